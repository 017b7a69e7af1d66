"""The best row within a loss, from episodes whose numbers are known by hand."""

from __future__ import annotations

from typing import Any

import pytest

from specmpc_cli.workflows.choose import best_within

STEPS = 10


def row(mode: str, returns: list[float], calls: int, success: list[bool] | None = None) -> dict[str, Any]:
    episodes = [
        {"return": value, "success": success[i] if success else None, "steps": STEPS, "planner_calls": calls}
        for i, value in enumerate(returns)
    ]
    return {"mode": mode, "horizon": None, "corrector": None, "success_rate": None if success is None else 0.5, "episodes": episodes}


def report(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"rows": list(rows)}


BASELINE = row("baseline", [10, 10, 10, 10], STEPS)


def test_the_most_saving_row_within_the_loss_is_chosen_on_even_episodes_and_reported_on_odd_ones() -> None:
    lucky = row("corrected", [10, 5, 10, 7], 1)  # keeps everything where it is chosen, much less where it is reported
    steady = row("naive", [9.9, 9.9, 9.9, 9.9], 5)
    best = best_within(report(BASELINE, steady, lucky), 0.02)
    assert (best["row"], best["mode"], best["episodes"]) == (2, "corrected", 2)
    assert best["return_vs_baseline"] == pytest.approx(0.6) and best["calls_saved"] == pytest.approx(0.9)
    assert best["return_vs_baseline_ci95"] == pytest.approx((0.5, 0.7))


def test_a_row_that_loses_too_much_is_not_chosen_however_much_it_saves() -> None:
    best = best_within(report(BASELINE, row("policy", [9, 9, 9, 9], 0), row("naive", [9.9] * 4, 5)), 0.02)
    assert best["mode"] == "naive"
    assert best_within(report(BASELINE, row("policy", [9, 9, 9, 9], 0)), 0.1)["mode"] == "policy"


def test_where_no_row_keeps_the_bound_it_is_the_baseline() -> None:
    best = best_within(report(BASELINE, row("naive", [9, 9, 9, 9], 1)), 0.02)
    assert (best["row"], best["calls_saved"], best["return_vs_baseline"]) == (0, 0.0, 1.0)


def test_a_baseline_without_return_proves_nothing() -> None:
    best = best_within(report(row("baseline", [0, 0, 0, 0], STEPS), row("naive", [5, 5, 5, 5], 1)), 0.5)
    assert best["row"] == 0 and best["return_vs_baseline"] is None


def test_tasks_with_success_are_judged_by_it() -> None:
    baseline = row("baseline", [0, 0, 0, 0], STEPS, success=[True] * 4)
    best = best_within(report(baseline, row("naive", [99] * 4, 1, success=[True, True, False, True])), 0.1)
    assert best["row"] == 0
