"""Several environments of one task, stepped in this process: for light tasks faster than worker processes, and always deterministic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specmpc_cli.envs.adapter import TaskEnv
from specmpc_cli.envs.registry import make_env
from specmpc_cli.types import EnvSpec


@dataclass(frozen=True, slots=True)
class VectorStep:
    """One step of some rows, each array [rows]."""

    obs: np.ndarray  # [rows, O]
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray


class VectorEnv:
    """Rows reset only when told to, each with its own seed; nothing resets by itself."""

    def __init__(self, envs: Sequence[TaskEnv]) -> None:
        assert envs
        self.envs = list(envs)

    @classmethod
    def make(cls, task: str, num_envs: int) -> VectorEnv:
        """Raises UnknownTask or SuiteNotInstalled."""
        return cls([make_env(task) for _ in range(num_envs)])

    @property
    def spec(self) -> EnvSpec:
        return self.envs[0].task_spec

    def __len__(self) -> int:
        return len(self.envs)

    def reset(self, row: int, seed: int) -> np.ndarray:
        """Begins an episode in one row; → obs [O]."""
        return self.envs[row].reset(seed=seed)[0]

    def step(self, rows: Sequence[int], actions: np.ndarray) -> VectorStep:
        """Steps these rows with actions [len(rows), A]; the other rows stand still."""
        steps = [self.envs[row].step(action) for row, action in zip(rows, actions, strict=True)]
        obs, reward, terminated, truncated, info = zip(*steps, strict=True)
        return VectorStep(
            np.stack(obs),
            np.array(reward, dtype=np.float32),
            np.array(terminated),
            np.array(truncated),
            np.array([i["success"] for i in info]),
        )

    def close(self) -> None:
        for env in self.envs:
            env.close()
