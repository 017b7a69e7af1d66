"""DMControl: 28 stock tasks and TD-MPC2's 11 custom ones, wrapped directly.

Directly, because shimmy sorts the observation keys, keeps float64 and does not rescale actions.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import numpy as np

from specmpc_cli.envs.adapter import RawStep
from specmpc_cli.errors import SimulationDiverged

with warnings.catch_warnings():
    # dm_control looks for a window system at import; on a machine without a screen GLFW warns, and other backends render.
    warnings.filterwarnings("ignore", module="glfw")
    from dm_control import suite
    from dm_control.rl.control import Environment, PhysicsError

    from specmpc_cli.envs.dmcontrol_custom import CUSTOM_TASKS

_DOMAINS = {"cup": "ball_in_cup"}


class DMControlSimulator:
    """A dm_control environment whose random state is re-seeded at each reset."""

    def __init__(self, env: Environment, random: np.random.RandomState, camera: int) -> None:
        self._env = env
        self._random = random
        self._camera = camera
        action = env.action_spec()
        self.action_low, self.action_high = np.asarray(action.minimum, float), np.asarray(action.maximum, float)
        self.obs_dim = sum(int(np.prod(spec.shape)) for spec in env.observation_spec().values())

    def reset(self, seed: int) -> np.ndarray:
        self._random.seed(seed)
        with _named_divergence():
            return _flatten(self._env.reset().observation)

    def step(self, action: np.ndarray) -> RawStep:
        with _named_divergence():
            step = self._env.step(action)
        return RawStep(_flatten(step.observation), step.reward, truncated=step.last())

    def render(self, height: int, width: int) -> np.ndarray:
        return self._env.physics.render(height, width, self._camera)

    def close(self) -> None:
        self._env.close()


def make_simulator(task: str) -> DMControlSimulator:
    """The simulator of a task by TD-MPC2's name (`cup` is ball_in_cup)."""
    random = np.random.RandomState(0)
    with _quiet_mujoco():
        if task in CUSTOM_TASKS:
            env = CUSTOM_TASKS[task](random)
        else:
            domain, name = task.replace("-", "_").split("_", 1)
            env = suite.load(_DOMAINS.get(domain, domain), name, task_kwargs={"random": random})
    return DMControlSimulator(env, random, camera=2 if task.startswith("quadruped") else 0)


@contextlib.contextmanager
def _named_divergence() -> Iterator[None]:
    """What MuJoCo warns of, as our error."""
    try:
        yield
    except PhysicsError as error:
        raise SimulationDiverged(" ".join(str(error).split())) from None


@contextlib.contextmanager
def _quiet_mujoco() -> Iterator[None]:
    """Silences MuJoCo's deprecation notes on dm_control's own models, which a user cannot mend."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _flatten(observation: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(value, dtype=np.float32).ravel() for value in observation.values()])
