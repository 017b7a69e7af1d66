"""LayerNorm and Mish, and dropout before them: what lies between the matrix products of every TD-MPC2 network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mish(x: Tensor) -> Tensor:
    """x · tanh(softplus(x)), written with one exponential: x·n/(n+2) with n = eˣ(eˣ+2).

    The exponent is capped at 20, where the quotient is 1 in fp32, so that n cannot overflow.
    """
    e = torch.exp(x.clamp(max=20.0))
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


def norm_mish(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """mish(LayerNorm((x + shift) · mask)), computed in fp32, in the dtype of x.

    Args:
        x: [..., D], fp32 or bf16; [G, N, D] if each of G groups has its own vectors.
        shift, weight, bias: [D] or [G, D], fp32; weight and bias are LayerNorm's. The shift is a product's bias.
        mask: as x, fp32: dropout's factors; 1 if left out.
    """
    shifted = x.float() + over_rows(shift)
    if mask is not None:
        shifted = shifted * mask
    if weight.dim() == 1:
        normed = F.layer_norm(shifted, weight.shape, weight, bias)
    else:
        normed = F.layer_norm(shifted, x.shape[-1:]) * over_rows(weight) + over_rows(bias)
    return mish(normed).to(x.dtype)


def over_rows(vectors: Tensor) -> Tensor:
    """One vector for all rows [D], or one per group of rows [..., D], as what rows [..., N, D] can be added to."""
    return vectors if vectors.dim() == 1 else vectors.unsqueeze(-2)
