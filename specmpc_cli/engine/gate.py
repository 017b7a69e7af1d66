"""The gate: how far reality is from the plan, and what to do about it. Pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specmpc_cli.types import Decision, ReplanReason


def l2(z: Tensor, z_pred: Tensor) -> Tensor:
    """Euclidean distance of latents [..., Z] → [...]."""
    return torch.linalg.vector_norm(z - z_pred, dim=-1)


def l1(z: Tensor, z_pred: Tensor) -> Tensor:
    """Sum of absolute differences [...]: for SimNorm latents, twice the total variation summed over the groups."""
    return (z - z_pred).abs().sum(-1)


def cosine(z: Tensor, z_pred: Tensor) -> Tensor:
    """1 − cosine similarity [...]."""
    return 1.0 - torch.cosine_similarity(z, z_pred, dim=-1)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": l2, "l1": l1, "cosine": cosine}


@dataclass(frozen=True, slots=True)
class GateRule:
    """When a step of an older plan is accepted, corrected or replanned.

    The defaults, before calibration, never fall back to the planner early: `naive` sets `accept_below` to infinity and always accepts,
    `corrected` leaves it at minus infinity and always corrects.

    Raises:
        ValueError: numbers that contradict each other, or an unknown metric.
    """

    horizon: int  # a plan is exhausted after this many env steps
    accept_below: float = -math.inf
    replan_above: float = math.inf
    replan_above_error: float = math.inf  # on the corrector's own expected error
    metric: str = "l2"

    def __post_init__(self) -> None:
        if not (self.horizon >= 1 and self.accept_below <= self.replan_above and self.metric in METRICS):
            raise ValueError(f"no such gate: {self}")

    def as_json(self) -> dict[str, Any]:
        """Its numbers; null for thresholds that are not in use."""
        return {name: None if isinstance(value, float) and math.isinf(value) else value for name, value in asdict(self).items()}

    @property
    def label(self) -> str:
        """While what a plan lives: `at most 12 steps, l2 ≤ 0.83`."""
        parts = [f"at most {self.horizon} steps"]
        if self.replan_above < math.inf:
            parts.append(f"{self.metric} ≤ {self.replan_above:.3g}")
        if self.replan_above_error < math.inf:
            parts.append(f"expected error ≤ {self.replan_above_error:.3g}")
        return ", ".join(parts)


class GateLimits(NamedTuple):
    """A rule's numbers as scalar tensors, so that a compiled step is compiled once for all rules."""

    horizon: Tensor
    accept_below: Tensor
    replan_above: Tensor
    replan_above_error: Tensor


def limits_of(rule: GateRule, device: torch.device) -> GateLimits:
    """The rule's numbers on a device."""
    thresholds = (rule.accept_below, rule.replan_above, rule.replan_above_error)
    return GateLimits(torch.tensor(rule.horizon, device=device), *(torch.tensor(float(value), device=device) for value in thresholds))


def decide(mismatch: Tensor, expected_error: Tensor, age: Tensor, first: Tensor, rule: GateRule | GateLimits) -> tuple[Tensor, Tensor]:
    """Each row's decision and the reason of its replan, all [B]; rows decide independently.

    An episode's first step and an exhausted plan always replan; else mismatch ≤ accept_below accepts, mismatch > replan_above (or an
    expected error above its own threshold) replans, and what lies between is corrected.
    """
    exhausted = age >= rule.horizon
    accept = mismatch <= rule.accept_below
    # A mismatch that is not a number is no evidence that the plan holds: it replans.
    diverged = ~accept & ((mismatch > rule.replan_above) | (expected_error > rule.replan_above_error) | mismatch.isnan())

    reason = torch.full_like(age, int(ReplanReason.NONE))
    reason = torch.where(diverged, int(ReplanReason.MISMATCH), reason)
    reason = torch.where(exhausted, int(ReplanReason.EXHAUSTED), reason)
    reason = torch.where(first, int(ReplanReason.FIRST), reason)
    kept = torch.where(accept, int(Decision.ACCEPT), int(Decision.CORRECT))
    return torch.where(reason == int(ReplanReason.NONE), kept, int(Decision.REPLAN)), reason
