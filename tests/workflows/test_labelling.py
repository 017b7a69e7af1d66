"""Labels: which plans they are, what those start from, and who acts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from specmpc_cli.data.tuples import Behaviour
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.planner import PlannerSettings
from specmpc_cli.engine.runner import Refinement, SpeculativeRunner
from specmpc_cli.types import Actor, Course
from specmpc_cli.workflows.labelling import Labeller
from tests.fakes import CountingModel, ScriptedPlanner

STEPS = 5


def two_steps_per_plan(**options: Any) -> tuple[SpeculativeRunner, ScriptedPlanner]:
    model = CountingModel()
    planner = ScriptedPlanner(model)
    return SpeculativeRunner(model, planner, GateRule(2, accept_below=math.inf), **options), planner  # type: ignore[arg-type]


def drive(actor: Actor[Any]) -> tuple[list[float], list[Any]]:
    """The actions and logs of the counting world's first steps."""
    state = actor.begin(actor.initial_state(1), torch.tensor([0]), torch.tensor([0]))
    actions, logs = [], []
    for step in range(STEPS):
        action, state, log = actor.act(torch.tensor([[float(step), 1.0]]), state, torch.tensor([step == 0]))
        actions.append(float(action))
        logs.append(log)
    return actions, logs


def test_a_label_is_a_fresh_plan_around_the_executed_one_and_where_that_is_used_up_the_next_one() -> None:
    runner, _ = two_steps_per_plan()
    actions, logs = drive(Labeller(runner, Behaviour.NAIVE))
    # Every step is planned once. The plans of steps 0, 2 and 4 (numbers 1, 3 and 5) are executed, the others only looked at.
    assert [float(log.a_teacher_mean) for log in logs] == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    assert actions == pytest.approx([0.01, 0.01, 0.03, 0.03, 0.05])
    assert [float(log.a_plan) for log in logs[1:]] == pytest.approx([0.01, 0.01, 0.03, 0.03])
    warm_starts = [[0, 0, 0], [0.011, 0.012, -0.5], [0.012, -0.5, -0.5], [0.031, 0.032, -0.5], [0.032, -0.5, -0.5]]
    assert [log.warm_start.flatten().tolist() for log in logs] == [pytest.approx(warm_start) for warm_start in warm_starts]


@pytest.mark.parametrize("behaviour", [Behaviour.NAIVE, Behaviour.TEACHER])
def test_the_drawn_action_is_recorded_and_is_the_teachers_whatever_plans_execute(behaviour: Behaviour) -> None:
    runner, _ = two_steps_per_plan(course=Course("mean"))
    actions, logs = drive(Labeller(runner, behaviour))
    assert [float(log.a_plan) for log in logs[1:]] == pytest.approx([0.011, 0.012, 0.031, 0.032])
    assert [float(log.a_teacher) for log in logs] == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    expected = [0.01, 0.02, 0.03, 0.04, 0.05] if behaviour is Behaviour.TEACHER else [0.01, 0.011, 0.03, 0.031, 0.05]
    assert actions == pytest.approx(expected)


def test_labels_search_anew_where_acting_would_refine() -> None:
    model = CountingModel()
    cheap = ScriptedPlanner(model, PlannerSettings(discount=0.99, horizon=3, iterations=1))
    runner, _ = two_steps_per_plan(refinement=Refinement(cheap))  # type: ignore[arg-type]
    _, logs = drive(Labeller(runner, Behaviour.NAIVE))
    assert [int(log.planner_iterations) for log in logs] == [6, 0, 6, 0, 6] and cheap.calls == []


def test_the_teacher_acts_by_its_own_plans_while_the_runners_age_beside_them() -> None:
    runner, planner = two_steps_per_plan()
    actions, logs = drive(Labeller(runner, Behaviour.TEACHER))
    assert actions == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05])
    assert [float(log.a_plan) for log in logs[1:]] == pytest.approx([0.01, 0.01, 0.03, 0.03])
    assert planner.calls[1] == (1, pytest.approx([0.011, 0.012, 0]))  # its own last plan, shifted by one: plain TD-MPC2
