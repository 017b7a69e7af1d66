"""Tasks of the user's own, in the current folder or as an entry point; the example of docs/tasks.md is run as it stands."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from specmpc_cli.envs import custom, registry
from specmpc_cli.envs.registry import lookup, make_env
from specmpc_cli.errors import UnknownTask
from specmpc_cli.workflows import list_tasks as list_tasks_module
from specmpc_cli.workflows.list_tasks import list_tasks
from tests.cli.conftest import Command

DOC = Path(__file__).parents[2] / "docs" / "tasks.md"
EXAMPLE = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the documented example in it; what it imports is forgotten afterwards."""
    (tmp_path / "balance.py").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "balance", raising=False)
    custom.custom_spec.cache_clear()
    return tmp_path


def test_the_documented_example_is_a_task(folder: Path) -> None:
    spec = lookup("balance:make").spec
    assert (spec.obs_dim, spec.action_dim, spec.decisions, spec.episodic, spec.has_success) == (3, 1, 100, False, True)
    env = make_env("balance:make")
    first, again = env.reset(seed=5)[0], env.reset(seed=5)[0]
    assert first.dtype == np.float32 and np.array_equal(first, again) and not np.array_equal(first, env.reset(seed=6)[0])
    _, reward, terminated, truncated, info = env.step(np.ones(1, np.float32))
    assert np.isfinite(reward) and not terminated and not truncated and isinstance(info["success"], bool)
    env.close()


def test_actions_of_another_range_are_scaled(folder: Path) -> None:
    env = make_env("balance:make")
    assert float(env.simulator.action_high[0]) == 2.0 and float(env.action_space.high[0]) == 1.0  # type: ignore[attr-defined]
    env.close()


def test_a_custom_task_goes_through_the_pipeline(folder: Path, command: Command) -> None:
    small = [
        "--set",
        "train.batch_size=8",
        "--set",
        "train.seed_steps=100",
        "--set",
        "train.seed_updates=1",
        "--set",
        "train.eval_every=1000",
    ]
    small += ["--set", "train.eval_episodes=1", "--set", "train.updates_per_decision=0.05", "--set", "train.acting.iterations=1"]
    small += [
        "--set",
        "planner.iterations=1",
        "--set",
        "planner.num_samples=32",
        "--set",
        "planner.num_elites=8",
        "--set",
        "planner.num_pi_trajs=4",
    ]
    result = command("train", "--task", "balance:make", "--steps", "200", *small)
    assert result.code == 0, result.err
    result = command("eval", "--mode", "naive", "--horizon", "3", "--episodes", "1", "--json")
    assert result.document["task"] == "balance:make" and len(result.document["rows"]) == 1


def test_an_entry_point_names_a_task_and_only_the_custom_suite_lists_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)  # as if it were installed
    found = [EntryPoint("my-arm", "balance:make", "specmpc.tasks")]
    for module in (registry, custom):
        monkeypatch.setattr(module, "entry_points", lambda group: found)
    assert lookup("my-arm").spec.decisions == 100
    assert [task["task"] for task in list_tasks("custom", check=True)["tasks"]] == ["my-arm"]
    assert list_tasks("custom", check=True)["tasks"][0]["ok"] is True
    assert "my-arm" not in [task["task"] for task in list_tasks(None, check=False)["tasks"]]


BROKEN = {
    "nothing": ("x = 1", "AttributeError"),
    "raises": ("def make():\n    raise RuntimeError('no\\nlicence')", "RuntimeError: no licence"),
    "no-env": ("def make():\n    return 7", "must give a gymnasium.Env, and it gave a int"),
    "discrete": ("import gymnasium\ndef make():\n    return gymnasium.make('CartPole-v1')", "needs a Box action space with finite bounds"),
    "endless": ("import gymnasium\ndef make():\n    return gymnasium.make('Pendulum-v1').unwrapped", "has no time limit"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_a_custom_task_lacks_is_said_in_one_line(folder: Path, kind: str, command: Command) -> None:
    code, message = BROKEN[kind]
    name = f"broken_{kind.replace('-', '_')}"
    (folder / f"{name}.py").write_text(code)
    assert message in command.fails("collect", "--task", f"{name}:make")


def test_success_may_be_told_at_the_end_only(folder: Path) -> None:
    (folder / "late.py").write_text(EXAMPLE.replace('{"success": abs(self.angle) < 0.1}', "{}"))
    env = make_env("late:make")
    env.reset(seed=0)
    assert env.step(np.zeros(1, np.float32))[4]["success"] is False
    env.close()


def test_a_broken_package_does_not_hide_the_other_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)
    found = [EntryPoint(name, value, "specmpc.tasks") for name, value in (("bad", "gone:make"), ("good", "balance:make"))]
    found.append(EntryPoint("walker-walk", "balance:make", "specmpc.tasks"))  # a built-in task keeps its name
    for module in (registry, custom):
        monkeypatch.setattr(module, "entry_points", lambda group: found)
    bad, good = list_tasks("custom", check=True)["tasks"]
    assert (bad["task"], bad["ok"]) == ("bad", False) and "No module named 'gone'" in bad["error"]
    assert (good["task"], good["ok"]) == ("good", True)
    assert lookup("walker-walk").suite.name == "dmcontrol"


def test_a_task_that_cannot_be_made_is_listed_with_its_reason_as_it_stands(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """Brackets in it are no markup, and without --check nothing failed."""
    (folder / "needy.py").write_text("def make():\n    raise RuntimeError(\"[/absent] needs: pip install 'foo[bar]'\")")
    monkeypatch.syspath_prepend(folder)
    for module in (registry, custom):
        monkeypatch.setattr(module, "entry_points", lambda group: [EntryPoint("needy", "needy:make", "specmpc.tasks")])
    listed = command("tasks", "--suite", "custom")
    assert listed.code == 0 and "[/absent] needs: pip install 'foo[bar]'" in " ".join(listed.out.split())
    (task,) = command("tasks", "--suite", "custom", "--json").document["tasks"]
    assert task["ok"] is None and "needs" in task["error"]
    assert command("tasks", "--suite", "custom", "--check").code == 2


def test_what_an_environment_prints_does_not_mix_with_the_document(folder: Path, command: Command) -> None:
    source = EXAMPLE.replace("def make(", "def make_quietly(") + "\n\ndef make():\n    print('hello')\n    return make_quietly()\n"
    (folder / "chatty.py").write_text(source)
    result = command("export", "--task", "chatty:make", "--json")
    assert result.code == 2 and "hello" in result.err and result.out == ""


def test_a_module_in_the_current_folder_hides_no_other(folder: Path) -> None:
    (folder / "statistics.py").write_text("raise RuntimeError('shadowed')")
    lookup("balance:make")
    assert sys.path[-1] == str(folder)


def test_a_module_that_is_not_there(folder: Path) -> None:
    with pytest.raises(UnknownTask, match="cannot be made: ModuleNotFoundError: No module named 'gone'"):
        lookup("gone:make")


def test_a_check_goes_on_with_another_episode_where_one_ends(folder: Path) -> None:
    strict = """

class Strict(gymnasium.Wrapper):
    over = True

    def reset(self, **options):
        self.over = False
        return self.env.reset(**options)

    def step(self, action):
        assert not self.over, "the episode is over"
        *seen, terminated, truncated, info = self.env.step(action)
        self.over = terminated or truncated
        return *seen, terminated, truncated, info


def make_short():
    return Strict(TimeLimit(Balance(), 7))
"""
    (folder / "short.py").write_text(EXAMPLE + strict)
    checked = list_tasks_module._check(lookup("short:make_short"))
    assert checked["ok"] is True, checked
