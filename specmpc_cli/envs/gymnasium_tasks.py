"""Four Gymnasium tasks, and the simulator that any Gymnasium environment can be (envs/custom.py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium.spaces import Box, flatdim, flatten
from PIL import Image

from specmpc_cli.envs.adapter import RawStep
from specmpc_cli.errors import CannotRender

Success = Callable[[dict[str, Any], float], bool]  # (info of this step, return so far) → success

# task: Gymnasium's name and options, and what counts as success
_TASKS: dict[str, tuple[str, dict[str, Any], Success | None]] = {
    "mujoco-walker": ("Walker2d-v5", {}, None),
    "mujoco-halfcheetah": ("HalfCheetah-v5", {}, None),
    "bipedal-walker": ("BipedalWalker-v3", {}, None),
    "lunarlander-continuous": ("LunarLander-v3", {"continuous": True}, lambda _, total: total > 200),
}


class GymnasiumSimulator:
    """A Gymnasium environment with Box actions and an observation space that can be flattened."""

    def __init__(self, env: gymnasium.Env[Any, Any], success: Success | None = None) -> None:
        assert isinstance(env.action_space, Box)
        self._env, self._success = env, success
        self._space, self._action_space = env.observation_space, env.action_space
        self._return = 0.0
        self.obs_dim = flatdim(env.observation_space)
        self.action_low = env.action_space.low.astype(float).ravel()
        self.action_high = env.action_space.high.astype(float).ravel()

    def reset(self, seed: int) -> np.ndarray:
        self._return = 0.0
        return self._flat(self._env.reset(seed=seed)[0])

    def step(self, action: np.ndarray) -> RawStep:
        shaped = action.reshape(self._action_space.shape).astype(self._action_space.dtype)
        obs, reward, terminated, truncated, info = self._env.step(shaped)
        self._return += float(reward)
        success = self._success is not None and self._success(info, self._return)
        return RawStep(self._flat(obs), float(reward), bool(terminated), bool(truncated), success)

    def render(self, height: int, width: int) -> np.ndarray:
        """A frame at the environment's own size, resized."""
        drawn = self._env.render()
        if drawn is None:
            raise CannotRender('the environment draws nothing; make it with render_mode="rgb_array" and a render() that returns frames')
        return np.asarray(Image.fromarray(np.asarray(drawn, dtype=np.uint8)).resize((width, height)))

    def close(self) -> None:
        self._env.close()

    def _flat(self, obs: Any) -> np.ndarray:
        return np.asarray(flatten(self._space, obs))


class _NewWorldAtReset(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Gives BipedalWalker a new Box2D world for each episode, as LunarLander does itself.

    In a used world contacts are solved in another order, and an episode is not the one that its seed gives in a fresh environment.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        walker: Any = self.env.unwrapped
        walker._destroy()  # bodies belong to their world
        walker.world = type(walker.world)()
        return super().reset(seed=seed, options=options)


def make_simulator(task: str) -> GymnasiumSimulator:
    """The simulator of one of the four tasks."""
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # Box2D's tasks import it, and it greets on standard output
    name, options, success = _TASKS[task]
    with _deprecations_hidden():
        env = gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True, **options)
    return GymnasiumSimulator(_NewWorldAtReset(env) if task == "bipedal-walker" else env, success)


@contextmanager
def _deprecations_hidden() -> Iterator[None]:
    """MuJoCo warns of an attribute in Gymnasium's walker, on standard error and in a file in the current folder."""
    callbacks: Any = mujoco  # its type stubs lack these two
    before = callbacks.get_mju_user_warning()
    callbacks.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        callbacks.set_mju_user_warning(before)
