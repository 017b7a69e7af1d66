"""The only environment loop. Collection, evaluation, comparison and a user's own actors all run through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from specmpc_cli.envs.vector import VectorEnv
from specmpc_cli.errors import ActionNotFinite
from specmpc_cli.runtime import Purpose, Stopwatch, env_seed, stream_key
from specmpc_cli.types import Actor, Decision, StepLog


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode to run, and all that its randomness depends on."""

    purpose: Purpose
    seed: int
    index: int

    @property
    def env_seed(self) -> int:
        return env_seed(self.purpose, self.seed, self.index)

    @property
    def stream(self) -> int:
        return stream_key(self.purpose, self.seed, self.index)


@dataclass(frozen=True, slots=True)
class Transition:
    """One env step of one row, as a callback sees it. Tensors and arrays are this row's own."""

    episode: Episode
    step: int
    obs: np.ndarray  # [O] what the actor saw
    action: np.ndarray  # [A] what it did
    reward: float
    next_obs: np.ndarray  # [O] what followed
    terminated: bool
    log: StepLog  # of this row: its fields lack the batch axis


@dataclass(slots=True)
class EpisodeStats:
    """Everything a report needs of one episode; per-step values are lists over its env steps."""

    episode: Episode
    rewards: list[float] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    reasons: list[int] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    met_ages: list[int] = field(default_factory=list)
    mismatches: list[float] = field(default_factory=list)
    expected_errors: list[float] = field(default_factory=list)
    correction_norms: list[float] = field(default_factory=list)
    planner_iterations: list[int] = field(default_factory=list)
    success: bool = False
    terminated: bool = False

    @property
    def env_steps(self) -> int:
        return len(self.rewards)

    @property
    def episode_return(self) -> float:
        return float(sum(self.rewards))

    @property
    def planner_calls(self) -> int:
        return sum(decision == Decision.REPLAN for decision in self.decisions)

    @property
    def steps_per_plan(self) -> list[int]:
        """Env steps executed from each plan, in order."""
        starts = [step for step, decision in enumerate(self.decisions) if decision == Decision.REPLAN]
        return [end - start for start, end in zip(starts, [*starts[1:], self.env_steps], strict=True)]

    def record(self, reward: float, log: StepLog) -> None:
        """Adds one step; `log` is this row's."""
        self.rewards.append(reward)
        self.decisions.append(int(log.decision))
        self.reasons.append(int(log.reason))
        self.ages.append(int(log.age))
        self.met_ages.append(int(log.met_age))
        self.mismatches.append(float(log.mismatch))
        self.expected_errors.append(float(log.expected_error))
        self.correction_norms.append(float(log.correction_norm))
        self.planner_iterations.append(int(log.planner_iterations))


def rollout(
    actor: Actor[Any],
    envs: VectorEnv,
    episodes: Sequence[Episode],
    *,
    device: torch.device,
    max_steps: int | None = None,
    on_act: Callable[[int], None] | None = None,
    on_step: Callable[[Transition], None] | None = None,
    on_episode: Callable[[EpisodeStats], None] | None = None,
    on_latency: Callable[[float], None] | None = None,
) -> list[EpisodeStats]:
    """Runs the episodes, several at a time, and returns their statistics in the given order.

    A row whose episode ended begins the next one that waits, or is dropped; the other rows do not notice.

    Args:
        max_steps: cuts every episode short (latency passes).
        on_act: told how many rows act, once their actions are known and before the environments step: what it launches on an
            accelerator runs beside the simulators.
        on_step: sees each row's step; on_episode: sees each finished episode.
        on_latency: milliseconds of each `act` call, device synchronised: observation in, action out.

    Raises:
        ActionNotFinite: the actor's action is not a number.
    """
    batch = _Batch(actor, envs, episodes, device)
    clock = Stopwatch(device)
    while batch.running:
        clock.start()
        action, state, log = actor.act(torch.from_numpy(batch.obs).to(device), batch.state, batch.first)
        actions = action.cpu().numpy()
        if on_latency is not None:
            on_latency(clock.stop_ms())
        if not np.isfinite(actions).all():
            raise ActionNotFinite(f"{envs.spec.task}: an action is not finite; the model's weights are damaged or its training diverged")
        log = log.cpu()
        if on_act is not None:
            on_act(len(actions))
        step = envs.step([row.env for row in batch.running], actions)
        ended = []
        for i, row in enumerate(batch.running):
            row_log = log.take(torch.tensor(i))
            if on_step is not None:
                what = (batch.obs[i], actions[i], float(step.reward[i]), step.obs[i], bool(step.terminated[i]))
                on_step(Transition(row.stats.episode, row.stats.env_steps, *what, row_log))
            row.stats.record(float(step.reward[i]), row_log)
            if step.terminated[i] or step.truncated[i] or row.stats.env_steps == max_steps:
                row.stats.success, row.stats.terminated = bool(step.success[i]), bool(step.terminated[i])
                ended.append(i)
        batch.advance(state, step.obs)
        for i in ended:
            if on_episode is not None:
                on_episode(batch.running[i].stats)
        batch.replace(ended)
    return batch.finished()


@dataclass(slots=True)
class _Row:
    """An environment and the episode that it plays."""

    env: int
    stats: EpisodeStats


class _Batch:
    """The rows that act together: their environments, episodes, observations and the actor's state, kept in the same order."""

    def __init__(self, actor: Actor[Any], envs: VectorEnv, episodes: Sequence[Episode], device: torch.device) -> None:
        self._actor, self._envs, self._device = actor, envs, device
        self._all = [EpisodeStats(episode) for episode in episodes]
        self._waiting = iter(self._all)
        self.running = [_Row(env, stats) for env, stats in zip(range(len(envs)), self._waiting, strict=False)]
        self.obs = np.stack([self._reset(row) for row in self.running])
        self.first = torch.ones(len(self.running), dtype=torch.bool, device=device)
        self.state = self._begun(actor.initial_state(len(self.running)), list(range(len(self.running))))

    def advance(self, state: Any, obs: np.ndarray) -> None:
        """After a step of all rows."""
        self.state, self.obs, self.first = state, obs, torch.zeros_like(self.first)

    def replace(self, ended: list[int]) -> None:
        """Gives the rows at these positions the next waiting episodes; where none waits they are dropped."""
        restarted, dropped = [], []
        self.obs = self.obs.copy()  # callbacks may have kept rows of the old one
        for i in ended:
            stats = next(self._waiting, None)
            if stats is None:
                dropped.append(i)
                continue
            self.running[i].stats = stats
            self.obs[i] = self._reset(self.running[i])
            self.first[i] = True
            restarted.append(i)
        if restarted:
            self.state = self._begun(self.state, restarted)
        if dropped:
            kept = [i for i in range(len(self.running)) if i not in dropped]
            index = torch.tensor(kept, dtype=torch.int64, device=self._device)
            self.running = [self.running[i] for i in kept]
            self.obs, self.first, self.state = self.obs[kept], self.first[index], self.state.take(index)

    def finished(self) -> list[EpisodeStats]:
        """The statistics of all episodes, in the order in which they were given."""
        return self._all

    def _reset(self, row: _Row) -> np.ndarray:
        return self._envs.reset(row.env, row.stats.episode.env_seed)

    def _begun(self, state: Any, positions: list[int]) -> Any:
        streams = [self.running[i].stats.episode.stream for i in positions]
        index, keys = (torch.tensor(values, dtype=torch.int64, device=self._device) for values in (positions, streams))
        return self._actor.begin(state, index, keys)
