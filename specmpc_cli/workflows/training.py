"""Training a TD-MPC2 world model (Hansen et al., 2024, §3.1): a seed phase, a burst of updates, then acting and learning in turn.

The training is made of rounds of `num_envs` episodes, and can be continued from the end of any of them: what it does next depends only on
its weights, optimisers, replay and counters.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from specmpc_cli.config.schema import Config
from specmpc_cli.data.replay import Replay, ReplayEpisode
from specmpc_cli.engine.actors import RandomActor
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.runner import SpeculativeRunner
from specmpc_cli.engine.world_model import MODEL_SIZES, WorldModel, WorldModelDims
from specmpc_cli.envs.vector import VectorEnv
from specmpc_cli.errors import ActionNotFinite, StoreError, TrainingDiverged
from specmpc_cli.files import write_whole
from specmpc_cli.learning.learner import Learner, LearnerSettings, UpdateInfo
from specmpc_cli.learning.losses import Batch, LossSettings
from specmpc_cli.runtime import Purpose, Runtime
from specmpc_cli.types import Actor, EnvSpec
from specmpc_cli.versions import versions
from specmpc_cli.workflows.acting import make_planner
from specmpc_cli.workflows.plots import plot_training
from specmpc_cli.workflows.rollout import Episode, EpisodeStats, Transition, rollout
from specmpc_cli.workflows.store import Store, timestamp
from specmpc_cli.workflows.train_state import Counters, ResumeFolder, SavedTraining, TrainFacts

FINITE_EVERY = {"cpu": 1, "cuda": 100}  # updates between looks for NaN: on a GPU a look waits for the device
TEACHER_DTYPE = torch.float16  # of the teacher's file: half the size, and 11 bits of mantissa; training continues from fp32
_RHO, _RHO_EPISODIC = 0.5, 0.7
_MIN_SEED_STEPS, _SEED_EPISODES = 1000, 5


@dataclass(slots=True)
class Progress:
    """What a watcher is shown."""

    phase: str  # "random actions", "first updates" or "training"
    decisions: int = 0
    updates: int = 0
    last_return: float | None = None
    losses: dict[str, float] = field(default_factory=dict)  # means over the last round


@dataclass(slots=True)
class Watcher:
    """Callbacks of a training; each may be left out."""

    on_progress: Callable[[Progress], None] = lambda progress: None
    on_metrics: Callable[[dict[str, Any]], None] = lambda line: None  # a line of metrics.jsonl


def seed_steps(config: Config, spec: EnvSpec) -> int:
    """Random decisions at the start: max(1000, five episodes) unless the config says otherwise."""
    return config.train.seed_steps or max(_MIN_SEED_STEPS, _SEED_EPISODES * spec.decisions)


class Trainer:
    """One training of one task, from its first decision or from a checkpoint."""

    def __init__(self, store: Store, spec: EnvSpec, facts: TrainFacts, runtime: Runtime) -> None:
        self.spec, self.facts, self.runtime = spec, facts, runtime
        self.config = Config.model_validate(facts.config)
        self.counters = Counters()
        self.metrics: list[dict[str, Any]] = []
        self._store = store
        self._resume = ResumeFolder(store.resume_folder())
        self._watcher = Watcher()
        self._progress = Progress("random actions")
        train = self.config.train
        torch.manual_seed(facts.seed)
        self.model = WorldModel(WorldModelDims(spec.obs_dim, spec.action_dim, episodic=spec.episodic, **MODEL_SIZES[facts.size]))
        rho = train.rho or (_RHO_EPISODIC if spec.episodic else _RHO)
        losses = LossSettings(discount=spec.discount, **{**_named(LossSettings, train), "rho": rho})
        self.learner = Learner(self.model, losses, LearnerSettings(**_named(LearnerSettings, train)), runtime, seed=facts.seed)
        self._acting = make_planner(self.model, self.config.training_planner, spec, runtime, explore=True)
        self._planning = make_planner(self.model, self.config.planner, spec, runtime)
        self.replay = Replay(spec.obs_dim, spec.action_dim, train.buffer_size, runtime.device)
        self._unsaved: list[ReplayEpisode] = []
        self._recent: list[UpdateInfo] = []  # since the last line of metrics
        self._last: UpdateInfo | None = None
        self.seconds_before = 0.0  # wall time spent by earlier runs of this training
        self.checkpointed: int | None = None  # decisions in the last checkpoint
        self._drawn = 0  # lines of metrics when the curve was last drawn

    # Running

    def run(self, steps: int, watcher: Watcher) -> None:
        """Trains until `steps` decisions are made, then saves.

        Raises:
            TrainingDiverged: losses, gradients or actions that are not finite; a diagnosis is left in the store.
            StoreError: the store can no longer be written; the last checkpoint is intact.
        """
        self._watcher = watcher
        envs = VectorEnv.make(self.spec.task, self.facts.num_envs)
        saved = time.monotonic()
        self._begun = saved - self.counters.seconds
        try:
            while self.counters.decisions < steps:
                before = self.counters.decisions
                self._round(envs, steps)
                if _crossed(self.config.train.eval_every, before, self.counters.decisions) or self.counters.decisions >= steps:
                    self._evaluate(envs)
                if time.monotonic() - saved >= self.config.train.checkpoint_seconds or self.counters.decisions >= steps:
                    self.checkpoint()
                    saved = time.monotonic()
        finally:
            envs.close()

    def _round(self, envs: VectorEnv, steps: int) -> None:
        """Plays one episode in each environment, learning after each decision; then makes the burst if the seed phase ended."""
        recorder = _Recorder(self)
        seeding = self.counters.seed_decisions is None
        numbers = range(self.counters.episodes, self.counters.episodes + self.facts.num_envs)
        try:
            stats = rollout(
                self._actor(seeding),
                envs,
                [Episode(Purpose.TRAIN, self.facts.seed, number) for number in numbers],
                device=self.runtime.device,
                max_steps=-(-(steps - self.counters.decisions) // self.facts.num_envs),
                on_step=recorder.step,
            )
        except ActionNotFinite:
            raise self.diverged("an action is not finite", {}) from None
        for number, stat in zip(numbers, stats, strict=True):
            episode = recorder.episode(number)
            self.replay.add(episode)
            self._unsaved.append(episode)
            self._log_episode(number, stat)
        self.counters = replace(self.counters, episodes=self.counters.episodes + len(stats), seconds=time.monotonic() - self._begun)
        if seeding and self.counters.decisions >= seed_steps(self.config, self.spec):
            self.counters = replace(self.counters, seed_decisions=self.counters.decisions)
            self._progress.phase = "first updates"
            self.learn()
            self._log({"event": "first updates", "decisions": self.counters.decisions, "updates": self.learner.updates, **self._losses()})
            self._progress.phase = "training"

    def _actor(self, seeding: bool) -> Actor[Any]:
        if seeding:
            return RandomActor(self.spec.action_dim, self.runtime.device)
        return SpeculativeRunner(self.model, self._acting, GateRule(self.config.train.acting.horizon, accept_below=math.inf))

    def count_decision(self) -> None:
        """A decision was made: learns what is due."""
        self.counters = replace(self.counters, decisions=self.counters.decisions + 1)
        if self.counters.seed_decisions is not None:
            self.learn()
        self._show()

    def learn(self) -> None:
        """Makes the updates that are due after this many decisions."""
        train, counters = self.config.train, self.counters
        assert counters.seed_decisions is not None
        burst = counters.seed_decisions if train.seed_updates is None else train.seed_updates
        due = burst + math.floor(train.updates_per_decision * (counters.decisions - counters.seed_decisions))
        while self.learner.updates < due:
            rng = np.random.Generator(np.random.Philox(key=[self.facts.seed, self.learner.updates]))
            batch = Batch(**self.replay.sample(train.batch_size, train.horizon, rng))
            info = self.learner.update(batch)
            self._recent.append(info)
            self._last = info
            if self.learner.updates % FINITE_EVERY[self.runtime.device.type] == 0:
                self._expect_finite(info, batch)
            if self._progress.phase == "first updates":
                self._show()
        self._acting.refresh()
        self.counters = replace(self.counters, updates=self.learner.updates)

    def _evaluate(self, envs: VectorEnv) -> None:
        """Plans at every step with the full planner, on episodes that training never sees."""
        if self.counters.seed_decisions is None:
            return
        self._planning.refresh()
        stats = rollout(
            SpeculativeRunner(self.model, self._planning, GateRule(1, accept_below=math.inf)),
            envs,
            [Episode(Purpose.TRAIN_EVAL, self.facts.seed, number) for number in range(self.config.train.eval_episodes)],
            device=self.runtime.device,
        )
        returns = [stat.episode_return for stat in stats]
        line = {"event": "eval", "decisions": self.counters.decisions, "return_mean": float(np.mean(returns)), "returns": returns}
        if self.spec.has_success:
            line["success_rate"] = float(np.mean([stat.success for stat in stats]))
        self._log(line)

    # Keeping

    def checkpoint(self) -> None:
        """Writes everything that continuing needs, and the teacher as it is now."""
        if self._last is not None:
            self._expect_finite(self._last, None)
        try:
            self._resume.save(SavedTraining(self.facts, self.counters), self.learner.state_dict(), self._unsaved)
        except StoreError as error:
            kept = f"the checkpoint after {self.checkpointed} decisions is intact" if self.checkpointed else "there is no checkpoint yet"
            raise StoreError(f"{error}; {kept}, and the same command without --fresh continues") from None
        self._unsaved = []
        folder = self._store.save_teacher(self.model, self._teacher_config(), self.metrics, TEACHER_DTYPE)
        if any(line["event"] == "eval" for line in self.metrics[self._drawn :]):
            self._drawn = len(self.metrics)
            plot_training(self.metrics, self.spec.task, folder / "training.png")
        self.checkpointed = self.counters.decisions

    def resume(self) -> None:
        """Goes on from the checkpoint in the store. Raises CheckpointError or DatasetError if it is damaged."""
        saved, tensors, episodes = self._resume.load()
        self.learner.load_state_dict(tensors, saved.counters.updates)
        for episode in episodes:
            self.replay.add(episode)
        self._acting.refresh()
        self.counters = saved.counters
        self.seconds_before = saved.counters.seconds
        self.metrics = [line for line in self._store.teacher_metrics() if line["decisions"] <= saved.counters.decisions]
        self.checkpointed = saved.counters.decisions
        self._progress.phase = "training" if saved.counters.seed_decisions is not None else "random actions"

    def _teacher_config(self) -> dict[str, Any]:
        evaluations = [line for line in self.metrics if line["event"] == "eval"]
        origin = {
            "made_by": "specmpc train",
            "task": self.spec.task,
            "size": self.facts.size,
            "seed": self.facts.seed,
            "num_envs": self.facts.num_envs,
            **asdict(self.counters),
            "return": evaluations[-1]["return_mean"] if evaluations else None,
            "device": str(self.runtime.device),
            "dtype": self.runtime.dtype_name,
            "date": timestamp(),
            "versions": versions(),
        }
        return {**self.facts.config, "dims": asdict(self.model.dims), "origin": origin}

    def _log_episode(self, number: int, stat: EpisodeStats) -> None:
        line: dict[str, Any] = {
            "event": "episode",
            "decisions": self.counters.decisions,
            "episode": number,
            "return": stat.episode_return,
            "env_steps": stat.env_steps,
            "planner_calls": stat.planner_calls,
            "updates": self.learner.updates,
            "seconds": round(time.monotonic() - self._begun, 1),
        }
        if self.spec.has_success:
            line["success"] = stat.success
        self._progress.last_return = stat.episode_return
        self._log(line | self._losses())

    def _losses(self) -> dict[str, float]:
        """Means over the updates since the last call; empty if there were none."""
        if not self._recent:
            return {}
        means = [float(torch.stack(values).mean()) for values in zip(*self._recent, strict=True)]
        self._recent = []
        self._progress.losses = {name: float(f"{mean:.6g}") for name, mean in zip(UpdateInfo._fields, means, strict=True)}
        return self._progress.losses

    def _log(self, line: dict[str, Any]) -> None:
        self.metrics.append(line)
        self._watcher.on_metrics(line)

    def _show(self) -> None:
        self._progress.decisions, self._progress.updates = self.counters.decisions, self.learner.updates
        self._watcher.on_progress(self._progress)

    # Divergence

    def _expect_finite(self, info: UpdateInfo, batch: Batch | None) -> None:
        losses = {name: float(value) for name, value in info._asdict().items()}
        if not all(math.isfinite(value) for value in losses.values()):
            name, value = next((name, value) for name, value in losses.items() if not math.isfinite(value))
            batch_range = {} if batch is None else {name: [float(v.min()), float(v.max())] for name, v in batch._asdict().items()}
            raise self.diverged(f"{name} is {value} at update {self.learner.updates}", {"losses": losses, "batch": batch_range})

    def diverged(self, what: str, details: dict[str, Any]) -> TrainingDiverged:
        """The error to raise; writes the diagnosis file."""
        broken = [name for name, value in self.model.named_parameters() if not torch.isfinite(value).all()]
        finite = {name: float(value.detach().abs().max()) for name, value in self.model.named_parameters() if name not in broken}
        diagnosis = {
            "what": what,
            "counters": asdict(self.counters),
            **details,
            "weights_not_finite": broken,
            "largest_weights": finite,
            "last_metrics": self.metrics[-5:],
        }
        path = self._resume.path / "diagnosis.json"
        write_whole(path, json.dumps(diagnosis, indent=1) + "\n")
        kept = self.checkpointed
        last = (
            f"the last good checkpoint, {self._resume.state_file} after {kept} decisions, is intact"
            if kept
            else "there is no checkpoint yet"
        )
        return TrainingDiverged(
            f"the training of {self.spec.task} diverged at decision {self.counters.decisions}: {what}; {last}; diagnosis: {path}; "
            "start over with --fresh and a lower --set train.lr, or another --seed"
        )


class _Recorder:
    """Keeps the transitions of a round, and tells the trainer of each decision."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._transitions: dict[int, list[Transition]] = {}

    def step(self, transition: Transition) -> None:
        self._transitions.setdefault(transition.episode.index, []).append(transition)
        self._trainer.count_decision()

    def episode(self, number: int) -> ReplayEpisode:
        """A finished episode as the replay takes it."""
        steps = self._transitions[number]
        return ReplayEpisode(
            number,
            np.stack([*(step.obs for step in steps), steps[-1].next_obs]),
            np.stack([step.action for step in steps]),
            np.array([step.reward for step in steps], dtype=np.float32),
            np.array([step.terminated for step in steps], dtype=np.float32),
        )


def _named(settings: type, section: Any) -> dict[str, Any]:
    """The fields that a settings class and a config section share by name."""
    return {field.name: getattr(section, field.name) for field in fields(settings) if hasattr(section, field.name)}


def _crossed(every: int, before: int, after: int) -> bool:
    return before // every < after // every
