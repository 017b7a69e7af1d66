"""Both versions' answers become flat arrays and plain numbers; neither version need be installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from specmpc_cli.envs.maniskill_simulator import StateSimulator
from specmpc_cli.errors import CannotRender


class Fake:
    """Answers as version 3 (tensors of one row) or version 2 (plain arrays and numbers) does."""

    def __init__(self, version: int) -> None:
        self.wrap = (lambda value: torch.tensor([value])) if version == 3 else (lambda value: np.array(value) if np.ndim(value) else value)
        self.observation_space = SimpleNamespace(shape=(1, 3) if version == 3 else (3,))
        self.action_space = SimpleNamespace(low=-np.ones(2, np.float32), high=np.ones(2, np.float32))
        self.actions: list[np.ndarray] = []

    def reset(self, seed: int) -> tuple[Any, dict[str, Any]]:
        return self.wrap([float(seed), 1.0, 2.0]), {}

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        self.actions.append(action)
        return self.wrap([3.0, 4.0, 5.0]), self.wrap(0.5), self.wrap(True), self.wrap(False), {"success": self.wrap(True)}

    def close(self) -> None:
        self.actions.clear()


@pytest.mark.parametrize("version", [2, 3])
def test_answers_are_flat_and_plain(version: int) -> None:
    env = Fake(version)
    simulator = StateSimulator(env)
    assert simulator.obs_dim == 3 and simulator.action_low.dtype == float
    np.testing.assert_array_equal(simulator.reset(seed=7), [7, 1, 2])
    raw = simulator.step(np.array([0.5, -0.5]))
    np.testing.assert_array_equal(raw.obs, [3, 4, 5])
    assert (raw.reward, raw.terminated, raw.truncated, raw.success) == (0.5, True, False, True)
    assert type(raw.reward) is float and type(raw.success) is bool and env.actions[0].dtype == np.float32
    with pytest.raises(CannotRender, match="no video"):
        simulator.render(64, 64)
    simulator.close()
    assert not env.actions
