"""Every task keeps the adapter's contract (specmpc_cli/envs/adapter.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specmpc_cli.envs.adapter import TaskEnv
from specmpc_cli.envs.registry import TASK_SETS, TASKS, lookup, make_env, make_script
from specmpc_cli.errors import AssetsMissing, ConfigError, SimulationDiverged, SuiteNotInstalled, UnknownTask
from specmpc_cli.workflows.list_tasks import list_tasks
from tests.fakes import CountingSimulator, counting_envs

STEPS = 40
# MyoSuite's fixed goals come with a fixed start: all episodes are one.
ONE_START = {"myo-reach", "myo-pose", "myo-obj-hold", "myo-key-turn", "myo-pen-twirl"}


@pytest.fixture(scope="module", params=[*TASKS, "pointmass"])
def env(request: pytest.FixtureRequest) -> Iterator[TaskEnv]:
    entry = lookup(request.param)
    if not entry.installed:
        pytest.skip(f"needs {entry.suite.requires}: {entry.suite.install}")
    try:
        made = make_env(request.param)
    except AssetsMissing as error:
        pytest.skip(str(error))
    yield made
    made.close()


def play(env: TaskEnv, seed: int, steps: int = STEPS) -> np.ndarray:
    """Observations and rewards of an episode under actions that the seed does not choose."""
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, env.task_spec.action_dim)).astype(np.float32)
    obs, _ = env.reset(seed=seed)
    trace = [np.append(obs, 0.0)]
    for action in actions:
        obs, reward, *_ = env.step(action)
        trace.append(np.append(obs, reward))
    return np.stack(trace)


def test_spaces_dtypes_and_dimensions(env: TaskEnv) -> None:
    spec, entry = env.task_spec, lookup(env.task_spec.task)
    assert spec == entry.spec
    obs, _ = env.reset(seed=0)
    assert env.observation_space.shape == (spec.obs_dim,) and obs in env.observation_space
    assert env.action_space.dtype == np.float32
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()  # type: ignore[attr-defined]
    obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert obs.dtype == np.float32 and isinstance(reward, float)
    assert not terminated and not truncated and isinstance(info["success"], bool)


def test_a_seed_reproduces_an_episode_exactly_and_another_seed_does_not(env: TaskEnv) -> None:
    first, other, again = play(env, 3), play(env, 4), play(env, 3)
    assert np.array_equal(first, again)
    if env.task_spec.task not in ONE_START:
        assert not np.array_equal(first, other)


def test_a_second_environment_plays_the_same_episode(env: TaskEnv) -> None:
    twin = make_env(env.task_spec.task)
    assert np.array_equal(play(env, 5, 10), play(twin, 5, 10))
    twin.close()


def test_truncates_at_its_number_of_decisions_and_never_before(env: TaskEnv) -> None:
    if env.task_spec.episodic:
        pytest.skip("may terminate before")
    env.reset(seed=1)
    action = np.zeros(env.task_spec.action_dim, np.float32)
    for step in range(1, env.task_spec.decisions + 1):
        _, _, terminated, truncated, _ = env.step(action)
        assert not terminated
        assert truncated == (step == env.task_spec.decisions), step


def test_the_table_has_the_tasks_of_every_suite() -> None:
    suites = Counter(entry.suite.name for entry in TASKS.values())
    assert suites == {"dmcontrol": 39, "metaworld": 50, "maniskill": 5, "myosuite": 10, "gymnasium": 4}
    decisions = {task: lookup(task).spec.decisions for task in ("dog-run", "mw-push", "myo-pose", "bipedal-walker")}
    assert decisions == {"dog-run": 500, "mw-push": 100, "myo-pose": 100, "bipedal-walker": 1600}


def test_only_gymnasium_tasks_may_terminate_and_their_discount_is_bounded() -> None:
    assert {entry.suite.name for entry in TASKS.values() if entry.spec.episodic} == {"gymnasium"}
    assert max(entry.spec.discount for entry in TASKS.values() if entry.spec.episodic) == 0.99


def test_falling_ends_a_gymnasium_episode() -> None:
    env = make_env("mujoco-walker")
    env.reset(seed=0)
    for _ in range(300):
        _, _, terminated, truncated, _ = env.step(np.ones(6, np.float32))
        if terminated:
            break
    assert terminated and not truncated
    env.close()


def test_a_used_bipedal_walker_plays_the_episodes_of_a_fresh_one() -> None:
    """Steady actions make it stumble over contacts, whose order a used Box2D world remembers."""
    pytest.importorskip("Box2D", reason="needs Box2D: pip install 'specmpc[box2d]'")

    def play_smoothly(env: TaskEnv, seed: int) -> np.ndarray:
        noise, action = np.random.default_rng(seed), np.zeros(4)
        trace = [env.reset(seed=seed)[0]]
        for _ in range(200):
            action = 0.9 * action + 0.1 * noise.uniform(-3, 3, 4)
            obs, _, terminated, _, _ = env.step(action)
            trace.append(obs)
            if terminated:
                break
        return np.stack(trace)

    used = make_env("bipedal-walker")
    for seed in range(12):
        fresh = make_env("bipedal-walker")
        assert np.array_equal(play_smoothly(used, seed), play_smoothly(fresh, seed)), seed
        fresh.close()
    used.close()


def test_landing_is_a_success_once_the_return_exceeds_200() -> None:
    pytest.importorskip("Box2D", reason="needs Box2D: pip install 'specmpc[box2d]'")
    env = make_env("lunarlander-continuous")
    env.reset(seed=0)
    step = env.simulator._env.step  # type: ignore[attr-defined]
    env.simulator._env.step = lambda action: (*step(action)[:1], 150.0, False, False, {})  # type: ignore[attr-defined]
    assert [env.step(np.zeros(2, np.float32))[4]["success"] for _ in range(2)] == [False, True]
    env.reset(seed=0)
    assert not env.step(np.zeros(2, np.float32))[4]["success"]  # the return begins anew
    env.close()


def test_task_sets_are_complete_and_known() -> None:
    assert [len(TASK_SETS[name]) for name in ("mt30", "mt80")] == [30, 80]
    assert all(task in TASKS for name in TASK_SETS for task in TASK_SETS[name])
    assert TASK_SETS["mt80"][:30] == TASK_SETS["mt30"] and len(set(TASK_SETS["mt80"])) == 80


def test_actions_are_scaled_to_the_simulators_range_and_clipped() -> None:
    """The quadruped's actions reach from −1 to 1.1, so ±1 must map to those."""
    env = make_env("quadruped-walk")
    received: list[np.ndarray] = []
    step = env.simulator.step
    env.simulator.step = lambda action: (received.append(action), step(action))[1]  # type: ignore[method-assign]
    env.reset(seed=0)
    for value in (-1.0, 1.0, 7.0):
        env.step(np.full(12, value, np.float32))
    low, high = env.simulator.action_low, env.simulator.action_high
    assert high.max() == pytest.approx(1.1)
    for got, expected in zip(received[::2], (low, high, high), strict=True):
        np.testing.assert_allclose(got, expected)
    env.close()


def test_rewards_of_repeated_actions_add_up() -> None:
    env = make_env("walker-walk")
    env.reset(seed=0)
    rewards: list[float] = []
    step = env.simulator.step
    env.simulator.step = lambda action: (rewards.append((raw := step(action)).reward), raw)[1]  # type: ignore[method-assign]
    _, reward, *_ = env.step(np.zeros(6, np.float32))
    assert len(rewards) == 2 and reward == pytest.approx(sum(rewards))
    env.close()


def test_metaworld_draws_a_new_goal_each_episode_and_shows_it() -> None:
    env = make_env("mw-reach")
    goals = [env.reset(seed=seed)[0][-3:] for seed in range(3)]
    assert len({tuple(goal) for goal in goals}) == 3
    assert all(np.abs(goal).sum() > 0 for goal in goals)
    env.close()


@pytest.mark.parametrize(("field", "value"), [("obs", np.nan), ("reward", np.inf)])
def test_values_that_are_not_finite_stop_the_episode_with_task_and_step(field: str, value: float) -> None:
    env = counting_envs(1).envs[0]
    env.reset(seed=0)
    env.step(np.zeros(1))
    step = env.simulator.step
    broken = {"obs": np.array([value, 1.0])} if field == "obs" else {"reward": value}
    env.simulator.step = lambda action: step(action)._replace(**broken)  # type: ignore[method-assign]
    with pytest.raises(SimulationDiverged, match="counting: the simulation diverged at step 2 of the episode with seed 0"):
        env.step(np.zeros(1))


def test_an_observation_of_another_length_than_its_space_is_named() -> None:
    env = counting_envs(1).envs[0]
    env.reset(seed=0)
    step = env.simulator.step
    env.simulator.step = lambda action: step(action)._replace(obs=np.zeros(3))  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="counting: the environment returned an observation of 3 values where its space has 2"):
        env.step(np.zeros(1))


def test_a_diverged_dmcontrol_simulation_is_named_with_mujocos_own_warning() -> None:
    env = make_env("cartpole-balance")
    env.reset(seed=3)
    env.simulator._env.physics.data.qvel[:] = 1e300  # type: ignore[attr-defined]
    with pytest.raises(SimulationDiverged, match="cartpole-balance: .* step 1 of the episode with seed 3: .*mjWARN_BAD.*another --seed"):
        env.step(np.ones(1))
    assert np.isfinite(env.reset(seed=3)[0]).all()
    env.close()


def test_a_suites_own_end_counts_as_truncation_unless_the_task_may_terminate() -> None:
    for episodic, expected in ((False, (False, True)), (True, (True, False))):
        env = counting_envs(1, episodic=episodic).envs[0]
        env.reset(seed=3)
        ends = [env.step(np.zeros(1))[2:4] for _ in range(3)]
        assert ends == [(False, False), (False, False), expected]


def test_unknown_tasks_are_answered_with_the_nearest_names() -> None:
    with pytest.raises(UnknownTask, match="did you mean walker-walk"):
        lookup("walker-wlak")
    with pytest.raises(UnknownTask, match="specmpc tasks"):
        lookup("zzzzzz")


def test_a_suite_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SuiteNotInstalled, match="run: pip install"):
        make_env("mw-assembly")


def test_a_suite_that_breaks_when_imported_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise AttributeError("module 'mujoco' has no\nattribute 'flex'")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(SuiteNotInstalled, match=r"fails to import: AttributeError: module 'mujoco' has no attribute 'flex'$"):
        make_env("mw-assembly")


def test_the_counting_simulator_is_what_the_tests_think_it_is() -> None:
    simulator = CountingSimulator()
    assert simulator.reset(10_002).tolist() == [0, 1]
    assert [simulator.step(np.zeros(1)).truncated for _ in range(2)] == [False, True]


def test_missing_assets_are_named_with_their_command_and_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    maniskill = pytest.importorskip("specmpc_cli.envs.maniskill", reason="needs mani_skill: pip install 'specmpc[maniskill]'")
    monkeypatch.setattr(maniskill, "ASSET_DIR", tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    for task, asset in (("pick-ycb", "ycb"), ("turn-faucet", "partnet_mobility_faucet")):
        with pytest.raises(AssetsMissing, match=f"not in {tmp_path}; run: python -m mani_skill.utils.download_asset {asset} "):
            make_env(task)
    checked = list_tasks("maniskill", check=True)["tasks"]
    assert [task["ok"] for task in checked] == [True, True, True, None, None] and "download_asset ycb" in checked[3]["error"]


def test_lifting_the_cube_is_rewarded_as_in_version_2() -> None:
    pytest.importorskip("mani_skill", reason="needs mani_skill: pip install 'specmpc[maniskill]'")
    env = make_env("lift-cube")
    env.reset(seed=0)
    scene = env.simulator._env.unwrapped  # type: ignore[attr-defined]
    info = scene.get_info()
    distance = float(np.linalg.norm(scene.cube.pose.p - scene.agent.tcp_pose.p))
    reward = float(scene.compute_dense_reward(None, None, info))
    assert reward == pytest.approx(1 - np.tanh(5 * distance), abs=1e-5)  # on the table and not grasped: reaching only
    assert not bool(info["success"])
    done = {"success": info["success"] | True}
    assert float(scene.compute_normalized_dense_reward(None, None, done)) == 1.0
    env.close()


@pytest.mark.parametrize("task", ["mw-assembly", "mw-drawer-close"])
def test_scripted_policies_solve_their_task_at_our_action_repeat(task: str) -> None:
    env, script = make_env(task), make_script(task)
    obs, _ = env.reset(seed=3)
    info: dict[str, Any] = {}
    for _ in range(env.task_spec.decisions):
        action = script(obs)
        assert action.dtype == np.float32 and np.abs(action).max() <= 1
        obs, _, _, _, info = env.step(action)
    env.close()
    assert info["success"]


def test_every_meta_world_task_has_a_script_and_others_say_that_they_have_none() -> None:
    for entry in TASKS.values():
        if entry.suite.name == "metaworld":
            assert callable(make_script(entry.spec.task))
    with pytest.raises(ConfigError, match="walker-walk has no scripted policy"):
        make_script("walker-walk")
