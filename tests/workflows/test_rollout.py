"""The environment loop: rows restart, wait and end independently, and nothing is lost or counted twice."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from specmpc_cli.engine.actors import PlanlessActor
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.runner import SpeculativeRunner
from specmpc_cli.errors import ActionNotFinite, ConfigError
from specmpc_cli.runtime import Purpose, env_seed, stream_key
from specmpc_cli.workflows.rollout import Episode, Transition, rollout
from tests.fakes import CountingModel, ScriptedPlanner, counting_envs

CPU = torch.device("cpu")


def runner(horizon: int = 4) -> SpeculativeRunner:
    model = CountingModel()
    return SpeculativeRunner(model, ScriptedPlanner(model), GateRule(horizon, accept_below=math.inf))  # type: ignore[arg-type]


def episodes(*lengths: int) -> list[Episode]:
    """The counting environment ends after `index` steps (its seed modulo 10⁴)."""
    return [Episode(Purpose.TRAIN, 0, length) for length in lengths]


@pytest.mark.parametrize("num_envs", [1, 2, 5])
def test_every_episode_runs_once_in_order_whatever_the_number_of_rows(num_envs: int) -> None:
    lengths = [5, 9, 3, 7, 11]
    stats = rollout(runner(), counting_envs(num_envs), episodes(*lengths), device=CPU)
    assert [stat.env_steps for stat in stats] == lengths
    assert [stat.episode_return for stat in stats] == [float(length) for length in lengths]
    for stat in stats:
        # FIRST at 0, then EXHAUSTED every 4 steps: exactly what the episode alone would do
        assert stat.reasons == [1 if step == 0 else 2 if step % 4 == 0 else 0 for step in range(stat.env_steps)]
        assert stat.ages == [step % 4 for step in range(stat.env_steps)]
        assert stat.planner_calls == math.ceil(stat.env_steps / 4)
        assert sum(stat.steps_per_plan) == stat.env_steps
        assert math.isnan(stat.mismatches[0]) and all(value == 0 for value in stat.mismatches[1:])


def test_steps_per_plan_counts_the_unfinished_last_plan() -> None:
    (stat,) = rollout(runner(4), counting_envs(1), episodes(10), device=CPU)
    assert stat.steps_per_plan == [4, 4, 2]


def test_truncation_termination_and_success_are_told_apart() -> None:
    (cut,) = rollout(runner(), counting_envs(1, decisions=6), episodes(0), device=CPU)
    assert (cut.env_steps, cut.terminated, cut.success) == (6, False, False)
    (ended,) = rollout(runner(), counting_envs(1, episodic=True), episodes(5), device=CPU)
    assert (ended.env_steps, ended.terminated, ended.success) == (5, True, True)


def test_callbacks_see_each_step_and_each_episode() -> None:
    seen: list[Transition] = []
    finished: list[int] = []
    times: list[float] = []
    rollout(
        runner(),
        counting_envs(2),
        episodes(3, 5),
        device=CPU,
        on_step=seen.append,
        on_episode=lambda stats: finished.append(stats.env_steps),
        on_latency=times.append,
    )
    assert sorted((t.episode.index, t.step) for t in seen) == [(3, s) for s in range(3)] + [(5, s) for s in range(5)]
    assert all(transition.obs[0] == transition.step for transition in seen)
    assert finished == [3, 5]
    assert len(times) == 5 and all(time > 0 for time in times)


def test_max_steps_cuts_episodes_short() -> None:
    assert [stat.env_steps for stat in rollout(runner(), counting_envs(2), episodes(3, 9), device=CPU, max_steps=4)] == [3, 4]


def test_environment_seeds_and_streams_never_collide_across_purposes() -> None:
    seeds = {(purpose, seed, e): env_seed(purpose, seed, e) for purpose in Purpose for seed in (0, 1, 49_999) for e in (0, 9_999)}
    assert len(set(seeds.values())) == len(seeds) and max(seeds.values()) < 2**32
    assert env_seed(Purpose.TUNE, 3, 7) - env_seed(Purpose.TUNE, 0, 0) == 3 * 10_000 + 7
    assert len({stream_key(*key) for key in seeds}) == len(seeds)
    assert all(0 <= stream_key(*key) < 2**63 for key in seeds)


def test_more_episodes_than_a_seed_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="use another --seed"):
        env_seed(Purpose.COLLECT, 0, 10_000)


def test_actions_that_are_not_finite_never_reach_the_simulator() -> None:
    class Broken(PlanlessActor):
        def choose(self, obs: torch.Tensor, state: object) -> torch.Tensor:
            return torch.full((len(obs), 1), torch.nan)

    with pytest.raises(ActionNotFinite, match="an action is not finite"):
        rollout(Broken(CPU), counting_envs(1), episodes(5), device=CPU)


def test_it_says_that_rows_act_before_the_environments_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched then runs beside the simulators, so nothing may wait for the device in between."""
    events: list[str] = []
    envs = counting_envs(2)
    step = envs.step

    def stepping(rows: list[int], actions: np.ndarray) -> object:
        events.append(f"step {len(rows)}")
        return step(rows, actions)

    monkeypatch.setattr(envs, "step", stepping)
    rollout(runner(), envs, episodes(3, 1), device=CPU, on_act=lambda count: events.append(f"act {count}"))
    assert events == ["act 2", "step 2", "act 1", "step 1", "act 1", "step 1"]
