"""Scalar coding: rewards and values as distributions over bins in symlog space (TD-MPC2 §3.1, after DreamerV3)."""

import torch
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """sign(x)·log(1 + |x|): compresses magnitudes, keeps signs."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """The inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def two_hot_inv(logits: Tensor, low: float, high: float) -> Tensor:
    """Expected scalar of bin logits [..., bins] → [...]: symexp of the mean bin, in fp32."""
    bins = torch.linspace(low, high, logits.shape[-1], device=logits.device)
    return symexp((torch.softmax(logits.float(), dim=-1) * bins).sum(-1))
