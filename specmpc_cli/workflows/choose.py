"""Choosing the row of a comparison that saves most within a bound on lost return, without believing the episodes that chose it."""

from __future__ import annotations

from typing import Any

import numpy as np

from specmpc_cli.errors import ConfigError
from specmpc_cli.workflows.evaluate import Report, Row
from specmpc_cli.workflows.statistics import ratio, ratio_ci95

FEWEST_EPISODES = 4


def check_loss(max_return_loss: float, episodes: int) -> None:
    """Raises ConfigError for a bound outside [0, 1), or too few episodes to choose on one half and report on the other."""
    if not 0 <= max_return_loss < 1:
        raise ConfigError(f"--max-return-loss is a share of the baseline's return in [0, 1), such as 0.02; got {max_return_loss:g}")
    if episodes < FEWEST_EPISODES:
        raise ConfigError(
            f"--max-return-loss chooses on half of the episodes and reports on the other half: it needs --episodes {FEWEST_EPISODES} "
            f"or more, got {episodes}"
        )


def best_within(report: Report, max_return_loss: float) -> dict[str, Any]:
    """The row that saves most calls while it keeps 1 − `max_return_loss` of the baseline's return (of its success, for tasks with success).

    Controls that never plan may be it too: then planning less is not what the task needs. It is chosen on the episodes of even index and
    reported on those of odd index. The baseline itself always keeps the bound, so there is always a row; where no other does, it is the
    baseline, which saves nothing.

    Returns:
        `max_return_loss`, `row` (its index in the report), `mode`, `horizon`, `corrector`, and of the reporting half: `episodes`,
        `calls_saved`, `return_vs_baseline` and `return_vs_baseline_ci95` (null where the baseline's mean is not positive, and then the
        baseline is chosen).
    """
    baseline, *others = report["rows"]
    chosen = 0
    best = (0.0, 1.0)
    for index, row in enumerate(others, start=1):
        kept = ratio(_scores(row)[::2], _scores(baseline)[::2])
        if kept is not None and kept >= 1 - max_return_loss and (_saved(row, 0), kept) > best:
            chosen, best = index, (_saved(row, 0), kept)
    row = report["rows"][chosen]
    score, reference = _scores(row)[1::2], _scores(baseline)[1::2]
    return {
        "max_return_loss": max_return_loss,
        "row": chosen,
        **{name: row[name] for name in ("mode", "horizon", "corrector")},
        "episodes": len(score),
        "calls_saved": _saved(row, 1),
        "return_vs_baseline": ratio(score, reference),
        "return_vs_baseline_ci95": ratio_ci95(score, reference),
    }


def _scores(row: Row) -> np.ndarray:
    """Success of each episode where the task has it, else its return."""
    name = "return" if row["success_rate"] is None else "success"
    return np.array([episode[name] for episode in row["episodes"]], dtype=float)


def _saved(row: Row, half: int) -> float:
    """Share of the planner calls saved, over the episodes of one half."""
    episodes = row["episodes"][half::2]
    return 1 - sum(episode["planner_calls"] for episode in episodes) / sum(episode["steps"] for episode in episodes)
