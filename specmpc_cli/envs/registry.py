"""The task table: every name, its suite, and how to make it. Importing it imports no suite."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from dataclasses import dataclass

from specmpc_cli.envs.adapter import TaskEnv
from specmpc_cli.errors import SuiteNotInstalled, UnknownTask
from specmpc_cli.types import EnvSpec


@dataclass(frozen=True, slots=True)
class Suite:
    """A family of tasks: the module here that makes its simulators, and what must be installed for it."""

    name: str
    module: str
    requires: str | None  # the import that tells whether it is installed
    install: str
    decisions: int
    action_repeat: int
    has_success: bool = False


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """A registered task."""

    task: str
    suite: Suite
    obs_dim: int
    action_dim: int

    @property
    def installed(self) -> bool:
        return self.suite.requires is None or importlib.util.find_spec(self.suite.requires) is not None

    @property
    def spec(self) -> EnvSpec:
        """The facts of its environment, without building one."""
        suite = self.suite
        return EnvSpec(
            task=self.task,
            suite=suite.name,
            obs_dim=self.obs_dim,
            action_dim=self.action_dim,
            decisions=suite.decisions,
            action_repeat=suite.action_repeat,
            has_success=suite.has_success,
        )


_CORE = "pip install specmpc"
DMCONTROL = Suite("dmcontrol", "specmpc_cli.envs.dmcontrol", "dm_control", _CORE, decisions=500, action_repeat=2)
METAWORLD = Suite("metaworld", "specmpc_cli.envs.metaworld", "metaworld", _CORE, decisions=100, action_repeat=2, has_success=True)
POINTMASS = Suite("pointmass", "specmpc_cli.envs.pointmass", None, _CORE, decisions=40, action_repeat=1)

# task: observation and action dimensions
_DMCONTROL_TASKS = {
    "acrobot-swingup": (6, 1), "cartpole-balance": (5, 1), "cartpole-balance-sparse": (5, 1), "cartpole-swingup": (5, 1),
    "cartpole-swingup-sparse": (5, 1), "cheetah-jump": (17, 6), "cheetah-run": (17, 6), "cheetah-run-back": (17, 6),
    "cheetah-run-backwards": (17, 6), "cheetah-run-front": (17, 6), "cup-catch": (8, 2), "cup-spin": (8, 2), "dog-run": (223, 38),
    "dog-stand": (223, 38), "dog-trot": (223, 38), "dog-walk": (223, 38), "finger-spin": (9, 2), "finger-turn-easy": (12, 2),
    "finger-turn-hard": (12, 2), "fish-swim": (24, 5), "hopper-hop": (15, 4), "hopper-hop-backwards": (15, 4), "hopper-stand": (15, 4),
    "humanoid-run": (67, 21), "humanoid-stand": (67, 21), "humanoid-walk": (67, 21), "pendulum-spin": (3, 1),
    "pendulum-swingup": (3, 1), "quadruped-run": (78, 12), "quadruped-walk": (78, 12), "reacher-easy": (6, 2), "reacher-hard": (6, 2),
    "reacher-three-easy": (8, 3), "reacher-three-hard": (8, 3), "walker-run": (24, 6), "walker-run-backwards": (24, 6),
    "walker-stand": (24, 6), "walker-walk": (24, 6), "walker-walk-backwards": (24, 6),
}  # fmt: skip
_METAWORLD_TASKS = """
assembly basketball bin-picking box-close button-press button-press-topdown button-press-topdown-wall button-press-wall coffee-button
coffee-pull coffee-push dial-turn disassemble door-close door-lock door-open door-unlock drawer-close drawer-open faucet-close
faucet-open hammer hand-insert handle-press handle-press-side handle-pull handle-pull-side lever-pull peg-insert-side
peg-unplug-side pick-out-of-hole pick-place pick-place-wall plate-slide plate-slide-back plate-slide-back-side plate-slide-side
push push-back push-wall reach reach-wall shelf-place soccer stick-pull stick-push sweep sweep-into window-close window-open
"""

TASKS: dict[str, TaskEntry] = {
    **{name: TaskEntry(name, DMCONTROL, *dims) for name, dims in _DMCONTROL_TASKS.items()},
    **{f"mw-{name}": TaskEntry(f"mw-{name}", METAWORLD, 39, 4) for name in _METAWORLD_TASKS.split()},
}
_BUILT_IN = {"pointmass": TaskEntry("pointmass", POINTMASS, 4, 2)}

# The index of a task in its set picks its embedding in official multi-task checkpoints, so the order is part of the format.
_MT30 = """
walker-stand walker-walk walker-run cheetah-run reacher-easy reacher-hard acrobot-swingup pendulum-swingup cartpole-balance
cartpole-balance-sparse cartpole-swingup cartpole-swingup-sparse cup-catch finger-spin finger-turn-easy finger-turn-hard fish-swim
hopper-stand hopper-hop walker-walk-backwards walker-run-backwards cheetah-run-backwards cheetah-run-front cheetah-run-back
cheetah-jump hopper-hop-backwards reacher-three-easy reacher-three-hard cup-spin pendulum-spin
"""
_MT80_METAWORLD = """
assembly basketball button-press-topdown button-press-topdown-wall button-press button-press-wall coffee-button coffee-pull
coffee-push dial-turn disassemble door-open door-close drawer-close drawer-open faucet-open faucet-close hammer handle-press-side
handle-press handle-pull-side handle-pull lever-pull peg-insert-side peg-unplug-side pick-out-of-hole pick-place pick-place-wall
plate-slide plate-slide-side plate-slide-back plate-slide-back-side push-back push push-wall reach reach-wall shelf-place soccer
stick-push stick-pull sweep-into sweep window-open window-close bin-picking box-close door-lock door-unlock hand-insert
"""
TASK_SETS: dict[str, tuple[str, ...]] = {
    "mt30": tuple(_MT30.split()),
    "mt80": (*_MT30.split(), *(f"mw-{name}" for name in _MT80_METAWORLD.split())),
}


def is_task(name: str) -> bool:
    """Whether a task has this name."""
    return name in TASKS or name in _BUILT_IN


def lookup(task: str) -> TaskEntry:
    """The entry of a task name. Raises UnknownTask, with the nearest names."""
    entry = TASKS.get(task) or _BUILT_IN.get(task)
    if entry is None:
        close = difflib.get_close_matches(task, TASKS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "'specmpc tasks' lists all"
        raise UnknownTask(f"unknown task {task!r}; {hint}")
    return entry


def make_env(task: str) -> TaskEnv:
    """A new environment. Raises UnknownTask or SuiteNotInstalled."""
    entry = lookup(task)
    suite = entry.suite
    if not entry.installed:
        raise SuiteNotInstalled(f"{task} needs {suite.requires}, which is not installed; run: {suite.install}")
    simulator = importlib.import_module(suite.module).make_simulator(task)
    assert (simulator.obs_dim, len(simulator.action_low)) == (entry.obs_dim, entry.action_dim), task
    return TaskEnv(entry.spec, simulator)
