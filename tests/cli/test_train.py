"""`specmpc train` as a user runs it: what it shows and leaves, and what happens when it is stopped or given nonsense."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from specmpc_cli.cli.app import app
from specmpc_cli.engine.world_model import MODEL_SIZES
from specmpc_cli.workflows.train_state import ResumeFolder
from specmpc_cli.workflows.training import Trainer
from tests.cli.conftest import Command, heed_ctrl_c

SMALL = (
    "train: {seed_steps: 80, seed_updates: 4, updates_per_decision: 0.1, batch_size: 8, eval_every: 80, eval_episodes: 1,"
    " checkpoint_seconds: 0}\nplanner: {num_samples: 16, num_elites: 4, num_pi_trajs: 4, iterations: 2}\n"
)


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_SIZES, 1, {"enc_dim": 32, "num_enc_layers": 2, "mlp_dim": 32, "latent_dim": 16, "num_q": 2})


@pytest.fixture
def preset(tmp_path: Path) -> str:
    (tmp_path / "small.yaml").write_text(SMALL)
    return str(tmp_path / "small.yaml")


@pytest.fixture
def teacher(command: Command) -> Path:
    return command.store / "pointmass" / "main" / "teacher"


@pytest.mark.usefixtures("tiny_models")
class TestInProcess:
    def test_a_trained_teacher_is_used_by_the_other_commands(self, command: Command, teacher: Path, preset: str) -> None:
        result = command("train", "--task", "pointmass", "--steps", "160", "--preset", preset)
        assert result.code == 0, result.err
        assert "after 80 decisions: evaluation return" in result.err and "trained: 160 decisions, 12 updates" in result.out
        assert {path.name for path in teacher.iterdir()} == {"model.safetensors", "config.yaml", "metrics.jsonl", "training.png", "resume"}
        config = yaml.safe_load((teacher / "config.yaml").read_text())
        assert config["origin"]["made_by"] == "specmpc train" and config["train"]["batch_size"] == 8 and "versions" in config["origin"]
        report = command("eval", "--mode", "baseline", "--episodes", "1", "--json").document
        assert report["task"] == "pointmass" and report["teacher"]["source"] == "store"

    def test_json_is_one_document_and_continuing_adds_to_it(self, command: Command, preset: str) -> None:
        first = command("train", "--task", "pointmass", "--steps", "120", "--preset", preset, "--json").document
        second = command("train", "--task", "pointmass", "--steps", "160", "--json").document
        assert (first["decisions"], second["decisions"]) == (120, 160) and second["updates"] == 12
        assert [line["decisions"] for line in second["evaluations"]] == [80, 120, 160]
        assert second["sha256"] != first["sha256"]
        assert command("eval", "--mode", "policy", "--episodes", "1", "--json").document["teacher"]["sha256"] == second["sha256"]

    def test_more_of_the_same_is_refused_or_begun_anew(self, command: Command, teacher: Path, preset: str) -> None:
        arguments = ("train", "--task", "pointmass", "--preset", preset, "--steps")
        assert command(*arguments, "120").code == 0
        again = command(*arguments, "120")  # as in a script that is run again
        assert again.code == 0 and "nothing to do" in again.err and "trained: 120 decisions" in again.out
        assert "size is 5, was 1" in command.fails(*arguments, "160", "--size", "5")
        assert "seed is 3, was 0" in command.fails(*arguments, "160", "--seed", "3")
        assert command(*arguments, "120", "--fresh").code == 0

    def test_an_imported_teacher_is_not_overwritten(self, with_teacher: Command, preset: str) -> None:
        weights = with_teacher.store / "pointmass/main/teacher/model.safetensors"
        before = weights.read_bytes()
        line = with_teacher.fails("train", "--task", "pointmass", "--preset", preset)
        assert "train with another --name, or replace it with --fresh" in line and weights.read_bytes() == before
        assert with_teacher("train", "--task", "pointmass", "--preset", preset, "--steps", "120", "--name", "own").code == 0
        assert weights.read_bytes() == before

    def test_a_training_is_not_overwritten_by_an_import(self, command: Command, teacher: Path, preset: str, checkpoint: Path) -> None:
        assert command("train", "--task", "pointmass", "--steps", "120", "--preset", preset).code == 0
        before = (teacher / "model.safetensors").read_bytes()
        assert "import under another --name" in command.fails("import", str(checkpoint), "--task", "pointmass")
        assert (teacher / "model.safetensors").read_bytes() == before

    def test_fresh_over_an_imported_teacher_can_be_continued(self, with_teacher: Command, preset: str) -> None:
        arguments = ("train", "--task", "pointmass", "--preset", preset)
        assert with_teacher(*arguments, "--steps", "120", "--fresh").code == 0
        assert with_teacher(*arguments, "--steps", "160", "--json").document["decisions"] == 160

    def test_nonsense_is_refused_before_anything_is_written(self, command: Command, preset: str) -> None:
        for arguments, expected in (
            (("--size", "7"), "--size must be one of 1, 5, 19, 48, 317, got 7"),
            (("--steps", "50"), "--steps must exceed the 80 decisions of the seed phase"),
            (("--resume",), "there is no training to resume"),
            (("--set", "train.lr=-1"), "train.lr"),
            (("--set", "train.acting.num_samples=4"), "train.acting: num_pi_trajs (4) must be below"),
            (("--set", "train.horizn=2"), "did you mean horizon"),
            (("--set", "speculation.tail=hold"), "--set speculation.tail has no part in training, which takes planner.*, train.*"),
        ):
            assert expected in command.fails("train", "--task", "pointmass", "--preset", preset, *arguments)
        assert not (command.store / "pointmass").exists()

    def test_the_line_that_says_how_to_go_on_is_a_command_that_does(
        self, command: Command, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With a store, a name, a seed and settings of its own, none of which the user has to remember."""
        elsewhere = Command(tmp_path / "another store", command.preset)

        def interrupt(trainer: Trainer, envs: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_evaluate", interrupt)
            options = ("--steps", "240", "--name", "own", "--seed", "5", "--dtype", "fp32", "--preset", preset)
            stopped = elsewhere("train", "--task", "pointmass", *options, "--set", "train.eval_every=200")
        assert stopped.code == 130
        line = stopped.err.strip().splitlines()[-1]
        arguments = shlex.split(line.partition("go on from there with ")[2])
        assert arguments[:2] == ["specmpc", "train"] and "--seed" not in arguments
        assert arguments[-2:] == ["--set", "train.eval_every=200"]  # asked for anew, it may be in no checkpoint yet
        done = CliRunner().invoke(app, [*arguments[1:], "--json"])
        document = json.loads(done.stdout)
        assert (document["decisions"], document["seed"]) == (240, 5)
        assert document["path"] == str(tmp_path / "another store" / "pointmass" / "own" / "teacher")

    def test_tensorboard_files_hold_the_metrics(self, command: Command, teacher: Path, preset: str) -> None:
        pytest.importorskip("tensorboard", reason="needs the tensorboard extra")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        assert command("train", "--task", "pointmass", "--steps", "120", "--preset", preset, "--tensorboard").code == 0
        events = EventAccumulator(str(teacher / "tensorboard"))
        events.Reload()
        scalars = {event.step: event.value for event in events.Scalars("eval/return_mean")}
        lines = [json.loads(line) for line in (teacher / "metrics.jsonl").read_text().splitlines()]
        expected = {line["decisions"]: line["return_mean"] for line in lines if line["event"] == "eval"}
        assert scalars == pytest.approx(expected)
        assert "episode/value_loss" in events.Tags()["scalars"]

    def test_where_tensorboard_cannot_write_the_line_says_how_to_go_on(self, command: Command, teacher: Path, preset: str) -> None:
        pytest.importorskip("tensorboard", reason="needs the tensorboard extra")
        assert command("train", "--task", "pointmass", "--preset", preset, "--steps", "120").code == 0
        (teacher / "tensorboard").write_text("a file")
        line = command.fails("train", "--task", "pointmass", "--preset", preset, "--steps", "240", "--tensorboard")
        assert "cannot write TensorBoard files" in line and "specmpc train" in line

    def test_with_nothing_to_do_settings_of_acting_are_refused(self, command: Command, teacher: Path, preset: str) -> None:
        train = ("train", "--task", "pointmass", "--preset", preset, "--steps", "120")
        assert command(*train).code == 0
        kept = {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()}
        line = command.fails(*train, "--set", "planner.num_samples=48")
        assert "planner.num_samples" in line and "--steps" in line
        assert {path: path.read_bytes() for path in teacher.rglob("*") if path.is_file()} == kept

    def test_half_written_files_of_a_killed_run_are_deleted(self, command: Command, teacher: Path, preset: str) -> None:
        train = ("train", "--task", "pointmass", "--preset", preset, "--steps")
        assert command(*train, "120").code == 0
        (teacher / ".model.safetensors.abc.part").write_bytes(b"half")
        assert command(*train, "240").code == 0
        assert not list(teacher.rglob(".*.part"))

    def test_without_tensorboard_the_remedy_is_named(
        self, command: Command, teacher: Path, preset: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert command("train", "--task", "pointmass", "--preset", preset, "--steps", "120").code == 0
        state = (teacher / "resume" / "state.safetensors").read_bytes()
        line = command.fails("train", "--task", "pointmass", "--preset", preset, "--steps", "120", "--tensorboard", "--fresh")
        assert (teacher / "resume" / "state.safetensors").read_bytes() == state
        assert "pip install 'specmpc[tensorboard]'" in line


@pytest.fixture
def run(command: Command, preset: str) -> Iterator[object]:
    """Starts `specmpc train` as a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(steps: int, limit: int | None = None) -> subprocess.Popen[str]:
        def prepare() -> None:
            heed_ctrl_c()
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        arguments = ["train", "--task", "pointmass", "--steps", str(steps), "--preset", preset, "--store", str(command.store)]
        process = subprocess.Popen(
            [sys.executable, "-m", "specmpc_cli", *arguments],
            env=os.environ | {"SPECMPC_COMPILE": "0"},
            preexec_fn=prepare,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Waits until the file is there; fails if the process ends before."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_by_a_signal_it_ends_where_an_uninterrupted_training_ends(
    command: Command, teacher: Path, run, preset: str, how: signal.Signals
) -> None:
    process = run(100_000)
    wait_for(teacher / "resume" / "state.safetensors", process)
    time.sleep(0.3)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -9), err
    if how == signal.SIGINT:
        assert err.strip().splitlines()[-1].startswith("error: interrupted after")
        again = f"specmpc train --task pointmass --resume --steps 100000 --store {command.store} --preset {preset}"
        assert f"go on from there with {again}\n" in err
    saved = ResumeFolder(teacher / "resume").saved()
    assert saved is not None
    done = run(saved.counters.decisions + 80)
    _, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    state = (teacher / "model.safetensors").read_bytes()
    fresh = command.store / "fresh"
    straight = subprocess.run(
        [*done.args[:-1], str(fresh)], env=os.environ | {"SPECMPC_COMPILE": "0"}, capture_output=True, text=True, check=False
    )
    assert straight.returncode == 0, straight.stderr
    assert (fresh / "pointmass/main/teacher/model.safetensors").read_bytes() == state


@pytest.mark.parametrize("limit", [3_000, 1_000_000])
def test_a_full_disk_leaves_the_last_checkpoint_and_says_how_to_continue(teacher: Path, run, limit: int) -> None:
    """A limit on file sizes stands for the full disk: first the replay's shard does not fit, then only the state."""
    first = run(120)
    assert first.wait(timeout=120) == 0
    state = (teacher / "resume" / "state.safetensors").read_bytes()
    full = run(200, limit)
    _, err = full.communicate(timeout=120)
    assert full.returncode == 2 and "Traceback" not in err, err
    assert "the checkpoint after 120 decisions is intact; go on from there with specmpc train" in err
    assert (teacher / "resume" / "state.safetensors").read_bytes() == state
    assert not list(teacher.rglob("*.part"))
    again = run(200)
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err


def test_tensorboard_is_an_extra_not_a_need() -> None:
    """Importing the command's modules must not import TensorBoard."""
    code = "import sys, specmpc_cli.workflows.training, specmpc_cli.workflows.tensorboard; print('tensorboard' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False" and importlib.util.find_spec("specmpc_cli.workflows.tensorboard")
