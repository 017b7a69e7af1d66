"""What the curves of a training are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specmpc_cli.workflows.plots import _learning_curve, plot_training


def episode(decisions: int, actor: str, **score: Any) -> dict[str, Any]:
    return {"event": "episode", "decisions": decisions, "actor": actor, **score}


def test_returns_are_drawn_as_they_are_and_demonstrations_not_at_all() -> None:
    metrics = [
        episode(10, "script", **{"return": 9.0}),
        episode(20, "random", **{"return": 1.0}),
        episode(30, "planner", **{"return": 2.0}),
    ]
    metrics += [episode(40, "policy", **{"return": 3.0}), {"event": "eval", "decisions": 40, "return_mean": 5.0}]
    assert _learning_curve(metrics, "return", by_prior=False) == [(20, 1.0), (30, 2.0)]
    assert _learning_curve(metrics, "return", by_prior=True) == [(40, 3.0)]


def test_success_is_a_rate_over_the_last_ten_episodes_of_the_same_actor(tmp_path: Path) -> None:
    planner = [episode(10 * i, "planner", success=i > 5) for i in range(1, 16)]
    prior = [episode(10 * i + 5, "policy", success=True) for i in range(1, 16)]
    metrics = [line for pair in zip(planner, prior, strict=True) for line in pair]
    curve = dict(_learning_curve(metrics, "success", by_prior=False))
    assert (curve[50], curve[60], curve[100], curve[150]) == (0.0, 1 / 6, 0.5, 1.0)
    assert {rate for _, rate in _learning_curve(metrics, "success", by_prior=True)} == {1.0}
    evaluation = {"event": "eval", "decisions": 155, "return_mean": 1.0, "success_rate": 0.5}
    plot_training([*metrics, evaluation], "a task", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
