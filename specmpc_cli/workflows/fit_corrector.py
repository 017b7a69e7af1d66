"""Fitting correctors to the store's data: loads, fits, measures the label's own noise, saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from specmpc_cli.config.schema import CorrectorConfig
from specmpc_cli.data.shards import Shard, read_columns
from specmpc_cli.engine.correctors import CorrectorDims, build_corrector
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
from specmpc_cli.workflows.store import FittedCorrector, Store, timestamp

NOISE_SAMPLE = 48  # states planned again to measure the label's noise


@dataclass(frozen=True, slots=True)
class CorrectorReport:
    """One fitted corrector and what to hold its error against."""

    arch: str
    path: Path
    dataset: Path
    fit: FitReport
    label_noise: float
    parameters: int


def fit_to_store(
    store: Store,
    bench: Workbench,
    arch: str,
    *,
    seed: int,
    shards: Sequence[Shard] | None = None,
    noise: float | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> CorrectorReport:
    """Fits one architecture to the newest dataset of the teacher, or to these shards of it, and saves it in the store.

    Args:
        noise: the label noise, where it is known already; else it is measured by planning some states again.

    Raises:
        DatasetError: no data, data of another teacher or latent size, or too few episodes.
    """
    folder, all_shards = store.newest_dataset(bench.teacher)
    shards = list(shards if shards is not None else all_shards)
    columns, group = load_tuples(shards, bench)
    config = bench.config.corrector
    dims = bench.model.dims
    torch.manual_seed(seed)
    network = build_corrector(arch, CorrectorDims(dims.latent_dim, dims.action_dim, config.width, config.history, config.layers)).to(
        bench.runtime.device
    )
    table = TupleTable(columns, group, bench.model, config.history)
    train, validation = split_by_episode(group, config.validation_share, seed)
    report = fit_corrector(network, table, train, validation, _settings(config), seed=seed, on_epoch=on_epoch)
    if noise is None:
        noise = measure_label_noise(bench, columns, seed=seed)
    provenance = {
        "arch": arch,
        "dataset": folder.name,
        "episodes": len(shards),
        "rows": len(group),
        "teacher_sha256": bench.teacher.sha256,
        "seed": seed,
        "date": timestamp(),
        "versions": versions(),
        "label_noise": round(noise, 6),
        "validation_error": round(report.best.validation_error, 6),
    }
    gate = {"metric": bench.config.speculation.metric, "accept_below": -math.inf, "replan_above": math.inf, "calibrated": False}
    path = store.save_corrector(
        network,
        bench.teacher,
        gate,
        {"corrector": config.model_dump(mode="json"), "origin": provenance},
        [asdict(line) for line in report.curve],
    )
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return CorrectorReport(arch, path, folder, report, noise, parameters)


def fitted_for_round(store: Store, bench: Workbench, arch: str, round_: int, *, seed: int) -> FittedCorrector:
    """Fits on the rounds before `round_` and returns the corrector that acts in it."""
    _, shards = store.newest_dataset(bench.teacher)
    fit_to_store(store, bench, arch, seed=seed, shards=[shard for shard in shards if shard.key[1] < round_], noise=math.nan)
    return store.corrector(bench.teacher, arch)


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


def measure_label_noise(bench: Workbench, columns: dict[str, np.ndarray], *, seed: int) -> float:
    """Mean squared difference of two labels of one state, over a sample of the dataset."""
    rows = np.random.default_rng(seed).choice(len(columns["z"]), min(NOISE_SAMPLE, len(columns["z"])), replace=False)
    z, warm_start, label = (
        torch.from_numpy(columns[name][rows]).to(bench.runtime.device) for name in ("z", "warm_start", "a_teacher_mean")
    )
    return label_noise(bench.planner, z, warm_start, label, seed=seed)


def _settings(config: CorrectorConfig) -> FitSettings:
    return FitSettings(
        epochs=config.epochs,
        patience=config.patience,
        batch_size=config.batch_size,
        lr=config.lr,
        weight_decay=config.weight_decay,
        delta_penalty=config.delta_penalty,
    )
