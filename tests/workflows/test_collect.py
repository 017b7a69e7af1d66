"""What a round of collection runs, before it runs."""

from __future__ import annotations

from dataclasses import replace

from specmpc_cli.config.schema import CollectConfig, SpeculationConfig
from specmpc_cli.data.shards import DatasetFacts
from specmpc_cli.data.tuples import Behaviour, TupleDims
from specmpc_cli.workflows.collect import dataset_name, plan_round


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
