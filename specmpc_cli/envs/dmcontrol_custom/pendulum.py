"""The pendulum, spinning."""

from __future__ import annotations

import math

import numpy as np
from dm_control.rl.control import Environment
from dm_control.suite import pendulum

from specmpc_cli.envs.dmcontrol_custom.rewards import linear


class Spin(pendulum.SwingUp):
    """Turn at 9 rad/s or more, either way round."""

    def get_reward(self, physics: pendulum.Physics) -> float:
        return linear(float(np.linalg.norm(physics.angular_velocity())), 9, math.inf, margin=4.5, value=0.5)


def make(random: np.random.RandomState) -> Environment:
    physics = pendulum.Physics.from_xml_string(*pendulum.get_model_and_assets())
    return Environment(physics, Spin(random=random), time_limit=20)
