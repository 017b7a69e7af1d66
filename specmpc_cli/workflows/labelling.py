"""Acting while planning for other reasons: a label at every step (`Labeller`), or a comparison now and then (`Auditor`)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specmpc_cli.data.tuples import Behaviour
from specmpc_cli.engine.runner import Replanned, SpeculativeRunner
from specmpc_cli.types import Decision, Rows, RunnerState, StepLog


@dataclass(frozen=True)
class LabelledLog(StepLog):
    """A step log with the columns of a tuple that the loop does not know."""

    z: Tensor
    z_pred: Tensor
    a_plan: Tensor
    a_teacher_mean: Tensor
    a_teacher_std: Tensor
    a_teacher: Tensor
    warm_start: Tensor


@dataclass(frozen=True)
class LabellerState(Rows):
    """The runner's state, and the teacher's own last mean: it plans at each step and warm-starts from that."""

    runner: RunnerState
    teacher_mean: Tensor  # [B, H, A]


class Labeller:
    """Acts as a runner does, or as the teacher with that runner in its shadow, and plans at every step for the label.

    Where the runner replans, the label's plan is the plan it adopts, a whole search even where acting would refine the old plan.
    Implements `types.Actor`.
    """

    def __init__(self, runner: SpeculativeRunner, behaviour: Behaviour) -> None:
        self.runner = runner
        self.behaviour = behaviour

    def initial_state(self, batch: int) -> LabellerState:
        state = self.runner.initial_state(batch)
        return LabellerState(state, state.plan.mean)

    def begin(self, state: LabellerState, rows: Tensor, streams: Tensor) -> LabellerState:
        return replace(state, runner=self.runner.begin(state.runner, rows, streams))

    @torch.inference_mode()
    def act(self, obs: Tensor, state: LabellerState, first: Tensor) -> tuple[Tensor, LabellerState, LabelledLog]:
        seen = self.runner.judge(obs, state.runner, first)
        if self.behaviour is Behaviour.TEACHER:
            shifted = torch.cat([state.teacher_mean[:, 1:], torch.zeros_like(state.teacher_mean[:, :1])], dim=1)
            warm_start = shifted.masked_fill(first[:, None, None], 0.0)
        else:
            warm_start = self.runner.warm_start(state.runner, first)
        planner = self.runner.planner
        fresh = planner(seen.z, warm_start, state.runner.stream, state.runner.step)
        rows = torch.nonzero(seen.decision == Decision.REPLAN).squeeze(1)
        adopted = Replanned(rows, self.runner.adopt(fresh.take(rows)), planner.settings.iterations)
        action, after, log = self.runner.execute(seen, state.runner, [adopted])
        if self.behaviour is Behaviour.TEACHER:
            action = fresh.actions[:, 0]
        labelled = LabelledLog(
            **vars(log),
            z=seen.z,
            z_pred=seen.z_pred,
            a_plan=seen.planned,
            a_teacher_mean=fresh.mean[:, 0],
            a_teacher_std=fresh.std[:, 0],
            a_teacher=fresh.actions[:, 0],
            warm_start=warm_start,
        )
        return action, LabellerState(after, fresh.mean), labelled


AUDIT_SHARE = 1 / 7  # of the steps


def is_audited(stream: Tensor, step: Tensor) -> Tensor:
    """Whether these steps are compared [B]: by the golden ratio's multiples, which no plan length can fall into step with."""
    turns = (stream + step * 0x9E3779B1) & 0xFFFFFFFF
    return turns < AUDIT_SHARE * 2**32


@dataclass(frozen=True)
class AuditedLog(StepLog):
    """A step log that says, of some steps, how far the action lies from a fresh plan's."""

    audited: Tensor  # [B] bool
    error: Tensor  # [B] squared distance to a fresh plan's mean, per action dimension; 0 where a whole search acted, NaN where not audited


class Auditor:
    """Acts exactly as its runner does and, on a seventh of the steps, plans besides. Implements `types.Actor`."""

    def __init__(self, runner: SpeculativeRunner) -> None:
        self.runner = runner

    def initial_state(self, batch: int) -> RunnerState:
        return self.runner.initial_state(batch)

    def begin(self, state: RunnerState, rows: Tensor, streams: Tensor) -> RunnerState:
        return self.runner.begin(state, rows, streams)

    @torch.inference_mode()
    def act(self, obs: Tensor, state: RunnerState, first: Tensor) -> tuple[Tensor, RunnerState, AuditedLog]:
        action, after, log = self.runner.act(obs, state, first)
        audited = is_audited(state.stream, state.step)
        searched = log.planner_iterations == self.runner.planner.settings.iterations  # not merely refined
        error = torch.where(audited & searched, 0.0, torch.nan)
        rows = torch.nonzero(audited & ~searched).squeeze(1)
        if len(rows):
            seen = state.take(rows)
            warm_start = self.runner.warm_start(seen, first[rows])
            fresh = self.runner.planner(self.runner.encode(obs[rows]), warm_start, seen.stream, seen.step)
            error[rows] = (action[rows] - fresh.mean[:, 0]).square().mean(-1)
        return action, after, AuditedLog(**vars(log), audited=audited, error=error)
