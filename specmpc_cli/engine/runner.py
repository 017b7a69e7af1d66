"""Speculative control: plan once, execute the plan, compare prediction with reality, and accept, correct or plan again.

The runner holds no state: `act` takes the state and returns the next one. Plain TD-MPC2 is the runner with an execution horizon of 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specmpc_cli.engine.gate import METRICS, GateLimits, GateRule, decide, limits_of
from specmpc_cli.engine.planner import Behaviour, PlannerSettings
from specmpc_cli.engine.rows import row_by_row
from specmpc_cli.engine.world_model import WorldModel
from specmpc_cli.types import DEFAULT_COURSE, Corrector, Course, Decision, Plan, ReplanReason, RunnerState, StepLog, Visit


class Planner(Protocol):
    """Makes plans of B rows from latents, warm starts and the keys of their random draws."""

    settings: PlannerSettings

    def __call__(self, z: Tensor, warm_start: Tensor, streams: Tensor, steps: Tensor) -> Plan: ...


class Judgement(NamedTuple):
    """One step of every row seen and judged, before any planner call."""

    z: Tensor  # [B, Z]
    z_pred: Tensor  # [B, Z] z itself on an episode's first step
    planned: Tensor  # [B, A]
    history: Tensor  # [B, W, 3Z+A], this step included
    mismatch: Tensor  # [B] NaN on an episode's first step
    delta: Tensor  # [B, A] the corrector's proposal, 0 without one
    expected_error: Tensor  # [B] how wrong it expects to be, 0 without one
    decision: Tensor  # [B]
    reason: Tensor  # [B]


def judge(
    model: Behaviour,
    corrector: Corrector | None,
    metric: str,
    limits: GateLimits,
    obs: Tensor,
    z_pred: Tensor,
    planned: Tensor,
    age: Tensor,
    history: Tensor,
    first: Tensor,
) -> Judgement:
    """Encodes obs [B, O], compares with the plan (z_pred [B, Z], planned [B, A], age [B]), asks the corrector and decides. Pure.

    `history` [B, W, 3Z+A] is of the steps before this one; only correctors read it, so without one it stays as it is.
    """
    z = model.encode(obs)
    z_pred = torch.where(first.unsqueeze(1), z, z_pred)
    mismatch = METRICS[metric](z, z_pred).masked_fill(first, torch.nan)
    delta, expected_error = torch.zeros_like(planned), torch.zeros_like(mismatch)
    if corrector is not None:
        entry = torch.cat([z, z_pred, z - z_pred, planned], dim=1).masked_fill(first.unsqueeze(1), 0.0)
        history = torch.cat([history[:, 1:], entry.unsqueeze(1)], dim=1).masked_fill(first[:, None, None], 0.0)
        delta, expected_error = corrector(Visit(z, z_pred, planned, model.pi_mean(z), age, history))
    decision, reason = decide(mismatch, expected_error, age, first, limits)
    return Judgement(z, z_pred, planned, history, mismatch, delta, expected_error, decision, reason)


Judge = Callable[..., Judgement]  # `judge`, or one for a device (engine/compiled.py)


class Replanned(NamedTuple):
    """What planner calls brought on one step."""

    rows: Tensor  # [R] int64, the rows that got a plan, in rising order
    plan: Plan  # of R rows, tails included
    iterations: int  # MPPI iterations spent on each


@dataclass(frozen=True, slots=True)
class Refinement:
    """Cheaper replans: where the old plan still describes what is seen, a planner of few iterations and little spread refines it."""

    planner: Planner
    below: float | None = None  # mismatch up to which plans are refined; None: where they are exhausted, not where the gate rejects them

    def covers(self, seen: Judgement) -> Tensor:
        """Whose replans refine the old plan [B]; never those of an episode's first step, whose mismatch is NaN."""
        return seen.reason == ReplanReason.EXHAUSTED if self.below is None else seen.mismatch <= self.below


class SpeculativeRunner:
    """Acts with few planner calls. Implements `types.Actor`."""

    def __init__(
        self,
        model: WorldModel,
        planner: Planner,
        rule: GateRule,
        corrector: Corrector | None = None,
        *,
        course: Course = DEFAULT_COURSE,
        history: int = 8,
        judge: Judge = judge,
        refinement: Refinement | None = None,
        behaviour: Behaviour | None = None,
    ) -> None:
        """
        Args:
            model: the fp32 world model.
            course: how plans run. `executes`: what plans of several steps execute, the elite that the planner drew or the elites'
                `mean`; one step per plan is plain TD-MPC2, which executes what it drew. `tail`: how a plan goes on beyond the
                planner's horizon; `policy` follows the policy prior's mean through the dynamics, `hold` repeats the last planned
                action. `reroll`: what a plan predicts and, in its tail, proposes after a correction: the same as before, so that
                the mismatch is the distance from the plan, or anew from the latent and the action that were corrected.
            history: W, the steps a corrector may look back on.
            judge: the function above, or one that computes the same for this device (engine/compiled.py).
            refinement: which replans may be cheaper ones; None for none.
            behaviour: encodes, and predicts tails and what follows a correction; by default `model`. The networks of a planner compute
                the same, faster.
        """
        self.model = model
        self._behaviour = behaviour or model
        self._sees = model if next(model.parameters()).is_cuda else self._behaviour  # a GPU has one graph for all planners of a model
        self.planner = planner
        self.rule = rule
        self.refinement = refinement
        self._metric, self._limits = rule.metric, limits_of(rule, next(model.parameters()).device)
        self._judge = judge
        self.corrector = corrector
        self.history = history
        self._executes_mean = course.executes == "mean" and rule.horizon > 1
        self._next_action = self._behaviour.pi_mean if course.tail == "policy" else None
        self._rerolls = course.reroll and corrector is not None and rule.horizon > 1
        # A plan goes on for a whole planner's horizon past its last step: that is the warm start of the next one, and what is seen where it
        # is exhausted has a planned action to be compared with. One step per plan is plain TD-MPC2, which knows no tail.
        self._length = rule.horizon + planner.settings.horizon if rule.horizon > 1 else planner.settings.horizon

    def initial_state(self, batch: int) -> RunnerState:
        """A state of `batch` rows, none of which has begun an episode."""
        d, horizon, length = self.model.dims, self.planner.settings.horizon, self._length
        like = next(self.model.parameters())
        zeros = like.new_zeros
        plan = Plan(
            actions=zeros(batch, length, d.action_dim),
            latents=zeros(batch, length + 1, d.latent_dim),
            mean=zeros(batch, horizon, d.action_dim),
            std=zeros(batch, horizon, d.action_dim),
            value=zeros(batch),
        )
        count = torch.zeros(batch, dtype=torch.int64, device=like.device)
        return RunnerState(plan, count, zeros(batch, self.history, 3 * d.latent_dim + d.action_dim), count, count)

    def begin(self, state: RunnerState, rows: Tensor, streams: Tensor) -> RunnerState:
        """Resets these rows and names their random streams."""
        fresh = replace(self.initial_state(len(rows)), stream=streams)
        return state.put(rows, fresh)

    @torch.inference_mode()
    def act(self, obs: Tensor, state: RunnerState, first: Tensor) -> tuple[Tensor, RunnerState, StepLog]:
        """See `types.Actor`. Only the rows that need a plan are planned."""
        seen = self.judge(obs, state, first)
        replanning = seen.decision == Decision.REPLAN
        if self.refinement is None:
            planners = [(self.planner, replanning)]
        else:
            refined = replanning & self.refinement.covers(seen)
            planners = [(self.planner, replanning & ~refined), (self.refinement.planner, refined)]
        replanned = [self._replan_rows(planner, mask, seen, state, first) for planner, mask in planners]
        return self.execute(seen, state, [part for part in replanned if part is not None])

    def encode(self, obs: Tensor) -> Tensor:
        """Observations [B, O] → latents [B, Z], as steps see them."""
        return row_by_row(self._sees.encode, obs)

    def judge(self, obs: Tensor, state: RunnerState, first: Tensor) -> Judgement:
        """What is seen and decided, before anything is planned."""
        assert obs.shape == (first.shape[0], self.model.dims.obs_dim), obs.shape
        row = torch.arange(len(first), device=first.device)
        z_pred = state.plan.latents[row, state.age.clamp(max=self._length)]
        planned = state.plan.actions[row, state.age.clamp(max=self._length - 1)]
        return self._judge(self._sees, self.corrector, self._metric, self._limits, obs, z_pred, planned, state.age, state.history, first)

    def adopt(self, plan: Plan) -> Plan:
        """The plan as this runner executes it: the drawn elite or the mean, and then the tail."""
        if plan.actions.shape[1] == self._length and not self._executes_mean:
            return plan
        actions, latents = row_by_row(self._with_tail, plan.actions, plan.latents, plan.mean)
        return replace(plan, actions=actions, latents=latents)

    def _with_tail(self, actions: Tensor, latents: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [B, H, A], latents [B, H+1, Z] and mean [B, H, A] of plans → what is executed, [B, L, A], and predicted, [B, L+1, Z]."""
        if self._executes_mean:
            actions, latents = mean, latents[:, :1]
        executed, states = list(actions.unbind(1)), list(latents.unbind(1))
        for t in range(self._length):
            if t == len(executed):
                executed.append(executed[-1] if self._next_action is None else self._next_action(states[t]))
            if t + 1 == len(states):
                states.append(self._behaviour.next(states[t], executed[t]))
        return torch.stack(executed, dim=1), torch.stack(states, dim=1)

    def _replan_rows(self, planner: Planner, mask: Tensor, seen: Judgement, state: RunnerState, first: Tensor) -> Replanned | None:
        """New plans by `planner` of the rows under the mask [B]; None if there are none."""
        rows = torch.nonzero(mask).squeeze(1)
        if not len(rows):
            return None
        z = seen.z
        if len(rows) < len(mask):  # there is something to pick
            z, state, first = z[rows], state.take(rows), first[rows]
        plan = planner(z, self.warm_start(state, first), state.stream, state.step)
        return Replanned(rows, self.adopt(plan), planner.settings.iterations)

    def execute(self, seen: Judgement, state: RunnerState, replanned: Sequence[Replanned]) -> tuple[Tensor, RunnerState, StepLog]:
        """Acts as decided; `replanned` covers the rows that decided to replan, each once."""
        planned, corrected = seen.planned, seen.decision == Decision.CORRECT
        delta = torch.where(corrected.unsqueeze(1), seen.delta, 0.0)
        action = (planned + delta).clamp(-1, 1)
        correction_norm = torch.linalg.vector_norm(action - planned, dim=1).masked_fill(~corrected, 0.0)
        plan, age, iterations = state.plan, state.age, torch.zeros_like(state.age)
        if self._rerolls:
            plan = self._rerolled(plan, age, torch.where(corrected.unsqueeze(1), seen.z, seen.z_pred), action, seen.decision)
        for rows, fresh, spent in replanned:
            plan = plan.put(rows, fresh) if len(rows) < len(action) else fresh
            age = age.index_fill(0, rows, 0)
            action = action.index_copy(0, rows, fresh.actions[:, 0])
            iterations = iterations.index_fill(0, rows, spent)
        log = StepLog(
            decision=seen.decision,
            reason=seen.reason,
            age=age,
            met_age=state.age,
            mismatch=seen.mismatch,
            expected_error=seen.expected_error,
            correction_norm=correction_norm,
            planner_iterations=iterations,
        )
        return action, RunnerState(plan, age + 1, seen.history, state.stream, state.step + 1), log

    def _rerolled(self, plan: Plan, age: Tensor, z: Tensor, action: Tensor, decision: Tensor) -> Plan:
        """The plan of the rows that keep theirs, predicted anew after `action` at the latent z: as far as the next plan's warm start looks.

        What lies beyond is predicted anew at the next step, from the same latents where that one corrects nothing.
        """
        rows = torch.nonzero(decision != Decision.REPLAN).squeeze(1)
        if not len(rows):
            return plan
        horizon = self.planner.settings.horizon
        ahead = age[rows].unsqueeze(1) + 1 + torch.arange(horizon, device=age.device)  # [R, H]
        at = rows.unsqueeze(1).expand_as(ahead)
        proposed, states = row_by_row(self._roll, z[rows], action[rows], plan.actions[at, ahead], ahead >= horizon)
        actions, latents = plan.actions.clone(), plan.latents.clone()
        actions[at, ahead], latents[at, ahead] = proposed, states
        return replace(plan, actions=actions, latents=latents)

    def _roll(self, z: Tensor, action: Tensor, planned: Tensor, in_tail: Tensor) -> tuple[Tensor, Tensor]:
        """z [B, Z], its action [B, A], the next planned actions [B, H, A] and which are the tail's [B, H] → those and their latents."""
        proposed, states = [], []
        for t in range(planned.shape[1]):
            z = self._behaviour.next(z, action)
            action = planned[:, t]
            if self._next_action is not None:
                action = torch.where(in_tail[:, t, None], self._next_action(z), action)
            proposed.append(action)
            states.append(z)
        return torch.stack(proposed, dim=1), torch.stack(states, dim=1)

    def warm_start(self, state: RunnerState, first: Tensor) -> Tensor:
        """The old plan's mean shifted by its age, per row; where it runs out the tail's actions, without a tail 0; → [B, H, A]."""
        plan, horizon = state.plan, self.planner.settings.horizon
        means = torch.cat([plan.mean, plan.actions[:, horizon:]], dim=1)  # [B, L, A]
        index = state.age.unsqueeze(1) + torch.arange(horizon, device=means.device)  # [B, H]
        inside = (index < means.shape[1]) & ~first.unsqueeze(1)
        index = index.clamp(max=means.shape[1] - 1)
        shifted = means.gather(1, index.unsqueeze(2).expand(-1, -1, means.shape[2]))
        return torch.where(inside.unsqueeze(2), shifted, 0.0)
