"""Reports as Rich tables. Knows the shape of reports, runs nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from specmpc_cli.workflows.plots import computed_on, scored_by

Row = dict[str, Any]


def comparison_table(report: dict[str, Any], label: Any) -> Table:
    """Rows of `compare` and `eval`; `label(row)` names a way of acting."""
    success = any(row["success_rate"] is not None for row in report["rows"])
    refines = "refine" in report["config"]  # else iterations are calls times a constant
    table = Table(box=box.SIMPLE_HEAD, title=_title(report), title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("way of acting", no_wrap=True)
    extra = [["success"] if success else [], ["iterations"] if refines else []]
    for name in ("return", "95 % CI", *extra[0], "vs base", "95 % CI ", "calls", "saved", *extra[1]):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("accept/correct/replan", "p50 ms", "p99 ms", "Hz"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["rows"]:
        cells = [label(row), f"{row['return_mean']:.1f}", _interval(row["return_ci95"], 1, "")]
        if success:
            cells.append(percent(row["success_rate"]))
        cells += [percent(row["return_vs_baseline"], 1), _interval(row["return_vs_baseline_ci95"], 100, " %")]
        cells += [f"{row['planner_calls_per_episode']:.1f}", percent(row["calls_saved"])]
        if refines:
            cells.append(f"{row['planner_iterations_per_episode']:.0f}")
        rates = [row[name] for name in ("accept_rate", "correct_rate", "replan_rate")]
        cells.append("–" if rates[0] is None else " / ".join(f"{rate:.0%}" for rate in rates))
        cells += [f"{row['step_ms_p50']:.1f}", f"{row['step_ms_p99']:.1f}", f"{row['control_hz']:.0f}"]
        table.add_row(*cells)
    return table


def best_line(report: dict[str, Any], label: Any) -> str:
    """The row that was chosen on half of the episodes, with its figures on the other half, and what it does not show."""
    best, what = report["best"], scored_by(report)
    if best["row"] == 0:
        return "; ".join(["none but replanning at every step", *best["notes"]])
    others = report["episodes"] - best["episodes"]
    kept = f"{percent(best['return_vs_baseline'], 1)} ({_interval(best['return_vs_baseline_ci95'], 100, ' %')}) of the baseline's {what}"
    line = (
        f"{label(report['rows'][best['row']])}, chosen on {others} episodes for at most {best['max_return_loss']:.1%} lost {what}; "
        f"on the other {best['episodes']} it keeps {kept} and saves {percent(best['calls_saved'])} of the calls"
    )
    return "; ".join([line, *best["notes"]])


def by_age_table(report: dict[str, Any], label: Any) -> Table:
    """What happens as plans age, for each way of acting."""
    table = Table(box=box.SIMPLE_HEAD, title="by age of the plan", title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("way of acting", no_wrap=True)
    for name in ("age", "steps", "reward", "mismatch", "correction"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["rows"]:
        for index, line in enumerate(row["by_age"]):
            name = label(row) if index == 0 else ""
            means = (_number(line[column]) for column in ("reward_mean", "mismatch_mean", "correction_norm_mean"))
            table.add_row(name, str(line["age"]), str(line["count"]), *means, end_section=index == len(row["by_age"]) - 1)
    return table


def benchmark_table(report: dict[str, Any]) -> Table:
    """Our path beside the plain one, and the arithmetic floor."""
    title = f"{report['machine']} · {computed_on(report)}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("what", no_wrap=True)
    for name in ("size", "batch", "ours ms", "plain ms", "ratio", "GFLOP", "floor ms", "ours / floor", "pairs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["rows"]:
        table.add_row(
            row["what"],
            f"{row['size']} M",
            str(row["batch"]),
            *(f"{row[name]:.2f}" for name in ("ours_ms", "plain_ms")),
            f"{row['ratio']:.2f} ×",
            f"{row['gflop']:.3g}",
            f"{row['floor_ms']:.2f}",
            f"{row['ours_ms'] / row['floor_ms']:.1f} ×",
            str(row["pairs"]),
        )
    return table


def fit_table(fitted: Sequence[Any], noise: float) -> Table:
    """Fitted correctors beside the errors to hold them against, and their learning curves."""
    title = "mean squared error per action dimension, on held-out episodes"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("corrector", no_wrap=True)
    for name in ("validation", "train", "plan as it is", "policy prior", "label noise", "epochs", "rows", "parameters"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("validation by epoch", no_wrap=True)
    for one in fitted:
        fit = one.fit
        table.add_row(
            one.network.arch,
            f"{fit.best.validation_error:.4f}",
            f"{fit.best.train_error:.4f}",
            f"{fit.planned_error:.4f}",
            f"{fit.prior_error:.4f}",
            f"{noise:.4f}",
            f"{fit.best.epoch} of {len(fit.curve)}",
            f"{fit.train_rows + fit.validation_rows}",
            f"{one.parameters / 1e6:.2f} M",
            sparkline([line.validation_error for line in fit.curve]),
        )
    return table


def calibration_table(calibrated: Mapping[str, Any]) -> Table:
    """The gates that were tried on tune episodes, and those that kept their promise on fresh ones, by architecture."""
    title = "gates in closed loop, paired with plain replanning"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("corrector", no_wrap=True)
    table.add_column("a plan lives while", no_wrap=True)
    for name in ("episodes", "calls saved", "kept", "at least", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for arch, calibration in calibrated.items():
        for kind, trials in (("tried", calibration.tuned), ("promised", [calibration.promise])):
            for trial in trials:
                shares = [percent(share, 1) for share in (trial.calls_saved, trial.kept, trial.at_least)]
                style = "bold" if kind == "promised" else None
                table.add_row(arch, trial.rule.label, str(trial.episodes), *shares, kind, style=style)
    return table


def tasks_table(tasks: Sequence[Row], checked: bool) -> Table:
    """The task table; with speeds and failures once they were checked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "suite"):
        table.add_column(name, no_wrap=True)
    for name in ("obs", "action", "decisions"):
        table.add_column(name, justify="right")
    table.add_column("teacher", no_wrap=True)
    table.add_column("state", overflow="fold")
    if checked:
        table.add_column("steps/s", justify="right")
    for task in tasks:
        teacher = task["teacher"]
        known = "–" if teacher is None else f"{teacher['size'] or '?'}M, {_number(teacher['return'])}"
        if task["error"]:
            state = f"{'failed' if task['ok'] is False else 'not ready'}: {task['error']}"
        else:
            state = "ok" if task["ok"] else "ready" if task["installed"] else "not installed"
        cells = [
            task["task"],
            task["suite"],
            _number(task["obs_dim"]),
            _number(task["action_dim"]),
            _number(task["decisions"]),
            known,
            Text(state),
        ]
        table.add_row(*cells, *([_speed(task["steps_per_s"])] if checked else []))
    return table


def sparkline(values: Sequence[float], width: int = 30) -> str:
    """Values as a line of blocks, the highest full; longer series are thinned out."""
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round((value - low) / span * 7)] for value in values)


def percent(value: float | None, digits: int = 0) -> str:
    """A share, or a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}%}"


def _speed(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"  # without an exponent


def _interval(interval: Sequence[float] | None, scale: float, unit: str) -> str:
    """`97.1–99.8 %`; without decimals where the numbers are large."""
    if interval is None:
        return "–"
    low, high = (bound * scale for bound in interval)
    digits = 1 if unit or max(abs(low), abs(high)) < 100 else 0
    return f"{low:.{digits}f}–{high:.{digits}f}{unit}"


def _title(report: dict[str, Any]) -> str:
    return f"{report['task']} · {report['episodes']} episodes, seed {report['seed']} · {computed_on(report)}"
