"""Choosing the row of a comparison that saves most within a bound on lost return, without believing the episodes that chose it."""

from __future__ import annotations

from typing import Any

import numpy as np

from specmpc_cli.errors import ConfigError
from specmpc_cli.workflows.evaluate import Report, Row
from specmpc_cli.workflows.plots import CONTROLS, row_label
from specmpc_cli.workflows.statistics import lost_share_bound, ratio, ratio_ci95

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

    Controls that never plan may be it too. It is chosen on the episodes of even index and reported on those of odd index. Where no row that
    saves anything keeps the bound it is the baseline, and `notes` say so.

    Returns:
        `max_return_loss`, `row` (its index in the report), `mode`, `horizon`, `corrector`, of the reporting half `episodes`,
        `calls_saved`, `return_vs_baseline` (null where the baseline's mean is not positive) and
        `return_vs_baseline_ci95` (null, too, where that of many resamples is not), and `notes`: sentences on what the choice does not show.
    """
    rows, baseline = report["rows"], report["rows"][0]
    kept = [ratio(_scores(row)[::2], _scores(baseline)[::2]) for row in rows]
    saved = [_saved(row, 0) for row in rows]
    saving = [(index, share) for index, share in enumerate(kept) if share is not None and saved[index] > 0]
    within = [(saved[index], share, index) for index, share in saving if share >= 1 - max_return_loss]
    chosen = max(within)[-1] if within else 0
    row = rows[chosen]
    score, reference = _scores(row)[1::2], _scores(baseline)[1::2]
    interval = ratio_ci95(score, reference)
    notes = []
    if kept[0] is None:
        earned = f"plain replanning scores {_scores(baseline)[::2].mean():.3g} on average on the episodes that choose"
        notes.append(f"{earned}, and no share of that can be kept")
    elif not within:
        notes.append(f"no row that saves calls loses at most {max_return_loss:.1%} on the episodes that choose")
        if saving:
            nearest, share = max(saving, key=lambda one: one[1])
            notes.append(f"the nearest, {row_label(rows[nearest])}, keeps {share:.1%} there and saves {saved[nearest]:.0%} of the calls")
    elif row["mode"] in CONTROLS:
        planning = [one for one in within if rows[one[-1]]["mode"] not in CONTROLS]
        rest = f"of the ways that plan, {row_label(rows[max(planning)[-1]])} saves most" if planning else "no way that plans and saves does"
        notes.append(f"it never plans and keeps the bound: here planning less proves little; {rest}")
    if chosen and interval is not None and interval[0] == interval[1]:
        room = lost_share_bound(0, len(score), 0.975)
        notes.append(f"{len(score)} episodes without any spread still leave room for {room:.0%} of others that lose everything")
    return {
        "max_return_loss": max_return_loss,
        "row": chosen,
        **{name: row[name] for name in ("mode", "horizon", "corrector")},
        "episodes": len(score),
        "calls_saved": _saved(row, 1),
        "return_vs_baseline": ratio(score, reference),
        "return_vs_baseline_ci95": interval,
        "notes": notes,
    }


def _scores(row: Row) -> np.ndarray:
    """Success of each episode where the task has it, else its return."""
    name = "return" if row["success_rate"] is None else "success"
    return np.array([episode[name] for episode in row["episodes"]], dtype=float)


def _saved(row: Row, half: int) -> float:
    """Share of the planner calls saved, over the episodes of one half."""
    episodes = row["episodes"][half::2]
    return 1 - sum(episode["planner_calls"] for episode in episodes) / sum(episode["steps"] for episode in episodes)
