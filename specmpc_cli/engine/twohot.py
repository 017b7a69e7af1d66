"""Scalar coding: rewards and values as distributions over bins in symlog space (TD-MPC2 §3.1, after DreamerV3)."""

import torch
import torch.nn.functional as F
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


def two_hot(x: Tensor, low: float, high: float, num_bins: int) -> Tensor:
    """Scalar [...] → distribution over bins [..., bins]: symlog, clamped to the range, its weight split between the two nearest bins."""
    position = (symlog(x).clamp(low, high) - low) * ((num_bins - 1) / (high - low))
    bins = torch.arange(num_bins, device=x.device)
    # A triangle of width 1 around the position is that split, without the scatter of the official code.
    return (1 - (position.unsqueeze(-1) - bins).abs()).clamp(min=0)


def two_hot_loss(logits: Tensor, target: Tensor, low: float, high: float) -> Tensor:
    """Cross-entropy of bin logits [..., bins] and the two-hot coding of scalars [...] → [...], in fp32."""
    log_probability = F.log_softmax(logits.float(), dim=-1)
    return -(two_hot(target, low, high, logits.shape[-1]) * log_probability).sum(-1)
