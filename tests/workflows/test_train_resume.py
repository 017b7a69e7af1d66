"""Trainings on pointmass that were stopped: they continue bit for bit, or say why not."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from specmpc_cli.engine.official import save_official
from specmpc_cli.engine.world_model import MODEL_SIZES, WorldModel, WorldModelDims
from specmpc_cli.envs import registry
from specmpc_cli.errors import CheckpointError, ConfigError, DatasetError
from specmpc_cli.runtime import choose_runtime
from specmpc_cli.workflows.import_teacher import import_teacher
from specmpc_cli.workflows.store import Store
from specmpc_cli.workflows.train import begin_training, training_report
from specmpc_cli.workflows.train_log import Progress, Watcher
from specmpc_cli.workflows.train_state import ResumeFolder
from tests.workflows.pointmass_training import (
    SMALL,
    STEPS,
    TINY,
    Killed,
    assert_same_training,
    begin,
    kill_at,
    lines,
    teacher,
)

pytestmark = pytest.mark.usefixtures("tiny_models")


@pytest.mark.parametrize("when", [30, 81, 163])
def test_killed_at_any_decision_it_continues_bit_for_bit(tmp_path: Path, straight: Path, when: int) -> None:
    with pytest.raises(Killed):
        begin(tmp_path).run(STEPS, Watcher(kill_at(when)))
    continued = begin(tmp_path)
    assert continued.counters.decisions == when // 40 * 40
    continued.run(STEPS, Watcher())
    assert_same_training(tmp_path, straight)


@pytest.mark.parametrize("write", ["train_state.save", "store.write_whole", "store.save_world_model", "training.plot_training"])
def test_killed_between_two_writes_of_a_checkpoint_it_continues_bit_for_bit(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    """The replay's shard, the state, then the teacher's files: whatever is missing is made good by the next run."""

    def kill(*args: Any, **options: Any) -> None:
        raise Killed

    def arm(progress: Progress) -> None:
        if progress.decisions == 119:
            monkeypatch.setattr(f"specmpc_cli.workflows.{write}", kill)

    with pytest.raises(Killed):
        begin(tmp_path).run(STEPS, Watcher(arm))
    monkeypatch.undo()
    begin(tmp_path).run(STEPS, Watcher())
    assert_same_training(tmp_path, straight)


def test_a_finished_training_whose_teacher_was_not_written_writes_it(tmp_path: Path, straight: Path) -> None:
    begin(tmp_path).run(STEPS, Watcher())
    for name in ("model.safetensors", "config.yaml", "metrics.jsonl"):
        (teacher(tmp_path) / name).unlink()
    begin(tmp_path).run(STEPS, Watcher())
    assert_same_training(tmp_path, straight)


def test_a_training_of_a_model_with_other_dimensions_cannot_be_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the task's suite was replaced by another version of it."""
    begin(tmp_path).run(STEPS, Watcher())
    monkeypatch.setitem(MODEL_SIZES, 1, {**TINY, "latent_dim": 24})
    with pytest.raises(CheckpointError, match="other dimensions than pointmass has here"):
        begin(tmp_path)


def test_resuming_something_else_says_what_differs(tmp_path: Path) -> None:
    begin(tmp_path).run(120, Watcher())
    with pytest.raises(ConfigError, match="size is 5, was 1"):
        begin(tmp_path, size=5)
    with pytest.raises(ConfigError, match=r"config\.train\.lr is 0\.001, was 0\.0003"):
        begin(tmp_path, settings=[*SMALL, "train.lr=0.001"])
    with pytest.raises(ConfigError, match="num_envs is 2, was 1"):
        begin(tmp_path, num_envs=2)
    resume = Store(tmp_path, "pointmass").resume_folder()
    moved = Store(tmp_path, "cartpole-balance").resume_folder()
    moved.parent.mkdir(parents=True)
    resume.rename(moved)
    with pytest.raises(ConfigError, match="task is cartpole-balance, was pointmass"):
        begin_training(Store(tmp_path, "cartpole-balance"), choose_runtime("cpu", "fp32"), steps=5000, seed=0)


def test_how_it_acts_may_change_on_the_way_and_the_metrics_say_when(tmp_path: Path) -> None:
    begin(tmp_path).run(120, Watcher())
    slower = [*SMALL, "train.acting.horizon=4", "planner.iterations=2"]
    with pytest.raises(Killed):  # before the next checkpoint, so that nothing of the change is kept
        begin(tmp_path, settings=slower).run(STEPS, Watcher(kill_at(130)))
    changed = begin(tmp_path, settings=slower)
    expected = ["config.planner.iterations is 2, was 1", "config.train.acting.horizon is 4, was 1"]
    assert changed.notes == ["from here on it acts with other settings: " + "; ".join(expected)]
    changed.run(STEPS, Watcher())
    again = begin(tmp_path, settings=[])
    assert not again.notes and again.config.train.acting.horizon == 4
    assert [line for line in lines(tmp_path) if line["event"] == "settings"] == [
        {"event": "settings", "decisions": 120, "changes": expected}
    ]
    assert [line["planner_calls"] for line in lines(tmp_path) if line["event"] == "episode"] == [0, 0, 40, 10, 10]


def test_options_left_out_are_those_of_the_saved_training(tmp_path: Path) -> None:
    begin(tmp_path, num_envs=2).run(120, Watcher())
    continued = begin(tmp_path, settings=[])
    assert continued.facts.num_envs == 2 and continued.config.train.batch_size == 8
    one_more = begin(tmp_path, settings=["train.eval_every=5000"])
    assert one_more.config.train.batch_size == 8 and one_more.config.planner.iterations == 1 and not one_more.notes


def test_a_seed_left_out_is_the_saved_one(tmp_path: Path) -> None:
    begin(tmp_path, seed=7).run(120, Watcher())
    assert begin(tmp_path, seed=None).facts.seed == 7
    with pytest.raises(ConfigError, match="seed is 0, was 7"):
        begin(tmp_path)


def test_settings_that_change_nothing_learned_may_change(tmp_path: Path) -> None:
    begin(tmp_path).run(120, Watcher())
    assert begin(tmp_path, settings=[*SMALL, "train.eval_every=7", "train.checkpoint_seconds=9"]).config.train.eval_every == 7


def test_a_training_that_moves_to_another_dtype_says_so(tmp_path: Path) -> None:
    begin(tmp_path).run(120, Watcher())
    store = Store(tmp_path, "pointmass")
    moved = begin_training(store, choose_runtime("cpu", "bf16"), steps=STEPS, seed=0)
    threads = f"{torch.get_num_threads()} threads"
    assert f"ran on cpu, fp32, eager, {threads} before and goes on on cpu, bf16, eager, {threads}: it will not end" in moved.notes[0]
    assert not begin(tmp_path).notes


def test_a_training_that_goes_on_with_other_threads_or_compiled_says_so(tmp_path: Path) -> None:
    begin(tmp_path).run(120, Watcher())
    runtime = choose_runtime("cpu", "fp32")
    for other in (replace(runtime, threads=99), replace(runtime, compiled=not runtime.compiled)):
        moved = begin_training(Store(tmp_path, "pointmass"), other, steps=STEPS)
        assert "it will not end bit for bit" in moved.notes[0]


def test_nothing_is_said_where_an_older_version_saved_less_of_how_it_was_computed(tmp_path: Path) -> None:
    trainer = begin(tmp_path)
    trainer.run(120, Watcher())
    folder = ResumeFolder(Store(tmp_path, "pointmass").resume_folder())
    saved, tensors, _ = folder.load()
    folder.save(replace(saved, computed_on="cpu, fp32"), tensors, [])
    assert not begin(tmp_path).notes


def test_two_trainings_of_one_store_keep_out_of_each_others_way(tmp_path: Path) -> None:
    def second(progress: Progress) -> None:
        if progress.decisions == 130:
            with pytest.raises(ConfigError, match="another 'specmpc train' is at work"):
                begin(tmp_path).run(STEPS, Watcher())
            raise Killed

    with pytest.raises(Killed):
        begin(tmp_path).run(STEPS, Watcher(second))
    begin(tmp_path).run(160, Watcher())


def test_a_training_that_another_has_overtaken_is_refused(tmp_path: Path) -> None:
    """Both were begun before either was at work: what the second read is older than what the first left."""
    begin(tmp_path).run(120, Watcher())
    first, second = begin(tmp_path), begin(tmp_path)
    first.run(160, Watcher())
    before = lines(tmp_path)
    with pytest.raises(ConfigError, match="another 'specmpc train' has been at work in .* meanwhile; go on with the same command"):
        second.run(STEPS, Watcher())
    assert lines(tmp_path) == before
    begin(tmp_path).run(STEPS, Watcher())


def test_an_import_keeps_out_of_a_training_that_has_no_checkpoint_yet(tmp_path: Path) -> None:
    save_official(WorldModel(WorldModelDims(4, 2, **TINY)), tmp_path / "official.pt")
    store = Store(tmp_path / "store", "pointmass")

    def import_meanwhile(progress: Progress) -> None:
        if progress.decisions == 20:
            with pytest.raises(ConfigError, match="another 'specmpc train' is at work"):
                import_teacher(store, tmp_path / "official.pt")

    begin(tmp_path / "store").run(120, Watcher(import_meanwhile))
    assert lines(tmp_path / "store")[0]["event"] == "episode"


def test_an_import_that_was_under_way_when_a_training_began_is_not_overwritten(tmp_path: Path) -> None:
    """It looked for a training before there was one, and wrote its weights after."""
    save_official(WorldModel(WorldModelDims(4, 2, **TINY)), tmp_path / "official.pt")
    store, elsewhere = Store(tmp_path / "store", "pointmass"), Store(tmp_path / "elsewhere", "pointmass")
    import_teacher(elsewhere, tmp_path / "official.pt")

    def arrive(progress: Progress) -> None:
        if progress.decisions == 20:
            shutil.copytree(elsewhere.folder / "teacher", store.folder / "teacher", dirs_exist_ok=True)

    with pytest.raises(ConfigError, match="another command has written the teacher"):
        begin(tmp_path / "store").run(STEPS, Watcher(arrive))
    assert store.teacher().sha256 == elsewhere.teacher().sha256


def test_a_checkpoint_that_cannot_be_read_is_neither_missing_nor_damaged(tmp_path: Path) -> None:
    begin(tmp_path).run(120, Watcher())
    state = Store(tmp_path, "pointmass").resume_folder() / "state.safetensors"
    state.unlink()
    state.mkdir()
    with pytest.raises(CheckpointError, match="cannot read .*state.safetensors: Is a directory"):
        begin(tmp_path)


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    begin(tmp_path).run(120, Watcher())
    state = Store(tmp_path, "pointmass").resume_folder() / "state.safetensors"
    whole = state.read_bytes()
    for damaged in (whole[:100], b"", whole[: len(whole) // 2]):
        state.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            begin(tmp_path)
    state.write_bytes(whole)
    shard = next((state.parent / "replay").glob("*.h5"))
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(DatasetError, match=shard.name):
        begin(tmp_path)


def test_a_teacher_that_is_imported_while_a_training_prepares_is_not_overwritten(tmp_path: Path) -> None:
    """Before its first round a training holds no lock, and compiles for minutes."""
    save_official(WorldModel(WorldModelDims(4, 2, **TINY)), tmp_path / "official.pt")
    store = Store(tmp_path / "store", "pointmass")
    trainer = begin(tmp_path / "store")
    import_teacher(store, tmp_path / "official.pt")
    imported = store.teacher().sha256
    with pytest.raises(ConfigError, match="another command has written the teacher"):
        trainer.run(STEPS, Watcher())
    assert store.teacher().sha256 == imported


def test_where_files_cannot_be_locked_it_trains_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    begin(tmp_path).run(120, Watcher())
    assert lines(tmp_path)


def test_checkpoints_of_before_keep_their_metrics_in_the_header(tmp_path: Path, straight: Path) -> None:
    begin(tmp_path).run(120, Watcher())
    state = Store(tmp_path, "pointmass").resume_folder() / "state.safetensors"
    with safe_open(state, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    training = json.loads(header["training"])
    training["metrics"] = json.loads(tensors.pop("metrics.json").numpy().tobytes())
    del training["facts"]["decisions"]
    save_file(tensors, state, {**header, "training": json.dumps(training)})
    begin(tmp_path).run(STEPS, Watcher())
    assert_same_training(tmp_path, straight)


def test_a_task_whose_episodes_have_another_length_now_is_not_the_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path).run(120, Watcher())
    entry = registry.lookup("pointmass")
    longer = replace(entry, spec=replace(entry.spec, decisions=60))
    monkeypatch.setitem(registry._BUILT_IN, "pointmass", longer)
    with pytest.raises(ConfigError, match="decisions per episode is 60, was 40"):
        begin(tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.horizon=41", "train.horizon is 41, and an episode of pointmass has 40"),
        ("train.buffer_size=40", "must exceed the 40 decisions"),
    ],
)
def test_settings_that_no_episode_fits_are_refused_before_the_first(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        begin(tmp_path, settings=[*SMALL, setting])


def test_a_report_tells_weights_and_evaluation_apart(tmp_path: Path) -> None:
    """Stopped after a checkpoint that no evaluation followed, and asked for fewer decisions than it has."""
    with pytest.raises(Killed):
        begin(tmp_path).run(STEPS, Watcher(kill_at(163)))
    trainer = begin(tmp_path, steps=150)
    trainer.run(150, Watcher())
    report = training_report(trainer, Store(tmp_path, "pointmass"))
    assert (report["decisions"], report["teacher_decisions"], report["evaluated_decisions"]) == (160, 160, 120)
    origin = yaml.safe_load((teacher(tmp_path) / "config.yaml").read_text())["origin"]
    assert (origin["decisions"], origin["evaluated_decisions"]) == (160, 120)
