"""Prints the README's table of savings, and docs/savings.md's table of each task, from kept comparisons.

    python docs/zoo_table.py STORE/*/main/results/compare-*.json

Of each task the newest file counts. Shares are of plain replanning's return, paired by episode; successes are counted beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from specmpc_cli.workflows.plots import row_label
from specmpc_cli.workflows.statistics import ratio, ratio_ci95

Row = Mapping[str, Any]
SHOWN = (("corrected", 12), ("corrected", 20), ("policy", None))


def returns(row: Row) -> np.ndarray:
    return np.array([episode["return"] for episode in row["episodes"]])


def solved(row: Row) -> str | None:
    """`37 of 40`, where the task has success."""
    return None if row["success_rate"] is None else f"{sum(episode['success'] for episode in row['episodes'])} of {len(row['episodes'])}"


def kept(row: Row, baseline: Row) -> str:
    """`98.9% (98.0%–99.7%)`: the share of plain replanning's return."""
    share, interval = ratio(returns(row), returns(baseline)), ratio_ci95(returns(row), returns(baseline))
    around = f" ({interval[0]:.1%}–{interval[1]:.1%})" if interval else ""
    return "–" if share is None else f"{share:.1%}{around}"


def summary(report: Mapping[str, Any]) -> str:
    """A task's line of the README."""
    baseline, *rows = report["rows"]
    plain = solved(baseline)
    cells = [f"{returns(baseline).mean():.0f}, {report['episodes']} episodes" if plain is None else f"{plain} solved"]
    for mode, horizon in SHOWN:
        row = next(row for row in rows if (row["mode"], row["horizon"]) == (mode, horizon) and row["corrector"] in (None, "two-tower"))
        cells.append(", ".join(filter(None, (solved(row), kept(row, baseline)))))
    return f"| {report['task']} | {' | '.join(cells)} |"


def details(report: Mapping[str, Any]) -> list[str]:
    """A task's own table."""
    baseline = report["rows"][0]
    lines = [
        f"\n{report['task']}, {report['episodes']} episodes\n",
        "| way | calls saved | return | of plain replanning |",
        "|---|---|---|---|",
    ]
    for row in report["rows"]:
        low, high = row["return_ci95"]
        counted = f"{solved(row)} solved, " if solved(row) else ""
        earned = f"{counted}{row['return_mean']:.1f} ({low:.0f}–{high:.0f}), worst {returns(row).min():.0f}"
        lines.append(f"| {row_label(row)} | {row['calls_saved']:.1%} | {earned} | {kept(row, baseline)} |")
    return lines


def main() -> None:
    newest: dict[str, dict[str, Any]] = {}
    for path in map(Path, sys.argv[1:]):
        report = json.loads(path.read_text())
        if report["task"] not in newest or report["date"] > newest[report["task"]]["date"]:
            newest[report["task"]] = report
    if not newest:
        sys.exit(__doc__)
    print("| task | plain replanning | 12 steps per plan | 20 steps per plan | policy prior alone |\n|---|---|---|---|---|")
    print("\n".join(summary(newest[task]) for task in sorted(newest)))
    print("\n".join(line for task in sorted(newest) for line in details(newest[task])))


if __name__ == "__main__":
    main()
