"""The hopper, hopping backwards."""

from __future__ import annotations

import math

import numpy as np
from dm_control.rl.control import Environment
from dm_control.suite import hopper
from dm_control.utils.rewards import tolerance

from specmpc_cli.envs.dmcontrol_custom.rewards import linear


class BackwardsHopper(hopper.Hopper):
    """Stand and hop backwards at 1 m/s."""

    def __init__(self, random: np.random.RandomState) -> None:
        super().__init__(hopping=True, random=random)

    def get_reward(self, physics: hopper.Physics) -> float:
        standing = float(tolerance(physics.height(), bounds=(0.6, 2)))
        return standing * linear(physics.speed(), -math.inf, -1, margin=0.5, value=0.5)


def make(random: np.random.RandomState) -> Environment:
    physics = hopper.Physics.from_xml_string(*hopper.get_model_and_assets())
    return Environment(physics, BackwardsHopper(random), time_limit=20, control_timestep=0.02)
