"""What a training says of itself: the lines of metrics.jsonl, live progress, and the diagnosis of one that diverged. Decides nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from specmpc_cli.engine.world_model import WorldModel
from specmpc_cli.files import write_whole
from specmpc_cli.learning.learner import UpdateInfo
from specmpc_cli.workflows.rollout import EpisodeStats
from specmpc_cli.workflows.train_state import Counters

Line = dict[str, Any]
ActorName = Literal["script", "random", "policy", "planner"]  # who plays an episode of a training


@dataclass(slots=True)
class Progress:
    """What a watcher is shown."""

    phase: str  # "seed phase", "first updates", "training" or "evaluating"
    decisions: int = 0
    updates: int = 0
    last_return: float | None = None
    losses: dict[str, float] = field(default_factory=dict)  # means over the last round


@dataclass(slots=True)
class Watcher:
    """Callbacks of a training; each may be left out."""

    on_progress: Callable[[Progress], None] = lambda progress: None
    on_metrics: Callable[[Line], None] = lambda line: None  # a line of metrics.jsonl


class TrainingLog:
    """The lines so far, and the updates since the last of them."""

    def __init__(self, has_success: bool) -> None:
        self.lines: list[Line] = []
        self.last_update: UpdateInfo | None = None
        self._has_success = has_success
        self._recent: list[UpdateInfo] = []

    @property
    def evaluations(self) -> list[Line]:
        return [line for line in self.lines if line["event"] == "eval"]

    @property
    def last_evaluation(self) -> Line | None:
        return next(reversed(self.evaluations), None)

    @property
    def best(self) -> Line | None:
        """The evaluation with the highest success rate, or return where there is no success; of equals the later."""
        kept = [line for line in reversed(self.evaluations) if "forgotten" not in line]
        return max(kept, key=lambda line: (line.get("success_rate", 0.0), line["return_mean"]), default=None)

    def forget_best(self) -> None:
        """No evaluation so far counts as the best any more, because its weights are gone."""
        for line in self.evaluations:
            line["forgotten"] = True

    def updated(self, info: UpdateInfo) -> None:
        """An update was made."""
        self.last_update = info
        self._recent.append(info)

    def losses(self) -> dict[str, float]:
        """Means over the updates since the last call; empty if there were none."""
        if not self._recent:
            return {}
        means = [float(torch.stack(values).mean()) for values in zip(*self._recent, strict=True)]
        self._recent = []
        return {name: float(f"{mean:.6g}") for name, mean in zip(UpdateInfo._fields, means, strict=True)}

    def episode(self, counters: Counters, number: int, who: ActorName, stat: EpisodeStats, losses: dict[str, float]) -> Line:
        """A finished episode of the training."""
        success = {"success": stat.success} if self._has_success else {}
        return self._add(
            {
                "event": "episode",
                "decisions": counters.decisions,
                "episode": number,
                "actor": who,
                "return": stat.episode_return,
                **success,
                "env_steps": stat.env_steps,
                "planner_calls": stat.planner_calls,
                "updates": counters.updates,
                "seconds": round(counters.seconds, 1),
                **losses,
            }
        )

    def settings(self, counters: Counters, changes: list[str]) -> Line:
        """A training that goes on acting in another way."""
        return self._add({"event": "settings", "decisions": counters.decisions, "changes": changes})

    def burst(self, counters: Counters) -> Line:
        """The updates after the seed phase."""
        return self._add({"event": "first updates", "decisions": counters.decisions, "updates": counters.updates, **self.losses()})

    def evaluation(self, counters: Counters, stats: list[EpisodeStats]) -> Line:
        """An evaluation with the full planner."""
        returns = [stat.episode_return for stat in stats]
        line = {"event": "eval", "decisions": counters.decisions, "return_mean": float(np.mean(returns)), "returns": returns}
        if self._has_success:
            line["success_rate"] = float(np.mean([stat.success for stat in stats]))
        return self._add(line)

    def _add(self, line: Line) -> Line:
        self.lines.append(line)
        return line


def not_finite(info: UpdateInfo) -> str | None:
    """`total_loss is nan`, if anything an update reports is not finite."""
    values = {name: float(value) for name, value in info._asdict().items()}
    return next((f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)), None)


def write_diagnosis(path: Path, what: str, counters: Counters, model: WorldModel, log: TrainingLog) -> None:
    """Everything that helps to tell why a training diverged, as JSON. Raises StoreError."""
    weights = {name: value.detach() for name, value in model.named_parameters()}
    broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    losses = {} if log.last_update is None else {name: repr(float(value)) for name, value in log.last_update._asdict().items()}
    diagnosis = {
        "what": what,
        "counters": asdict(counters),
        "last_update": losses,  # as text: JSON has no NaN
        "weights_not_finite": broken,
        "largest_weights": {name: float(value.abs().max()) for name, value in weights.items() if name not in broken},
        "last_metrics": log.lines[-5:],
    }
    write_whole(path, json.dumps(diagnosis, indent=1) + "\n")
