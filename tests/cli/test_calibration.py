"""`fit-corrector --max-return-loss` on the command line: what it keeps, what `eval` and `compare` then do, what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from specmpc_cli.envs import custom
from tests.cli.conftest import Command

TASK = '''
import gymnasium as gym
import numpy as np


class Paid(gym.Env):
    """Pays about 1 a step, whatever is done."""

    observation_space = gym.spaces.Box(-5, 5, (4,))
    action_space = gym.spaces.Box(-1, 1, (2,))
    metadata = {"episodic": False}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action):
        reward = 1.0 + 0.01 * float(action[0]) + 0.01 * self.np_random.normal()
        return self._observe(), reward, False, False, {}

    def _observe(self):
        return self.np_random.normal(size=4).astype(np.float32)


def make():
    return gym.wrappers.TimeLimit(Paid(), 25)
'''


@pytest.fixture
def paid(command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """A store with a teacher of a task without success, and data."""
    return with_data(command, checkpoint, tmp_path, monkeypatch, "paid", TASK)


def with_data(command: Command, checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> Command:
    """The command, whose store has a teacher and data of the task `name:make`."""
    (folder / f"{name}.py").write_text(source)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    custom.custom_spec.cache_clear()
    for arguments in (("import", str(checkpoint), "--task", f"{name}:make"), ("collect", "--episodes", "3")):
        result = command(*arguments)
        assert result.code == 0, result.err
    return command


def test_a_calibrated_gate_is_kept_and_used(paid: Command) -> None:
    result = paid("fit-corrector", "--arch", "two-tower", "--max-return-loss", "0.1", "--calibrate-episodes", "22")
    assert result.code == 0, result.err
    assert "gates in closed loop" in result.out and "promised" in result.out
    assert "two-tower: saves 92.0% of the planner calls" in result.out and "on 22 fresh episodes" in result.out

    folder = next(paid.store.glob("*/main/correctors/two-tower"))
    calibration = yaml.safe_load((folder / "config.yaml").read_text())["origin"]["calibration"]
    promise = calibration["promise"]
    assert promise["episodes"] == 22 and 0.9 <= promise["at_least"] <= promise["kept"] + 1e-9
    assert promise["gate"] == {"horizon": 20, "metric": "l2", "accept_below": None, "replan_above": None, "replan_above_error": None}

    (row,) = paid("eval", "--mode", "adaptive", "--episodes", "2", "--json").document["rows"]
    assert (row["mode"], row["corrector"], row["calls_saved"]) == ("adaptive", "two-tower", promise["calls_saved"])
    rows = paid("compare", "--horizons", "3", "--episodes", "2", "--json").document["rows"]
    assert [row["mode"] for row in rows] == ["baseline", "policy", "naive", "corrected", "adaptive"]

    lighter = paid("eval", "--mode", "adaptive", "--episodes", "1", "--set", "planner.num_samples=16")
    assert "a plan lives at most 20 steps" in lighter.err and "no promise holds here" in lighter.err

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    stricter = paid("fit-corrector", "--arch", "two-tower", "--max-return-loss", "0.000001", "--json")
    assert stricter.code == 2 and "will be replaced if the new one keeps its promise" in stricter.err
    assert "; the store keeps its earlier corrector and that one's gate" in stricter.err.splitlines()[-1]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (unsaved,) = stricter.document["correctors"]  # what was fitted is reported, and that it lies nowhere
    assert unsaved["calibration"] is None and unsaved["path"] is None and unsaved["validation_error"] > 0
    by_hand = paid("eval", "--mode", "adaptive", "--episodes", "1", "--replan-above", "1e9")
    assert "replaced by thresholds given by hand: no promise holds here" in by_hand.err

    again = paid("fit-corrector", "--arch", "two-tower", "--json")
    assert "its calibrated gate, will be replaced" in again.err
    document = again.document  # without a promise there is no gate any more
    assert document["correctors"][0]["calibration"] is None
    assert "carries no calibrated one" in paid.fails("eval", "--mode", "adaptive")


def test_a_task_that_only_costs_gets_no_promise_and_keeps_its_corrector(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costly = with_data(command, checkpoint, tmp_path, monkeypatch, "costly", TASK.replace("reward = 1.0", "reward = -1.0"))
    result = costly("fit-corrector", "--arch", "temporal", "--max-return-loss", "0.1")
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("error: plain replanning has a mean return of -24.8 over 6 episodes"), result.err
    (row,) = costly("eval", "--mode", "corrected", "--arch", "temporal", "--episodes", "1", "--json").document["rows"]
    assert row["fallback_rate"] == 0


def test_promises_that_cannot_be_kept_are_refused_before_anything_is_fitted(with_teacher: Command) -> None:
    assert with_teacher("collect", "--episodes", "2").code == 0
    refused = {
        ("--max-return-loss", "0"): "between 0 and 1",
        ("--calibrate-episodes", "30"): "no meaning without --max-return-loss",
        ("--max-return-loss", "1.5"): "between 0 and 1",
        ("--max-return-loss", "0.5", "--calibrate-episodes", "3"): "at least 20",
    }
    for options, expected in refused.items():
        assert expected in with_teacher.fails("fit-corrector", *options)
    assert not (with_teacher.store / "pointmass" / "main" / "correctors").exists()
