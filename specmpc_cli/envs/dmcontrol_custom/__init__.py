"""TD-MPC2's 11 custom DMControl tasks, rebuilt on the stock models, which are edited where the task needs it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from dm_control.rl.control import Environment

from specmpc_cli.envs.dmcontrol_custom import cheetah, cup, hopper, pendulum, reacher, walker

CUSTOM_TASKS: dict[str, Callable[[np.random.RandomState], Environment]] = {
    "walker-walk-backwards": partial(walker.make, speed=1.0),
    "walker-run-backwards": partial(walker.make, speed=8.0),
    "cheetah-run-backwards": partial(cheetah.make, reward=cheetah.run_backwards),
    "cheetah-run-front": partial(cheetah.make, reward=partial(cheetah.run_on_one_foot, raised="bfoot")),
    "cheetah-run-back": partial(cheetah.make, reward=partial(cheetah.run_on_one_foot, raised="ffoot")),
    "cheetah-jump": partial(cheetah.make, reward=cheetah.jump),
    "hopper-hop-backwards": hopper.make,
    "reacher-three-easy": partial(reacher.make, target_size=0.05),
    "reacher-three-hard": partial(reacher.make, target_size=0.015),
    "cup-spin": cup.make,
    "pendulum-spin": pendulum.make,
}
