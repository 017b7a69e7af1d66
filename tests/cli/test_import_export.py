"""Official checkpoints in and out, as a user moves them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specmpc_cli.engine.checkpoint import load_world_model
from specmpc_cli.engine.official import read_official, save_official
from specmpc_cli.engine.world_model import WorldModel, WorldModelDims
from specmpc_cli.envs.registry import TASK_SETS, lookup
from tests.cli.conftest import Command


def test_an_export_can_be_imported_again_and_is_the_same_teacher(with_teacher: Command, tmp_path: Path) -> None:
    out = tmp_path / "teacher.pt"
    report = with_teacher("export", "--out", str(out), "--json").document
    assert report["task"] == "pointmass" and report["path"] == str(out) and report["source"] == "store"
    again = with_teacher("import", str(out), "--name", "again", "--json").document
    assert again["sha256"] == report["sha256"]


def test_without_a_name_the_file_is_the_tasks(with_teacher: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "to pointmass.pt" in with_teacher("export").out
    assert read_official(tmp_path / "pointmass.pt").dims.obs_dim == 4


def test_the_embedded_teacher_can_be_exported(command: Command, tmp_path: Path) -> None:
    report = command("export", "--task", "walker-walk", "--out", str(tmp_path / "w.pt"), "--json").document
    assert report["source"] == "embedded"
    payload = torch.load(tmp_path / "w.pt", weights_only=True)
    assert list(payload) == ["model"] and payload["model"]["_dynamics.0.weight"].dtype == torch.float32


def test_exports_that_cannot_be_written_are_refused_and_leave_nothing(with_teacher: Command, tmp_path: Path) -> None:
    assert "--out must be a file" in with_teacher.fails("export", "--out", str(tmp_path))
    (tmp_path / "file").write_text("in the way")
    assert "choose another --out" in with_teacher.fails("export", "--out", str(tmp_path / "file" / "x.pt"))
    assert "there is no teacher for dog-run" in with_teacher.fails("export", "--task", "dog-run", "--out", str(tmp_path / "d.pt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.fixture(scope="module")
def multitask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny world model of all 30 tasks of mt30, as the official code would save it."""
    specs = [lookup(task).spec for task in TASK_SETS["mt30"]]
    torch.manual_seed(0)
    dims = WorldModelDims(max(s.obs_dim for s in specs), max(s.action_dim for s in specs), 16, 24, 24, 2, 3, num_tasks=30, task_dim=8)
    model = WorldModel(dims)
    for index, spec in enumerate(specs):
        model.action_masks[index, spec.action_dim :] = 0.0
    path = tmp_path_factory.mktemp("multitask") / "mt30.pt"
    save_official(model, path)
    return path


@pytest.mark.parametrize("task", ["walker-walk", "reacher-three-hard", "pendulum-spin"])
def test_a_member_of_a_task_set_computes_what_the_whole_model_does(command: Command, multitask: Path, task: str) -> None:
    report = command("import", str(multitask), "--task", task, "--task-set", "mt30", "--json").document
    spec = lookup(task).spec
    assert (report["dims"]["obs_dim"], report["dims"]["action_dim"], report["dims"]["num_tasks"]) == (spec.obs_dim, spec.action_dim, 0)
    member, _ = load_world_model(Path(report["path"]) / "model.safetensors")
    whole = read_official(multitask).requires_grad_(False)
    index = torch.full((5,), TASK_SETS["mt30"].index(task))
    obs = torch.zeros(5, whole.dims.obs_dim)
    obs[:, : spec.obs_dim] = torch.randn(5, spec.obs_dim)
    z = whole.encode(obs, index)
    action = whole.pi_sample(z, torch.zeros(5, whole.dims.action_dim), index)
    assert (action[:, spec.action_dim :] == 0).all()
    torch.testing.assert_close(member.encode(obs[:, : spec.obs_dim]), z, rtol=0, atol=1e-6)
    torch.testing.assert_close(member.pi_mean(z), action[:, : spec.action_dim], rtol=0, atol=1e-6)
    torch.testing.assert_close(member.next(z, action[:, : spec.action_dim]), whole.next(z, action, index), rtol=0, atol=1e-6)


def test_the_wrong_task_set_or_none_is_refused(command: Command, multitask: Path) -> None:
    assert "name its task set" in command.fails("import", str(multitask), "--task", "walker-walk")
    assert "trained on 30 tasks" in command.fails("import", str(multitask), "--task", "mw-push", "--task-set", "mt80")
