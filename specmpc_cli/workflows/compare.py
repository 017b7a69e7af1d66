"""Comparing ways of acting on the same episodes: return against planner calls saved, paired with plain replanning."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from specmpc_cli.engine.correctors import DistilledPolicy
from specmpc_cli.envs.vector import VectorEnv
from specmpc_cli.errors import ConfigError
from specmpc_cli.files import write_whole
from specmpc_cli.runtime import Purpose
from specmpc_cli.workflows.acting import Workbench
from specmpc_cli.workflows.evaluate import Report, Row, episodes_of, evaluate, make_report, make_row, measure_latency, trace_of
from specmpc_cli.workflows.plots import plot_front
from specmpc_cli.workflows.rollout import Transition
from specmpc_cli.workflows.store import FittedCorrector, Store
from specmpc_cli.workflows.ways import Mode, Way, adaptive_way

_OPERATORS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def ways_of(bench: Workbench, horizons: Sequence[int], correctors: Sequence[FittedCorrector]) -> list[Way]:
    """The rows of a comparison, in order: baseline, policy, distilled, naive k, corrected k of each architecture, adaptive of each
    calibrated one.

    Horizon 1 of naive and corrected equals the baseline and is not listed again.
    """
    longer = [horizon for horizon in dict.fromkeys(horizons) if horizon > 1]
    ways = [Way(Mode.BASELINE, 1), Way(Mode.POLICY)]
    ways += [Way(Mode.DISTILLED, None, corrector) for corrector in correctors if corrector.arch == DistilledPolicy.arch]
    ways += [Way(Mode.NAIVE, horizon) for horizon in longer]
    ways += [Way(Mode.CORRECTED, horizon, corrector) for corrector in correctors for horizon in longer]
    ways += [adaptive_way(corrector, bench.config, None, None) for corrector in correctors if corrector.facts.calibrated]
    return ways


def compare(
    bench: Workbench,
    ways: Sequence[Way],
    *,
    episodes: int,
    seed: int,
    num_envs: int,
    traces: bool = False,
    on_way: Callable[[int, Way], None] | None = None,
    on_step: Callable[[Transition], None] | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> Report:
    """Runs every way on the same `compare` episodes and times each in a pass of its own. `ways` begins with the baseline.

    `traces` adds to each row what was decided and met at each step of the first episode.
    """
    assert ways[0].mode is Mode.BASELINE
    envs = VectorEnv.make(bench.spec.task, min(num_envs, episodes))
    runs = episodes_of(Purpose.COMPARE, seed, episodes)
    rows: list[Row] = []
    baseline = None
    try:
        for index, way in enumerate(ways):
            if on_way is not None:
                on_way(index, way)
            stats = evaluate(bench, way, envs, runs, on_step=on_step)
            baseline = baseline or stats
            latency = measure_latency(bench, way, envs, seed)
            rows.append(make_row(way, stats, baseline, latency, use_success=bench.spec.has_success, gate=bench.gate(way)))
            if traces:
                rows[-1]["trace"] = trace_of(stats[0])
            if on_row is not None:
                on_row(rows[-1])
    finally:
        envs.close()
    return make_report(bench, seed, episodes, rows)


def evaluate_one(
    bench: Workbench,
    way: Way,
    *,
    episodes: int,
    seed: int,
    num_envs: int,
    on_step: Callable[[Transition], None] | None = None,
) -> Report:
    """One way on the `compare` episodes, without a baseline beside it: the report of `eval`."""
    envs = VectorEnv.make(bench.spec.task, min(num_envs, episodes))
    try:
        stats = evaluate(bench, way, envs, episodes_of(Purpose.COMPARE, seed, episodes), on_step=on_step)
        baseline = stats if way.mode is Mode.BASELINE else None
        latency = measure_latency(bench, way, envs, seed)
        row = make_row(way, stats, baseline, latency, use_success=bench.spec.has_success, gate=bench.gate(way))
    finally:
        envs.close()
    return make_report(bench, seed, episodes, [row])


def keep_results(store: Store, report: Report) -> tuple[Path, Path]:
    """Writes the report and its plot into the store's results; → their paths."""
    folder, name = store.results_folder(), f"compare-{report['date']}"
    earlier = len(list(folder.glob(f"{name}*.json")))  # of the same second
    stem = folder / (f"{name}-{earlier + 1}" if earlier else name)
    as_json, as_png = stem.with_suffix(".json"), stem.with_suffix(".png")
    write_whole(as_json, json.dumps(report, indent=1) + "\n")
    plot_front(report, as_png)
    return as_json, as_png


@dataclass(frozen=True, slots=True)
class Requirement:
    """One condition of `--require`."""

    field: str
    sign: str
    bound: float

    def holds(self, row: Row) -> bool:
        """False where the row has no such value."""
        value = row[self.field]
        return value is not None and _OPERATORS[self.sign](value, self.bound)


# Fields of a row that a requirement may name: its numbers.
REQUIRABLE = (
    "return_mean", "return_median", "return_cvar05", "return_vs_baseline", "success_rate", "termination_rate", "env_steps_per_episode",
    "planner_calls_per_episode", "planner_iterations_per_episode", "calls_saved", "accept_rate", "correct_rate", "replan_rate",
    "fallback_rate", "correction_norm_mean", "step_ms_p50", "step_ms_p99", "control_hz",
)  # fmt: skip


def parse_requirements(text: str) -> list[Requirement]:
    """`calls_saved>=0.5,return_vs_baseline>=0.95` → requirements on numeric fields of a row. Raises ConfigError."""
    requirements = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*([-+]?[0-9.]+(?:[eE][-+]?\d+)?)\s*", part)
        if match is None:
            raise ConfigError(f"--require takes conditions such as calls_saved>=0.5, separated by commas; got {part!r}")
        if match[1] not in REQUIRABLE:
            raise ConfigError(f"--require: there is no field {match[1]}; there are {', '.join(REQUIRABLE)}")
        try:
            requirements.append(Requirement(match[1], match[2], float(match[3])))
        except ValueError:
            raise ConfigError(f"--require: {match[3]!r} is not a number") from None
    return requirements


def rows_meeting(report: Report, requirements: Sequence[Requirement]) -> list[Row]:
    """The rows that meet all requirements."""
    return [row for row in report["rows"] if all(requirement.holds(row) for requirement in requirements)]
