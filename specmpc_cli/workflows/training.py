"""Training a TD-MPC2 world model (Hansen et al., 2024, §3.1): a seed phase, a burst of updates, then acting and learning in turn.

The training is made of rounds, one episode in each environment, and can be continued from the end of any of them: what it does next
depends only on its weights, optimisers, replay and counters.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specmpc_cli.config.schema import Config
from specmpc_cli.data.replay import Replay, ReplayEpisode
from specmpc_cli.engine import native
from specmpc_cli.engine.actors import PolicyActor, RandomActor, ScriptedActor
from specmpc_cli.engine.batched_planner import BatchedPlanner
from specmpc_cli.engine.compiled import judge_for
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.runner import SpeculativeRunner
from specmpc_cli.engine.world_model import MODEL_SIZES, WorldModel, WorldModelDims
from specmpc_cli.envs.registry import make_script
from specmpc_cli.envs.vector import VectorEnv
from specmpc_cli.errors import (
    ActionNotFinite,
    CheckpointError,
    ConfigError,
    Interrupted,
    SimulationDiverged,
    SpecMPCError,
    StoreError,
    TrainingDiverged,
)
from specmpc_cli.learning.learner import Learner, LearnerSettings
from specmpc_cli.learning.losses import Batch, LossSettings
from specmpc_cli.runtime import Purpose, Runtime
from specmpc_cli.types import Actor, EnvSpec
from specmpc_cli.versions import versions
from specmpc_cli.workflows.acting import COMPILER_ERRORS, compilers_fault, make_planner, plan_once
from specmpc_cli.workflows.plots import computed_on, plot_training
from specmpc_cli.workflows.rollout import Episode, rollout
from specmpc_cli.workflows.round_recorder import RoundRecorder
from specmpc_cli.workflows.store import Store, timestamp
from specmpc_cli.workflows.train_log import ActorName, Line, Progress, TrainingLog, Watcher, not_finite, write_diagnosis
from specmpc_cli.workflows.train_state import Counters, ResumeFolder, SavedTraining, TrainFacts

FINITE_EVERY = {"cpu": 1, "cuda": 100}  # updates between looks for NaN: on a GPU a look waits for the device
TEACHER_DTYPE = torch.float16  # of the teacher's file: half the size, and 11 bits of mantissa; training continues from fp32
_RHO, _RHO_EPISODIC = 0.5, 0.7


class Trainer:
    """One training of one task, from its first decision or from a checkpoint."""

    def __init__(self, store: Store, spec: EnvSpec, facts: TrainFacts, runtime: Runtime) -> None:
        self.spec, self.facts, self.runtime = spec, facts, runtime
        self.config = Config.model_validate(facts.config)
        self.counters = Counters()
        self.log = TrainingLog(spec.has_success)
        self.notes: list[str] = []  # what the user should know before it runs
        self.checkpointed: int | None = None  # decisions in the last checkpoint
        self.again = "the same command"  # what continues from there
        self.seconds_before = 0.0  # wall time spent by earlier runs of this training
        self._store = store
        self._resume = ResumeFolder(store.resume_folder())
        self._found, self._teacher_found = self._resume.stamp(), store.teacher_stamp()
        self._watcher = Watcher()
        self._progress = Progress("seed phase")
        self._unsaved: list[ReplayEpisode] = []
        self._drawn = 0  # evaluations in the curve
        train = self.config.train
        self._seed_phase = train.seed_phase(spec.decisions)
        torch.manual_seed(facts.seed)
        self.model = WorldModel(WorldModelDims(spec.obs_dim, spec.action_dim, episodic=spec.episodic, **MODEL_SIZES[facts.size]))
        rho = train.rho or (_RHO_EPISODIC if spec.episodic else _RHO)
        losses = LossSettings(discount=spec.discount, **{**_named(LossSettings, train), "rho": rho})
        optimisers = LearnerSettings(**_named(LearnerSettings, train))
        shown = train.demonstrations
        self.learner = Learner(self.model, losses, optimisers, runtime, seed=facts.seed, demonstrated=shown > 0)
        self.replay = Replay(spec.obs_dim, spec.action_dim, train.buffer_size, runtime.device, shown)
        self._script = make_script(spec.task) if shown else None
        self._make_planners()

    def _make_planners(self) -> None:
        self._judge = judge_for(self.runtime.device)
        self._acting = make_planner(self.model, self.config.training_planner, self.spec, self.runtime, explore=True)
        self._planning = make_planner(self.model, self.config.planner, self.spec, self.runtime)

    def resume(self) -> None:
        """Goes on from the checkpoint in the store. Raises CheckpointError or DatasetError if it is damaged."""
        saved, tensors, episodes = self._resume.load()
        try:
            self.learner.load_state_dict(tensors, saved.counters.updates)
        except (KeyError, RuntimeError):
            raise CheckpointError(
                f"{self._resume.state_file} is of a model with other dimensions than {self.spec.task} has here (another version of its "
                "suite?); begin anew with --fresh, or keep both with another --name"
            ) from None
        for episode in episodes:
            self.replay.add(episode)
        self.counters, self.log.lines = saved.counters, saved.metrics
        self.seconds_before, self.checkpointed = saved.counters.seconds, saved.counters.decisions
        if changes := self.facts.acting_changes(saved.facts):
            self.log.settings(saved.counters, changes)
            self.notes.append(f"from here on it acts with other settings: {'; '.join(changes)}")
        if saved.counters.seed_decisions is not None:
            self._progress.phase = "training"
        if not self._weights_are_the_teachers and not self._store.has_teacher():
            self.log.forget_best()
            self.notes.append("the best evaluated weights are gone from the store: from here on it keeps the best of those to come")
        if not self._computed_on.startswith(saved.computed_on):  # older versions saved less of it
            self.notes.append(
                f"this training ran on {saved.computed_on} before and goes on on {self._computed_on}: "
                "it will not end bit for bit where an uninterrupted one would"
            )

    def prepare(self) -> str | None:
        """Makes one plan of each kind and computes the losses once, which builds or compiles what they need.

        Returns:
            What went wrong, if compiling failed on this machine: everything is eager from then on, or lacks a kernel.

        Raises:
            ConfigError: the device's memory is too small.
        """
        try:
            evaluated = min(self.facts.num_envs, self.config.train.eval_episodes)
            for planner, rows in ((self._acting, self.facts.num_envs), (self._planning, evaluated)):
                plan_once(planner, self.model, planner.sizes_for(rows))
            self.learner.rehearse(self.config.train.batch_size, self.config.train.horizon)
        except COMPILER_ERRORS as error:
            reason = compilers_fault(error, self.runtime)
            self.runtime = replace(self.runtime, compiled=False)
            self._make_planners()
            self.learner.compute_eagerly()
            return f"compiling failed, so training runs eagerly, at a third to half of the speed: {reason}"
        return native.problem()

    # Running

    def run(self, steps: int, watcher: Watcher) -> None:
        """Trains until at least `steps` decisions are made (the round that reaches them is played to its end), then saves.

        Raises:
            TrainingDiverged: losses, gradients or actions that are not finite; a diagnosis is left in the store.
            StoreError: the store can no longer be written. ConfigError: another training is, or has meanwhile been, at work in it.
            Interrupted: Ctrl-C. All of them leave the last checkpoint intact and say so.
        """
        self._watcher = watcher
        with contextlib.closing(VectorEnv.make(self.spec.task, self.facts.num_envs)) as envs, self._resume.locked():
            if self._resume.stamp() != self._found:
                raise ConfigError(f"another 'specmpc train' has been at work in {self._resume.path} meanwhile; go on with {self.again}")
            self._expect_own_teacher()
            try:
                self._resume.tidy(self.counters.episodes if self.checkpointed else None)
                self._found = self._resume.stamp()
                self._train(envs, steps)
            except ActionNotFinite:
                raise self._diverged("an action is not finite") from None
            except TrainingDiverged:
                raise
            except SimulationDiverged as error:  # continued, it would only come there again
                raise SimulationDiverged(f"{error}; begin anew with --fresh and another --seed, or another --name") from None
            except SpecMPCError as error:
                raise type(error)(f"{error}; {self._kept}") from None
            except KeyboardInterrupt:
                raise Interrupted(f"interrupted after {self.counters.decisions} decisions; {self._kept}") from None

    def _train(self, envs: VectorEnv, steps: int) -> None:
        saved = time.monotonic()
        self._began = saved - self.counters.seconds
        self._acting.refresh()
        if self.checkpointed and self._weights_are_the_teachers:
            self._save_teacher()  # a kill may have come between the checkpoint and its files
        while self.counters.decisions < steps:
            before = self.counters.decisions
            self._round(envs)
            due = done = self.counters.decisions >= steps
            if _crossed(self.config.train.eval_every, before, self.counters.decisions) or done:
                self._evaluate(envs)
                # The next update changes the weights.
                due |= self.config.train.keep == "best" and self.log.best is not None and self._weights_are_the_teachers
            if due or time.monotonic() - saved >= self.config.train.checkpoint_seconds:
                self.checkpoint()
                saved = time.monotonic()

    def _round(self, envs: VectorEnv) -> None:
        """Plays one episode in each environment, learning after each decision; then makes the burst if the seed phase ended."""
        recorder = RoundRecorder()
        seeding = self.counters.seed_decisions is None
        who = self._who_acts(seeding)
        first, count = self.counters.episodes, self.facts.num_envs
        if seeding:  # no more at random than the seed phase needs, however many environments there are
            needed = math.ceil((self._seed_phase - self.counters.decisions) / self.spec.decisions)
            demonstrated = self.config.train.demonstrations - first
            count = min(count, needed, demonstrated if demonstrated > 0 else needed)
        stats = rollout(
            self._actor(who),
            envs,
            [Episode(Purpose.TRAIN, self.facts.seed, first + number) for number in range(count)],
            device=self.runtime.device,
            on_act=self._decided,
            on_step=recorder.step,
        )
        self.counters = replace(self.counters, episodes=first + count)
        self._count_seconds()
        losses = self.log.losses()
        self._progress.losses = losses or self._progress.losses
        for number, stat in enumerate(stats, start=first):
            episode = recorder.episode(number)
            self.replay.add(episode)
            self._unsaved.append(episode)
            self._progress.last_return = stat.episode_return
            self._watcher.on_metrics(self.log.episode(self.counters, number, who, stat, losses))
        if seeding and self.counters.decisions >= self._seed_phase:
            self.counters = replace(self.counters, seed_decisions=self.counters.decisions)
            self._progress.phase = "first updates"
            self.learn()
            self._watcher.on_metrics(self.log.burst(self.counters))
            self._progress.phase = "training"

    def _who_acts(self, seeding: bool) -> ActorName:
        """In the next round: demonstrations come first, then random actions, then plans, with the policy prior's share of the rounds."""
        if seeding:
            return "script" if self.counters.episodes < self.config.train.demonstrations else "random"
        share, round_ = self.config.train.acting.policy_share, self.counters.episodes // self.facts.num_envs
        return "policy" if math.floor(share * (round_ + 1)) > math.floor(share * round_) else "planner"

    def _actor(self, who: ActorName) -> Actor[Any]:
        device = self.runtime.device
        match who:
            case "script":
                assert self._script is not None
                return ScriptedActor(self._script, self.config.train.demonstration_noise, device)
            case "random":
                return RandomActor(self.spec.action_dim, device)
            case "policy":
                return PolicyActor(self.model, explore=True)
            case "planner":
                return self._runner(self._acting, self.config.train.acting.horizon)

    def _runner(self, planner: BatchedPlanner, horizon: int) -> SpeculativeRunner:
        return SpeculativeRunner(self.model, planner, GateRule(horizon, math.inf), judge=self._judge, behaviour=planner.networks)

    def _decided(self, count: int) -> None:
        """So many decisions were made: learns what is due. Their own episodes can be learnt from only when they have ended."""
        self.counters = replace(self.counters, decisions=self.counters.decisions + count)
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
            info = self.learner.update(Batch(**self.replay.sample(train.batch_size, train.horizon, rng)))
            self.log.updated(info)
            if self.learner.updates % FINITE_EVERY[self.runtime.device.type] == 0:
                self._expect_finite()
            if self._progress.phase == "first updates":
                self._show()
        self._acting.refresh()
        self.counters = replace(self.counters, updates=self.learner.updates)

    def _evaluate(self, envs: VectorEnv) -> None:
        """Plans at every step with the full planner, on episodes that training never sees."""
        if self.counters.seed_decisions is None:
            return
        phase, self._progress.phase = self._progress.phase, "evaluating"
        self._planning.refresh()
        stats = rollout(
            self._runner(self._planning, 1),
            envs,
            [Episode(Purpose.TRAIN_EVAL, self.facts.seed, number) for number in range(self.config.train.eval_episodes)],
            device=self.runtime.device,
            on_step=lambda transition: self._show(),
        )
        self._progress.phase = phase
        self._count_seconds()
        self._watcher.on_metrics(self.log.evaluation(self.counters, stats))

    def _count_seconds(self) -> None:
        self.counters = replace(self.counters, seconds=time.monotonic() - self._began)

    def _show(self) -> None:
        self._progress.decisions, self._progress.updates = self.counters.decisions, self.learner.updates
        self._watcher.on_progress(self._progress)

    # Keeping

    def checkpoint(self) -> None:
        """Writes everything that continuing needs, then the teacher unless better weights are kept.

        Raises:
            TrainingDiverged, StoreError; ConfigError where another command has written the teacher.
        """
        self._expect_finite()
        self._expect_own_teacher()
        saved = SavedTraining(self.facts, self.counters, self._computed_on, self.log.lines)
        self._resume.save(saved, self.learner.state_dict(), self._unsaved)
        self.checkpointed, self._found = self.counters.decisions, self._resume.stamp()
        self._unsaved = []
        folder = self._save_teacher() if self._weights_are_the_teachers else self._store.save_teacher_metrics(self.log.lines)
        evaluations = self.log.evaluations
        if len(evaluations) > self._drawn:
            plot_training(self.log.lines, self.spec.task, folder / "training.png")
            self._drawn = len(evaluations)

    @property
    def kept_evaluation(self) -> Line | None:
        """The evaluation that speaks for the teacher: the last, or the best if that one's weights are kept."""
        return self.log.best if self.config.train.keep == "best" else self.log.last_evaluation

    @property
    def teacher_decisions(self) -> int:
        """After how many decisions the teacher's weights are taken."""
        kept = self.log.best if self.config.train.keep == "best" else None
        return kept["decisions"] if kept else self.counters.decisions

    @property
    def _weights_are_the_teachers(self) -> bool:
        return self.teacher_decisions == self.counters.decisions

    def _save_teacher(self) -> Path:
        evaluation = self.kept_evaluation
        origin = {
            "made_by": "specmpc train",
            "task": self.spec.task,
            "size": self.facts.size,
            "seed": self.facts.seed,
            "num_envs": self.facts.num_envs,
            **asdict(self.counters),
            "return": evaluation["return_mean"] if evaluation else None,
            "evaluated_decisions": evaluation["decisions"] if evaluation else None,
            "success_rate": evaluation.get("success_rate") if evaluation else None,
            "device": str(self.runtime.device),
            "dtype": self.runtime.learning_dtype_name,
            "date": timestamp(),
            "versions": versions(),
        }
        config = {**self.facts.config, "dims": asdict(self.model.dims), "origin": origin}
        folder = self._store.save_teacher(self.model, config, self.log.lines, TEACHER_DTYPE)
        self._teacher_found = self._store.teacher_stamp()
        return folder

    @property
    def _computed_on(self) -> str:
        device = self.runtime.device.type  # which of several makes no difference
        return computed_on(self.runtime.facts | {"device": device, "dtype": self.runtime.learning_dtype_name})

    # What can go wrong

    @property
    def _kept(self) -> str:
        if self.checkpointed is None:
            return "there is no checkpoint yet, so the same command begins again"
        return f"the checkpoint after {self.checkpointed} decisions is intact; go on from there with {self.again}"

    def _expect_own_teacher(self) -> None:
        """An import that began before our lock was taken must not be overwritten."""
        if self._store.teacher_stamp() != self._teacher_found:
            raise ConfigError(f"another command has written the teacher in {self._store.folder} meanwhile; train with another --name")

    def _expect_finite(self) -> None:
        if self.log.last_update is not None and (what := not_finite(self.log.last_update)):
            raise self._diverged(f"{what} at update {self.learner.updates}")

    def _diverged(self, what: str) -> TrainingDiverged:
        """The error to raise; writes the diagnosis file."""
        path = self._resume.path / "diagnosis.json"
        try:
            write_diagnosis(path, what, self.counters, self.model, self.log)
            diagnosis = f"diagnosis: {path}"
        except StoreError as error:
            diagnosis = f"no diagnosis, because: {error}"
        kept = f"the last good checkpoint, {self._resume.state_file} after {self.checkpointed} decisions, is intact"
        return TrainingDiverged(
            f"the training of {self.spec.task} diverged at decision {self.counters.decisions}: {what}; "
            f"{kept if self.checkpointed else 'there is no checkpoint yet'}; {diagnosis}; "
            "start over with --fresh and a lower --set train.lr, or another --seed"
        )


def _named(settings: type, section: Any) -> dict[str, Any]:
    """The fields that a settings class and a config section share by name."""
    return {field.name: getattr(section, field.name) for field in fields(settings) if hasattr(section, field.name)}


def _crossed(every: int, before: int, after: int) -> bool:
    return before // every < after // every
