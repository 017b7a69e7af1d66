"""Collecting: runs episodes and labels every step with what a fresh plan would do there.

Round 1 mixes the teacher itself, with a shadow plan ageing beside it, and the naive runner. From round 2 on the current corrector acts, so
that later correctors learn from the states that correctors lead to (DAgger, Ross et al., 2011).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specmpc_cli.data.shards import DatasetFacts, Shard, ShardWriter, read_shards, write_index
from specmpc_cli.data.tuples import Behaviour, TupleDims, stack_rows
from specmpc_cli.envs.vector import VectorEnv
from specmpc_cli.errors import ConfigError
from specmpc_cli.runtime import EPISODES_PER_SEED, Purpose
from specmpc_cli.types import DEFAULT_COURSE
from specmpc_cli.versions import versions
from specmpc_cli.workflows.acting import Workbench
from specmpc_cli.workflows.labelling import LabelledLog, Labeller
from specmpc_cli.workflows.rollout import Episode, EpisodeStats, Transition, rollout
from specmpc_cli.workflows.store import FittedCorrector, Store
from specmpc_cli.workflows.ways import Mode, Way

EPISODES_PER_ROUND = 500  # episode numbers reserved for each round, so that a dataset can grow in both directions


@dataclass(frozen=True, slots=True)
class Item:
    """One episode to collect."""

    round_: int
    number: int  # within its round
    behaviour: Behaviour
    horizon: int

    @property
    def index(self) -> int:
        return (self.round_ - 1) * EPISODES_PER_ROUND + self.number


@dataclass(frozen=True, slots=True)
class CollectReport:
    """What a dataset holds after collecting."""

    folder: Path
    episodes: int
    new_episodes: int
    other_episodes: int  # of those asked for: present, but with other steps per plan than the settings now say
    rows: int
    returns: dict[str, list[float]]  # of the new episodes, by "round r, behaviour"
    planner_calls: int  # that labelled the new episodes: one per env step
    seconds: float  # that they took, fits between the rounds included


def dataset_facts(bench: Workbench) -> DatasetFacts:
    """What every shard of this teacher's data, made with these settings, agrees on."""
    d = bench.model.dims
    return DatasetFacts(
        task=bench.spec.task,
        teacher_sha256=bench.teacher.sha256,
        dims=TupleDims(d.obs_dim, d.action_dim, d.latent_dim, bench.planner.settings.horizon),
        planner=bench.config.planner.model_dump(),
        runner=bench.config.speculation.model_dump(),
    )


def dataset_name(facts: DatasetFacts) -> str:
    """<teacher>-<settings>: data of other teachers or settings never mixes."""
    # Data of before these were settings must be found.
    newer = {name: getattr(DEFAULT_COURSE, name) for name in ("executes", "reroll")}
    runner = {name: value for name, value in facts.runner.items() if (name, value) not in newer.items()}
    settings = json.dumps([facts.planner, runner], sort_keys=True)
    return f"{facts.teacher_sha256[:8]}-{hashlib.sha256(settings.encode()).hexdigest()[:4]}"


def plan_round(round_: int, episodes: int, horizons: tuple[int, ...], teacher_share: float) -> list[Item]:
    """The episodes of a round: horizons in turn, the teacher's episodes spread evenly, the same for every call."""
    items = []
    for number in range(episodes):
        teacher = int((number + 1) * teacher_share) > int(number * teacher_share)
        behaviour = Behaviour.TEACHER if teacher else Behaviour.NAIVE if round_ == 1 else Behaviour.CORRECTED
        items.append(Item(round_, number, behaviour, horizons[number % len(horizons)]))
    return items


def collect(
    store: Store,
    bench: Workbench,
    *,
    episodes: int,
    rounds: int,
    seed: int,
    fit: Callable[[list[Shard]], FittedCorrector],
    num_envs: int = 1,
    on_step: Callable[[], None] | None = None,
    on_round: Callable[[int, int], None] | None = None,
) -> CollectReport:
    """Brings the dataset to `episodes` episodes in each of `rounds` rounds; what is already there is kept.

    Args:
        fit: makes the corrector that acts in a round r ≥ 2 from this seed's shards of the rounds before it; called if the round lacks
            episodes.
        on_step: after each env step; on_round: (round, episodes to run in it) before each round.

    Raises:
        ConfigError: more episodes or rounds than seeds are reserved for.
        DatasetError: a damaged shard.
    """
    if not 1 <= episodes <= EPISODES_PER_ROUND:
        raise ConfigError(f"--episodes must lie in 1..{EPISODES_PER_ROUND} per round, got {episodes}; use another --seed for more")
    if not 1 <= rounds <= EPISODES_PER_SEED // EPISODES_PER_ROUND:
        raise ConfigError(f"--rounds must lie in 1..{EPISODES_PER_SEED // EPISODES_PER_ROUND}, got {rounds}")
    facts, config = dataset_facts(bench), bench.config.collect
    folder = store.dataset_folder(dataset_name(facts))
    writer = ShardWriter(folder, facts, seed=seed, versions=versions())
    envs = VectorEnv.make(store.task, num_envs)
    returns: dict[str, list[float]] = defaultdict(list)
    new, others, planner_calls, started = 0, 0, 0, time.perf_counter()
    try:
        for round_ in range(1, rounds + 1):
            shards = read_shards(folder)
            horizons = {shard.key: shard.horizon for shard in shards}
            planned = plan_round(round_, episodes, config.horizons_of(round_), config.teacher_share)
            missing = [item for item in planned if (seed, round_, item.number) not in horizons]
            others += sum(horizons.get((seed, round_, item.number)) not in (None, item.horizon) for item in planned)
            if on_round is not None:
                on_round(round_, len(missing))
            if not missing:
                continue
            # Of this seed's alone: what others write meanwhile must not decide how this one acts.
            before = [shard for shard in shards if shard.key[0] == seed and shard.key[1] < round_]
            corrector = fit(before) if round_ > 1 else None
            for recorded in _run_round(bench, envs, missing, seed, corrector, writer, on_step):
                returns[f"round {round_}, {recorded.label}"].append(recorded.episode_return)
                new += 1
                planner_calls += recorded.env_steps
    finally:
        envs.close()
        shards = write_index(folder, facts.dims)
    rows = sum(shard.rows for shard in shards)
    return CollectReport(folder, len(shards), new, others, rows, dict(returns), planner_calls, time.perf_counter() - started)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A collected episode, by what drove it."""

    behaviour: Behaviour
    horizon: int
    episode_return: float
    env_steps: int

    @property
    def label(self) -> str:
        if self.behaviour is Behaviour.TEACHER:  # it plans at every step, whatever the plan in its shadow does
            return "teacher"
        return f"{self.behaviour.name.lower()} {self.horizon} steps per plan"


def _run_round(
    bench: Workbench,
    envs: VectorEnv,
    items: list[Item],
    seed: int,
    corrector: FittedCorrector | None,
    writer: ShardWriter,
    on_step: Callable[[], None] | None,
) -> list[Recorded]:
    """Runs the items, those with the same actor together, and writes each episode as it ends."""
    groups: dict[tuple[Behaviour, int], list[Item]] = defaultdict(list)
    for item in items:
        groups[item.behaviour, item.horizon].append(item)
    recorded = []
    for (behaviour, horizon), group in groups.items():
        recorder = _Recorder(bench, behaviour, group, writer, on_step)
        stats = rollout(
            Labeller(bench.runner(_way(behaviour, horizon, corrector)), behaviour),
            envs,
            [Episode(Purpose.COLLECT, seed, item.index) for item in group],
            device=bench.runtime.device,
            on_step=recorder.step,
            on_episode=recorder.episode,
        )
        recorded += [Recorded(behaviour, horizon, stat.episode_return, stat.env_steps) for stat in stats]
    return recorded


def _way(behaviour: Behaviour, horizon: int, corrector: FittedCorrector | None) -> Way:
    if behaviour is Behaviour.CORRECTED:
        return Way(Mode.CORRECTED, horizon, corrector)
    return Way(Mode.NAIVE, horizon)


class _Recorder:
    """Turns a rollout's steps into shards, one per episode."""

    def __init__(
        self, bench: Workbench, behaviour: Behaviour, items: list[Item], writer: ShardWriter, on_step: Callable[[], None] | None
    ) -> None:
        self._dims = dataset_facts(bench).dims
        self._behaviour = behaviour
        self._items = {item.index: item for item in items}
        self._writer = writer
        self._on_step = on_step
        self._rows: dict[int, list[dict[str, Any]]] = defaultdict(list)

    def step(self, transition: Transition) -> None:
        """Keeps the tuple of a step; an episode's first step has none, because no older plan exists there."""
        if self._on_step is not None:
            self._on_step()
        log, item = transition.log, self._items[transition.episode.index]
        assert isinstance(log, LabelledLog)
        if transition.step == 0:
            return
        tensors = ("z", "z_pred", "a_plan", "a_teacher_mean", "a_teacher_std", "a_teacher", "warm_start", "mismatch", "met_age")
        row: dict[str, np.ndarray | float] = {name: getattr(log, name).numpy() for name in tensors}
        row["age"] = row.pop("met_age")
        self._rows[item.index].append(
            row
            | {
                "a_exec": transition.action,
                "obs": transition.obs,
                "reward": transition.reward,
                "episode": float(item.index),
                "step": float(transition.step),
                "behaviour": float(self._behaviour),
                "round": float(item.round_),
            }
        )

    def episode(self, stats: EpisodeStats) -> None:
        """Writes a finished episode."""
        item = self._items[stats.episode.index]
        rows = self._rows.pop(item.index, [])
        if rows:
            self._writer.write(stack_rows(rows, self._dims), round_=item.round_, episode=item.number, horizon=item.horizon)
