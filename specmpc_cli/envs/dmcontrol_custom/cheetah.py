"""The cheetah: backwards, on one foot, and jumping, on ground twice as long."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable

import numpy as np
from dm_control.rl.control import Environment
from dm_control.suite import cheetah

from specmpc_cli.envs.dmcontrol_custom.models import edited
from specmpc_cli.envs.dmcontrol_custom.rewards import above, linear

Reward = Callable[[cheetah.Physics], float]
_HEIGHT = 1.2  # of a raised torso or foot, metres


class CustomCheetah(cheetah.Cheetah):
    """The stock cheetah with another reward."""

    def __init__(self, reward: Reward, random: np.random.RandomState) -> None:
        super().__init__(random=random)
        self._reward = reward

    def get_reward(self, physics: cheetah.Physics) -> float:
        return self._reward(physics)


def run_backwards(physics: cheetah.Physics) -> float:
    """8 m/s backwards."""
    return linear(physics.speed(), -math.inf, -8, margin=8, value=0)


def run_on_one_foot(physics: cheetah.Physics, raised: str) -> float:
    """6 m/s forwards with the torso and the `raised` foot up."""
    torso_up = above(_z(physics, "torso"), _HEIGHT, margin=_HEIGHT / 2)
    foot_up = above(_z(physics, raised), _HEIGHT, margin=_HEIGHT / 2)
    up = (3 * foot_up + 2 * torso_up) / 5
    return up * (5 * linear(physics.speed(), 6, math.inf, margin=6, value=0) + 1) / 6


def jump(physics: cheetah.Physics) -> float:
    """Torso and both feet up, staying in place."""
    still = linear(physics.speed(), -0.5, 0.5, margin=0.5, value=0)
    heights = [(_z(physics, "torso") + _z(physics, foot)) / 2 for foot in ("bfoot", "ffoot")]
    return float(np.mean([(5 * above(height, _HEIGHT, margin=_HEIGHT / 2) + still) / 6 for height in heights]))


def _z(physics: cheetah.Physics, body: str) -> float:
    return float(physics.named.data.xpos[body, "z"])


def _lengthen_ground(root: ET.Element) -> None:
    ground = root.find(".//geom[@name='ground']")
    assert ground is not None
    ground.set("size", "200 .8 .5")


def make(random: np.random.RandomState, reward: Reward) -> Environment:
    physics = cheetah.Physics.from_xml_string(*edited(cheetah.get_model_and_assets(), _lengthen_ground))
    return Environment(physics, CustomCheetah(reward, random), time_limit=10)
