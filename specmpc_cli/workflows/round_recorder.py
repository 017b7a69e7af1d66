"""From the steps of a training round to the episodes that its replay takes."""

from __future__ import annotations

import numpy as np

from specmpc_cli.data.replay import ReplayEpisode
from specmpc_cli.workflows.rollout import Transition


class RoundRecorder:
    """Keeps the transitions of a round."""

    def __init__(self) -> None:
        self._transitions: dict[int, list[Transition]] = {}

    def step(self, transition: Transition) -> None:
        self._transitions.setdefault(transition.episode.index, []).append(transition)

    def episode(self, number: int) -> ReplayEpisode:
        """A finished episode as the replay takes it."""
        steps = self._transitions[number]
        return ReplayEpisode(
            number,
            np.stack([*(step.obs for step in steps), steps[-1].next_obs]),
            np.stack([step.action for step in steps]),
            np.array([step.reward for step in steps], dtype=np.float32),
            np.array([step.terminated for step in steps], dtype=np.float32),
        )
