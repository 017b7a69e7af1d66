"""Beginning and continuing a training: what is taken from the options, and what from the saved training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from specmpc_cli.config.presets import check_sections, load_config
from specmpc_cli.config.schema import Config
from specmpc_cli.engine.world_model import MODEL_SIZES
from specmpc_cli.envs.registry import expect_ready, lookup
from specmpc_cli.errors import ConfigError
from specmpc_cli.runtime import Runtime
from specmpc_cli.workflows.store import Store
from specmpc_cli.workflows.train_state import KEPT_SECTIONS, ResumeFolder, TrainFacts, kept_config
from specmpc_cli.workflows.training import Trainer

DEFAULT_SIZE = 1


def begin_training(
    store: Store,
    runtime: Runtime,
    *,
    steps: int,
    seed: int | None = None,
    size: int | None = None,
    num_envs: int | None = None,
    presets: Sequence[str] = (),
    settings: Sequence[str] = (),
    resume: bool | None = None,
) -> Trainer:
    """A trainer at its first decision, or where the store's training stopped.

    Args:
        steps: where the training will be told to stop.
        seed, size, num_envs: None takes those of the saved training, else 0, 1 and 1. What presets and settings do not name is likewise
            as in the saved config.
        resume: True insists on a saved training, False begins anew, None continues where there is something to continue.

    Raises:
        ConfigError: options that do not fit the task or the saved training, nothing to resume, or a teacher that would be overwritten.
        SuiteNotInstalled: what the task needs is missing.
        CheckpointError, DatasetError: the saved training is damaged.
    """
    expect_ready(store.task)
    spec = lookup(store.task).spec
    folder = ResumeFolder(store.resume_folder())
    saved = folder.saved() if resume is not False else None
    if saved is None and resume:
        raise ConfigError(f"there is no training to resume in {folder.path}; leave --resume out to begin one")
    if saved is None and resume is None and store.has_teacher():
        raise ConfigError(
            f"{store.folder / 'teacher'} holds a teacher that no training can continue; keep it and train with another --name, "
            "or replace it with --fresh"
        )
    facts = _facts(store.task, saved.facts if saved else None, size, seed, num_envs, presets, settings)
    if saved and (differences := facts.differences(saved.facts)):
        raise ConfigError(
            f"cannot continue the training in {folder.path}: {'; '.join(differences)}; repeat the options it was begun with, "
            "begin anew with --fresh, or keep both with another --name"
        )
    if saved and saved.counters.decisions >= steps and (changes := facts.acting_changes(saved.facts)):
        raise ConfigError(
            f"the training in {folder.path} has {saved.counters.decisions} decisions already, so other settings of acting would change "
            f"nothing but the teacher's description ({'; '.join(changes)}); ask for more --steps, or leave them out"
        )
    train = Config.model_validate(facts.config).train
    needed = train.seed_phase(spec.decisions)
    if steps <= needed:
        raise ConfigError(f"--steps must exceed the {needed} decisions of the seed phase, got {steps}")
    if train.horizon > spec.decisions:
        raise ConfigError(f"train.horizon is {train.horizon}, and an episode of {store.task} has {spec.decisions} decisions; take fewer")
    if train.buffer_size <= spec.decisions:
        raise ConfigError(
            f"train.buffer_size must exceed the {spec.decisions} decisions of an episode of {store.task}, got {train.buffer_size}"
        )
    if facts.num_envs * spec.decisions > steps:
        raise ConfigError(
            f"--num-envs {facts.num_envs} episodes of {spec.decisions} decisions are more than --steps {steps}; take fewer environments"
        )
    trainer = Trainer(store, spec, facts, runtime)
    store.claim()
    if saved:
        trainer.resume()
    return trainer


def _facts(
    task: str,
    old: TrainFacts | None,
    size: int | None,
    seed: int | None,
    num_envs: int | None,
    presets: Sequence[str],
    settings: Sequence[str],
) -> TrainFacts:
    """What the options ask for; what they leave out is as in the saved training. Raises ConfigError."""
    check_sections(settings, KEPT_SECTIONS, "training")
    config = kept_config(load_config(presets, settings, base=old.config if old else None))
    if size is None:
        size = old.size if old else DEFAULT_SIZE
    if size not in MODEL_SIZES:
        raise ConfigError(f"--size must be one of {', '.join(map(str, MODEL_SIZES))}, got {size}")
    if num_envs is None:
        num_envs = old.num_envs if old else 1
    if seed is None:
        seed = old.seed if old else 0
    return TrainFacts(task, size, seed, num_envs, config, lookup(task).spec.decisions)


def training_report(trainer: Trainer, store: Store) -> dict[str, Any]:
    """The document of `train --json` (docs/json.md)."""
    evaluations, kept = trainer.log.evaluations, trainer.kept_evaluation
    folder = store.folder / "teacher"
    return {
        "schema": 1,
        "task": trainer.spec.task,
        "size": trainer.facts.size,
        "seed": trainer.facts.seed,
        "path": str(folder),
        "curve": str(folder / "training.png"),
        "sha256": store.teacher().sha256,
        **asdict(trainer.counters),
        "seconds_this_time": trainer.counters.seconds - trainer.seconds_before,
        "teacher_decisions": trainer.teacher_decisions,
        "evaluated_decisions": kept["decisions"] if kept else None,
        "return_mean": kept["return_mean"] if kept else None,
        "returns": kept["returns"] if kept else [],
        "evaluations": [{"decisions": line["decisions"], "return_mean": line["return_mean"]} for line in evaluations],
    }
