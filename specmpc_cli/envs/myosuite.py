"""MyoSuite's ten hand tasks as TD-MPC2 ran them: 39 muscles, 100 steps whatever the environment says, success where it is `solved`."""

# An extra, which may not be installed where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import gymnasium
import mujoco
import myosuite  # noqa: F401  (registers its environments)
import numpy as np

from specmpc_cli.envs.adapter import RawStep

_NAMES = {"reach": "Reach", "pose": "Pose", "obj-hold": "ObjHold", "key-turn": "KeyTurn", "pen-twirl": "PenTwirl"}


class MyoSuiteSimulator:
    """One hand task. The published protocol ignores both of the environment's ends, so no step reports one."""

    def __init__(self, name: str) -> None:
        self._env: Any = gymnasium.make(name).unwrapped
        self.obs_dim = int(self._env.observation_space.shape[0])
        self.action_low, self.action_high = (bound.astype(float) for bound in (self._env.action_space.low, self._env.action_space.high))
        self._renderer: mujoco.Renderer | None = None

    def reset(self, seed: int) -> np.ndarray:
        return self._env.reset(seed=seed)[0]

    def step(self, action: np.ndarray) -> RawStep:
        obs, reward, _, _, info = self._env.step(action)
        return RawStep(obs, float(reward), success=bool(info["solved"]))

    def render(self, height: int, width: int) -> np.ndarray:
        if self._renderer is None or (self._renderer.height, self._renderer.width) != (height, width):
            self._close_renderer()
            self._renderer = mujoco.Renderer(self._env.mj_model, height, width)
        self._renderer.update_scene(self._env.mj_data, camera="hand_side_inter")
        return self._renderer.render()

    def close(self) -> None:
        self._close_renderer()
        self._env.close()

    def _close_renderer(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def make_simulator(task: str) -> MyoSuiteSimulator:
    """The simulator of `myo-NAME`, with a fixed goal, or `myo-NAME-hard`, with a random one."""
    name = task.removeprefix("myo-")
    goal = "Random" if name.endswith("-hard") else "Fixed"
    return MyoSuiteSimulator(f"myoHand{_NAMES[name.removesuffix('-hard')]}{goal}-v0")
