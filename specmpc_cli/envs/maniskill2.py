"""ManiSkill's five tasks on ManiSkill 2 (0.5), the major version of the published results: its tasks, observations and rewards, from
states, without a graphics device. Lives in a virtual environment of its own (constraints-maniskill2.txt), because it needs an older NumPy.

An episode ends when the environment says so, with its first success, which is treated as truncation. Rewards are normalised, the
default of 0.5; those of 0.4 were larger by a constant factor for each task.
"""

# In no environment where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium

from specmpc_cli.envs.maniskill_simulator import StateSimulator
from specmpc_cli.errors import AssetsMissing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that it names and that have been renamed since
    import mani_skill2.envs
    import sapien.core
    from mani_skill2 import ASSET_DIR
    from mani_skill2.envs.sapien_env import BaseEnv

# task: ManiSkill's name, control mode, the asset that must have been downloaded, and files by which it is known to be there
_TASKS: dict[str, tuple[str, str, tuple[str, str] | None]] = {
    "lift-cube": ("LiftCube-v0", "pd_ee_delta_pos", None),
    "pick-cube": ("PickCube-v0", "pd_ee_delta_pos", None),
    "stack-cube": ("StackCube-v0", "pd_ee_delta_pos", None),
    "pick-ycb": ("PickSingleYCB-v0", "pd_ee_delta_pose", ("ycb", "mani_skill2_ycb/info_pick_v0.json")),
    "turn-faucet": ("TurnFaucet-v0", "pd_ee_delta_pose", ("partnet_mobility_faucet", "partnet_mobility/dataset/*")),
}


class _Blank:
    """Stands for the renderer and what it makes: takes every call, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return _Blank

    def __setattr__(self, name: str, value: Any) -> None:
        pass


@cache
def _without_renderer() -> None:
    """Makes scenes without visuals, lights and cameras, once per process: ManiSkill builds them even where only states are asked for."""
    sapien.core.SapienRenderer = _Blank
    sapien.core.Engine.set_renderer = lambda self, renderer: None
    for name in [name for name in dir(sapien.core.ActorBuilder) if name.startswith("add_") and "visual" in name]:
        setattr(sapien.core.ActorBuilder, name, lambda self, *args, **kwargs: self)
    BaseEnv._setup_lighting = lambda self: None
    BaseEnv._setup_cameras = lambda self: self.__dict__.update(_cameras={}, _render_cameras={})
    BaseEnv._add_ground = lambda self, altitude=0.0, render=True: self._scene.add_ground(altitude=altitude, render=False)


def expect_assets(task: str) -> None:
    """Raises AssetsMissing with the command that downloads what the task needs."""
    asset = _TASKS[task][2]
    if asset is not None and not any(Path(ASSET_DIR).glob(asset[1])):
        raise AssetsMissing(
            f"{task} needs assets that are not in {Path(ASSET_DIR).resolve()}; run: python -m mani_skill2.utils.download_asset {asset[0]} "
            "(MS2_ASSET_DIR names another folder)"
        )


def make_simulator(task: str) -> StateSimulator:
    """The simulator of one of the five tasks, which cuts its episodes after 200 simulator steps.

    Raises AssetsMissing with the command that downloads what it needs.
    """
    assert mani_skill2.envs is not None  # imported to register its tasks
    name, control_mode, _ = _TASKS[task]
    expect_assets(task)
    _without_renderer()
    return StateSimulator(gymnasium.make(name, obs_mode="state", control_mode=control_mode, disable_env_checker=True))
