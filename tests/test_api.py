"""A user's own loop: three lines, the same numbers as `eval`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from specmpc_cli.api import load_controller
from specmpc_cli.envs.registry import make_env
from specmpc_cli.errors import CheckpointError, ConfigError, UnknownTask
from specmpc_cli.types import Decision
from specmpc_cli.workflows.import_teacher import import_teacher
from specmpc_cli.workflows.store import Store


@pytest.fixture
def store(checkpoint: Path, tmp_path: Path) -> Path:
    import_teacher(Store(tmp_path, "pointmass"), checkpoint)
    config = tmp_path / "pointmass/main/teacher/config.yaml"
    small = "planner: {iterations: 2, num_samples: 32, num_elites: 8, num_pi_trajs: 4}\n"
    config.write_text(small)
    return tmp_path


def run(controller, steps: int = 9) -> tuple[list[np.ndarray], list[int]]:  # noqa: ANN001
    env = make_env("pointmass")
    obs, _ = env.reset(seed=0)
    controller.reset()
    actions, decisions = [], []
    for _ in range(steps):
        actions.append(controller.act(obs))
        decisions.append(int(controller.log.decision))
        obs, *_ = env.step(actions[-1])
    return actions, decisions


def test_acts_with_plain_arrays_and_replans_when_exhausted(store: Path) -> None:
    controller = load_controller("pointmass", mode="naive", horizon=4, store=store)
    actions, decisions = run(controller)
    assert all(action.shape == (2,) and action.dtype == np.float32 and (np.abs(action) <= 1).all() for action in actions)
    assert decisions == [Decision.REPLAN if step % 4 == 0 else Decision.ACCEPT for step in range(9)]


def test_a_reset_begins_an_episode_and_episodes_are_reproducible(store: Path) -> None:
    first, second = (run(load_controller("pointmass", mode="naive", store=store)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    controller = load_controller("pointmass", mode="naive", store=store)
    run(controller)
    _, again = run(controller)
    assert again[0] == Decision.REPLAN


def test_a_path_names_a_teacher_of_any_store(store: Path) -> None:
    by_path = load_controller(store / "pointmass" / "main", mode="policy")
    assert run(by_path)[1] == [-1] * 9


def test_a_folder_without_a_teacher_of_its_own_takes_the_embedded_one(tmp_path: Path) -> None:
    folder = tmp_path / "walker-walk" / "main"
    folder.mkdir(parents=True)
    controller = load_controller(folder, mode="policy")
    assert controller.bench.teacher.source == "embedded" and controller.act(np.zeros(24)).shape == (6,)


def test_mistakes_are_answered_like_those_of_the_commands(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownTask, match="did you mean walker-walk"):
        load_controller("walker-wakl")
    with pytest.raises(ConfigError, match="must be one of baseline"):
        load_controller("pointmass", mode="best", store=store)
    with pytest.raises(CheckpointError, match="specmpc fit-corrector"):
        load_controller("pointmass", mode="corrected", store=store)
    controller = load_controller("pointmass", mode="naive", store=store)
    with pytest.raises(ConfigError, match="expected an observation of 4 values, got 3"):
        controller.act(np.zeros(3))
    with pytest.raises(ConfigError, match="not finite"):
        controller.act(np.array([0, 0, np.nan, 0]))


def test_the_store_is_the_commands_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECMPC_STORE", str(store))
    assert load_controller("pointmass", mode="policy").bench.teacher.source == "store"


def test_a_reset_before_the_first_step_is_no_new_episode(store: Path) -> None:
    reset, fresh = (load_controller("pointmass", mode="naive", store=store) for _ in range(2))
    reset.reset()
    obs = make_env("pointmass").reset(seed=0)[0]
    first = fresh.act(obs)
    assert np.array_equal(reset.act(obs), first)
    reset.reset()
    assert not np.array_equal(reset.act(obs), first)  # other draws
