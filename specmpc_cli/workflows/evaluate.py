"""Evaluating one way of acting: returns from batched episodes, latency from a pass of its own, all of it as one row of a report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from specmpc_cli.engine.gate import GateRule
from specmpc_cli.envs.vector import VectorEnv
from specmpc_cli.runtime import Purpose
from specmpc_cli.types import Decision, ReplanReason
from specmpc_cli.versions import commit, versions
from specmpc_cli.workflows.acting import Workbench
from specmpc_cli.workflows.rollout import Episode, EpisodeStats, Transition, rollout
from specmpc_cli.workflows.statistics import cvar05, mean_ci95, ratio, ratio_ci95
from specmpc_cli.workflows.store import timestamp
from specmpc_cli.workflows.ways import Mode, Way

REPORT_SCHEMA = 1
LATENCY_STEPS, LATENCY_WARM_UP = 60, 6  # env steps timed per way at least, and steps before them that are not

Report = dict[str, Any]
Row = dict[str, Any]


def episodes_of(purpose: Purpose, seed: int, count: int) -> list[Episode]:
    """Episodes 0 .. count−1 of a purpose and seed; the same ones for every way, so that differences are paired."""
    return [Episode(purpose, seed, index) for index in range(count)]


def evaluate(
    bench: Workbench,
    way: Way,
    envs: VectorEnv,
    episodes: list[Episode],
    *,
    on_step: Callable[[Transition], None] | None = None,
) -> list[EpisodeStats]:
    """Runs the episodes in one way of acting."""
    return rollout(bench.actor(way), envs, episodes, device=bench.runtime.device, on_step=on_step)


def measure_latency(bench: Workbench, way: Way, envs: VectorEnv, seed: int) -> np.ndarray:
    """Milliseconds from observation to action [steps], one environment at a time, after a warm-up that is not timed.

    From an episode's first step on, and over whole plans, so that planner calls have the share among the steps that they have in use; over
    several episodes where one is too short.
    """
    plan_steps = way.horizon or 1
    alone = VectorEnv(envs.envs[:1])

    def first_steps(count: int) -> list[float]:
        times: list[float] = []
        for number in range(count):
            missing = math.ceil((count - len(times)) / plan_steps) * plan_steps
            if missing <= 0:
                break
            episode = Episode(Purpose.TUNE, seed, number)
            rollout(bench.actor(way), alone, [episode], device=bench.runtime.device, max_steps=missing, on_latency=times.append)
        return times

    first_steps(LATENCY_WARM_UP)
    return np.array(first_steps(math.ceil(LATENCY_STEPS / plan_steps) * plan_steps))


def scores_of(stats: Sequence[EpisodeStats], use_success: bool) -> np.ndarray:
    """What ways are compared by [episodes]: success where the task has it, else return."""
    return np.array([float(stat.success) if use_success else stat.episode_return for stat in stats])


def calls_saved(stats: Sequence[EpisodeStats]) -> float:
    """1 − planner calls / env steps, over all episodes."""
    return 1 - sum(stat.planner_calls for stat in stats) / sum(stat.env_steps for stat in stats)


def make_row(
    way: Way,
    stats: list[EpisodeStats],
    baseline: list[EpisodeStats] | None,
    latency: np.ndarray,
    *,
    use_success: bool,
    gate: GateRule | None,
) -> Row:
    """One row of a report (docs/json.md). `baseline` None leaves the comparison empty."""
    returns, success = scores_of(stats, use_success=False), scores_of(stats, use_success=True)
    steps = sum(stat.env_steps for stat in stats)
    calls = sum(stat.planner_calls for stat in stats)
    row: Row = {
        "mode": way.mode.value,
        "horizon": way.horizon,
        "corrector": way.corrector.arch if way.corrector else None,
        "gate": gate.as_json() if gate else None,
        "return_mean": float(returns.mean()),
        "return_ci95": mean_ci95(returns),
        "return_median": float(np.median(returns)),
        "return_cvar05": cvar05(returns),
        "return_vs_baseline": None,
        "return_vs_baseline_ci95": None,
        "success_rate": float(success.mean()) if use_success else None,
        "termination_rate": float(np.mean([stat.terminated for stat in stats])),
        "env_steps_per_episode": steps / len(stats),
        "planner_calls_per_episode": calls / len(stats),
        "planner_iterations_per_episode": sum(sum(stat.planner_iterations) for stat in stats) / len(stats),
        "calls_saved": calls_saved(stats),
        **_gate_rates(way, stats, steps),
        "step_ms_p50": float(np.quantile(latency, 0.5)),
        "step_ms_p99": float(np.quantile(latency, 0.99)),
        "control_hz": 1000 / float(latency.mean()),
        "steps_per_plan_hist": _steps_per_plan(way, stats),
        "by_age": _by_age(way, stats),
        "episodes": [
            {
                "seed": stat.episode.env_seed,
                "return": stat.episode_return,
                "success": stat.success if use_success else None,
                "steps": stat.env_steps,
                "planner_calls": stat.planner_calls,
            }
            for stat in stats
        ],
    }
    if baseline is not None:
        score, reference = success if use_success else returns, scores_of(baseline, use_success)
        row["return_vs_baseline"] = ratio(score, reference)
        row["return_vs_baseline_ci95"] = ratio_ci95(score, reference)
    return row


def trace_of(stats: EpisodeStats) -> Row:
    """An episode step by step: `decisions`, and `mismatches`, null where no plan predicted the step."""
    mismatches = [mismatch if math.isfinite(mismatch) else None for mismatch in stats.mismatches]
    return {"decisions": list(stats.decisions), "mismatches": mismatches}


def _gate_rates(way: Way, stats: list[EpisodeStats], steps: int) -> Row:
    """Shares of all env steps by decision; null for policy, which decides nothing."""
    names = ("accept_rate", "correct_rate", "replan_rate", "fallback_rate", "correction_norm_mean")
    if way.mode is Mode.POLICY:
        return dict.fromkeys(names)
    decisions = Counter(decision for stat in stats for decision in stat.decisions)
    fallbacks = sum(reason == ReplanReason.MISMATCH for stat in stats for reason in stat.reasons)
    corrections = [
        norm for stat in stats for norm, decision in zip(stat.correction_norms, stat.decisions, strict=True) if decision == Decision.CORRECT
    ]
    rates = [decisions[decision] / steps for decision in (Decision.ACCEPT, Decision.CORRECT, Decision.REPLAN)]
    return dict(zip(names, [*rates, fallbacks / steps, _mean_or_none(np.array(corrections)) if corrections else 0.0], strict=True))


def _steps_per_plan(way: Way, stats: list[EpisodeStats]) -> list[int]:
    """Plans by the env steps executed from them: entry i counts plans of i + 1 steps. Empty for modes that never plan."""
    if not way.mode.plans:
        return []
    counts = Counter(length for stat in stats for length in stat.steps_per_plan)
    return [counts[length] for length in range(1, max(counts) + 1)]


def _by_age(way: Way, stats: list[EpisodeStats]) -> list[Row]:
    """Reward, mismatch and correction by the age of the plan the action came from; empty for modes that never plan."""
    if not way.mode.plans:
        return []

    def flat(name: str) -> np.ndarray:
        return np.array([value for stat in stats for value in getattr(stat, name)])

    ages, met_ages, mismatches = flat("ages"), flat("met_ages"), flat("mismatches")
    rewards, norms, corrected = flat("rewards"), flat("correction_norms"), flat("decisions") == Decision.CORRECT
    rows = []
    for age in np.unique(ages):
        at = ages == age
        rows.append(
            {
                "age": int(age),
                "count": int(at.sum()),
                "reward_mean": float(rewards[at].mean()),
                # Over all steps that a plan of this age met, those that then replanned included. At age 0 no prediction is met.
                "mismatch_mean": _mean_or_none(mismatches[met_ages == age]) if age else None,
                "correction_norm_mean": _mean_or_none(norms[at & corrected]) or 0.0,
            }
        )
    return rows


def _mean_or_none(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def make_report(bench: Workbench, seed: int, episodes: int, rows: list[Row]) -> Report:
    """The document of `eval --json` and `compare --json` (docs/json.md)."""
    return {
        "schema": REPORT_SCHEMA,
        "task": bench.spec.task,
        "teacher": {"source": bench.teacher.source, "sha256": bench.teacher.sha256},
        **bench.runtime.facts,
        "seed": seed,
        "episodes": episodes,
        "config": bench.config.acting_settings(),
        "versions": versions(),
        "commit": commit(),
        "date": timestamp(),
        "rows": rows,
    }
