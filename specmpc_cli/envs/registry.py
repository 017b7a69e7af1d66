"""The task table: every name, its suite, and how to make it. Importing it imports no suite."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType

from specmpc_cli.envs.adapter import Script, TaskEnv
from specmpc_cli.errors import ConfigError, SuiteNotInstalled, UnknownTask
from specmpc_cli.types import EnvSpec


@dataclass(frozen=True, slots=True)
class Suite:
    """A family of tasks: the module here that makes its simulators, and what must be installed for it."""

    name: str
    module: str
    requires: str | None  # the import that tells whether it is installed
    install: str

    @property
    def installed(self) -> bool:
        return self.requires is None or importlib.util.find_spec(self.requires) is not None


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """A task: its suite, and the facts of its environment, known without building one."""

    suite: Suite
    spec: EnvSpec

    @property
    def installed(self) -> bool:
        return self.suite.installed


def _extra(name: str) -> str:
    return f"pip install 'specmpc[{name}]'"


_CORE = "pip install specmpc"
DMCONTROL = Suite("dmcontrol", "specmpc_cli.envs.dmcontrol", "dm_control", _CORE)
METAWORLD = Suite("metaworld", "specmpc_cli.envs.metaworld", "metaworld", _CORE)
MYOSUITE = Suite("myosuite", "specmpc_cli.envs.myosuite", "myosuite", _extra("myosuite"))
MANISKILL = Suite("maniskill", "specmpc_cli.envs.maniskill", "mani_skill", _extra("maniskill"))
MANISKILL2 = Suite("maniskill", "specmpc_cli.envs.maniskill2", "mani_skill2", "pip install -c constraints-maniskill2.txt '.[maniskill2]'")
GYMNASIUM = Suite("gymnasium", "specmpc_cli.envs.gymnasium_tasks", "gymnasium", _CORE)
BOX2D = Suite("gymnasium", "specmpc_cli.envs.gymnasium_tasks", "Box2D", _extra("box2d"))
POINTMASS = Suite("pointmass", "specmpc_cli.envs.pointmass", None, _CORE)
CUSTOM = Suite("custom", "specmpc_cli.envs.custom", None, _CORE)
CUSTOM_GROUP = "specmpc.tasks"  # of entry points


def _entry(suite: Suite, task: str, obs_dim: int, action_dim: int, decisions: int, action_repeat: int, **facts: bool) -> TaskEntry:
    return TaskEntry(suite, EnvSpec(task, suite.name, obs_dim, action_dim, decisions, action_repeat, **facts))


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

# The goal of the plain ones is fixed, that of the hard ones random.
_MYOSUITE_TASKS = {"reach": 115, "pose": 108, "obj-hold": 91, "key-turn": 93, "pen-twirl": 83}  # observation dimensions

_MANISKILL_TASKS = {"lift-cube": (35, 4), "pick-cube": (42, 4), "stack-cube": (48, 4), "pick-ycb": (45, 7), "turn-faucet": (33, 7)}
# Version 2 shows more; it counts where it is installed and version 3 is not.
_MANISKILL2_TASKS = {"lift-cube": (42, 4), "pick-cube": (51, 4), "stack-cube": (55, 4), "pick-ycb": (51, 7), "turn-faucet": (40, 7)}
_maniskill, _maniskill_tasks = (
    (MANISKILL2, _MANISKILL2_TASKS) if MANISKILL2.installed and not MANISKILL.installed else (MANISKILL, _MANISKILL_TASKS)
)

_ENTRIES = [
    *(_entry(DMCONTROL, name, *dims, decisions=500, action_repeat=2) for name, dims in _DMCONTROL_TASKS.items()),
    *(_entry(METAWORLD, f"mw-{name}", 39, 4, 100, 2, has_success=True) for name in _METAWORLD_TASKS.split()),
    *(_entry(_maniskill, name, *dims, decisions=100, action_repeat=2, has_success=True) for name, dims in _maniskill_tasks.items()),
    *(
        _entry(MYOSUITE, f"myo-{name}{level}", obs_dim, 39, 100, 1, has_success=True)
        for name, obs_dim in _MYOSUITE_TASKS.items()
        for level in ("", "-hard")
    ),
    _entry(GYMNASIUM, "mujoco-walker", 17, 6, 1000, 1, episodic=True),
    _entry(GYMNASIUM, "mujoco-halfcheetah", 17, 6, 1000, 1, episodic=True),
    _entry(BOX2D, "bipedal-walker", 24, 4, 1600, 1, episodic=True),
    _entry(BOX2D, "lunarlander-continuous", 8, 2, 500, 1, episodic=True, has_success=True),
]
TASKS: dict[str, TaskEntry] = {entry.spec.task: entry for entry in _ENTRIES}
_BUILT_IN = {"pointmass": _entry(POINTMASS, "pointmass", 4, 2, 40, 1)}

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
    return name in TASKS or name in _BUILT_IN or _is_custom(name)


def lookup(task: str) -> TaskEntry:
    """The entry of a task's name. Raises UnknownTask, with the nearest names, or with what is wrong with a task of the user's own."""
    entry = TASKS.get(task) or _BUILT_IN.get(task)
    if entry is not None:
        return entry
    if _is_custom(task):
        from specmpc_cli.envs.custom import custom_spec  # it builds the environment, to learn about it

        return TaskEntry(CUSTOM, custom_spec(task))
    close = difflib.get_close_matches(task, TASKS, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "'specmpc tasks' lists all"
    raise UnknownTask(f"unknown task {task!r}; {hint}")


def custom_tasks() -> list[str]:
    """Names of the tasks that installed packages bring as entry points; a name that is taken stays with its task."""
    return sorted({entry.name for entry in entry_points(group=CUSTOM_GROUP)} - TASKS.keys() - _BUILT_IN.keys())


def _is_custom(name: str) -> bool:
    return ":" in name or name in custom_tasks()


def make_env(task: str) -> TaskEnv:
    """A new environment.

    Raises:
        UnknownTask: see `lookup`.
        SuiteNotInstalled: what the task needs is missing, or fails to import; AssetsMissing: or has not been downloaded.
    """
    entry = lookup(task)
    simulator = _module_of(entry).make_simulator(task)
    assert (simulator.obs_dim, len(simulator.action_low)) == (entry.spec.obs_dim, entry.spec.action_dim), task
    return TaskEnv(entry.spec, simulator)


def expect_ready(task: str) -> None:
    """Raises what `make_env` would for want of a suite or its assets, without making a simulator of a suite."""
    expect_assets = getattr(_module_of(lookup(task)), "expect_assets", None)
    if expect_assets is not None:
        expect_assets(task)


def make_script(task: str) -> Script:
    """The scripted policy that the task's suite brings. Raises ConfigError where there is none, and as `make_env` does."""
    make = getattr(_module_of(lookup(task)), "make_script", None)
    if make is None:
        raise ConfigError(f"{task} has no scripted policy to demonstrate it (Meta-World's tasks have); leave train.demonstrations at 0")
    return make(task)


def _module_of(entry: TaskEntry) -> ModuleType:
    """The module that makes the simulators of an entry's suite. Raises SuiteNotInstalled."""
    suite, task = entry.suite, entry.spec.task
    if not entry.installed:
        raise SuiteNotInstalled(f"{task} needs {suite.requires}, which is not installed; run: {suite.install}")
    try:
        return importlib.import_module(suite.module)
    except Exception as error:  # noqa: BLE001 (a suite may break in any way; the reason is what the user needs)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise SuiteNotInstalled(f"{task} needs {suite.requires}, which is installed but fails to import: {reason}") from None
