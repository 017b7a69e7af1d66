"""Ball in cup: keep the ball spinning around the cup."""

from __future__ import annotations

import math

import numpy as np
from dm_control.rl.control import Environment
from dm_control.suite import ball_in_cup, base

from specmpc_cli.envs.dmcontrol_custom.rewards import linear

_STARTS_OUTSIDE = 0.1  # share of episodes whose start may lie anywhere; the others start inside the cup


class Spin(ball_in_cup.BallInCup):
    """Ball far from the target and fast; nothing while it is in the target."""

    def initialize_episode(self, physics: ball_in_cup.Physics) -> None:
        anywhere = self.random.uniform() < _STARTS_OUTSIDE
        while True:
            physics.named.data.qpos["ball_x"] = self.random.uniform(-0.2, 0.2)
            physics.named.data.qpos["ball_z"] = self.random.uniform(0.2, 0.5)
            physics.after_reset()
            if physics.data.ncon == 0 and (anywhere or physics.in_target()):
                break
        base.Task.initialize_episode(self, physics)

    def get_reward(self, physics: ball_in_cup.Physics) -> float:
        far = linear(float(np.linalg.norm(physics.ball_to_target())), 0.5, math.inf, margin=0.25, value=0.5)
        speed = float(np.linalg.norm(physics.named.data.qvel[["ball_x", "ball_z"]]))
        fast = linear(speed, 6, math.inf, margin=3, value=0.5)
        return (1 - physics.in_target()) * (far + 2 * fast) / 3


def make(random: np.random.RandomState) -> Environment:
    physics = ball_in_cup.Physics.from_xml_string(*ball_in_cup.get_model_and_assets())
    return Environment(physics, Spin(random=random), time_limit=20, control_timestep=0.02)
