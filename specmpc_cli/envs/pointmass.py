"""A point on a plane that must reach the origin: the built-in task for trying commands out and for tests. Needs no simulator package."""

from __future__ import annotations

import numpy as np

from specmpc_cli.envs.adapter import RawStep

_DT, _DAMPING, _GAIN, _GOAL_RADIUS = 0.1, 0.9, 1.0, 0.1


class PointMass:
    """State and observation: position [2] and velocity [2]; the action accelerates. Reward exp(−distance); success within 0.1."""

    obs_dim = 4
    action_low = -np.ones(2)
    action_high = np.ones(2)

    def __init__(self) -> None:
        self._state = np.zeros(4)

    def reset(self, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        self._state = np.concatenate([rng.uniform(-1, 1, 2), np.zeros(2)])
        return self._state.copy()

    def step(self, action: np.ndarray) -> RawStep:
        position, velocity = self._state[:2], self._state[2:]
        velocity = _DAMPING * velocity + _DT * _GAIN * action
        position = position + _DT * velocity
        self._state = np.concatenate([position, velocity])
        distance = float(np.linalg.norm(position))
        return RawStep(self._state.copy(), float(np.exp(-distance)), success=distance < _GOAL_RADIUS)

    def render(self, height: int, width: int) -> np.ndarray:
        """White plane, grey goal, black point; the view spans [-1.5, 1.5]."""
        frame = np.full((height, width, 3), 255, np.uint8)
        y, x = np.mgrid[1.5 : -1.5 : height * 1j, -1.5 : 1.5 : width * 1j]
        frame[np.hypot(x, y) < _GOAL_RADIUS] = 200
        frame[np.hypot(x - self._state[0], y - self._state[1]) < 0.05] = 0
        return frame

    def close(self) -> None:
        """Nothing to release."""


def make_simulator(task: str) -> PointMass:
    """The one task of this suite."""
    assert task == "pointmass"
    return PointMass()
