"""A ManiSkill environment, of version 2 or 3, as the adapter wants it: states as flat arrays, and no renderer. Imports neither version."""

from __future__ import annotations

from typing import Any

import numpy as np

from specmpc_cli.envs.adapter import RawStep
from specmpc_cli.errors import CannotRender


class StateSimulator:
    """One environment. Version 3 answers in tensors with a leading axis of 1, version 2 in plain arrays and numbers."""

    def __init__(self, env: Any) -> None:
        """`env`: made with `obs_mode="state"`."""
        self._env = env
        self.obs_dim = int(np.prod(env.observation_space.shape))
        self.action_low, self.action_high = (bound.astype(float) for bound in (env.action_space.low, env.action_space.high))

    def reset(self, seed: int) -> np.ndarray:
        obs, _ = self._env.reset(seed=seed)
        return np.asarray(obs).reshape(-1)

    def step(self, action: np.ndarray) -> RawStep:
        obs, reward, terminated, truncated, info = self._env.step(action.astype(np.float32))
        return RawStep(np.asarray(obs).reshape(-1), float(reward), bool(terminated), bool(truncated), bool(info["success"]))

    def render(self, height: int, width: int) -> np.ndarray:
        raise CannotRender("ManiSkill's tasks are simulated here without their renderer, so there is no video of them")

    def close(self) -> None:
        self._env.close()
