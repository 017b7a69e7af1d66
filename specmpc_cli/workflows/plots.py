"""Plots: return against planner calls saved, with intervals and the Pareto front; and training curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specmpc_cli.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

CONTROLS = ("policy", "distilled")  # modes that never plan
_MARKS = {"baseline": "o", "policy": "X", "naive": "s", "corrected": "D", "adaptive": "P", "distilled": "*"}
_COLOURS = {None: "#6b7280", "two-tower": "#2563eb", "temporal": "#d97706", "distilled": "#059669"}
_OFFSETS = {None: -12.0, "two-tower": -4.0, "temporal": 4.0, "distilled": 12.0}  # points to the side


def pareto_front(rows: list[Row]) -> list[Row]:
    """The rows that no other beats in both calls saved and return, by calls saved. Rows without a ratio, and controls, do not count.

    Policy and distilled make no calls at all: they are controls, not ways of planning less.
    """
    entries = [row for row in rows if row["return_vs_baseline"] is not None and row["mode"] not in CONTROLS]
    front = [
        row
        for row in entries
        if not any(
            other["calls_saved"] >= row["calls_saved"]
            and other["return_vs_baseline"] >= row["return_vs_baseline"]
            and (other["calls_saved"], other["return_vs_baseline"]) != (row["calls_saved"], row["return_vs_baseline"])
            for other in entries
        )
    ]
    return sorted(front, key=lambda row: row["calls_saved"])


def row_label(row: Row) -> str:
    """`corrected 6 (two-tower)`."""
    horizon = f" {row['horizon']}" if row["mode"] in ("naive", "corrected") else ""
    corrector = f" ({row['corrector']})" if row["corrector"] and row["mode"] != "distilled" else ""
    return f"{row['mode']}{horizon}{corrector}"


def computed_on(report: dict[str, Any]) -> str:
    """`cpu, fp32, compiled, 2 threads`, of any report that says how it was computed."""
    compiled = "compiled" if report["compiled"] else "eager"
    return f"{report['device']}, {report['dtype']}, {compiled}, {report['threads']} threads"


def scored_by(report: dict[str, Any]) -> str:
    """What rows are compared by: `success` where the task has it, else `return`."""
    return "return" if report["rows"][0]["success_rate"] is None else "success"


def row_kind(row: Row) -> str:
    """`corrected (two-tower)`: what rows of all horizons have in common."""
    return row_label({**row, "horizon": ""}).replace("  ", " ").strip()


def beside(row: Row) -> float:
    """How many points beside its place a row is drawn. Ways with the same horizon save the same calls: so they do not hide each other."""
    return _OFFSETS.get(row["corrector"], 0.0) if row["mode"] in ("naive", "corrected") else 0.0


def plot_front(report: dict[str, Any], path: Path) -> None:
    """Draws the comparison as a PNG: return ratio with its paired interval against calls saved, and the Pareto front."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter
    from matplotlib.transforms import ScaledTranslation

    rows = [row for row in report["rows"] if row["return_vs_baseline"] is not None]
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1.0, color="#9ca3af", linewidth=1, linestyle=":")
    front = pareto_front(rows)
    axes.plot(
        [row["calls_saved"] for row in front],
        [row["return_vs_baseline"] for row in front],
        color="#111827",
        linewidth=1.2,
        alpha=0.5,
        label="Pareto front",
    )
    labelled = set()
    for row in rows:
        low, high = row["return_vs_baseline_ci95"] or (row["return_vs_baseline"],) * 2
        ratio, kind = row["return_vs_baseline"], row_kind(row)
        points = beside(row)
        moved = ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)
        axes.errorbar(
            row["calls_saved"],
            ratio,
            yerr=[[max(ratio - low, 0.0)], [max(high - ratio, 0.0)]],
            marker=_MARKS[row["mode"]],
            markersize=9 if row["mode"] not in CONTROLS else 12,
            color=_COLOURS[row["corrector"]],
            markeredgecolor="white",
            capsize=3,
            elinewidth=1.2,
            linestyle="none",
            label=None if kind in labelled else kind,
            transform=axes.transData + moved,
        )
        labelled.add(kind)
        if row["mode"] in ("naive", "corrected"):
            at = (row["calls_saved"], low)
            axes.annotate(str(row["horizon"]), at, xytext=(points, -12), textcoords="offset points", ha="center", fontsize=8)
    axes.set_title(f"{report['task']}: {report['episodes']} paired episodes, 95 % bootstrap intervals", loc="left", fontsize=11)
    axes.set_xlabel("planner calls saved (numbers: env steps per plan; ways of one length stand side by side)")
    axes.set_ylabel(f"{scored_by(report)} relative to replanning at every step")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlim(-0.04, 1.04)
    # Points drawn beside their place take no part in autoscaling.
    bounds = [bound for row in rows for bound in (row["return_vs_baseline"], *(row["return_vs_baseline_ci95"] or ()))] or [0.0, 1.0]
    margin = 0.08 * (max(bounds) - min(bounds)) or 0.05
    axes.set_ylim(min(bounds) - 1.5 * margin, max(bounds) + margin)
    _save(figure, axes, path, legend="lower left")


def plot_training(metrics: list[dict[str, Any]], task: str, path: Path, published: list[tuple[int, float]] | None = None) -> None:
    """Draws a training as a PNG: its episodes, by who acted in them, and the evaluations.

    Args:
        metrics: the lines of metrics.jsonl.
        published: (decisions, return) of a curve to draw beside it.
    """
    from matplotlib.figure import Figure

    score = "success" if any("success_rate" in line for line in metrics) else "return"
    name = "success_rate" if score == "success" else "return_mean"
    evaluations = [(line["decisions"], line[name]) for line in metrics if line["event"] == "eval"]
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes = figure.subplots()
    if published:
        axes.plot(*zip(*published, strict=True), color="#111827", linestyle=":", marker="s", markersize=4, label="published (TD-MPC2, 5M)")
    for by_prior, color, who in ((False, "#93c5fd", "training"), (True, "#fdba74", "training, policy prior alone")):
        if points := _learning_curve(metrics, score, by_prior):
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1, label=who)
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), color="#2563eb", marker="o", markersize=5, label="evaluations")
    axes.set_title(f"{task}: training", loc="left", fontsize=11)
    axes.set_xlabel("decisions")
    axes.set_ylabel("success rate" if score == "success" else "episode return")
    _save(figure, axes, path, legend="lower right")


_SUCCESS_WINDOW = 10  # episodes; a single one has either succeeded or not


def _learning_curve(metrics: list[dict[str, Any]], score: str, by_prior: bool) -> list[tuple[int, float]]:
    """(decisions, return, or success rate of the last episodes) of the episodes that learning itself played."""
    lines = [line for line in metrics if line["event"] == "episode" and line.get("actor") != "script"]
    mine = [line for line in lines if (line.get("actor") == "policy") == by_prior]
    window = _SUCCESS_WINDOW if score == "success" else 1
    means = [sum(line[score] for line in mine[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(mine))]
    return [(line["decisions"], float(mean)) for line, mean in zip(mine, means, strict=True)]


def _save(figure: Figure, axes: Axes, path: Path, *, legend: Literal["lower left", "lower right"]) -> None:
    """The look that all plots share; writes the PNG whole."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8, loc=legend, frameon=False)
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=140)
