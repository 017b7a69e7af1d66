"""MLPs to be computed in one call, and what exact arithmetic makes of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specmpc_cli.engine import native
from specmpc_cli.engine.layers import SimNorm
from specmpc_cli.engine.native import MISH, PLAIN


class Case(NamedTuple):
    x: tuple[int, ...]
    dims: tuple[int, ...]  # inputs and each layer's outputs
    group: int = PLAIN  # how the last layer ends: a number above 0 is SimNorm's
    shared: int = 0  # leading inputs that come apart
    stacks: int = 0  # E heads; 0: no axis for them
    heads: tuple[int, ...] | None = None
    apart: int = 0  # leading inputs that are of another kind


CASES = {
    "a plain layer": Case((6, 16), (16, 16)),
    "a row": Case((1, 40), (40, 24, 24)),
    "odd sizes": Case((101, 37), (37, 53, 29, 53)),
    "several blocks": Case((301, 64), (64, 96, 96)),
    "large weights": Case((301, 64), (64, 520, 520, 40)),
    "more inputs than one pass takes": Case((50, 1100), (1100, 40)),
    "simnorm": Case((100, 48), (48, 64, 128), 8),
    "simnorm of four": Case((100, 48), (48, 20), 4),
    "fewer outputs than lanes": Case((70, 33), (33, 40, 3)),
    "mish": Case((70, 33), (33, 48, 29), MISH),
    "one layer with mish, in heads": Case((2, 1, 40), (40, 24), MISH, stacks=2),
    "bins": Case((70, 64), (64, 64, 101)),
    "shared inputs": Case((64, 6), (38, 48, 16), 0, 32),
    "an odd number of shared inputs": Case((64, 50), (95, 48, 16), 0, 45),
    "shared inputs of each group": Case((3, 20, 6), (38, 48, 16), 0, 32),
    "three axes": Case((1, 70, 40), (40, 24, 24)),
    "inputs of two kinds": Case((70, 40), (40, 64, 24), 8, apart=32),
    "an odd number of one kind": Case((70, 40), (40, 24, 24), apart=29),
    "shared inputs are of one kind": Case((64, 6), (38, 48, 16), 0, 32, apart=32),
    "shared inputs are a part of one kind": Case((64, 16), (38, 48, 16), 0, 22, apart=32),
    "heads with inputs of two kinds": Case((2, 70, 40), (40, 24, 101), stacks=5, heads=(4, 1), apart=32),
    "heads": Case((3, 70, 40), (40, 24, 24), stacks=3),
    "heads for the same rows": Case((1, 70, 40), (40, 24, 24), stacks=3),
    "picked heads": Case((2, 70, 40), (40, 24, 24), stacks=5, heads=(4, 1)),
    "picked heads for the same rows": Case((1, 70, 40), (40, 24, 24), stacks=5, heads=(4, 1)),
    "groups through the same weights": Case((3, 70, 40), (40, 24, 24)),
    "shared inputs of each head": Case((1, 20, 6), (38, 48, 16), 0, 32, stacks=3),
}


class Given(NamedTuple):
    x: Tensor
    shared: Tensor | None
    weights: list[Tensor]
    vectors: list[list[Tensor]]  # of each layer: bias, and LayerNorm's weight and bias if it has a norm
    group: int
    heads: Tensor | None
    expect: tuple[float, float] | None = None
    int8: bool = False
    apart: int = 0

    @property
    def arguments(self) -> tuple[object, ...]:
        packed = torch.ops.specmpc.pack_mlp(self.weights, self.int8, None)
        vectors = torch.cat([vector for layer in self.vectors for vector in layer], -1)
        dims = [self.weights[0].shape[-1], *(weight.shape[-2] for weight in self.weights)]
        return self.x, self.shared, packed, vectors, dims, self.group, self.apart, self.expect, self.heads

    def fused(self) -> Tensor:
        return torch.ops.specmpc.fused_mlp(*self.arguments)

    def exact(self) -> Tensor:
        """In double precision, from torch's own functions; features between layers in the weights' dtype, or in 8 bits."""
        dtype, grouped = self.weights[0].dtype, self.weights[0].dim() == 3
        picked = slice(None) if self.heads is None else self.heads
        y = self.x
        rounded = in_8_bits if self.int8 else lambda x: x.to(dtype).double()
        parts = [y] if self.shared is None else [self.shared.expand(*y.shape[:-1], -1), y]
        if self.apart:
            before = 0 if self.shared is None else self.shared.shape[-1]
            parts[-1:] = parts[-1].split([self.apart - before, y.shape[-1] - self.apart + before], dim=-1)
        y = torch.cat([rounded(part) if part.numel() else part.double() for part in parts], -1)  # apart, if they come or are apart
        for number, (weight, vectors) in enumerate(zip(self.weights, self.vectors, strict=True)):
            weight = weight[picked] if grouped else weight
            bias, *norm = (v[picked].double().unsqueeze(-2) if grouped else v.double() for v in vectors)
            weight = weight_in_8_bits(weight) if self.int8 else weight.double()
            if number:
                kept = rounded(y)
                twice = self.int8 and number == len(self.weights) - 1 and not norm
                y = kept + in_8_bits(y.double() - kept) if twice else kept
            y = y @ weight.transpose(-1, -2) + bias
            if norm:
                y = F.layer_norm(y, y.shape[-1:]) * norm[0] + norm[1]
                y = F.mish(y) if number < len(self.weights) - 1 or self.group == MISH else SimNorm(self.group)(y)
        return y


def in_8_bits(x: Tensor) -> Tensor:
    """Rows, each as multiples of a scale of its own, of which 256 reach from its least to its greatest value, or to 0."""
    x = x.double()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, 255) - zero) * scale


def weight_in_8_bits(weight: Tensor) -> Tensor:
    """Each output's weights as multiples of a scale of its own, from -127 to 127."""
    scale = weight.double().abs().amax(-1, keepdim=True) / 127
    return (weight.double() / scale).round() * scale


def given(name: str, dtype: torch.dtype = torch.float32) -> Given:
    """Weights of this dtype, or fp32 ones for products in int8."""
    assert native.built()
    case = CASES[name]
    torch.manual_seed(0)
    stacks = (case.stacks,) if case.stacks else ()
    weights, vectors = [], []
    for i, o in zip(case.dims, case.dims[1:], strict=False):
        weights.append((torch.randn(*stacks, o, i) / i**0.5).to(torch.float32 if dtype is torch.int8 else dtype))
        vectors.append([torch.randn(*stacks, o), torch.rand(*stacks, o) * 2, torch.randn(*stacks, o)])
    if case.group == PLAIN:
        vectors[-1] = vectors[-1][:1]
    shared = torch.randn(*case.x[:-2], 1, case.shared) if case.shared else None
    assert case.x[-1] + case.shared == case.dims[0]
    heads = None if case.heads is None else torch.tensor(case.heads)
    return Given(torch.randn(case.x), shared, weights, vectors, case.group, heads, int8=dtype is torch.int8, apart=case.apart)
