"""From the steps of a training round to the episodes that its replay takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from specmpc_cli.data.replay import ReplayEpisode
from specmpc_cli.workflows.rollout import Transition


class _Step(NamedTuple):
    """What a replay keeps of a transition; its log would be many times as large."""

    obs: np.ndarray  # [O]
    action: np.ndarray  # [A]
    reward: float
    next_obs: np.ndarray  # [O]
    terminated: bool


class RoundRecorder:
    """Keeps the steps of a round."""

    def __init__(self) -> None:
        self._steps: dict[int, list[_Step]] = {}

    def step(self, transition: Transition) -> None:
        kept = _Step(*(getattr(transition, name) for name in _Step._fields))
        self._steps.setdefault(transition.episode.index, []).append(kept)

    def episode(self, number: int) -> ReplayEpisode:
        """A finished episode as the replay takes it."""
        steps = self._steps[number]
        return ReplayEpisode(
            number,
            np.stack([*(step.obs for step in steps), steps[-1].next_obs]),
            np.stack([step.action for step in steps]),
            np.array([step.reward for step in steps], dtype=np.float32),
            np.array([step.terminated for step in steps], dtype=np.float32),
        )
