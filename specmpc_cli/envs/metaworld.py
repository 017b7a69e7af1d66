"""Meta-World's 50 tasks as TD-MPC2 ran them: goal-observable, a new goal each episode, the `v2` rewards."""

from __future__ import annotations

import warnings

import numpy as np
from gymnasium.spaces import Box
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from specmpc_cli.envs.adapter import RawStep, Script


class MetaWorldSimulator:
    """One task's environment, built from its class.

    The ready-made goal-observable classes freeze the goal, and `reset(seed=...)` is ignored there, so the environment is opened up
    by hand: observable goal, a fresh goal drawn at each reset, from a generator that this class seeds.
    """

    obs_dim = 39

    def __init__(self, name: str) -> None:
        env = ALL_V3_ENVIRONMENTS[f"{name}-v3"](reward_function_version="v2", render_mode="rgb_array", camera_name="corner2")
        env._partially_observable = False
        del env.sawyer_observation_space  # cached with the goal hidden
        env.observation_space = env.sawyer_observation_space
        env._set_task_called = True
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        self._env = env
        assert isinstance(env.action_space, Box)
        self.action_low, self.action_high = env.action_space.low.astype(float), env.action_space.high.astype(float)

    def reset(self, seed: int) -> np.ndarray:
        self._env.seed(seed)
        self._env.reset()
        # The published protocol takes one zero action after each reset.
        return self._env.step(np.zeros(4))[0]

    def step(self, action: np.ndarray) -> RawStep:
        obs, reward, _, truncated, info = self._env.step(action)
        return RawStep(obs, reward, truncated=truncated, success=bool(info["success"]))

    def render(self, height: int, width: int) -> np.ndarray:
        renderer = self._env.mujoco_renderer
        renderer.width, renderer.height = width, height
        return np.asarray(self._env.render())[::-1]  # this camera stands on its head

    def close(self) -> None:
        self._env.close()


def make_simulator(task: str) -> MetaWorldSimulator:
    """The simulator of `mw-NAME`."""
    return MetaWorldSimulator(task.removeprefix("mw-"))


def make_script(task: str) -> Script:
    """Meta-World's own scripted policy of `mw-NAME`; it solves nearly every episode, at our action repeat too."""
    policy = ENV_POLICY_MAP[f"{task.removeprefix('mw-')}-v3"]()

    def act(obs: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that some of its forces exceed the action's bounds; they are clipped
            return np.clip(policy.get_action(obs.astype(np.float64)), -1.0, 1.0).astype(np.float32)

    return act
