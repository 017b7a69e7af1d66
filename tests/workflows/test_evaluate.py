"""Rows of a report from episodes whose numbers are known by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.runner import SpeculativeRunner
from specmpc_cli.runtime import Purpose, choose_runtime
from specmpc_cli.types import Decision, ReplanReason
from specmpc_cli.workflows.compare import REQUIRABLE, Requirement, parse_requirements
from specmpc_cli.workflows.evaluate import make_row, measure_latency
from specmpc_cli.workflows.plots import pareto_front
from specmpc_cli.workflows.rollout import Episode, EpisodeStats
from specmpc_cli.workflows.ways import Mode, Way
from tests.fakes import CountingModel, ScriptedPlanner, counting_envs

GATE = GateRule(4, accept_below=math.inf)
LATENCY = np.arange(1.0, 101.0)
A, C, R = Decision.ACCEPT, Decision.CORRECT, Decision.REPLAN


def episode(index: int, rewards: list[float], decisions: list[int], *, success: bool = False) -> EpisodeStats:
    """Every replan but the first is a fallback."""
    stats = EpisodeStats(Episode(Purpose.COMPARE, 0, index), success=success)
    age = 0
    for step, (reward, decision) in enumerate(zip(rewards, decisions, strict=True)):
        stats.met_ages.append(age + 1 if step else 0)
        age = 0 if decision == R else age + 1
        reason = ReplanReason.NONE if decision != R else ReplanReason.MISMATCH if step else ReplanReason.FIRST
        stats.rewards.append(reward)
        stats.decisions.append(decision)
        stats.reasons.append(reason)
        stats.ages.append(age)
        stats.mismatches.append(math.nan if step == 0 else 0.1 * step + index)
        stats.correction_norms.append(0.5 if decision == C else 0.0)
        stats.planner_iterations.append(6 if decision == R else 0)
    return stats


EPISODES = [episode(0, [1, 2, 3, 4], [R, A, C, R]), episode(1, [5, 5, 5, 5], [R, C, C, A], success=True)]
BASELINE = [episode(0, [4, 4, 4, 4], [R] * 4, success=True), episode(1, [6, 6, 6, 6], [R] * 4, success=True)]


def test_a_rows_numbers() -> None:
    row = make_row(Way(Mode.NAIVE, 4), EPISODES, BASELINE, LATENCY, use_success=False, gate=GATE)
    assert (row["return_mean"], row["return_median"], row["return_cvar05"]) == (15, 15, 10)
    assert row["gate"] == {"horizon": 4, "accept_below": None, "replan_above": None, "replan_above_error": None, "metric": "l2"}
    assert row["return_vs_baseline"] == pytest.approx(30 / 40)
    assert (row["planner_calls_per_episode"], row["planner_iterations_per_episode"], row["calls_saved"]) == (1.5, 9, 1 - 3 / 8)
    assert (row["accept_rate"], row["correct_rate"], row["replan_rate"], row["fallback_rate"]) == (2 / 8, 3 / 8, 3 / 8, 1 / 8)
    assert row["correction_norm_mean"] == 0.5 and row["success_rate"] is None
    assert row["steps_per_plan_hist"] == [1, 0, 1, 1]
    assert (row["step_ms_p50"], row["control_hz"]) == (50.5, pytest.approx(1000 / 50.5))
    ages = {line["age"]: line for line in row["by_age"]}
    assert {age: line["count"] for age, line in ages.items()} == {0: 3, 1: 2, 2: 2, 3: 1}
    assert ages[1]["reward_mean"] == 3.5 and ages[1]["mismatch_mean"] == pytest.approx(0.1 + 0.5)
    assert ages[0]["mismatch_mean"] is None
    # the step that fell back counts at the age at which its plan met it: leaving it out would hide the worst
    assert ages[3]["mismatch_mean"] == pytest.approx(0.3 + 0.5) and ages[3]["count"] == 1
    assert ages[2]["correction_norm_mean"] == 0.5 and ages[3]["correction_norm_mean"] == 0


def test_tasks_with_success_are_compared_by_success() -> None:
    row = make_row(Way(Mode.NAIVE, 4), EPISODES, BASELINE, LATENCY, use_success=True, gate=GATE)
    assert (row["success_rate"], row["return_vs_baseline"]) == (0.5, 0.5)
    assert [line["success"] for line in row["episodes"]] == [False, True]


@pytest.mark.parametrize(("horizon", "steps", "plans"), [(1, 60, 60), (7, 63, 9), (12, 60, 5), (100, 100, 1)])
def test_latency_is_of_whole_plans_each_with_its_planner_call(horizon: int, steps: int, plans: int) -> None:
    model = CountingModel()
    planners = []

    def actor(way: Way) -> SpeculativeRunner:
        planners.append(ScriptedPlanner(model))
        return SpeculativeRunner(model, planners[-1], GateRule(horizon, accept_below=math.inf))  # type: ignore[arg-type]

    bench: Any = SimpleNamespace(actor=actor, runtime=choose_runtime("cpu", "fp32"))
    assert len(measure_latency(bench, Way(Mode.NAIVE, horizon), counting_envs(2, decisions=300), seed=0)) == steps
    assert len(planners) == 2 and len(planners[1].calls) == plans
    short = counting_envs(2, decisions=7)  # several episodes, each from its first step on
    assert len(measure_latency(bench, Way(Mode.NAIVE, horizon), short, seed=0)) >= steps


def test_requirements() -> None:
    both = parse_requirements("calls_saved >= 0.3, return_vs_baseline<0.8")
    row = make_row(Way(Mode.NAIVE, 4), EPISODES, BASELINE, LATENCY, use_success=False, gate=GATE)
    assert all(requirement.holds(row) for requirement in both)
    assert not Requirement("success_rate", ">=", 0.0).holds(row)  # null meets nothing
    assert all(row[field] is None or isinstance(row[field], float | int) for field in REQUIRABLE)


def test_the_front_keeps_what_nothing_beats_and_leaves_controls_out() -> None:
    def row(mode: str, saved: float, ratio: float | None) -> dict[str, object]:
        return {"mode": mode, "calls_saved": saved, "return_vs_baseline": ratio}

    baseline, good, worse, far = row("baseline", 0, 1), row("corrected", 0.8, 0.95), row("naive", 0.7, 0.9), row("naive", 0.9, 0.5)
    rows = [baseline, row("policy", 1.0, 0.7), row("distilled", 1.0, 1.1), worse, far, good, row("naive", 0.95, None)]
    assert pareto_front(rows) == [baseline, good, far]
