"""Which gate a way of acting follows, and what its promise holds for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from specmpc_cli.config.schema import Config, PlannerConfig, RefineConfig, SpeculationConfig
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.errors import ConfigError
from specmpc_cli.workflows.ways import Mode, Way, adaptive_way, broken_promise, check_way
from tests.workflows.workbenches import SMALL, corrector


def test_gates_come_from_the_mode_or_the_corrector() -> None:
    naive, corrected = Way(Mode.NAIVE, 3).gate_rule("cosine"), Way(Mode.CORRECTED, 3, corrector()).gate_rule("cosine")
    assert (naive.accept_below, naive.replan_above, naive.metric) == (math.inf, math.inf, "cosine")
    assert (corrected.accept_below, corrected.replan_above, corrected.metric) == (0.1, 0.4, "l1")


def test_adaptive_takes_a_calibrated_gate_or_both_thresholds() -> None:
    way = adaptive_way(corrector(calibrated=True), SMALL, None, None)
    assert way.rule == GateRule(15, 0.1, 0.4, 0.3, "l1")  # plans live as long as they did while the promise was checked
    by_hand = adaptive_way(corrector(), SMALL, 0.2, 0.3).rule
    assert by_hand == GateRule(20, 0.2, 0.3, metric="l1")
    # thresholds by hand are a gate of their own; one alone changes the calibrated one
    assert adaptive_way(corrector(calibrated=True), SMALL, 0.2, 0.3).rule == GateRule(20, 0.2, 0.3, metric="l1")
    assert adaptive_way(corrector(calibrated=True), SMALL, None, 0.9).rule == GateRule(15, 0.1, 0.9, 0.3, "l1")
    shorter = SMALL.model_copy(update={"speculation": SpeculationConfig(max_age=4)})
    assert adaptive_way(corrector(calibrated=True), shorter, None, None).horizon == 4
    for one in ((0.2, None), (None, 0.3), (None, None)):
        with pytest.raises(ConfigError, match="carries no calibrated one"):
            adaptive_way(corrector(), SMALL, *one)


def test_a_promise_holds_for_the_planner_and_the_refinement_that_it_was_checked_with() -> None:
    way = adaptive_way(corrector(calibrated=True), SMALL, None, None)
    assert broken_promise(way, SMALL, "fp32") is None
    for other in ({"planner": PlannerConfig()}, {"speculation": SpeculationConfig(max_age=7)}, {"refine": RefineConfig(iterations=1)}):
        assert "no promise holds here" in (broken_promise(way, SMALL.model_copy(update=other), "fp32") or "")
    longer = {"speculation": SpeculationConfig(max_age=40)}  # which the gate does not let a plan become
    assert broken_promise(adaptive_way(corrector(calibrated=True), SMALL, None, None), SMALL.model_copy(update=longer), "fp32") is None
    ours = {"speculation": SpeculationConfig(tail="hold", executes="mean", metric="l1")}  # the corrector brings its own
    assert broken_promise(way, SMALL.model_copy(update=ours), "fp32") is None
    assert broken_promise(Way(Mode.CORRECTED, 6, corrector(calibrated=True)), Config(), "fp32") is None


def test_a_promise_holds_for_the_gate_and_the_dtype_that_it_was_checked_with() -> None:
    calibrated = corrector(calibrated=True)
    for by_hand in ((None, 1e9), (0.05, None), (0.1, 0.4)):  # the last: the gate's own numbers, but for the length of its plans
        way = adaptive_way(calibrated, SMALL, *by_hand)
        assert "replaced by thresholds given by hand: no promise holds" in (broken_promise(way, SMALL, "fp32") or "")
    facts = replace(calibrated.facts, promised_with=SMALL.acting_settings() | {"dtype": "fp32"})
    way = adaptive_way(replace(calibrated, facts=facts), SMALL, None, None)
    assert broken_promise(way, SMALL, "fp32") is None
    assert "calibrated in fp32 and acts in bf16: no promise holds here" in (broken_promise(way, SMALL, "bf16") or "")


@pytest.mark.parametrize("horizon", [0, -1, 1001, 10**12])
def test_a_horizon_out_of_range_is_refused_before_anything_runs(horizon: int) -> None:
    with pytest.raises(ConfigError, match=rf"--horizon must lie in 1..1000, got {horizon}"):
        check_way("naive", horizon=horizon)
