"""The two shapes of dm_control's `tolerance` that the custom tasks use."""

from __future__ import annotations

import math

from dm_control.utils.rewards import tolerance


def above(x: float, low: float, margin: float, value: float = 0.1, shape: str = "gaussian") -> float:
    """1 where x ≥ low, falling to `value` at a distance of `margin`."""
    return float(tolerance(x, bounds=(low, math.inf), margin=margin, value_at_margin=value, sigmoid=shape))


def linear(x: float, low: float, high: float, margin: float, value: float) -> float:
    """1 inside [low, high], falling linearly to `value` at a distance of `margin`."""
    return float(tolerance(x, bounds=(low, high), margin=margin, value_at_margin=value, sigmoid="linear"))
