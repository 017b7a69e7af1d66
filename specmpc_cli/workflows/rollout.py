"""The only environment loop. Collection, evaluation, comparison and a user's own actors all run through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from specmpc_cli.envs.vector import VectorEnv
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
    log: StepLog  # of this row: its fields lack the batch axis


@dataclass(slots=True)
class EpisodeStats:
    """Everything a report needs of one episode; per-step values are lists over its env steps."""

    episode: Episode
    rewards: list[float] = field(default_factory=list)
    decisions: list[int] = field(default_factory=list)
    reasons: list[int] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    mismatches: list[float] = field(default_factory=list)
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
        self.mismatches.append(float(log.mismatch))
        self.correction_norms.append(float(log.correction_norm))
        self.planner_iterations.append(int(log.planner_iterations))


@torch.inference_mode()
def rollout(
    actor: Actor[Any],
    envs: VectorEnv,
    episodes: Sequence[Episode],
    *,
    device: torch.device,
    max_steps: int | None = None,
    on_step: Callable[[Transition], None] | None = None,
    on_episode: Callable[[EpisodeStats], None] | None = None,
    on_latency: Callable[[float], None] | None = None,
) -> list[EpisodeStats]:
    """Runs the episodes, several at a time, and returns their statistics in the given order.

    A row whose episode ended begins the next one that waits, or is dropped; the other rows do not notice.

    Args:
        max_steps: cuts every episode short (latency passes).
        on_step: sees each row's step; on_episode: sees each finished episode.
        on_latency: milliseconds of each `act` call, device synchronised: observation in, action out.
    """
    waiting = list(enumerate(episodes))
    finished: dict[int, EpisodeStats] = {}
    rows = list(range(min(len(envs), len(waiting))))  # environments in use; position in this list = row of the batch
    running = [waiting.pop(0) for _ in rows]
    stats = [EpisodeStats(episode) for _, episode in running]
    obs = np.stack([envs.reset(row, episode.env_seed) for row, (_, episode) in zip(rows, running, strict=True)])
    first = torch.ones(len(rows), dtype=torch.bool, device=device)
    state = _begin(actor, actor.initial_state(len(rows)), list(range(len(rows))), running, device)
    clock = Stopwatch(device)

    while rows:
        clock.start()
        action, state, log = actor.act(torch.from_numpy(obs).to(device), state, first)
        actions = action.cpu().numpy()
        if on_latency is not None:
            on_latency(clock.stop_ms())
        step = envs.step(rows, actions)
        first = torch.zeros_like(first)
        ended, host_log = [], log.cpu()
        for i, stat in enumerate(stats):
            row_log = host_log.take(torch.tensor(i))
            if on_step is not None:
                on_step(Transition(stat.episode, stat.env_steps, obs[i], actions[i], float(step.reward[i]), row_log))
            stat.record(float(step.reward[i]), row_log)
            if step.terminated[i] or step.truncated[i] or stat.env_steps == max_steps:
                stat.success, stat.terminated = bool(step.success[i]), bool(step.terminated[i])
                ended.append(i)
        obs = step.obs
        if not ended:
            continue

        # Finished rows begin the next waiting episode; where none waits they are dropped.
        restarted, dropped = [], []
        for i in ended:
            finished[running[i][0]] = stats[i]
            if on_episode is not None:
                on_episode(stats[i])
            if waiting:
                running[i] = waiting.pop(0)
                stats[i] = EpisodeStats(running[i][1])
                obs[i] = envs.reset(rows[i], running[i][1].env_seed)
                restarted.append(i)
            else:
                dropped.append(i)
        if restarted:
            first[restarted] = True
            state = _begin(actor, state, restarted, running, device)
        if dropped:
            kept = [i for i in range(len(rows)) if i not in dropped]
            index = torch.tensor(kept, dtype=torch.int64, device=device)
            rows, running, stats = [rows[i] for i in kept], [running[i] for i in kept], [stats[i] for i in kept]
            obs, first, state = obs[kept], first[index], state.take(index)
    return [finished[i] for i in range(len(episodes))]


def _begin(actor: Actor[Any], state: Any, rows: list[int], running: list[tuple[int, Episode]], device: torch.device) -> Any:
    streams = torch.tensor([running[i][1].stream for i in rows], dtype=torch.int64, device=device)
    return actor.begin(state, torch.tensor(rows, dtype=torch.int64, device=device), streams)
