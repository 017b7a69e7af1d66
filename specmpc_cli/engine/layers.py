"""Building blocks of TD-MPC2's networks. Knows nothing of what the networks are for.

Weights may be stored in bf16: each layer casts its input to the weight's dtype for the matrix product and does everything else
(LayerNorm, activation) in fp32, so one code path serves exact fp32 and fast bf16. They may also be padded with zeros to sizes that a GPU's
bf16 products like (`Affine.pad`), or packed for a CPU, where an MLP is then one call (`Stack.pack`); what they compute stays the same,
unless they are rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specmpc_cli.engine.native import PLAIN
from specmpc_cli.engine.norm_mish import norm_mish, over_rows
from specmpc_cli.engine.packed import PackedMlp


class SimNorm:
    """Simplicial normalisation (TD-MPC2 §3.1): a softmax over each group of `dim` neighbouring features."""

    def __init__(self, dim: int = 8) -> None:
        self.dim = dim

    def __call__(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, self.dim))
        return torch.softmax(groups, dim=-1).flatten(-2)


class Affine(nn.Module):
    """What layers with a weight [..., out, in] and a bias [..., out] share. Either may have been padded beyond `out_dim` and the inputs."""

    weight: nn.Parameter
    bias: nn.Parameter
    out_dim: int

    def __init__(self, out_dim: int, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.out_dim = out_dim
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        nn.init.trunc_normal_(self.weight, std=0.02)

    def vectors(self) -> list[Tensor]:
        """What comes after the product: the bias and, if there is a norm, its weight and bias; each [out] or [E, out]."""
        return [self.bias]

    def pad(self, multiple: int) -> None:
        """Adds zeros until out and in are multiples of this."""
        out_rest, in_rest = (-size % multiple for size in self.weight.shape[-2:])
        self.weight.data = F.pad(self.weight.data, (0, in_rest, 0, out_rest))
        self.bias.data = F.pad(self.bias.data, (0, out_rest))

    def as_input(self, x: Tensor) -> Tensor:
        """Inputs [..., in] in the weight's dtype and width."""
        return widened(x.to(self.weight.dtype), self.weight.shape[-1])

    def without_padding(self, y: Tensor) -> Tensor:
        """A product [..., out] cut to `out_dim`."""
        return y if y.shape[-1] == self.out_dim else y[..., : self.out_dim]


def widened(x: Tensor, width: int) -> Tensor:
    """x [..., n] with zeros up to this width."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


class Linear(Affine):
    """Affine map whose product runs in the weight's dtype and whose result is fp32."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(out_dim, torch.empty(out_dim, in_dim), torch.zeros(out_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.without_padding(F.linear(self.as_input(x), self.weight, self.bias)).float()


class NormedLinear(Linear):
    """Linear → LayerNorm → Mish or SimNorm, the unit every TD-MPC2 network is made of."""

    def __init__(self, in_dim: int, out_dim: int, simnorm: SimNorm | None = None) -> None:
        super().__init__(in_dim, out_dim)
        self.ln = nn.LayerNorm(out_dim)
        self.simnorm = simnorm

    def forward(self, x: Tensor, shared: Tensor | None = None) -> Tensor:
        """x [..., N, I] → [..., N, out].

        `shared` [..., 1, S] holds leading input features that all N rows have in common; their part of the product is computed once.
        """
        width = 0 if shared is None else shared.shape[-1]
        shift = self.bias if shared is None else F.linear(shared.squeeze(-2).to(self.weight.dtype), self._columns(0, width), self.bias)
        own = self._columns(width, self.weight.shape[1])
        y, shift = self.without_padding(F.linear(widened(x.to(own.dtype), own.shape[1]), own)), self.without_padding(shift)
        if self.simnorm is None:
            return norm_mish(y, shift, self.ln.weight, self.ln.bias)
        return self.simnorm(self.ln(y.float() + over_rows(shift).float()))

    def vectors(self) -> list[Tensor]:
        return [self.bias, self.ln.weight, self.ln.bias]

    def _columns(self, first: int, last: int) -> Tensor:
        """The weights of some inputs."""
        if last - first == self.weight.shape[1]:
            return self.weight
        columns = self.weight[:, first:last]
        # oneDNN's bf16 products take no row stride: they would copy such weights transposed, at five times the cost.
        return columns.contiguous() if columns.dtype is torch.bfloat16 and columns.device.type == "cpu" else columns


class Stack(nn.ModuleList):
    """Layers, each of which takes what the one before it made; a CPU may compute them in one call."""

    def __init__(self, layers: Sequence[nn.Module], last: SimNorm | None = None) -> None:
        """`last` is what the last layer ends with, if it has a norm."""
        super().__init__(layers)
        self.last = last
        self.packed: PackedMlp | None = None

    @property
    def ends_in(self) -> int:
        """How the last layer ends, as kernels have it: SimNorm's size or PLAIN."""
        return self.last.dim if self.last else PLAIN

    def pack(self, int8: bool = False, apart: int = 0) -> None:
        """Packs the weights, rounded to 8 bits if so wanted, without gradients; arguments as in `PackedMlp`. Needs `native.multiplies` for
        what is multiplied.
        """
        self.packed = PackedMlp(*self.values(), self.ends_in, int8=int8, apart=apart)

    def repack(self, source: Stack) -> None:
        """Packs another stack's weights, which are of the same sizes, in fp32 or as ours."""
        assert self.packed is not None
        self.packed.renew(*source.values())

    def values(self) -> tuple[list[Tensor], list[Tensor]]:
        """All weights, and the vectors that come after the products, without gradients."""
        weights, vectors = weights_and_vectors(self)
        return [weight.detach() for weight in weights], [vector.detach() for vector in vectors]


def weights_and_vectors(layers: Iterable[nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
    """All weights, and the vectors that come after the products, as our kernels take them."""
    affine = cast(list[Affine], list(layers))
    assert all(layer.weight.shape[-2] == layer.out_dim for layer in affine), "padded weights are a GPU's"
    return [layer.weight for layer in affine], [vector for layer in affine for vector in layer.vectors()]


class Mlp(Stack):
    """Normed hidden layers and a last layer: plain, or normed with the activation `last`."""

    def __init__(self, in_dim: int, hidden: Sequence[int], out_dim: int, last: SimNorm | None = None) -> None:
        dims = [in_dim, *hidden]
        layers: list[nn.Module] = [NormedLinear(i, o) for i, o in zip(dims, dims[1:], strict=False)]
        layers.append(NormedLinear(dims[-1], out_dim, last) if last else Linear(dims[-1], out_dim))
        super().__init__(layers, last)

    def forward(self, *parts: Tensor) -> Tensor:
        """Inputs [..., N, I], side by side in parts → [..., N, out]; packed, of two or three axes.

        The first of several parts may have one row [..., 1, S], which all N have in common; the first layer must then have a norm.
        """
        x, shared = joined(*parts)
        if self.packed is not None:
            return self.packed(x, shared)
        first, *others = self
        x = first(x) if shared is None else first(x, shared=shared)
        for layer in others:
            x = layer(x)
        return x


def joined(*parts: Tensor) -> tuple[Tensor, Tensor | None]:
    """Parts of inputs side by side; or the second alone, and apart from it the first, if that is one row which all rows have in common: its
    part of a product is then computed once.
    """
    first, *others = parts
    if not others:
        return first, None
    if all(other.shape[:-1] == first.shape[:-1] for other in others):
        return torch.cat(parts, dim=-1), None
    (own,) = others
    return own, first


class LinearEnsemble(Affine):
    """`num_heads` affine maps with stacked weights [E, out, in], followed by LayerNorm and Mish if `normed`."""

    def __init__(self, num_heads: int, in_dim: int, out_dim: int, normed: bool) -> None:
        super().__init__(out_dim, torch.empty(num_heads, out_dim, in_dim), torch.zeros(num_heads, out_dim))
        self.ln = StackedNormMish(num_heads, out_dim) if normed else None

    def forward(self, x: Tensor, head: int | Tensor | None, mask: Tensor | None = None) -> Tensor:
        """x [B, N, in] → [B, N, out] through one head: the same for all rows (int), or one per row (Tensor [B]).

        `head` None: through all heads, [E, N, in] → [E, N, out]; inputs that the heads share may come as [1, N, in].
        `mask` [B, N, out] multiplies the product (dropout).
        """
        y = self.without_padding(self._product(self.as_input(x), head))
        bias = self.without_padding(self.bias if head is None else self.bias[head])  # [E, out], [out] or [B, out]
        if self.ln is None:
            return y.float() + over_rows(bias).float()
        return self.ln(y, bias, head, mask)

    def vectors(self) -> list[Tensor]:
        return [self.bias] if self.ln is None else [self.bias, self.ln.weight, self.ln.bias]

    def _product(self, x: Tensor, head: int | Tensor | None) -> Tensor:
        """Without the bias."""
        if isinstance(head, int):
            return F.linear(x, self.weight[head])
        if head is None and x.shape[0] == 1:  # one wide product serves all heads
            y = F.linear(x[0], self.weight.flatten(0, 1))  # [N, E·out]
            return y.unflatten(1, self.bias.shape).transpose(0, 1)
        weight = self.weight if head is None else self.weight[head]
        if len(weight) == 1:  # in bf16, as a batched product, compiled, oneDNN would copy it transposed
            return F.linear(x[0], weight[0]).unsqueeze(0)
        return torch.bmm(x, weight.transpose(1, 2))


class StackedNormMish(nn.Module):
    """LayerNorm with one scale and shift per head, [E, dim], and Mish."""

    def __init__(self, num_heads: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, dim))
        self.bias = nn.Parameter(torch.zeros(num_heads, dim))

    def forward(self, x: Tensor, shift: Tensor, head: int | Tensor | None, mask: Tensor | None) -> Tensor:
        """x [B, N, dim] of one head (int), of one head per row [B], or [E, N, dim] of all heads (None). First `shift` is added, then `mask`
        multiplies, if there is one.
        """
        weight, bias = (self.weight, self.bias) if head is None else (self.weight[head], self.bias[head])
        return norm_mish(x, shift, weight, bias, mask)
