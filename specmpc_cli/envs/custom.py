"""Tasks of the user's own: any Gymnasium environment with Box actions, without a change to this package.

A task is named `module:function`, or by an entry point of the group `specmpc.tasks`. Calling the function gives a new environment; its
time limit is the episode's length. Its `metadata` may say more: `episodic` (it may terminate; true if left out) and `has_success`
(its steps' info has `success`; false if left out).
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, flatdim

from specmpc_cli.envs.gymnasium_tasks import GymnasiumSimulator
from specmpc_cli.envs.registry import CUSTOM, CUSTOM_GROUP
from specmpc_cli.errors import UnknownTask
from specmpc_cli.types import EnvSpec


@cache
def custom_spec(task: str) -> EnvSpec:
    """What a task's environment is like; builds one to look at. Raises UnknownTask, saying what it lacks."""
    env = _make(task)
    try:
        return _spec_of(task, env)
    finally:
        env.close()


def make_simulator(task: str) -> GymnasiumSimulator:
    """A new simulator of the task."""
    has_success = custom_spec(task).has_success
    return GymnasiumSimulator(_make(task), (lambda info, _: bool(info.get("success", False))) if has_success else None)


def _make(task: str) -> gymnasium.Env[Any, Any]:
    named = {entry.name: entry for entry in entry_points(group=CUSTOM_GROUP)}
    entry = named.get(task) or EntryPoint(task, task, CUSTOM_GROUP)
    if task not in named and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a module in the current folder needs no installation; last, so that it hides no other
    # Whatever the user's code raises, they are told what and where, in one line.
    try:
        env = entry.load()()
    except Exception as error:  # noqa: BLE001
        raise UnknownTask(f"the task {task!r} cannot be made: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if not isinstance(env, gymnasium.Env):
        raise UnknownTask(f"the task {task!r} must give a gymnasium.Env, and it gave a {type(env).__name__}")
    return env


def _spec_of(task: str, env: gymnasium.Env[Any, Any]) -> EnvSpec:
    action = env.action_space
    if not (isinstance(action, Box) and np.isfinite(action.low).all() and np.isfinite(action.high).all()):
        raise UnknownTask(f"the task {task!r} needs a Box action space with finite bounds, and has {action}")
    try:
        obs_dim = flatdim(env.observation_space)
    except (NotImplementedError, ValueError):
        raise UnknownTask(f"the task {task!r} has an observation space that cannot be flattened: {env.observation_space}") from None
    decisions = _time_limit(env)
    if decisions is None:
        raise UnknownTask(f"the task {task!r} has no time limit; wrap it in gymnasium.wrappers.TimeLimit(env, max_episode_steps=...)")
    facts = {name: bool(env.unwrapped.metadata.get(name, default)) for name, default in (("episodic", True), ("has_success", False))}
    return EnvSpec(task, CUSTOM.name, obs_dim, flatdim(action), decisions, action_repeat=1, **facts)


def _time_limit(env: gymnasium.Env[Any, Any]) -> int | None:
    """The outermost TimeLimit's number of steps, else that of the registered environment."""
    layer: Any = env
    while isinstance(layer, gymnasium.Wrapper):
        if isinstance(layer, gymnasium.wrappers.TimeLimit):
            return int(layer._max_episode_steps)
        layer = layer.env
    return env.spec.max_episode_steps if env.spec is not None else None
