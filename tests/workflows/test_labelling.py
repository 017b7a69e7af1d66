"""Labels are the teacher's own chain of plans, whoever acts; and asking for them changes nothing about how a runner acts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from specmpc_cli.data.tuples import Behaviour
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.planner import PlannerSettings
from specmpc_cli.engine.runner import Refinement, SpeculativeRunner
from specmpc_cli.types import Actor
from specmpc_cli.workflows.labelling import LabelledLog, Labeller
from tests.fakes import CountingModel, ScriptedPlanner

STEPS = 5


def two_steps_per_plan(refinement: Refinement | None = None) -> tuple[SpeculativeRunner, ScriptedPlanner]:
    model = CountingModel()
    planner = ScriptedPlanner(model)
    return SpeculativeRunner(model, planner, GateRule(2, accept_below=math.inf), refinement=refinement), planner  # type: ignore[arg-type]


def drive(actor: Actor[Any]) -> tuple[list[float], list[Any]]:
    """The actions and logs of the counting world's first steps."""
    state = actor.begin(actor.initial_state(1), torch.tensor([0]), torch.tensor([0]))
    actions, logs = [], []
    for step in range(STEPS):
        action, state, log = actor.act(torch.tensor([[float(step), 1.0]]), state, torch.tensor([step == 0]))
        actions.append(float(action))
        logs.append(log)
    return actions, logs


def test_each_label_searches_around_the_label_before_it_whatever_is_executed() -> None:
    runner, planner = two_steps_per_plan()
    actions, logs = drive(Labeller(runner, Behaviour.NAIVE))
    # The runner plans on steps 0, 2 and 4, before the label of the same step: plans 1, 4 and 7. Labels are plans 2, 3, 5, 6 and 8.
    assert actions == pytest.approx([0.01, 0.01, 0.04, 0.04, 0.07])
    assert [float(log.a_teacher_mean) for log in logs] == pytest.approx([0.02, 0.03, 0.05, 0.06, 0.08])
    chain = [[0, 0, 0], [0.021, 0.022, 0], [0.031, 0.032, 0], [0.051, 0.052, 0], [0.061, 0.062, 0]]
    assert [log.warm_start.flatten().tolist() for log in logs] == [pytest.approx(warm_start) for warm_start in chain]
    assert planner.calls[3] == (2, pytest.approx([0.012, -0.5, -0.5]))  # the runner's own: the plan it had, and that plan's tail


def test_labelling_changes_no_action_of_the_runner_and_no_replan_not_even_a_refined_one() -> None:
    def refined() -> SpeculativeRunner:
        model = CountingModel()
        cheap = ScriptedPlanner(model, PlannerSettings(discount=0.99, horizon=3, iterations=1))
        return two_steps_per_plan(Refinement(cheap))[0]  # type: ignore[arg-type]

    _, alone = drive(refined())
    _, labelled = drive(Labeller(refined(), Behaviour.NAIVE))
    iterations = [int(log.planner_iterations) for log in alone]
    assert iterations == [6, 0, 1, 0, 1]
    assert [int(log.planner_iterations) for log in labelled] == iterations
    assert [int(log.age) for log in labelled] == [int(log.age) for log in alone]


def test_the_teacher_acts_by_its_own_plans_while_the_runners_age_beside_them() -> None:
    runner, _ = two_steps_per_plan()
    actions, logs = drive(Labeller(runner, Behaviour.TEACHER))
    assert actions == pytest.approx([0.02, 0.03, 0.05, 0.06, 0.08])
    assert [float(log.a_plan) for log in logs[1:]] == pytest.approx([0.01, 0.01, 0.04, 0.04])
    assert all(isinstance(log, LabelledLog) for log in logs)
