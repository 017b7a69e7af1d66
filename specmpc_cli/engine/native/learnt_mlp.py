"""MLPs that learn: one call forwards, one back (learnt_mlp.h). Autograd has no part in it: who calls them passes the gradients on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specmpc_cli.engine.native import PLAIN


class Keep(IntEnum):
    """What a call keeps for its gradients (learnt_sizes.h)."""

    NOTHING = 0
    FOR_INPUTS = 1
    FOR_PARAMETERS = 2  # and inputs


class Dropout(NamedTuple):
    """Which of a layer's features, [G, N, D] in `shape`, are zero; the others grow by what those would have made."""

    zeros: Tensor  # [n] int64, in rising order, counted through all features; the features' number at the end, where there are too many
    shape: tuple[int, ...]
    share: float  # the chance of each

    def mask(self) -> Tensor:
        """Factors in this shape."""
        factors = torch.full((math.prod(self.shape) + 1,), 1 / (1 - self.share), device=self.zeros.device)
        return factors.index_fill_(0, self.zeros, 0.0)[:-1].view(self.shape)


class LearntMlp:
    """Layers and how their products are computed. Their parameters are read where they are, at each call. Needs `native.multiplies`."""

    def __init__(self, weights: Sequence[Tensor], vectors: Sequence[Tensor], ends_in: int = PLAIN, *, bf16: bool = False) -> None:
        """
        Args:
            weights: each layer's, [out, in] or, of heads, [E, out, in]; fp32 as everything.
            vectors: for each layer its bias and, if it has a norm, LayerNorm's weight and bias, [out] or [E, out].
            ends_in: how the last layer ends; all others end in Mish.
            bf16: products are computed in bf16, and features and what is kept for gradients are rounded to it.
        """
        self.weights, self.vectors, self.ends_in, self.bf16 = list(weights), list(vectors), ends_in, bf16

    def __call__(
        self, *parts: Tensor, keep: Keep = Keep.NOTHING, heads: Tensor | None = None, dropout: Dropout | None = None
    ) -> LearntCall:
        """Inputs → y [N, out], or [G, N, out] of heads.

        Args:
            parts: the inputs' features side by side, each [N, I].
            heads: [G] int64, which of E; all in turn if left out. Those that are picked cannot learn.
            dropout: of features of the first layer, [G, N, D].
        """
        dropped = (None, 0.0) if dropout is None else (dropout.zeros, dropout.share)
        settings = (heads, *dropped, self.ends_in, self.bf16, keep)
        y, kept = torch.ops.specmpc.mlp(parts, self.weights, self.vectors, *settings)
        return LearntCall(y, self, parts, settings, kept)

    def rollout(self, z: Tensor, beside: Tensor | None, actions: Tensor) -> LearntRollout:
        """What it makes of a step's inputs is the next step's first part: from z [N, Z], with actions [H, N, A] last and, between the two,
        what is the same in all steps, [N, D], if there is something. All is kept for gradients.
        """
        latents, kept = torch.ops.specmpc.mlp_rollout(z, beside, actions, self.weights, self.vectors, self.ends_in, self.bf16)
        return LearntRollout(latents, self, beside, actions, kept)


class LearntCall(NamedTuple):
    """What a call made, and what it kept."""

    y: Tensor
    mlp: LearntMlp
    parts: Sequence[Tensor]
    settings: tuple[Any, ...]  # as the operators take them
    kept: Tensor

    def gradients(self, grad: Tensor, *wanted: bool) -> tuple[list[Tensor], list[Tensor]]:
        """From the gradient of y those of the wanted parts, in their order, and, if they were kept for, of all weights and vectors."""
        made, kept, (parts, weights, vectors) = self.y, self.kept, (self.parts, self.mlp.weights, self.mlp.vectors)
        found = torch.ops.specmpc.mlp_backward(grad, made, kept, parts, weights, vectors, *self.settings, wanted)
        return found[: sum(wanted)], found[sum(wanted) :]


class LearntRollout(NamedTuple):
    """What a rollout made, and what it kept."""

    latents: Tensor  # [H+1, N, Z], the given ones first
    mlp: LearntMlp
    beside: Tensor | None
    actions: Tensor
    kept: Tensor

    def gradients(self, of_latents: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """From the gradient that the latents get elsewhere, to which that through later ones is added: that of `beside`, and of all weights
        and vectors.
        """
        (latents, mlp, beside, actions, kept), count = self, len(self.mlp.weights) + len(self.mlp.vectors)
        given = (latents, kept, beside, actions, mlp.weights, mlp.vectors, mlp.ends_in, mlp.bf16)
        found = torch.ops.specmpc.mlp_rollout_backward(of_latents, *given)
        return found[count:], found[:count]
