"""The nouns every layer shares, and the protocols that hold the system together.

Axes: B rows (environments), H planner horizon, L plan and tail, W history, A action, O observation, Z latent.
Annotations only name torch: importing this module loads nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Executes = Literal["drawn", "mean"]  # of a plan: the elite that the planner drew, or the elites' weighted mean
Tail = Literal["policy", "hold"]  # how a plan goes on beyond the planner's horizon


@dataclass(frozen=True, slots=True)
class Course:
    """How a plan runs between planner calls. The defaults are what files mean that are older than a setting."""

    executes: Executes = "drawn"
    tail: Tail = "policy"
    reroll: bool = False  # after a correction the rest of the plan is predicted anew, from where it was corrected


DEFAULT_COURSE = Course()


@dataclass(frozen=True, slots=True)
class EnvSpec:
    """Facts learnt from an environment, fixed for its life."""

    task: str
    suite: str
    obs_dim: int
    action_dim: int
    decisions: int  # env steps per episode, after action repeat
    action_repeat: int
    episodic: bool = False  # may terminate
    has_success: bool = False  # reports success at the last step

    @property
    def discount(self) -> float:
        """TD-MPC2's rule from the episode length T: clip((T/5 − 1)/(T/5), 0.95, 0.995), at most 0.99 for episodic tasks."""
        fifth = self.decisions / 5
        discount = min(max((fifth - 1) / fifth, 0.95), 0.995)
        return min(discount, 0.99) if self.episodic else discount


class Decision(IntEnum):
    """What the gate answers for one row and step."""

    ACCEPT = 0
    CORRECT = 1
    REPLAN = 2


class ReplanReason(IntEnum):
    """Why a planner call happened; NONE where none did."""

    NONE = 0
    FIRST = 1
    EXHAUSTED = 2
    MISMATCH = 3  # the gate's: real and predicted latent differ too much, or the corrector expects too large an error


@dataclass(frozen=True)
class Rows:
    """A record whose fields (tensors, or records of tensors) have one row per environment."""

    def take(self, rows: Tensor) -> Self:
        """A copy with the rows at these indices, or under this mask, in that order."""
        return self._map(lambda value: value[rows])

    def put(self, rows: Tensor, new: Self) -> Self:
        """A copy in which the rows at these indices, or under this mask, are the rows of `new`; the others are untouched."""

        def write(old: Tensor, fresh: Tensor) -> Tensor:
            out = old.clone()
            out[rows] = fresh
            return out

        return self._map(write, new)

    def cpu(self) -> Self:
        """A copy in host memory."""
        return self._map(lambda value: value.cpu())

    def concatenate(self, *others: Self) -> Self:
        """The rows of this record, then those of the others."""
        import torch  # not at the top: environments import this module and need no torch

        return self._map(lambda *parts: torch.cat(parts), *others) if others else self

    def _map(self, fn: Callable[..., Tensor], *others: Rows) -> Self:
        def apply(name: str) -> Any:
            values = [getattr(record, name) for record in (self, *others)]
            return values[0]._map(fn, *values[1:]) if isinstance(values[0], Rows) else fn(*values)

        return type(self)(**{field.name: apply(field.name) for field in fields(self)})


@dataclass(frozen=True)
class Plan(Rows):
    """What one planner call leaves behind. L is H, or longer by the tail that speculation appends."""

    actions: Tensor  # [B, L, A] the executed sequence: one elite drawn by weight or, if a runner prefers it, the mean; then the tail
    latents: Tensor  # [B, L+1, Z] its predicted latents; latents[:, 0] is the latent planned from
    mean: Tensor  # [B, H, A] weighted elite mean: the next warm start, and the label of distillation
    std: Tensor  # [B, H, A] weighted elite spread, clamped as MPPI clamps it
    value: Tensor  # [B] estimated value of the drawn elite


@dataclass(frozen=True)
class Visit(Rows):
    """What a corrector may look at on one step of every row."""

    z: Tensor  # [B, Z] the real latent
    z_pred: Tensor  # [B, Z] the latent the plan predicted here
    planned: Tensor  # [B, A] the action the plan proposes here
    prior: Tensor  # [B, A] the policy prior's mean at z
    age: Tensor  # [B] env steps since the plan was made
    history: Tensor  # [B, W, 3Z+A] (z, z_pred, z − z_pred, planned) of the last W steps, this one last; empty slots are zero


@dataclass(frozen=True)
class RunnerState(Rows):
    """Everything a runner remembers between two steps. It goes in and comes out; nothing hides on the runner."""

    plan: Plan
    age: Tensor  # [B] int64, env steps executed from this plan
    history: Tensor  # [B, W, 3Z+A]
    stream: Tensor  # [B] int64, names the row's random draws: a hash of (seed, purpose, episode)
    step: Tensor  # [B] int64, env steps since the episode began


@dataclass(frozen=True)
class StepLog(Rows):
    """What happened on one step of every row. Rows that never gate (the bare policy prior) have decision −1."""

    decision: Tensor  # [B] Decision, or −1
    reason: Tensor  # [B] ReplanReason
    age: Tensor  # [B] age of the plan the executed action came from: 0 right after planning
    met_age: Tensor  # [B] age of the plan that predicted this step, before any replan
    mismatch: Tensor  # [B] distance of z and z_pred, NaN where no older plan predicted this step
    expected_error: Tensor  # [B] the corrector's own guess of its squared error, 0 without one
    correction_norm: Tensor  # [B] ‖executed − planned‖, 0 where nothing was corrected, NaN without a plan
    planner_iterations: Tensor  # [B] MPPI iterations spent on this step


StateT = TypeVar("StateT")


class Actor(Protocol[StateT]):
    """Anything that acts. The rollout loop knows only this."""

    def initial_state(self, batch: int) -> StateT:
        """A state of `batch` rows, none of which has begun an episode."""
        ...

    def begin(self, state: StateT, rows: Tensor, streams: Tensor) -> StateT:
        """The state after the rows at these indices were told that a new episode begins, with these random streams [len(rows)]."""
        ...

    def act(self, obs: Tensor, state: StateT, first: Tensor) -> tuple[Tensor, StateT, StepLog]:
        """obs [B, O], first [B] bool → action [B, A] in [-1, 1], next state, log."""
        ...


class Corrector(Protocol):
    """A residual on the planned action, and how wrong it expects to be."""

    def __call__(self, visit: Visit) -> tuple[Tensor, Tensor]:
        """→ delta [B, A], expected squared error of the corrected action [B]."""
        ...
