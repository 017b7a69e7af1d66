"""Actors that never plan: the policy prior, a distilled policy, uniformly random actions, a script. All implement `types.Actor`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specmpc_cli.engine.correctors import DistilledPolicy
from specmpc_cli.engine.planner import Behaviour
from specmpc_cli.engine.rows import row_by_row
from specmpc_cli.engine.world_model import WorldModel
from specmpc_cli.types import Decision, ReplanReason, Rows, StepLog


@dataclass(frozen=True)
class StreamState(Rows):
    """Which random stream each row draws from, and how far it is."""

    stream: Tensor  # [B] int64
    step: Tensor  # [B] int64, env steps since the episode began


class PlanlessActor(ABC):
    """What they have in common: the state, and a log without plans."""

    decision = -1  # what the log says of every step

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @abstractmethod
    def choose(self, obs: Tensor, state: StreamState) -> Tensor:
        """obs [B, O] → action [B, A]."""

    def initial_state(self, batch: int) -> StreamState:
        zero = torch.zeros(batch, dtype=torch.int64, device=self._device)
        return StreamState(zero, zero)

    def begin(self, state: StreamState, rows: Tensor, streams: Tensor) -> StreamState:
        return state.put(rows, StreamState(streams, torch.zeros_like(streams)))

    @torch.inference_mode()
    def act(self, obs: Tensor, state: StreamState, first: Tensor) -> tuple[Tensor, StreamState, StepLog]:
        zero = torch.zeros_like(first, dtype=torch.int64)
        none = torch.full(first.shape, torch.nan, device=first.device)
        log = StepLog(
            decision=zero + int(self.decision),
            reason=zero + int(ReplanReason.NONE),
            age=zero,
            met_age=zero,
            mismatch=none,
            expected_error=torch.zeros_like(none),
            correction_norm=none,
            planner_iterations=zero,
        )
        return self.choose(obs, state), StreamState(state.stream, state.step + 1), log


class PolicyActor(PlanlessActor):
    """Acts with the policy prior alone: zero planner calls, the control every comparison needs."""

    def __init__(self, model: WorldModel, *, explore: bool = False, behaviour: Behaviour | None = None) -> None:
        """
        Args:
            explore: draws from the prior instead of taking its mean.
            behaviour: encodes, and has the mean; by default `model`. As for runners.
        """
        super().__init__(next(model.parameters()).device)
        self.model, self._explore, self._behaviour = model, explore, behaviour or model

    def choose(self, obs: Tensor, state: StreamState) -> Tensor:
        if not self._explore:
            return row_by_row(lambda obs: self._behaviour.pi_mean(self._behaviour.encode(obs)), obs)
        eps = np.stack([rng.standard_normal(self.model.dims.action_dim, dtype=np.float32) for rng in _draws(state)])
        drawn = torch.from_numpy(eps).to(self._device)
        return row_by_row(lambda obs, eps: self.model.pi_sample(self._behaviour.encode(obs), eps), obs, drawn)


class DistilledActor(PlanlessActor):
    """Acts with a network distilled from the planner alone: zero planner calls, the control every corrector must beat.

    Its steps count as corrected, because the network's action is executed; there is no plan to measure the correction from.
    """

    decision = Decision.CORRECT

    def __init__(self, model: WorldModel, network: DistilledPolicy, *, behaviour: Behaviour | None = None) -> None:
        """`behaviour`: encodes, and has the prior's mean; by default `model`. As for runners."""
        super().__init__(next(model.parameters()).device)
        self.network, self._behaviour = network, behaviour or model

    def choose(self, obs: Tensor, state: StreamState) -> Tensor:
        return row_by_row(self._action, obs)

    def _action(self, obs: Tensor) -> Tensor:
        z = self._behaviour.encode(obs)
        return self.network.propose(z, self._behaviour.pi_mean(z))[0].clamp(-1.0, 1.0)


class RandomActor(PlanlessActor):
    """Uniform actions in [-1, 1], keyed by (stream, step): the seed phase of a training."""

    def __init__(self, action_dim: int, device: torch.device) -> None:
        super().__init__(device)
        self._action_dim = action_dim

    def choose(self, obs: Tensor, state: StreamState) -> Tensor:
        rows = [rng.uniform(-1.0, 1.0, self._action_dim) for rng in _draws(state)]
        return torch.from_numpy(np.stack(rows).astype(np.float32)).to(self._device)


class ScriptedActor(PlanlessActor):
    """Follows a scripted policy, with normal noise on its actions: the demonstrations before a training."""

    def __init__(self, script: Callable[[np.ndarray], np.ndarray], noise: float, device: torch.device) -> None:
        """
        Args:
            script: observation [O] → action [A] in [-1, 1].
            noise: standard deviation; the sum is clamped to [-1, 1].
        """
        super().__init__(device)
        self._script, self._noise = script, noise

    def choose(self, obs: Tensor, state: StreamState) -> Tensor:
        actions = np.stack([self._script(row) for row in obs.cpu().numpy()])
        noise = np.stack([rng.standard_normal(actions.shape[1]) for rng in _draws(state)])
        return torch.from_numpy((actions + self._noise * noise).clip(-1.0, 1.0).astype(np.float32)).to(self._device)


def _draws(state: StreamState) -> Iterator[np.random.Generator]:
    """Each row's own generator for this step."""
    for key in zip(state.stream.tolist(), state.step.tolist(), strict=True):
        yield np.random.Generator(np.random.Philox(key=key))
