"""Fakes that check the protocol they take part in: a world that counts, and a planner whose plans can be recognised."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from specmpc_cli.engine.planner import PlannerSettings
from specmpc_cli.envs.adapter import RawStep, TaskEnv
from specmpc_cli.envs.vector import VectorEnv
from specmpc_cli.types import EnvSpec, Plan, Visit


@dataclass(frozen=True)
class Dims:
    obs_dim: int = 2
    action_dim: int = 1
    latent_dim: int = 2


class CountingModel(nn.Module):
    """Observations and latents are (steps since reset, 1); the model knows that each step adds one. `drift` is its error per step."""

    dims = Dims()

    def __init__(self, drift: float = 0.0) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()), requires_grad=False)  # tells the runner its device and dtype
        self.drift = drift

    def encode(self, obs: Tensor) -> Tensor:
        return obs

    def next(self, z: Tensor, a: Tensor) -> Tensor:
        return z + torch.tensor([1.0 + self.drift, 0.0])

    def pi_mean(self, z: Tensor) -> Tensor:
        return torch.full((*z.shape[:-1], 1), -0.5)


@dataclass
class ScriptedPlanner:
    """Plan number n (counted over rows, from 1) proposes actions n/100 and has the mean n/100 + t/1000."""

    model: CountingModel
    settings: PlannerSettings = field(default_factory=lambda: PlannerSettings(discount=0.99, horizon=3, iterations=6))
    calls: list[tuple[float, list[float]]] = field(default_factory=list)  # per plan: the count planned from, the warm start

    def __call__(self, z: Tensor, warm_start: Tensor, streams: Tensor, steps: Tensor) -> Plan:
        rows, horizon = len(z), self.settings.horizon
        assert len(streams) == len(steps) == rows and warm_start.shape == (rows, horizon, 1)
        number = torch.arange(len(self.calls) + 1, len(self.calls) + 1 + rows, dtype=torch.float32)
        self.calls += [(float(z[i, 0]), warm_start[i, :, 0].tolist()) for i in range(rows)]
        actions = (number / 100).view(rows, 1, 1).expand(rows, horizon, 1).clone()
        latents = [z]
        for t in range(horizon):
            latents.append(self.model.next(latents[-1], actions[:, t]))
        mean = actions + torch.arange(horizon).view(1, -1, 1) / 1000
        return Plan(actions, torch.stack(latents, 1), mean, torch.ones_like(mean), torch.zeros(rows))


class ConstantCorrector:
    """Adds the same delta everywhere and keeps what it was shown."""

    def __init__(self, delta: float) -> None:
        self.delta = delta
        self.visits: list[Visit] = []

    def state_dict(self) -> dict[str, Tensor]:
        return {"delta": torch.tensor(self.delta)}

    def __call__(self, visit: Visit) -> tuple[Tensor, Tensor]:
        self.visits.append(visit)
        return torch.full_like(visit.planned, self.delta), torch.zeros(len(visit.z))


class CountingSimulator:
    """obs = (steps since reset, 1), reward 1 a step. The seed is the episode's length, 0 meaning no end of its own."""

    obs_dim = 2
    action_low, action_high = -np.ones(1), np.ones(1)

    def __init__(self, terminates: bool = False) -> None:
        self.terminates = terminates
        self.actions: list[float] = []

    def reset(self, seed: int) -> np.ndarray:
        self.length, self.count = seed % 10_000, 0
        return self._obs()

    def step(self, action: np.ndarray) -> RawStep:
        self.actions.append(float(action[0]))
        self.count += 1
        ended = self.count == self.length
        return RawStep(self._obs(), 1.0, terminated=ended and self.terminates, truncated=ended and not self.terminates, success=ended)

    def _obs(self) -> np.ndarray:
        return np.array([self.count, 1.0])

    def render(self, height: int, width: int) -> np.ndarray:
        return np.zeros((height, width, 3), np.uint8)

    def close(self) -> None:
        """Nothing to release."""


def counting_envs(num: int, decisions: int = 12, *, episodic: bool = False) -> VectorEnv:
    spec = EnvSpec("counting", "tests", 2, 1, decisions, action_repeat=1, episodic=episodic, has_success=True)
    return VectorEnv([TaskEnv(spec, CountingSimulator(episodic)) for _ in range(num)])
