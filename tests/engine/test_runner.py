"""The runner in a world that counts, with a planner whose plans can be recognised: every age, reason and warm start is predicted."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from specmpc_cli.engine.actors import PolicyActor
from specmpc_cli.engine.batched_planner import BatchedPlanner
from specmpc_cli.engine.compiled import judge_for
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.planner import PlannerSettings, plan
from specmpc_cli.engine.runner import Refinement, SpeculativeRunner
from specmpc_cli.types import Course, Decision, Executes, ReplanReason, Rows, RunnerState, StepLog, Tail
from tests.conftest import make_model
from tests.fakes import ConstantCorrector, CountingModel, ScriptedPlanner

NAIVE = math.inf


class Drive:
    """Feeds a runner counted observations; `offset` makes reality differ from the model's prediction."""

    def __init__(self, runner: SpeculativeRunner, rows: int = 1) -> None:
        self.runner, self.rows = runner, rows
        self.state: RunnerState = runner.begin(runner.initial_state(rows), torch.arange(rows), torch.arange(rows))
        self.count = torch.zeros(rows)
        self.first = torch.ones(rows, dtype=torch.bool)
        self.actions: list[Tensor] = []

    def step(self, offset: float | Tensor = 0.0) -> StepLog:
        obs = torch.stack([self.count + offset, torch.ones(self.rows)], 1)
        action, self.state, log = self.runner.act(obs, self.state, self.first)
        self.actions.append(action)
        self.count, self.first = self.count + 1, torch.zeros_like(self.first)
        return log

    def restart(self, row: int) -> None:
        self.count[row], self.first[row] = 0, True
        self.state = self.runner.begin(self.state, torch.tensor([row]), torch.tensor([77]))


def naive(horizon: int, model: CountingModel | None = None, **options: object) -> tuple[SpeculativeRunner, ScriptedPlanner]:
    model = model or CountingModel()
    planner = ScriptedPlanner(model)
    runner = SpeculativeRunner(model, planner, GateRule(horizon, accept_below=NAIVE), **options)  # type: ignore[arg-type]
    return runner, planner


def test_naive_replans_when_the_plan_is_exhausted_and_ages_in_between() -> None:
    runner, planner = naive(4)
    drive = Drive(runner)
    logs = [drive.step() for _ in range(9)]
    assert [int(log.age) for log in logs] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert [int(log.reason) for log in logs] == [1, 0, 0, 0, 2, 0, 0, 0, 2]  # FIRST, then EXHAUSTED
    assert [int(log.decision) for log in logs] == [2, 0, 0, 0, 2, 0, 0, 0, 2]
    assert [int(log.planner_iterations) for log in logs] == [6, 0, 0, 0, 6, 0, 0, 0, 6]
    assert [count for count, _ in planner.calls] == [0, 4, 8]


def test_plans_of_one_action_predict_the_step_after_it() -> None:
    """A planner that looks one step ahead, replanning at each: what it met is compared with what it predicted, not with what it saw."""
    model = CountingModel(drift=0.5)
    planner = ScriptedPlanner(model, PlannerSettings(discount=0.99, horizon=1, iterations=6))
    drive = Drive(SpeculativeRunner(model, planner, GateRule(1, accept_below=NAIVE)))  # type: ignore[arg-type]
    drive.step()
    assert float(drive.step().mismatch) == pytest.approx(0.5)


def test_the_executed_actions_are_the_plans_then_its_tails() -> None:
    runner, _ = naive(5)
    drive = Drive(runner)
    for _ in range(6):
        drive.step()
    # three planned actions, two of the policy prior's tail, then the second plan
    assert torch.cat(drive.actions).flatten().tolist() == pytest.approx([0.01, 0.01, 0.01, -0.5, -0.5, 0.02])


def test_the_hold_tail_repeats_the_last_planned_action() -> None:
    runner, _ = naive(5, course=Course(tail="hold"))
    drive = Drive(runner)
    for _ in range(5):
        drive.step()
    assert torch.cat(drive.actions).flatten().tolist() == pytest.approx([0.01] * 5)


@pytest.mark.parametrize(("horizon", "expected"), [(1, [0.011, 0.012, 0.0]), (2, [0.012, -0.5, -0.5]), (4, [-0.5, -0.5, -0.5])])
def test_the_warm_start_is_the_mean_shifted_by_age_then_the_tail_if_any(horizon: int, expected: list[float]) -> None:
    runner, planner = naive(horizon)
    drive = Drive(runner)
    for _ in range(horizon + 1):
        drive.step()
    assert planner.calls[0][1] == [0.0, 0.0, 0.0]  # an episode starts cold
    assert planner.calls[1][1] == pytest.approx(expected)


def test_a_perfect_model_replans_only_when_exhausted_however_strict_the_gate() -> None:
    model = CountingModel()
    runner = SpeculativeRunner(model, ScriptedPlanner(model), GateRule(5, accept_below=1e-6, replan_above=1e-6))  # type: ignore[arg-type]
    drive = Drive(runner)
    logs = [drive.step() for _ in range(11)]
    assert [int(log.reason) for log in logs] == [1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2]
    assert all(float(log.mismatch) == 0 for log in logs[1:])
    assert math.isnan(float(logs[0].mismatch))


def test_a_drifting_model_is_accepted_then_corrected_then_replanned() -> None:
    model = CountingModel(drift=0.1)  # mismatch 0.1 at age 1, 0.2 at age 2, ...
    corrector = ConstantCorrector(0.3)
    rule = GateRule(10, accept_below=0.15, replan_above=0.25)
    runner = SpeculativeRunner(model, ScriptedPlanner(model), rule, corrector)  # type: ignore[arg-type]
    drive = Drive(runner)
    logs = [drive.step() for _ in range(7)]
    assert [int(log.decision) for log in logs] == [2, 0, 1, 2, 0, 1, 2]
    assert [int(log.reason) for log in logs] == [1, 0, 0, 3, 0, 0, 3]
    assert torch.cat(drive.actions).flatten().tolist() == pytest.approx([0.01, 0.01, 0.31, 0.02, 0.02, 0.32, 0.03])
    assert [float(log.correction_norm) for log in logs] == pytest.approx([0, 0, 0.3, 0, 0, 0.3, 0])
    assert [float(log.mismatch) for log in logs[1:]] == pytest.approx([0.1, 0.2, 0.3, 0.1, 0.2, 0.3], abs=1e-5)


def test_a_replan_near_its_plan_refines_it_and_every_other_one_searches_anew() -> None:
    model = CountingModel()
    whole, cheap = ScriptedPlanner(model), ScriptedPlanner(model, PlannerSettings(discount=0.99, horizon=3, iterations=1))
    rule = GateRule(2, accept_below=0.3, replan_above=0.3)
    runner = SpeculativeRunner(model, whole, rule, refinement=Refinement(cheap, below=0.5))  # type: ignore[arg-type]
    drive = Drive(runner, rows=2)
    # First step; a step of the plan; exhausted and as predicted; then off by more than the gate allows, a little and much.
    logs = [drive.step(offset) for offset in (0.0, 0.0, 0.0, torch.tensor([0.4, 0.9]))]
    assert [log.planner_iterations.tolist() for log in logs] == [[6, 6], [0, 0], [1, 1], [1, 6]]
    assert [log.reason.tolist() for log in logs] == [[1, 1], [0, 0], [2, 2], [3, 3]]
    assert [count for count, _ in whole.calls] == pytest.approx([0, 0, 3.9])
    assert [count for count, _ in cheap.calls] == pytest.approx([2, 2, 3.4])
    # Each row acts on its own planner's plan: the second and third of `cheap`, the third of `whole`.
    assert [action.flatten().tolist() for action in drive.actions[2:]] == [pytest.approx([0.01, 0.02]), pytest.approx([0.03, 0.03])]
    assert cheap.calls[0][1] == pytest.approx([0.012, -0.5, -0.5])  # all of its warm start is the plan that it refines, and its tail


def test_without_a_bound_exhausted_plans_are_refined_and_rejected_ones_are_not() -> None:
    model = CountingModel()
    whole, cheap = ScriptedPlanner(model), ScriptedPlanner(model, PlannerSettings(discount=0.99, horizon=3, iterations=1))
    runner = SpeculativeRunner(model, whole, GateRule(2, 0.3, 0.3), refinement=Refinement(cheap))  # type: ignore[arg-type]
    drive = Drive(runner)
    # First, kept, exhausted far from its prediction, and then so far off the new plan that the gate rejects it.
    logs = [drive.step(offset) for offset in (0.0, 0.0, 0.9, 7.0)]
    assert [(int(log.reason), int(log.planner_iterations)) for log in logs] == [(1, 6), (0, 0), (2, 1), (3, 6)]


def test_corrections_are_clamped_and_logged_as_executed() -> None:
    model = CountingModel()
    runner = SpeculativeRunner(model, ScriptedPlanner(model), GateRule(9), ConstantCorrector(5.0))  # type: ignore[arg-type]
    drive = Drive(runner)
    drive.step()
    log = drive.step()
    assert float(drive.actions[1]) == 1.0
    assert float(log.correction_norm) == pytest.approx(0.99)


def test_plans_of_several_steps_execute_what_they_are_told_to_and_plain_tdmpc2_what_it_drew() -> None:
    def actions(horizon: int, **options: object) -> list[float]:
        drive = Drive(naive(horizon, **options)[0])
        for _ in range(6):
            drive.step()
        return [float(action) for action in drive.actions]

    assert actions(4) == pytest.approx([0.01, 0.01, 0.01, -0.5, 0.02, 0.02])
    assert actions(4, course=Course("mean")) == pytest.approx([0.01, 0.011, 0.012, -0.5, 0.02, 0.021])
    assert actions(4, course=Course("mean", "hold")) == pytest.approx([0.01, 0.011, 0.012, 0.012, 0.02, 0.021])
    assert actions(1, course=Course("mean")) == actions(1) == pytest.approx([0.01, 0.02, 0.03, 0.04, 0.05, 0.06])


@pytest.mark.parametrize("executes", ["mean", "drawn"])
def test_a_plan_predicts_where_its_own_actions_lead(executes: Executes) -> None:
    model = make_model()
    runner = SpeculativeRunner(model, BatchedPlanner(model, SMALL), GateRule(6, accept_below=NAIVE), course=Course(executes))
    state = runner.begin(runner.initial_state(2), torch.arange(2), torch.arange(2))
    _, state, _ = runner.act(observations(1, 2)[0], state, torch.ones(2, dtype=torch.bool))
    plan = state.plan
    assert torch.equal(plan.actions[:, : SMALL.horizon], plan.mean) == (executes == "mean")
    for t in range(plan.actions.shape[1]):
        torch.testing.assert_close(plan.latents[:, t + 1], model.next(plan.latents[:, t], plan.actions[:, t]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("tail", ["policy", "hold"])
def test_after_a_correction_the_rest_of_the_plan_is_predicted_anew_if_asked_for(tail: Tail) -> None:
    """As far as it is looked at, the plan is what one predicted from the corrected latent and action, with the same planned actions, is."""
    torch.manual_seed(0)
    model = make_model().requires_grad_(False)
    corrector, course = ConstantCorrector(0.1), Course(tail=tail, reroll=True)
    runner = SpeculativeRunner(model, BatchedPlanner(model, SMALL), GateRule(5), corrector, course=course)  # type: ignore[arg-type]
    state = runner.begin(runner.initial_state(2), torch.arange(2), torch.arange(2))
    obs, horizon = torch.randn(5, 2, 4), SMALL.horizon
    _, state, _ = runner.act(obs[0], state, torch.ones(2, dtype=torch.bool))
    planned = state.plan
    for age in range(1, 5):
        action, state, log = runner.act(obs[age], state, torch.zeros(2, dtype=torch.bool))
        assert (log.decision == Decision.CORRECT).all()
        z, expected = model.encode(obs[age]), action
        for t in range(age + 1, age + 1 + horizon):
            z = model.next(z, expected)
            torch.testing.assert_close(state.plan.latents[:, t], z)
            expected = model.pi_mean(z) if tail == "policy" and t >= horizon else planned.actions[:, t]
            torch.testing.assert_close(state.plan.actions[:, t], expected)


def test_where_nothing_is_corrected_a_plan_predicted_anew_is_the_same_plan() -> None:
    def run(**options: object) -> tuple[list[Tensor], RunnerState]:
        runner, _ = naive(6, CountingModel(drift=0.25), corrector=ConstantCorrector(0.1), **options)
        drive = Drive(runner)
        for _ in range(9):
            drive.step()
        return drive.actions, drive.state

    (kept, state), (anew, state_anew) = run(), run(course=Course(reroll=True))
    assert all(torch.equal(*pair) for pair in zip(kept, anew, strict=True))
    torch.testing.assert_close(state.plan.latents, state_anew.plan.latents)


def test_one_rows_reset_leaves_the_others_alone() -> None:
    def run(restart: bool) -> list[StepLog]:
        runner, _ = naive(4)
        drive = Drive(runner, rows=3)
        logs = []
        for step in range(7):
            if restart and step == 2:
                drive.restart(1)
            logs.append(drive.step())
        return logs

    plain, restarted = run(False), run(True)
    for before, after in zip(plain, restarted, strict=True):
        for row in (0, 2):
            assert int(before.age[row]) == int(after.age[row])
            assert int(before.reason[row]) == int(after.reason[row])
    assert [int(log.age[1]) for log in restarted] == [0, 1, 0, 1, 2, 3, 0]
    assert [int(log.reason[1]) for log in restarted] == [1, 0, 1, 0, 0, 0, 2]


def test_beginning_an_episode_changes_no_other_row_in_any_field() -> None:
    drive = Drive(naive(4)[0], rows=3)
    for _ in range(3):
        drive.step()
    before = drive.state
    drive.restart(1)
    others = torch.tensor([0, 2])
    for old, new in zip(flat(before.take(others)), flat(drive.state.take(others)), strict=True):
        assert torch.equal(old, new)
    mine = drive.state.take(torch.tensor([1]))
    assert int(mine.age) == int(mine.step) == 0 and int(mine.stream) == 77 and (mine.history == 0).all() and (mine.plan.mean == 0).all()


def flat(record: Rows) -> list[Tensor]:
    """The tensors of a record and of the records in it."""
    values = [getattr(record, field.name) for field in fields(record)]
    return [tensor for value in values for tensor in (flat(value) if isinstance(value, Rows) else [value])]


def test_with_the_real_planner_one_rows_reset_changes_no_other_rows_actions() -> None:
    model = make_model()

    def run(restart: bool) -> Tensor:
        runner = SpeculativeRunner(model, BatchedPlanner(model, SMALL), GateRule(3, accept_below=NAIVE))
        state = runner.begin(runner.initial_state(3), torch.arange(3), torch.arange(3))
        actions = []
        for step, obs in enumerate(observations(7, 3)):
            first = torch.full((3,), step == 0)
            if restart and step == 2:
                first[1] = True
                state = runner.begin(state, torch.tensor([1]), torch.tensor([77]))
            action, state, _ = runner.act(obs, state, first)
            actions.append(action)
        return torch.stack(actions)

    plain, restarted = run(False), run(True)
    assert torch.equal(plain[:, [0, 2]], restarted[:, [0, 2]])
    assert not torch.equal(plain[2:, 1], restarted[2:, 1])


def test_the_history_holds_the_last_steps_and_forgets_at_a_reset() -> None:
    model, corrector = CountingModel(drift=0.5), ConstantCorrector(0.0)
    runner = SpeculativeRunner(model, ScriptedPlanner(model), GateRule(99), corrector, history=3)  # type: ignore[arg-type]
    drive = Drive(runner)
    for _ in range(4):
        drive.step()
    history = corrector.visits[-1].history[0]  # z, z_pred, difference, planned, each entry [2 + 2 + 2 + 1]
    assert history[:, 0].tolist() == [1, 2, 3]
    assert history[:, 2].tolist() == pytest.approx([1.5, 3.0, 4.5])
    assert history[:, 4].tolist() == pytest.approx([-0.5, -1.0, -1.5])
    drive.restart(0)
    drive.step()
    assert (corrector.visits[-1].history == 0).all()


SMALL = PlannerSettings(discount=0.99, iterations=2, num_samples=32, num_elites=8, num_pi_trajs=4)


def observations(steps: int, rows: int) -> Tensor:
    return torch.randn(steps, rows, 4, generator=torch.Generator().manual_seed(3))


def test_execution_horizon_one_equals_plain_replanning_bit_for_bit() -> None:
    model = make_model()
    planner = BatchedPlanner(model, SMALL)
    runner = SpeculativeRunner(model, planner, GateRule(1, accept_below=NAIVE))
    state = runner.begin(runner.initial_state(1), torch.tensor([0]), torch.tensor([42]))
    mean = torch.zeros(1, 3, 2)
    for step, obs in enumerate(observations(6, 1)):
        action, state, log = runner.act(obs, state, torch.tensor([step == 0]))
        # TD-MPC2 by hand: plan from the observation, warm-started from the last mean shifted by one
        warm = torch.cat([mean[:, 1:], torch.zeros(1, 1, 2)], 1) if step else mean
        noise = planner.draw(torch.tensor([42]), torch.tensor([step]))
        expected = plan(model, model.encode(obs), warm, noise, SMALL)
        assert torch.equal(action, expected.actions[:, 0])
        assert int(log.decision) == Decision.REPLAN
        mean = expected.mean


def test_results_do_not_depend_on_which_rows_share_a_batch() -> None:
    model = make_model()
    rule = GateRule(4, accept_below=0.05, replan_above=0.8)

    def run(rows: list[int], batch_sizes: tuple[int, ...]) -> Tensor:
        planner = BatchedPlanner(model, SMALL, batch_sizes=batch_sizes)
        judged = judge_for(torch.device("cpu"))
        runner = SpeculativeRunner(model, planner, rule, lambda visit: (0.1 * visit.prior, visit.planned.sum(-1) * 0), judge=judged)
        state = runner.begin(runner.initial_state(len(rows)), torch.arange(len(rows)), torch.tensor(rows) + 10)
        actions = []
        for step, obs in enumerate(observations(8, 5)):
            action, state, _ = runner.act(obs[rows], state, torch.full((len(rows),), step == 0))
            actions.append(action)
        return torch.stack(actions)

    together = run([0, 1, 2, 3, 4], (1,))
    assert torch.equal(run([1, 4], (1,)), together[:, [1, 4]]) and torch.equal(run([4], (1,)), together[:, [4]])
    torch.testing.assert_close(run([0, 1, 2, 3, 4], (1, 2)), together, rtol=0, atol=1e-4)  # plans of two rows, as a GPU makes them


def test_the_policy_actor_acts_with_the_priors_mean_and_never_gates() -> None:
    model = make_model()
    actor = PolicyActor(model)
    obs = observations(1, 3)[0]
    action, _, log = actor.act(obs, actor.initial_state(3), torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(action, model.pi_mean(model.encode(obs)))
    alone, _, _ = actor.act(obs[2:], actor.initial_state(1), torch.ones(1, dtype=torch.bool))
    assert torch.equal(alone, action[2:])
    assert log.decision.tolist() == [-1, -1, -1]
    assert log.reason.tolist() == [ReplanReason.NONE] * 3
    assert log.planner_iterations.tolist() == [0, 0, 0]
