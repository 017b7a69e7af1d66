"""Fitting correctors to the store's data: loads, fits, measures the label's own noise, saves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from specmpc_cli.config.schema import PlannerConfig
from specmpc_cli.data.shards import Shard, read_columns
from specmpc_cli.engine.checkpoint import CorrectorFacts
from specmpc_cli.engine.correctors import BaseCorrector, CorrectorDims, build_corrector
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.errors import DatasetError
from specmpc_cli.learning.corrector_fit import (
    Epoch,
    FitReport,
    FitSettings,
    TupleTable,
    fit_corrector,
    label_noise,
    split_by_episode,
)
from specmpc_cli.versions import versions
from specmpc_cli.workflows.acting import Workbench
from specmpc_cli.workflows.calibrate import Calibration
from specmpc_cli.workflows.store import FittedCorrector, Store, timestamp

NOISE_SAMPLE = 48  # states planned again to measure the label's noise


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted corrector and what to hold its error against."""

    network: BaseCorrector
    fit: FitReport
    shards: list[Shard]
    seed: int

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())


def fit(bench: Workbench, arch: str, shards: Sequence[Shard], *, seed: int, on_epoch: Callable[[Epoch], None] | None = None) -> Fitted:
    """Fits one architecture to these shards; nothing is saved.

    Raises:
        DatasetError: no data, data of another latent size, or too few episodes.
    """
    columns, group = load_tuples(shards, bench)
    config, dims = bench.config.corrector, bench.model.dims
    torch.manual_seed(seed)
    sizes = CorrectorDims(
        dims.latent_dim,
        dims.action_dim,
        config.width,
        config.history,
        config.layers,
        dropout=config.dropout,
        oldest_age=int(columns["age"].max()),
    )
    network = build_corrector(arch, sizes).to(bench.runtime.device)
    table = TupleTable(columns, group, bench.model, config.history)
    train, validation = split_by_episode(group, config.validation_share, seed)
    settings = FitSettings(**config.model_dump(include={field.name for field in fields(FitSettings)}))
    report = fit_corrector(network, table, train, validation, settings, seed=seed, on_epoch=on_epoch)
    return Fitted(network, report, list(shards), seed)


def uncalibrated(bench: Workbench) -> CorrectorFacts:
    """Of a corrector of this teacher whose gate always corrects and never falls back."""
    speculation = bench.config.speculation
    gate = GateRule(speculation.max_age, metric=speculation.metric)
    return CorrectorFacts(bench.teacher.sha256, gate, course=speculation.course)


def as_corrector(bench: Workbench, fitted: Fitted) -> FittedCorrector:
    """A corrector to act with that lies in no store: collection's own, between two rounds."""
    folder = fitted.shards[0].path.parent
    return FittedCorrector(fitted.network, uncalibrated(bench), "memory", folder)


def as_saved(bench: Workbench, fitted: Fitted) -> FittedCorrector:
    """The same as its file would have it, in half precision."""
    return as_corrector(bench, replace(fitted, network=copy.deepcopy(fitted.network).half().float()))


def save(store: Store, bench: Workbench, fitted: Fitted, noise: float, calibration: Calibration | None = None) -> Path:
    """Puts a fitted corrector into the store, with the data, settings and calibration that made it; → its folder."""
    facts = uncalibrated(bench)
    if calibration is not None:
        facts = replace(facts, gate=calibration.promise.rule, promised_with=bench.acts_with)
    origin = {
        "made_by": "specmpc fit-corrector",
        "dataset": fitted.shards[0].path.parent.name,
        "episodes": len(fitted.shards),
        "rows": sum(shard.rows for shard in fitted.shards),
        "teacher_sha256": bench.teacher.sha256,
        "seed": fitted.seed,
        "date": timestamp(),
        "versions": versions(),
        "label_noise": round(noise, 6),
        "validation_error": round(fitted.fit.best.validation_error, 6),
        "calibration": calibration.as_json() if calibration else None,
    }
    config = {"corrector": bench.config.corrector.model_dump(), "origin": origin}
    return store.save_corrector(fitted.network, facts, config, [asdict(line) for line in fitted.fit.curve])


def load_tuples(shards: Sequence[Shard], bench: Workbench) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The columns that fitting needs, and the episode each row belongs to [rows]. Raises DatasetError if they do not fit the teacher."""
    if not shards:
        raise DatasetError(f"the dataset is empty; make some data with 'specmpc collect --task {bench.spec.task}'")
    columns = read_columns(shards, ["z", "z_pred", "a_plan", "a_teacher_mean", "age", "warm_start"])
    have, want = columns["z"].shape[1], bench.model.dims.latent_dim
    if have != want:
        raise DatasetError(f"the dataset's latents have {have} dimensions, the teacher's {want}; collect again")
    if not all(np.isfinite(values).all() for values in columns.values()):
        raise DatasetError("the dataset holds values that are not finite; collect it again")
    return columns, np.repeat(np.arange(len(shards)), [shard.rows for shard in shards])


def measure_label_noise(bench: Workbench, shards: Sequence[Shard], *, seed: int) -> float:
    """Mean squared difference of two labels of one state, over a sample of the shards, with the planner that labelled them."""
    columns, _ = load_tuples(shards, bench)
    rows = np.random.default_rng(seed).choice(len(columns["z"]), min(NOISE_SAMPLE, len(columns["z"])), replace=False)
    z, warm_start, label = (
        torch.from_numpy(columns[name][rows]).to(bench.runtime.device) for name in ("z", "warm_start", "a_teacher_mean")
    )
    try:
        planner = bench.planner_for(PlannerConfig(**shards[0].planner))
    except ValidationError:
        raise DatasetError(
            f"{shards[0].path} was labelled by a planner with settings that this version does not know; collect again"
        ) from None
    return label_noise(planner, z, warm_start, label, seed=seed)
