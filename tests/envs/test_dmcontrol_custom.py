"""The custom tasks' rewards at states whose reward is known by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specmpc_cli.envs.dmcontrol_custom import CUSTOM_TASKS, cheetah


def make(task: str) -> tuple[Any, Any]:
    env = CUSTOM_TASKS[task](np.random.RandomState(0))
    env.reset()
    return env, env.physics


class FakeCheetah:
    """Just what the cheetah's rewards look at."""

    def __init__(self, speed: float, **z: float) -> None:
        self._speed = speed
        heights = {("torso", "z"): z["torso"], ("bfoot", "z"): z["bfoot"], ("ffoot", "z"): z["ffoot"]}
        self.named = type("Named", (), {"data": type("Data", (), {"xpos": heights})})

    def speed(self) -> float:
        return self._speed


@pytest.mark.parametrize(("speed", "reward"), [(-8, 1), (-20, 1), (-4, 0.5), (0, 0), (5, 0)])
def test_cheetah_run_backwards(speed: float, reward: float) -> None:
    assert cheetah.run_backwards(FakeCheetah(speed, torso=0, bfoot=0, ffoot=0)) == pytest.approx(reward)  # type: ignore[arg-type]


def test_cheetah_on_one_foot_looks_at_the_raised_foot() -> None:
    up = FakeCheetah(6, torso=1.3, bfoot=1.3, ffoot=0)
    assert cheetah.run_on_one_foot(up, "bfoot") == pytest.approx(1)  # type: ignore[arg-type]
    # foot at 0.6 below its target of 1.2, one margin away: 0.1; a still cheetah keeps a sixth
    low = FakeCheetah(0, torso=1.3, bfoot=0.6, ffoot=0)
    assert cheetah.run_on_one_foot(low, "bfoot") == pytest.approx((3 * 0.1 + 2) / 5 / 6)  # type: ignore[arg-type]


def test_cheetah_jump_is_the_mean_over_the_feet() -> None:
    both = FakeCheetah(0, torso=1.2, bfoot=1.2, ffoot=1.2)
    assert cheetah.jump(both) == pytest.approx(1)  # type: ignore[arg-type]
    one = FakeCheetah(0, torso=1.2, bfoot=1.2, ffoot=0.0)  # mean height 0.6: one margin away
    assert cheetah.jump(one) == pytest.approx((1 + (5 * 0.1 + 1) / 6) / 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(("task", "speed"), [("walker-walk-backwards", 1.0), ("walker-run-backwards", 8.0)])
def test_walker_backwards_is_paid_for_moving_back(task: str, speed: float) -> None:
    env, physics = make(task)
    physics.torso_height, physics.torso_upright = (lambda: 1.3), (lambda: 1.0)
    expected = {-speed: 1.0, -speed / 2: (5 * 0.5 + 1) / 6, 0.0: 1 / 6, speed: 1 / 6}
    for velocity, reward in expected.items():
        physics.horizontal_velocity = lambda velocity=velocity: velocity
        assert env.task.get_reward(physics) == pytest.approx(reward), velocity
    assert physics.named.model.geom_size["floor", 0] == 500


def test_cheetahs_ground_is_twice_as_long() -> None:
    assert make("cheetah-jump")[1].named.model.geom_size["ground", 0] == 200


def test_hopper_backwards() -> None:
    env, physics = make("hopper-hop-backwards")
    physics.height = lambda: 1.0
    for speed, reward in {-1.0: 1.0, -0.5: 0.5, 2.0: 0.0}.items():
        physics.speed = lambda speed=speed: speed
        assert env.task.get_reward(physics) == pytest.approx(reward), speed


def test_pendulum_spin_counts_both_directions() -> None:
    env, physics = make("pendulum-spin")
    for velocity, reward in {9.0: 1.0, -9.0: 1.0, 4.5: 0.5, 0.0: 0.0}.items():
        physics.named.data.qvel["hinge"] = velocity
        assert env.task.get_reward(physics) == pytest.approx(reward), velocity


def test_cup_spin_pays_nothing_in_the_cup_and_starts_there_nine_times_in_ten() -> None:
    env, physics = make("cup-spin")
    starts = []
    for _ in range(200):
        env.reset()
        starts.append(bool(physics.in_target()))
        if starts[-1]:
            assert env.task.get_reward(physics) == 0
    assert 0.83 < np.mean(starts) < 0.97
    physics.in_target = lambda: 0.0
    physics.ball_to_target = lambda: np.array([0.5, 0.0])
    physics.named.data.qvel[["ball_x", "ball_z"]] = [3.6, 4.8]  # 6 m/s
    assert env.task.get_reward(physics) == pytest.approx(1)


def test_the_three_link_reacher_is_put_together_as_the_table_says() -> None:
    for task, radius in (("reacher-three-easy", 0.05), ("reacher-three-hard", 0.015)):
        env, physics = make(task)
        model = physics.named.model
        assert model.geom_size["target", 0] == pytest.approx(radius)
        assert [float(model.body_pos[name, "x"]) for name in ("forearm", "hand", "finger")] == pytest.approx([0.09] * 3)
        for joint in ("elbow", "wrist"):
            np.testing.assert_allclose(np.degrees(model.jnt_range[joint]), [-80, 80])
        assert env.action_spec().shape == (3,)
        assert list(env.observation_spec()) == ["position", "to_target", "velocity"]
        physics.named.data.qpos[:] = 0
        physics.forward()
        assert float(physics.named.data.geom_xpos["finger", "x"]) == pytest.approx(0.27)
