"""The contract every task keeps: float32 observations, actions in [-1, 1], action repeat, truncation, exact reproduction from a seed.

A suite provides a `Simulator` (raw steps in its own units); `TaskEnv` makes a Gymnasium environment of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import gymnasium
import numpy as np

from specmpc_cli.errors import ConfigError, SimulationDiverged
from specmpc_cli.types import EnvSpec

_Given = TypeVar("_Given")
_Result = TypeVar("_Result")
Script = Callable[[np.ndarray], np.ndarray]  # a scripted policy: observation [O] → action [A] in [-1, 1]


class RawStep(NamedTuple):
    """One simulator step, before repeat and scaling."""

    obs: np.ndarray
    reward: float
    terminated: bool = False
    truncated: bool = False
    success: bool = False


class Simulator(Protocol):
    """What a suite provides. Observations and actions are flat arrays in the suite's own units."""

    obs_dim: int
    action_low: np.ndarray  # [A]
    action_high: np.ndarray  # [A]

    def reset(self, seed: int) -> np.ndarray:
        """Begins the episode that this seed names; the same seed gives the same episode. Raises as `step` does."""
        ...

    def step(self, action: np.ndarray) -> RawStep:
        """One step. Raises SimulationDiverged, with the simulator's own reason, where it notices by itself."""
        ...

    def render(self, height: int, width: int) -> np.ndarray:
        """An RGB frame, uint8 [height, width, 3]."""
        ...

    def close(self) -> None: ...


class TaskEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A task as a Gymnasium environment.

    Observations are float32 [O]; actions float32 [A] in [-1, 1], clipped, then scaled to the simulator's range. A step repeats the action
    `spec.action_repeat` times and adds up the rewards. Episodes are truncated after `spec.decisions` steps. `info["success"]` is the
    suite's success flag at this step. `reset(seed=...)` reproduces an episode exactly; without a seed, the next one follows the last.

    Raises:
        SimulationDiverged: the simulator says that it gave up, or returned an observation or reward that is not finite.
        ConfigError: an observation of another length than its space has.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}  # noqa: RUF012 (Gymnasium's own spelling)

    def __init__(self, spec: EnvSpec, simulator: Simulator) -> None:
        self.task_spec = spec
        self.simulator = simulator
        self.render_mode = "rgb_array"
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (spec.obs_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (spec.action_dim,), np.float32)
        self._centre = (simulator.action_high + simulator.action_low) / 2
        self._half_range = (simulator.action_high - simulator.action_low) / 2
        self._seed = -1
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        del options  # no task takes any
        self._seed = self._seed + 1 if seed is None else seed
        self._steps = 0
        return self._checked(self._of_simulator(self.simulator.reset, self._seed)), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        native = self._centre + self._half_range * np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        self._steps += 1
        raw = self._of_simulator(self.simulator.step, native)
        reward = float(raw.reward)
        for _ in range(self.task_spec.action_repeat - 1):
            if raw.terminated or raw.truncated:
                break
            raw = self._of_simulator(self.simulator.step, native)
            reward += float(raw.reward)
        obs = self._checked(raw.obs)
        if not np.isfinite(reward):
            raise self._diverged(f"the reward is {reward}")
        terminated = raw.terminated and self.task_spec.episodic
        ended_otherwise = (raw.terminated or raw.truncated) and not terminated
        truncated = ended_otherwise or self._steps >= self.task_spec.decisions
        return obs, reward, terminated, truncated, {"success": raw.success}

    def render(self, height: int = 384, width: int = 384) -> np.ndarray:
        """An RGB frame, uint8 [height, width, 3]."""
        return self.simulator.render(height, width)

    def close(self) -> None:
        self.simulator.close()

    def _of_simulator(self, ask: Callable[[_Given], _Result], given: _Given) -> _Result:
        """What the simulator answers; where it diverged, said with task, step and seed."""
        try:
            return ask(given)
        except SimulationDiverged as error:
            raise self._diverged(str(error)) from None

    def _checked(self, obs: np.ndarray) -> np.ndarray:
        flat = np.asarray(obs, dtype=np.float32).ravel()
        if len(flat) != self.task_spec.obs_dim:
            raise ConfigError(
                f"{self.task_spec.task}: the environment returned an observation of {len(flat)} values where its space has "
                f"{self.task_spec.obs_dim}; mend one of them"
            )
        if not np.isfinite(flat).all():
            index = int(np.flatnonzero(~np.isfinite(flat))[0])
            raise self._diverged(f"observation {index} is {flat[index]}")
        return flat

    def _diverged(self, what: str) -> SimulationDiverged:
        return SimulationDiverged(
            f"{self.task_spec.task}: the simulation diverged at step {self._steps} of the episode with seed {self._seed}: {what}; "
            "another --seed brings other episodes"
        )
