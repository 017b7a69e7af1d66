"""A comparison as one self-contained HTML page: no scripts, no files beside it, light and dark, readable on a phone."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from specmpc_cli.errors import ConfigError
from specmpc_cli.files import check_destination, write_whole
from specmpc_cli.types import Decision
from specmpc_cli.workflows.evaluate import Report, Row
from specmpc_cli.workflows.plots import CONTROLS, beside, computed_on, pareto_front, row_label, scored_by
from specmpc_cli.workflows.svg import Chart

_ITERATIONS = "iterations"
_COLUMNS = (
    "way of acting",
    "return",
    "95 % CI",
    "vs baseline",
    "95 % CI",
    "calls",
    "saved",
    _ITERATIONS,
    "accept / correct / replan",
    "p50 ms",
    "p99 ms",
    "Hz",
)
_DECISIONS = {Decision.ACCEPT: "accept", Decision.CORRECT: "correct", Decision.REPLAN: "replan"}

_MEANS = {"return": "mean returns", "success": "success rates"}
_COLOURS = 16  # of rows, --s0 to --s15

_STYLE = (
    """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1b1f24; --faint: #6b7280; --rule: #e5e7eb; --accept: #009e73;
  --correct: #e69f00; --replan: #d55e00; --s0: #57606a; --s1: #0072b2; --s2: #d55e00; --s3: #009e73; --s4: #cc79a7; --s5: #b8860b;
  --s6: #56b4e9; --s7: #8250df; --s8: #a0522d; --s9: #2e7d32; --s10: #c2185b; --s11: #3f51b5; --s12: #00838f;
  --s13: #6d4c41; --s14: #9e9d24; --s15: #ad1457; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --ink: #e6e8eb; --faint: #9aa4ad; --rule: #2c3238; --s0: #aab2ba;
  --s1: #58a6ff; --s2: #ff8c4b; --s3: #2bd4a0; --s4: #e8a0c8; --s5: #e3b341; --s6: #8fd0ff; --s7: #b392f0; --s8: #d9a07b; --s9: #81c784;
  --s10: #f48fb1; --s11: #9fa8da; --s12: #4dd0e1; --s13: #bcaaa4; --s14: #dce775; --s15: #f06292; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1.2rem 1rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; } .faint { color: var(--faint); }
.best { border-left: 4px solid var(--accept); padding: .2rem .8rem; margin: 1rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; } th { color: var(--faint); font-weight: 500; }
tr.best td { font-weight: 600; border-left: 0; }
svg { width: 100%; height: auto; display: block; max-width: 46rem; }
.axis, .grid, .level { fill: none; stroke: var(--faint); } .grid { stroke: var(--rule); } .level { stroke-dasharray: 2 4; }
.tick, .label { fill: var(--faint); font-size: 12px; } .label { font-size: 13px; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .dot { stroke: var(--ground); stroke-width: 1.5; }
.accept { fill: var(--accept); } .correct { fill: var(--correct); } .replan { fill: var(--replan); }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .85rem; margin: .3rem 0 .6rem; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .35em; }
@media (max-width: 36rem) { .tick, .label { font-size: 18px; } }
pre { overflow-x: auto; font-size: .8rem; padding: .7rem; border: 1px solid var(--rule); border-radius: 6px; }
"""
    + "".join(
        f".line.s{i} {{ stroke: var(--s{i}); }} .dot.s{i} {{ fill: var(--s{i}); }} i.s{i} {{ background: var(--s{i}); }}\n"
        for i in range(_COLOURS)
    )
    + "".join(f"i.{name} {{ background: var(--{name}); }}\n" for name in _DECISIONS.values())
)


def check_page(path: Path) -> None:
    """Raises ConfigError where a page cannot be written there, before anything runs."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--report writes .html, got {path.name!r}")
    check_destination(path, "--report")


def write_page(report: Report, path: Path, command: str, best: str | None = None) -> None:
    """Writes the page.

    Args:
        report: of `compare`, with a `trace` in its rows (`compare(..., traces=True)`).
        command: the command line that made it.
        best: the sentence on the best row within a bound, if one was asked for.
    """
    rows, what = report["rows"], scored_by(report)
    names = {id(row): index % _COLOURS for index, row in enumerate(rows)}
    how = {name: report[name] for name in ("teacher", "seed", "episodes", "config", "versions", "commit")}
    parts = [
        f"<h1>{escape(report['task'])}</h1>",
        f'<p class="faint">{escape(_subtitle(report))}</p>',
        f'<p class="best">{escape(best)}</p>' if best else "",
        "<h2>Ways of acting</h2>",
        f'<div class="wide">{_table(report)}</div>',
        f'<p class="faint">vs baseline: ratio of {_MEANS[what]} on the same episodes, with a paired bootstrap interval. '
        "Calls: planner calls per episode. Latency: one environment, warm-up left out.</p>",
        f"<h2>{what.capitalize()} against planner calls saved</h2>",
        _key(rows, names),
        _front(rows, names, what),
        "<h2>As plans age</h2>",
        *(_by_age(rows, names, field, label) for field, label in (("reward_mean", "mean reward"), ("mismatch_mean", "mean mismatch"))),
        "<h2>One episode</h2>",
        '<p class="faint">The first episode: mismatch of predicted and real latent over its steps, and below it what was decided.</p>',
        '<div class="key">' + "".join(f'<span><i class="{name}"></i>{name}</span>' for name in _DECISIONS.values()) + "</div>",
        *(_trace(row, names[id(row)]) for row in rows if row["mode"] not in ("baseline", *CONTROLS)),
        "<h2>How it was made</h2>",
        f"<pre>{escape(command)}</pre>",
        f"<pre>{escape(json.dumps(how, indent=1))}</pre>",
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>specmpc: {escape(report['task'])}</title>"
    write_whole(
        path,
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n",
    )


def _subtitle(report: Report) -> str:
    return f"{report['episodes']} episodes, seed {report['seed']} · {computed_on(report)} · {report['date']}"


def _table(report: Report) -> str:
    chosen = report.get("best", {}).get("row") or None  # the baseline is chosen where no row is
    refines = "refine" in report["config"]  # else iterations are calls times a constant
    columns = [name for name in _COLUMNS if name != _ITERATIONS or refines]
    lines = ["<tr>" + "".join(f"<th>{name}</th>" for name in columns) + "</tr>"]
    for index, row in enumerate(report["rows"]):
        rates = [row[name] for name in ("accept_rate", "correct_rate", "replan_rate")]
        cells = [
            row_label(row),
            f"{row['return_mean']:.1f}" if row["success_rate"] is None else f"{row['return_mean']:.1f} ({row['success_rate']:.0%} solved)",
            _interval(row["return_ci95"], 1, ".0f"),
            "–" if row["return_vs_baseline"] is None else f"{row['return_vs_baseline']:.1%}",
            _interval(row["return_vs_baseline_ci95"], 100, ".1f"),
            f"{row['planner_calls_per_episode']:.1f}",
            f"{row['calls_saved']:.0%}",
            *([f"{row['planner_iterations_per_episode']:.0f}"] if refines else []),
            "–" if rates[0] is None else " / ".join(f"{rate:.0%}" for rate in rates),
            f"{row['step_ms_p50']:.1f}",
            f"{row['step_ms_p99']:.1f}",
            f"{row['control_hz']:.0f}",
        ]
        css = ' class="best"' if index == chosen else ""
        lines.append(f"<tr{css}>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"


def _interval(bounds: tuple[float, float] | None, scale: float, form: str) -> str:
    return "–" if bounds is None else f"{bounds[0] * scale:{form}}–{bounds[1] * scale:{form}}"


def _key(rows: list[Row], names: dict[int, int]) -> str:
    return (
        '<div class="key">' + "".join(f'<span><i class="s{names[id(row)]}"></i>{escape(row_label(row))}</span>' for row in rows) + "</div>"
    )


def _front(rows: list[Row], names: dict[int, int], what: str) -> str:
    shown = [row for row in rows if row["return_vs_baseline"] is not None]
    if not shown:
        return f'<p class="faint">The baseline has no positive {what} to compare with.</p>'
    bounds = [bound for row in shown for bound in row["return_vs_baseline_ci95"] or (row["return_vs_baseline"],)]
    low, high = min(bounds), max(bounds)
    margin = 0.06 * (high - low) + 0.01
    chart = Chart(
        (-0.03, 1.03),
        (low - margin, high + margin),
        "planner calls saved (ways of one length side by side)",
        f"{what} vs baseline",
        "{:.0%}".format,
        "{:.0%}".format,
    )
    chart.level(1.0)
    chart.line([(row["calls_saved"], row["return_vs_baseline"]) for row in pareto_front(rows)], 0, dashed=True)
    for row in shown:
        title = f"{row_label(row)}: {row['return_vs_baseline']:.1%} of the baseline's {what}, {row['calls_saved']:.0%} of the calls saved"
        chart.point(row["calls_saved"], row["return_vs_baseline"], names[id(row)], title, row["return_vs_baseline_ci95"], beside(row))
    return chart.svg()


def _by_age(rows: list[Row], names: dict[int, int], field: str, label: str) -> str:
    lines = [(row, [(line["age"], line[field]) for line in row["by_age"] if line[field] is not None]) for row in rows]
    lines = [(row, points) for row, points in lines if len(points) > 1]
    if not lines:
        return ""
    ages = [age for _, points in lines for age, _ in points]
    values = [value for _, points in lines for _, value in points]
    margin = 0.06 * (max(values) - min(values)) + 1e-6
    chart = Chart((0, max(ages)), (min(values) - margin, max(values) + margin), "age of the plan (env steps)", label, height=260)
    for row, points in lines:
        chart.line(points, names[id(row)])
    return chart.svg()


def _trace(row: Row, series: int) -> str:
    trace: dict[str, Any] = row["trace"]
    mismatches, decisions = trace["mismatches"], trace["decisions"]
    finite = [value for value in mismatches if value is not None]
    top = max(finite, default=1.0) or 1.0
    chart = Chart((0, len(decisions)), (-0.12 * top, 1.05 * top), f"env step · {row_label(row)}", "mismatch", height=190)
    chart.line([(step, math.nan if value is None else value) for step, value in enumerate(mismatches)], series)
    start = 0
    for step in range(1, len(decisions) + 1):
        if step == len(decisions) or decisions[step] != decisions[start]:
            chart.band(start, step, _DECISIONS[Decision(decisions[start])])
            start = step
    return chart.svg()
