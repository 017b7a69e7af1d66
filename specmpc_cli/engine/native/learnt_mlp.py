"""An MLP in one call, and its gradients in another (learnt_mlp.h), as an operator that compiled code can differentiate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

# What a last layer ends in; a number above 0 means SimNorm in groups of so many. A norm comes before Mish and SimNorm.
PLAIN, MISH = 0, -1

_KEEP_NOTHING, _KEEP_FOR_INPUTS, _KEEP_FOR_PARAMETERS = range(3)  # as in learnt_sizes.h


def mlp(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *,
    ends_in: int,
    heads: Tensor | None = None,
    mask: Tensor | None = None,
    bf16: bool = False,
) -> Tensor:
    """Inputs → [N, out], or [G, N, out] of heads, fp32. Needs `native.built`.

    Args:
        parts: the inputs' features side by side, each [N, I], fp32 as everything.
        weights: each layer's, [out, in] or [E, out, in].
        vectors: for each layer its bias and, if it has a norm, LayerNorm's weight and bias, [out] or [E, out].
        ends_in: how the last layer ends; all others end in Mish.
        heads: [G] int64, which of E stacks; all in turn if left out. Those that are picked must not learn.
        mask: [G, N, D], dropout's factors in the first layer.
        bf16: products are computed in bf16, and features and what is kept for gradients are rounded to it.
    """
    keep = _KEEP_NOTHING
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*weights, *vectors)):
        keep = _KEEP_FOR_PARAMETERS
    elif torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        keep = _KEEP_FOR_INPUTS
    y, _ = torch.ops.specmpc.mlp(parts, weights, vectors, heads, mask, ends_in, bf16, keep)
    return y


def register() -> None:
    """Tells torch the operators' shapes and gradients, once they are loaded."""
    torch.library.register_fake("specmpc::mlp", _results)
    torch.library.register_fake("specmpc::mlp_backward", _gradients)
    torch.library.register_autograd("specmpc::mlp", _backward, setup_context=_remember)


def _results(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    heads: Tensor | None,
    mask: Tensor | None,
    ends_in: int,
    bf16: bool,
    keep: int,
) -> tuple[Tensor, Tensor]:
    rows, grouped = parts[0].shape[0], weights[0].dim() == 3
    groups = len(heads) if heads is not None else len(weights[0]) if grouped else 1
    dims = [weights[0].shape[-1], *(weight.shape[-2] for weight in weights)]
    kept = torch.ops.specmpc.mlp_kept_bytes(bf16, dims, rows, groups, ends_in, keep)
    y = parts[0].new_empty([groups, rows, dims[-1]] if grouped else [rows, dims[-1]])
    return y, parts[0].new_empty([kept], dtype=torch.uint8)


def _gradients(
    grad: Tensor,
    y: Tensor,
    kept: Tensor,
    parts: Sequence[Tensor],
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    *settings: Any,
) -> list[Tensor]:
    *_, keep, wanted = settings
    of = [part for part, wants in zip(parts, wanted, strict=True) if wants]
    if keep == _KEEP_FOR_PARAMETERS:
        of += [*weights, *vectors]
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in of]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    parts, weights, vectors, heads, mask, *settings = inputs
    ctx.save_for_backward(*output, heads, mask, *parts, *weights, *vectors)
    ctx.counts, ctx.settings = (len(parts), len(weights), len(vectors)), settings
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    y, kept, heads, mask, *tensors = ctx.saved_tensors
    rest = iter(tensors)
    given = [list(islice(rest, count)) for count in ctx.counts]
    wanted = list(ctx.needs_input_grad[0])
    gradients: Iterator[Tensor] = iter(torch.ops.specmpc.mlp_backward(grad, y, kept, *given, heads, mask, *ctx.settings, wanted))
    of_parts = [next(gradients) if wants else None for wants in wanted]
    learns = ctx.settings[-1] == _KEEP_FOR_PARAMETERS
    of_weights, of_vectors = ([next(gradients) if learns else None for _ in some] for some in given[1:])
    return of_parts, of_weights, of_vectors, None, None, None, None, None
