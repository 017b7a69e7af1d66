"""The task table with what is known of each task, and the check that each one runs."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import yaml

from specmpc_cli.config.presets import zoo_root
from specmpc_cli.envs.registry import CUSTOM, TASKS, TaskEntry, custom_tasks, lookup, make_env
from specmpc_cli.errors import AssetsMissing, ConfigError, UnknownTask

CHECK_STEPS = 20
_FIELDS = ("task", "suite", "installed", "obs_dim", "action_dim", "decisions", "teacher", "ok", "error", "steps_per_s")


def list_tasks(suite: str | None, *, check: bool, on_task: Any = None) -> dict[str, Any]:
    """The document of `tasks --json` (docs/json.md).

    Args:
        suite: only this one; `custom` lists the tasks that installed packages bring as entry points, which are not listed otherwise.
        check: builds and resets every installed task and takes 20 random steps.
        on_task: called with each task's name before it is looked at.

    Raises:
        ConfigError: an unknown suite.
    """
    suites = [*dict.fromkeys(entry.suite.name for entry in TASKS.values()), CUSTOM.name]
    if suite is not None and suite not in suites:
        raise ConfigError(f"--suite must be one of {', '.join(suites)}, got {suite!r}")
    names = custom_tasks() if suite == CUSTOM.name else [task for task, entry in TASKS.items() if suite in (None, entry.suite.name)]
    tasks = []
    for name in names:
        if on_task is not None:
            on_task(name)
        try:
            entry = lookup(name)
        except UnknownTask as error:  # a task of the user's own that cannot be made
            ok = False if check else None
            tasks.append({**dict.fromkeys(_FIELDS), "task": name, "suite": suite, "installed": True, "ok": ok, "error": str(error)})
            continue
        tasks.append(_describe(entry) | (_check(entry) if check else {}))
    return {"schema": 1, "tasks": tasks}


def _describe(entry: TaskEntry) -> dict[str, Any]:
    return {
        "task": entry.spec.task,
        "suite": entry.suite.name,
        "installed": entry.installed,
        "obs_dim": entry.spec.obs_dim,
        "action_dim": entry.spec.action_dim,
        "decisions": entry.spec.decisions,
        "teacher": embedded_teacher(entry.spec.task),
        "ok": None,
        "error": None,
        "steps_per_s": None,
    }


def embedded_teacher(task: str) -> dict[str, Any] | None:
    """Size (millions of parameters) and measured return of the embedded teacher, None where there is none."""
    path = zoo_root() / task / "teacher" / "config.yaml"
    if not path.exists():
        return None
    origin = yaml.safe_load(path.read_text(encoding="utf-8")).get("origin", {})
    return {"size": origin.get("size"), "return": origin.get("return")}


def _check(entry: TaskEntry) -> dict[str, Any]:
    if not entry.installed:
        return {}
    try:
        return _run_steps(entry)
    except AssetsMissing as error:
        return {"error": str(error)}
    # Whatever a suite raises is what this check is there to report, beside the other tasks.
    except Exception as error:  # noqa: BLE001
        return {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}


def _run_steps(entry: TaskEntry) -> dict[str, Any]:
    env = make_env(entry.spec.task)
    try:
        env.reset(seed=0)
        actions = np.random.default_rng(0).uniform(-1, 1, (CHECK_STEPS, env.task_spec.action_dim))
        started = time.perf_counter()
        for seed, action in enumerate(actions, start=1):
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset(seed=seed)
        speed = CHECK_STEPS / (time.perf_counter() - started)
        return {"ok": True, "steps_per_s": round(speed, 1)}
    finally:
        env.close()
