"""The planar walker, backwards, on a floor twice as long."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
from dm_control.rl.control import Environment
from dm_control.suite import walker

from specmpc_cli.envs.dmcontrol_custom.models import edited
from specmpc_cli.envs.dmcontrol_custom.rewards import above, linear


class BackwardsWalker(walker.PlanarWalker):
    """Stand upright and move backwards at `speed` m/s."""

    def __init__(self, speed: float, random: np.random.RandomState) -> None:
        super().__init__(move_speed=speed, random=random)
        self._speed = speed

    def get_reward(self, physics: walker.Physics) -> float:
        standing = above(physics.torso_height(), 1.2, margin=0.6)
        stand = (3 * standing + (1 + physics.torso_upright()) / 2) / 4
        move = linear(physics.horizontal_velocity(), -math.inf, -self._speed, margin=self._speed / 2, value=0.5)
        return stand * (5 * move + 1) / 6


def _lengthen_floor(root: ET.Element) -> None:
    floor = root.find(".//geom[@name='floor']")
    assert floor is not None
    floor.set("size", "500 .8 .2")


def make(random: np.random.RandomState, speed: float) -> Environment:
    physics = walker.Physics.from_xml_string(*edited(walker.get_model_and_assets(), _lengthen_floor))
    return Environment(physics, BackwardsWalker(speed, random), time_limit=25, control_timestep=0.025)
