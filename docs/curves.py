"""Draws docs/training-<task>.png: a training's curve beside the published one.

python docs/curves.py STORE TASK...
"""

import csv
import json
import sys
from pathlib import Path

from specmpc_cli.workflows.plots import plot_training

HERE = Path(__file__).parent


def draw(store: Path, task: str) -> Path:
    """The figure of one task, from its metrics in the store and docs/published-curves.csv, as far as the training went."""
    lines = [json.loads(line) for line in (store / task / "main/teacher/metrics.jsonl").read_text().splitlines()]
    end = 50_000 * -(-lines[-1]["decisions"] // 50_000)  # the published curves have one point every 50,000 decisions
    with open(HERE / "published-curves.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == task]
    published = [(int(row["decisions"]), float(row["return"])) for row in rows if int(row["decisions"]) <= end]
    path = HERE / f"training-{task}.png"
    plot_training(lines, task, path, published)
    return path


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    for name in sys.argv[2:]:
        print(draw(Path(sys.argv[1]), name))
