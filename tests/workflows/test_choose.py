"""The best row within a loss, from episodes whose numbers are known by hand."""

from __future__ import annotations

from typing import Any

import pytest

from specmpc_cli.cli.tables import best_line
from specmpc_cli.workflows.choose import best_within
from specmpc_cli.workflows.plots import row_label

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
    rows = report(BASELINE, row("policy", [5, 5, 5, 5], 0), row("naive", [9, 9, 9, 9], 1), row("corrected", [11, 11, 11, 11], STEPS))
    best = best_within(rows, 0.02)  # the last one saves nothing
    assert (best["row"], best["calls_saved"], best["return_vs_baseline"]) == (0, 0.0, 1.0)
    assert best["notes"] == [
        "no row that saves calls loses at most 2.0% on the episodes that choose",
        "the nearest, naive None, keeps 90.0% there and saves 90% of the calls",
    ]
    assert best_line({**rows, "best": best, "episodes": 4}, row_label).startswith("none but replanning at every step; no row that saves")


def test_a_baseline_without_return_proves_nothing() -> None:
    best = best_within(report(row("baseline", [0, 0, 0, 0], STEPS), row("naive", [5, 5, 5, 5], 1)), 0.5)
    assert best["row"] == 0 and best["return_vs_baseline"] is None
    assert best["notes"] == ["plain replanning scores 0 on average on the episodes that choose, and no share of that can be kept"]


def test_a_control_that_wins_and_scores_without_spread_are_said_to_show_little() -> None:
    constant, prior = row("naive", [10, 10, 10, 10], 2), row("policy", [10, 10, 10, 10], 0)
    best = best_within(report(BASELINE, constant, prior), 0.02)
    never, room = best["notes"]
    assert best["mode"] == "policy" and "it never plans" in never and never.endswith("of the ways that plan, naive None saves most")
    assert room == "2 episodes without any spread still leave room for 84% of others that lose everything"
    assert "no way that plans and saves does" in best_within(report(BASELINE, prior), 0.02)["notes"][0]


def test_tasks_with_success_are_judged_by_it() -> None:
    baseline = row("baseline", [0, 0, 0, 0], STEPS, success=[True] * 4)
    best = best_within(report(baseline, row("naive", [99] * 4, 1, success=[True, True, False, True])), 0.1)
    assert best["row"] == 0
    kept = best_within(report(baseline, row("naive", [0] * 4, 1, success=[True] * 4)), 0.1)
    line = best_line({**report(baseline, row("naive", [0] * 4, 1, success=[True] * 4)), "best": kept, "episodes": 4}, row_label)
    assert "for at most 10.0% lost success" in line and "of the baseline's success" in line
