"""ManiSkill's five tasks on ManiSkill 3, from states, on a CPU and without a graphics device.

What differs from the published results, which ran ManiSkill 2: the observations are version 3's, turn-faucet has a sparse reward only, and
lift-cube, which version 3 lacks, is built here on its cube scene with the reward of version 2. As there, a success ends the episode.
"""

# An extra, which may not be installed where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import torch

from specmpc_cli.envs.maniskill_simulator import StateSimulator
from specmpc_cli.errors import AssetsMissing

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # sapien warns that there is no Vulkan, which nothing here needs
    import mani_skill.envs
    import sapien
    from mani_skill import ASSET_DIR, PACKAGE_ASSET_DIR
    from mani_skill.envs.tasks.tabletop.pick_cube import PickCubeEnv
    from mani_skill.utils.building import ground
    from mani_skill.utils.registration import register_env
    from mani_skill.utils.scene_builder.table import scene_builder
    from sapien.wrapper import actor_builder, urdf_loader

# Simulator steps of an episode, as in ManiSkill 2: 100 decisions. Version 3 would cut most of them at 50.
_STEPS = 200

# task: ManiSkill's name, control mode, and the asset that must have been downloaded
_TASKS: dict[str, tuple[str, str, str | None]] = {
    "lift-cube": ("SpecmpcLiftCube-v1", "pd_ee_delta_pos", None),
    "pick-cube": ("PickCube-v1", "pd_ee_delta_pos", None),
    "stack-cube": ("StackCube-v1", "pd_ee_delta_pos", None),
    "pick-ycb": ("PickSingleYCB-v1", "pd_ee_delta_pose", "ycb"),
    "turn-faucet": ("TurnFaucet-v1", "pd_ee_delta_pose", "partnet_mobility_faucet"),
}


@register_env("SpecmpcLiftCube-v1", max_episode_steps=_STEPS)
class LiftCube(PickCubeEnv):
    """Lift the cube by 0.2 m and hold still: ManiSkill 2's LiftCube-v0 on version 3's cube scene."""

    _HEIGHT = 0.2  # metres
    _BEST = 2.25  # the reward of a success, by which rewards are normalised

    def _get_obs_extra(self, info: dict[str, Any]) -> dict[str, torch.Tensor]:
        hand, cube = self.agent.tcp_pose, self.cube.pose
        return {"tcp_pose": hand.raw_pose, "obj_pose": cube.raw_pose, "tcp_to_obj_pos": cube.p - hand.p}

    def evaluate(self) -> dict[str, torch.Tensor]:
        lifted = self._lift() >= self._HEIGHT
        still = self.agent.is_static(0.2)
        return {"success": lifted & still, "is_lifted": lifted, "is_robot_static": still}

    def compute_dense_reward(self, obs: Any, action: torch.Tensor, info: dict[str, Any]) -> torch.Tensor:
        """Reaching, plus 0.25 and the share of the height while the cube is grasped; 2.25 for a success."""
        distance = torch.linalg.norm(self.cube.pose.p - self.agent.tcp_pose.p, dim=1)
        grasped = self.agent.is_grasping(self.cube, max_angle=30)
        held = 0.25 + (self._lift() / self._HEIGHT).clamp(max=1.0)
        reward = 1 - torch.tanh(5 * distance) + grasped * held
        return torch.where(info["success"], self._BEST, reward)

    def compute_normalized_dense_reward(self, obs: Any, action: torch.Tensor, info: dict[str, Any]) -> torch.Tensor:
        return self.compute_dense_reward(obs, action, info) / self._BEST

    def _lift(self) -> torch.Tensor:
        """Metres of the cube above where it lies on the table, [1]."""
        return self.cube.pose.p[:, 2] - self.cube_half_size


class _Blank:
    """Stands for a material or texture: takes everything, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> None:
        return None


@cache
def _without_renderer() -> None:
    """Makes scenes without visuals, once per process.

    ManiSkill looks for a graphics device as soon as anything gets a colour, even where only states are asked for.
    """
    for module in (sapien.render, urdf_loader):
        for name in ("RenderMaterial", "RenderTexture2D"):
            setattr(module, name, _Blank)
    for name in [name for name in dir(actor_builder.ActorBuilder) if name.startswith("add_") and "visual" in name]:
        setattr(actor_builder.ActorBuilder, name, lambda self, *args, **kwargs: self)
    for module in (ground, scene_builder):
        setattr(module, "build_ground", lambda *args, **kwargs: None)  # noqa: B010 (the modules are typed without it)


def expect_assets(task: str) -> None:
    """Raises AssetsMissing, with the command that downloads them, where ManiSkill would ask on standard input whether to."""
    asset = _TASKS[task][2]
    if asset is None:
        return
    if asset == "ycb":
        there = (Path(ASSET_DIR) / "assets/mani_skill2_ycb/info_pick_v0.json").exists()
    else:
        models = Path(PACKAGE_ASSET_DIR) / "partnet_mobility/meta/info_faucet_train.json"
        there = models.exists() and any((Path(ASSET_DIR) / "partnet_mobility/dataset").glob("*"))
    if not there:
        raise AssetsMissing(
            f"{task} needs assets that are not in {ASSET_DIR}; run: python -m mani_skill.utils.download_asset {asset} "
            "(MS_ASSET_DIR names another folder)"
        )


def make_simulator(task: str) -> StateSimulator:
    """The simulator of one of the five tasks. Raises AssetsMissing with the command that downloads them."""
    assert mani_skill.envs is not None  # imported to register its tasks
    name, control_mode, _ = _TASKS[task]
    expect_assets(task)
    _without_renderer()
    env = gymnasium.make(
        name,
        num_envs=1,
        obs_mode="state",
        control_mode=control_mode,
        sim_backend="cpu",
        render_backend="none",
        max_episode_steps=_STEPS,
    )
    return StateSimulator(env)
