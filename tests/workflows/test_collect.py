"""What a round of collection runs, and of what its corrector is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from specmpc_cli.config.schema import CollectConfig, SpeculationConfig
from specmpc_cli.data.shards import DatasetFacts, Shard
from specmpc_cli.data.tuples import Behaviour, TupleDims
from specmpc_cli.workflows.collect import collect, dataset_name, plan_round
from specmpc_cli.workflows.store import FittedCorrector, Store
from tests.workflows.workbenches import bench, corrector


def test_rounds_mix_the_teacher_with_naive_reuse_and_then_with_the_corrector_on_longer_plans() -> None:
    config = CollectConfig()
    first, second = (plan_round(round_, 10, config.horizons_of(round_), config.teacher_share) for round_ in (1, 2))
    assert [item.horizon for item in first] == [6, 3, 12, 6, 3, 12, 6, 3, 12, 6]
    assert [item.horizon for item in second] == [12, 20, 6, 12, 20, 6, 12, 20, 6, 12]
    for items, behaviour in ((first, Behaviour.NAIVE), (second, Behaviour.CORRECTED)):
        assert [item.number for item in items if item.behaviour is Behaviour.TEACHER] == [4, 9]
        assert {item.behaviour for item in items} == {Behaviour.TEACHER, behaviour}


def test_a_longer_round_begins_with_the_shorter_one_and_no_two_rounds_share_an_episode() -> None:
    assert plan_round(3, 9, (8, 5), 0.5)[:4] == plan_round(3, 4, (8, 5), 0.5)
    assert len({item.index for round_ in (1, 2, 3) for item in plan_round(round_, 500, (8,), 0.5)}) == 1500


def test_datasets_of_before_a_setting_are_found_with_its_default() -> None:
    now = DatasetFacts("pointmass", "abc", TupleDims(3, 2, 4, 3), {"horizon": 3}, SpeculationConfig().model_dump())
    before = replace(now, runner={name: value for name, value in now.runner.items() if name != "executes"})
    assert dataset_name(now) == dataset_name(before) != dataset_name(replace(now, runner={**now.runner, "executes": "mean"}))


def test_another_seeds_data_in_the_same_folder_does_not_decide_how_this_one_acts(tmp_path: Path) -> None:
    def collected(root: Path, seed: int, rounds: int) -> list[list[tuple[int, int, int]]]:
        """The keys of the shards that each corrector was made of."""
        made_of = []

        def fit(shards: list[Shard]) -> FittedCorrector:
            made_of.append(sorted(shard.key for shard in shards))
            return corrector()

        collect(Store(root, "pointmass"), bench(), episodes=2, rounds=rounds, seed=seed, fit=fit)
        return made_of

    alone = collected(tmp_path / "alone", 0, 2)
    assert alone == [[(0, 1, 0), (0, 1, 1)]]
    collected(tmp_path / "shared", 1, 1)
    assert collected(tmp_path / "shared", 0, 2) == alone


def test_returns_are_told_by_what_acted(tmp_path: Path) -> None:
    report = collect(Store(tmp_path, "pointmass"), bench(), episodes=5, rounds=1, seed=0, fit=lambda _: corrector())
    assert {group: len(returns) for group, returns in report.returns.items()} == {
        "round 1, naive 6 steps per plan": 2,
        "round 1, naive 3 steps per plan": 1,
        "round 1, naive 12 steps per plan": 1,
        "round 1, teacher": 1,
    }


def test_episodes_that_were_run_with_other_horizons_are_counted(tmp_path: Path) -> None:
    store = Store(tmp_path, "pointmass")
    first = collect(store, bench(), episodes=2, rounds=1, seed=0, fit=lambda _: corrector())
    assert (first.new_episodes, first.other_episodes) == (2, 0)
    other = bench()
    other.config = other.config.model_copy(update={"collect": CollectConfig(horizons=(6, 5))})
    again = collect(store, other, episodes=2, rounds=1, seed=0, fit=lambda _: corrector())
    assert (again.new_episodes, again.other_episodes) == (0, 1)  # the second had 3 steps per plan
