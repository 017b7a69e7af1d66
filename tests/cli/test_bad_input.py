"""What a user can get wrong: one line with the remedy, exit code 2, and earlier files untouched."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest
import torch

from specmpc_cli.data.shards import read_shards
from tests.cli.conftest import Command, heed_ctrl_c
from tests.conftest import make_model, official_state


@pytest.fixture
def own(pipeline: Command, tmp_path: Path) -> Command:
    """A copy of the pipeline's store that a test may damage."""
    shutil.copytree(pipeline.store, tmp_path / "store")
    return Command(tmp_path / "store", pipeline.preset)


def main_folder(command: Command) -> Path:
    return command.store / "pointmass" / "main"


def test_unknown_task(command: Command) -> None:
    assert "did you mean walker-walk" in command.fails("collect", "--task", "walker-wlak")


def test_unknown_preset_and_setting(with_teacher: Command) -> None:
    assert "unknown preset 'light-planer'; did you mean light-planner?" in with_teacher.fails("collect", "--preset", "light-planer")
    assert "did you mean horizon" in with_teacher.fails("collect", "--set", "planner.horizn=3")


@pytest.mark.parametrize("name", ["collect", "fit-corrector", "eval", "compare"])
def test_no_teacher(command: Command, name: str) -> None:
    line = command.fails(name, "--task", "pointmass")
    assert "there is no teacher for pointmass" in line and "specmpc import FILE --task pointmass" in line


def test_no_data(with_teacher: Command) -> None:
    assert "make some with 'specmpc collect --task pointmass'" in with_teacher.fails("fit-corrector")


def test_no_corrector(with_teacher: Command) -> None:
    line = with_teacher.fails("eval", "--mode", "corrected")
    assert "no two-tower corrector" in line and "specmpc fit-corrector --task pointmass --arch two-tower" in line
    assert "no temporal corrector" in with_teacher.fails("compare", "--arch", "temporal")


def test_without_correctors_compare_leaves_the_rows_out_and_says_so(with_teacher: Command) -> None:
    result = with_teacher("compare", "--episodes", "1", "--horizons", "3", "--json")
    assert [row["mode"] for row in result.document["rows"]] == ["baseline", "policy", "naive"]
    assert "no corrected rows" in result.err


@pytest.fixture
def other_teacher(own: Command, tmp_path: Path) -> Command:
    """The pipeline's store after another teacher was imported over the first."""
    torch.save({"model": official_state(make_model(seed=9))}, tmp_path / "other.pt")
    assert own("import", str(tmp_path / "other.pt"), "--task", "pointmass").code == 0
    return own


def test_a_corrector_and_data_of_another_teacher(other_teacher: Command) -> None:
    assert "distilled from another teacher" in other_teacher.fails("eval", "--mode", "corrected")
    assert "only data of other teachers" in other_teacher.fails("fit-corrector")
    result = other_teacher("compare", "--episodes", "1", "--horizons", "3", "--json")
    assert [row["mode"] for row in result.document["rows"]] == ["baseline", "policy", "naive"]
    assert result.err.count("was distilled from another teacher; left out") == 3


def test_damaged_shards(own: Command) -> None:
    shard = sorted(main_folder(own).glob("data/*/shard-*.h5"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:500])
    for name in ("fit-corrector", "collect"):
        line = own.fails(name)
        assert shard.name in line and "delete it" in line
    shard.unlink()
    repaired = own("collect", "--episodes", "4", "--rounds", "2", "--json")
    assert repaired.code == 0 and repaired.document["new_episodes"] == 1  # the very episode that was lost


def test_foreign_shards(own: Command) -> None:
    (dataset,) = (main_folder(own) / "data").iterdir()
    with h5py.File(dataset / "shard-foreign-0.h5", "w") as file:
        file["x"] = [1.0]
    assert "another program" in own.fails("fit-corrector")


def test_damaged_teachers_and_correctors(own: Command) -> None:
    for path, name in (
        (main_folder(own) / "correctors/two-tower/model.safetensors", "eval"),
        (main_folder(own) / "teacher/model.safetensors", "compare"),
    ):
        path.write_bytes(path.read_bytes()[:100])
        assert "not a safetensors file, or it is truncated" in own.fails(name)


def test_a_damaged_config(own: Command) -> None:
    (main_folder(own) / "teacher/config.yaml").write_text("planner: {horizon: -1}")
    assert "planner.horizon" in own.fails("compare")
    (main_folder(own) / "teacher/config.yaml").write_text("a: [")
    assert "is not YAML" in own.fails("compare")


def test_checkpoints_that_do_not_fit_leave_the_store_as_it_was(with_teacher: Command, checkpoint: Path, tmp_path: Path) -> None:
    weights = main_folder(with_teacher) / "teacher/model.safetensors"
    before = weights.read_bytes()
    assert "expects 4 observation dimensions and the task has 24" in with_teacher.fails("import", str(checkpoint), "--task", "walker-walk")
    (tmp_path / "half.pt").write_bytes(checkpoint.read_bytes()[:1000])
    assert "truncated" in with_teacher.fails("import", str(tmp_path / "half.pt"), "--task", "pointmass")
    assert "there is no file" in with_teacher.fails("import", str(tmp_path / "gone.pt"), "--task", "pointmass")
    assert "--task-set must be mt30 or mt80" in with_teacher.fails("import", str(checkpoint), "--task-set", "mt9")
    assert "not in mt30" in with_teacher.fails("import", str(checkpoint), "--task", "mw-push", "--task-set", "mt30")
    assert weights.read_bytes() == before
    assert not (with_teacher.store / "walker-walk").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "--mode", "psychic"), "--mode must be one of baseline, policy"),
        (("eval", "--mode", "baseline", "--horizon", "3"), "--horizon has no meaning in mode baseline"),
        (("eval", "--mode", "naive", "--arch", "temporal"), "--arch has no meaning in mode naive"),
        (("eval", "--arch", "lstm"), "--arch must be one of two-tower, temporal, distilled, got 'lstm'"),
        (("fit-corrector", "--arch", "lstm"), "--arch must be one of two-tower, temporal, distilled, got 'lstm'"),
        (("compare", "--horizons", "1,x"), "--horizons takes whole numbers"),
        (("compare", "--horizons", "0,3"), "--horizons must lie in 1..1000"),
        (("compare", "--require", "calls_saved"), "--require takes conditions"),
        (("compare", "--require", ""), "--require takes conditions"),
        (("compare", "--name", "../elsewhere"), "--name takes letters, digits"),
        (("compare", "--name", ""), "--name takes letters, digits"),
        (("compare", "--device", "cpu:1"), "--device must be auto, cpu, cuda or cuda:N, got 'cpu:1'"),
        (("--json", "compare"), "No such option: --json"),
        (("--json",), "options follow the command"),
        (("--version=3",), "--version"),
        (("compare", "--require", "clals_saved>1"), "there is no field clals_saved"),
        (("compare", "--require", "by_age>1"), "there is no field by_age"),
        (("compare", "--require", "calls_saved>1.2.3"), "is not a number"),
        (("compare", "--require", "success_rate>=0.5"), "pointmass knows no success, so success_rate has no value there"),
        (("collect", "--episodes", "0"), "--episodes must lie in 1..500"),
        (("collect", "--rounds", "99"), "--rounds must lie in 1..20"),
        (("collect", "--device", "cuda:7"), "CUDA devices; use --device cpu"),
        (("compare", "--dtype", "fp8"), "--dtype must be auto, bf16, fp32 or int8, got 'fp8'"),
        (("compare", "--dtype", "int8"), "--dtype int8 plans on a CPU with AVX512-VNNI, with compiled code: "),
        (("tasks", "--suite", "atari"), "--suite must be one of dmcontrol"),
        (("compare", "--episodes", "0"), "--episodes"),
        (("collect", "--episodes", "many"), "valid integer"),
        (("collect", "--set", "train.lr=1e-4"), "--set train.lr has no part in this command, which takes planner.*, "),
        (("compare", "--set", "corrector.width=64"), "--set corrector.width has no part in this command"),
        (("fit-corrector", "--set", "collect.horizons=[3]"), "--set collect.horizons has no part in this command"),
        (("compare", "--set", "planer.iterations=4"), "did you mean planner"),
        (("compare", "--set", "nonsense"), "--set takes a.b=value, got 'nonsense'"),
        (("eval", "--set", "refine.below=0.3"), "refine.below (0.3) means nothing while refine.iterations is 0"),
        (("eval", "--set", "planner.horizon=2024-13-45"), "'2024-13-45' is not a YAML value"),
        (("import",), "Missing argument 'file'"),
        (("compare", "--horizon", "3"), "No such option"),
        (("comprae",), "No such command"),
    ],
)
def test_options_are_checked_before_anything_runs(with_teacher: Command, arguments: tuple[str, ...], message: str) -> None:
    assert message in with_teacher.fails(*arguments)


@pytest.mark.parametrize("name", ["collect", "eval", "compare"])
def test_a_suite_that_is_missing_is_named_before_anything_is_kept(
    with_teacher: Command, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "which is not installed; run: pip install" in with_teacher.fails(name, "--task", "mw-assembly")
    assert (with_teacher.store / "last.json").read_text().strip() == '{"task": "pointmass"}'


def test_a_store_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    blocked = Command(tmp_path / "file" / "store", tmp_path / "none")
    assert "choose another --store" in blocked.fails("import", str(checkpoint), "--task", "pointmass")


@pytest.mark.parametrize("name", ["collect", "eval", "compare"])
def test_a_store_without_write_permission_is_refused_before_anything_runs(
    with_teacher: Command, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root, who may run these tests, may write everywhere
    assert "no permission to write" in with_teacher.fails(name)
    monkeypatch.undo()
    if os.geteuid() != 0:
        with_teacher.store.chmod(0o500)
        try:
            assert "choose another --store" in with_teacher.fails(name, "--task", "pointmass", "--name", "other")
        finally:
            with_teacher.store.chmod(0o700)


def test_a_store_that_cannot_be_read(with_teacher: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = Path.exists

    def refuse(path: Path, **options: bool) -> bool:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", refuse)
    assert "Permission denied; choose another --store" in with_teacher.fails("compare")


def test_a_store_whose_memory_is_damaged(with_teacher: Command) -> None:
    (with_teacher.store / "last.json").write_text("{")
    assert "delete it, or name the task with --task" in with_teacher.fails("compare")


def test_ctrl_c_while_collecting_keeps_the_finished_episodes_and_the_next_call_goes_on(with_teacher: Command) -> None:
    arguments = [sys.executable, "-m", "specmpc_cli", "collect", "--episodes", "400", "--store", str(with_teacher.store)]
    run = subprocess.Popen(
        [*arguments, "--preset", str(with_teacher.preset), "--quiet"], preexec_fn=heed_ctrl_c, stderr=subprocess.PIPE, text=True
    )
    data = main_folder(with_teacher) / "data"
    deadline = time.monotonic() + 120
    while len(list(data.glob("*/shard-*.h5"))) < 2:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in err and err.startswith("error: interrupted")
    assert not list(data.glob("*/.*.part"))
    (dataset,) = data.iterdir()
    kept = {shard.key[2] for shard in read_shards(dataset)}
    assert 2 <= len(kept) < 400
    wanted = max(kept) + 2
    report = with_teacher("collect", "--episodes", str(wanted), "--json").document
    assert report["episodes"] == wanted and report["new_episodes"] == wanted - len(kept)
