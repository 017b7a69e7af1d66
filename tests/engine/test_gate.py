"""The gate's decisions, row by row."""

from __future__ import annotations

import math

import pytest
import torch

from specmpc_cli.engine.gate import METRICS, GateRule, decide
from specmpc_cli.types import Decision, ReplanReason

A, C, R = Decision.ACCEPT, Decision.CORRECT, Decision.REPLAN


def run(rule: GateRule, mismatch: list[float], age: list[int], first: list[bool], error: list[float] | None = None) -> tuple[list, list]:
    decision, reason = decide(torch.tensor(mismatch), torch.tensor(error or [0.0] * len(age)), torch.tensor(age), torch.tensor(first), rule)
    return decision.tolist(), reason.tolist()


def test_the_three_bands_and_their_borders() -> None:
    rule = GateRule(horizon=10, accept_below=0.2, replan_above=0.5)
    decision, reason = run(rule, [0.1, 0.2, 0.3, 0.5, 0.6], [1] * 5, [False] * 5)
    assert decision == [A, A, C, C, R]
    assert reason == [ReplanReason.NONE] * 4 + [ReplanReason.MISMATCH]


def test_first_beats_exhausted_beats_mismatch() -> None:
    rule = GateRule(horizon=3, accept_below=0.2, replan_above=0.5)
    _, reason = run(rule, [9.0, 9.0, 9.0], [3, 3, 2], [True, False, False])
    assert reason == [ReplanReason.FIRST, ReplanReason.EXHAUSTED, ReplanReason.MISMATCH]


def test_before_calibration_corrected_always_corrects_and_naive_always_accepts() -> None:
    mismatch, age, first = [0.0, 5.0, 1e9], [1, 2, 3], [False] * 3
    assert run(GateRule(horizon=9), mismatch, age, first)[0] == [C, C, C]
    assert run(GateRule(horizon=9, accept_below=math.inf), mismatch, age, first)[0] == [A, A, A]


def test_a_mismatch_that_is_not_a_number_replans() -> None:
    assert run(GateRule(horizon=9), [math.nan], [1], [False]) == ([R], [ReplanReason.MISMATCH])


def test_an_expected_error_above_its_threshold_replans_unless_the_plan_is_accepted() -> None:
    rule = GateRule(horizon=9, accept_below=0.1, replan_above_error=0.3)
    assert run(rule, [0.2, 0.2, 0.05], [1] * 3, [False] * 3, [0.2, 0.4, 0.4])[0] == [C, R, A]


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_zero_only_at_equality_and_symmetric(name: str) -> None:
    x, y = torch.softmax(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 4.0]]), -1)
    metric = METRICS[name]
    assert metric(x, x).item() == pytest.approx(0, abs=1e-6)
    assert metric(x, y).item() > 0.05
    assert metric(x, y).item() == pytest.approx(metric(y, x).item())
