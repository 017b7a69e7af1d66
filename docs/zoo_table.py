"""Prints the README's table of savings from kept comparisons.

    python docs/zoo_table.py STORE/*/main/results/compare-*.json

One block per task, from its newest file: every way but `baseline` itself, with what `specmpc compare` measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from specmpc_cli.workflows.plots import row_label


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def lines(report: dict[str, Any]) -> list[str]:
    """The table's lines for one task."""
    baseline, *rows = report["rows"]
    reference = f"{baseline['return_mean']:.0f}"
    if baseline["success_rate"] is not None:
        reference += f", {baseline['success_rate']:.0%} solved"
    first = f"{report['task']} ({report['episodes']} episodes; plain replanning {reference})"
    out = []
    for row in rows:
        interval = row["return_vs_baseline_ci95"]
        kept = percent(row["return_vs_baseline"]) + (f" ({percent(interval[0])}–{percent(interval[1])})" if interval else "")
        out.append(f"| {first} | {row_label(row)} | {percent(row['calls_saved'])} | {row['return_mean']:.0f} | {kept} |")
        first = ""
    return out


def main() -> None:
    newest: dict[str, dict[str, Any]] = {}
    for path in map(Path, sys.argv[1:]):
        report = json.loads(path.read_text())
        if report["task"] not in newest or report["date"] > newest[report["task"]]["date"]:
            newest[report["task"]] = report
    if not newest:
        sys.exit(__doc__)
    print("| task | way of acting | calls saved | return | of plain replanning |\n|---|---|---|---|---|")
    for task in sorted(newest):
        print("\n".join(lines(newest[task])))


if __name__ == "__main__":
    main()
