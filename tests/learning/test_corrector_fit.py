"""Distillation: histories rebuilt as the runner saw them, whole episodes held out, and a known function learnt."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specmpc_cli.engine.correctors import CORRECTORS, CorrectorDims, build_corrector
from specmpc_cli.errors import DatasetError
from specmpc_cli.learning.corrector_fit import FitSettings, TupleTable, fit_corrector, label_noise, split_by_episode
from tests.conftest import make_model
from tests.fakes import CountingModel, ScriptedPlanner

SETTINGS = FitSettings(epochs=30, patience=30, batch_size=64, lr=3e-3, weight_decay=0.0, delta_penalty=0.0)


def columns(rows: int, label: str = "known") -> dict[str, np.ndarray]:
    """Rows whose label is a fixed linear function of the mismatch, on top of the plan."""
    rng = np.random.default_rng(0)
    z, z_pred = (rng.random((rows, 16), dtype=np.float32) for _ in range(2))
    planned = rng.uniform(-0.4, 0.4, (rows, 2)).astype(np.float32)
    residual = (z - z_pred) @ np.linspace(-0.4, 0.4, 32, dtype=np.float32).reshape(16, 2)
    teacher = planned + residual if label == "known" else np.full_like(planned, np.nan)
    age = rng.integers(1, 6, rows).astype(np.float32)
    return {"z": z, "z_pred": z_pred, "a_plan": planned, "a_teacher_mean": teacher, "age": age}


def test_histories_end_with_the_row_itself_and_never_cross_episodes() -> None:
    group = np.array([0, 0, 0, 1, 1])
    data = columns(5)
    table = TupleTable(data, group, make_model(), history=3)
    history = table.visit(torch.arange(5)).history
    z = torch.from_numpy(data["z"])
    expected = [[None, None, 0], [None, 0, 1], [0, 1, 2], [None, None, 3], [None, 3, 4]]
    for row, slots in enumerate(expected):
        for slot, source in enumerate(slots):
            want = torch.zeros(16) if source is None else z[source]
            assert torch.equal(history[row, slot, :16], want)
    assert torch.equal(history[:, -1, 16:32], torch.from_numpy(data["z_pred"]))
    assert torch.equal(history[:, -1, 48:], torch.from_numpy(data["a_plan"]))


def test_validation_holds_out_whole_episodes() -> None:
    group = np.repeat(np.arange(10), 7)
    train, validation = split_by_episode(group, 0.2, seed=0)
    assert len(train) + len(validation) == 70
    assert set(group[train]).isdisjoint(group[validation])
    assert len(set(group[validation])) == 2
    assert np.array_equal(split_by_episode(group, 0.2, seed=0)[1], validation)


def test_one_episode_is_too_few() -> None:
    with pytest.raises(DatasetError, match="at least 2 episodes"):
        split_by_episode(np.zeros(50), 0.2, seed=0)
    assert all(len(rows) for rows in split_by_episode(np.array([0, 1, 2]), 0.9, seed=0))  # something to learn from, and to judge by


@pytest.mark.parametrize("arch", CORRECTORS)
def test_learns_a_known_correction_and_how_wrong_it_is(arch: str) -> None:
    torch.manual_seed(0)
    group = np.repeat(np.arange(40), 25)
    data = columns(1000)
    if arch == "distilled":  # it sees no plan: its label is of the real latent alone
        data["a_teacher_mean"] = 2 * data["z"][:, :2] - 1
    table = TupleTable(data, group, make_model(), history=3)
    train, validation = split_by_episode(group, 0.2, seed=0)
    corrector = build_corrector(arch, CorrectorDims(16, 2, 32, 3))
    report = fit_corrector(corrector, table, train, validation, SETTINGS, seed=0)
    assert report.best.validation_error < 0.15 * report.planned_error
    assert report.best.validation_error == min(line.validation_error for line in report.curve)
    with torch.no_grad():
        _, expected = corrector(table.visit(torch.from_numpy(validation)))
    assert float(expected.mean()) == pytest.approx(report.best.validation_error, abs=0.05)


def test_stops_early_and_keeps_the_best_weights() -> None:
    torch.manual_seed(0)
    group = np.repeat(np.arange(6), 10)
    data = columns(60)
    data["a_teacher_mean"] = np.random.default_rng(1).uniform(-1, 1, (60, 2)).astype(np.float32)  # nothing to learn
    table = TupleTable(data, group, make_model(), history=3)
    train, validation = split_by_episode(group, 0.2, seed=0)
    settings = FitSettings(epochs=200, patience=5, batch_size=16, lr=3e-3, weight_decay=0.0, delta_penalty=0.0)
    corrector = build_corrector("two-tower", CorrectorDims(16, 2, 32, 3))
    report = fit_corrector(corrector, table, train, validation, settings, seed=0)
    assert len(report.curve) == report.best.epoch + 5 < 200
    with torch.no_grad():
        visit = table.visit(torch.from_numpy(validation))
        error = ((visit.planned + corrector(visit)[0]).clamp(-1, 1) - table.label[validation]).square().mean()
    assert float(error) == pytest.approx(report.best.validation_error, rel=1e-4)


@pytest.mark.parametrize(("epochs", "batch_size"), [(1, 1000), (10, 1000), (1, 4), (5, 8)])
def test_few_steps_are_enough_to_fit(epochs: int, batch_size: int) -> None:
    """Ten steps in all once divided by zero in the learning rate's schedule."""
    group = np.repeat(np.arange(5), 10)
    table = TupleTable(columns(50), group, make_model(), history=3)
    settings = FitSettings(epochs, 99, batch_size, lr=1e-3, weight_decay=0.0, delta_penalty=0.0)
    corrector = build_corrector("two-tower", CorrectorDims(16, 2, 32, 3))
    assert len(fit_corrector(corrector, table, *split_by_episode(group, 0.2, seed=0), settings, seed=0).curve) == epochs


def test_labels_that_are_not_numbers_stop_the_fit() -> None:
    group = np.repeat(np.arange(4), 5)
    table = TupleTable(columns(20, label="nan"), group, make_model(), history=3)
    corrector = build_corrector("two-tower", CorrectorDims(16, 2, 32, 3))
    with pytest.raises(DatasetError, match="not finite in epoch 1"):
        fit_corrector(corrector, table, *split_by_episode(group, 0.3, seed=0), SETTINGS, seed=0)


def test_label_noise_is_the_squared_difference_to_a_second_plan() -> None:
    planner = ScriptedPlanner(CountingModel())  # the second plan's mean is n/100 for row n = 1, 2, ...
    noise = label_noise(planner, torch.zeros(2, 2), torch.zeros(2, 3, 1), torch.zeros(2, 1), seed=0)
    assert noise == pytest.approx((0.01**2 + 0.02**2) / 2)
