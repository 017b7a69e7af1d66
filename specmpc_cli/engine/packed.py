"""An MLP as a CPU computes it in one call (engine/native), without gradients: its weights packed in the order in which they are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specmpc_cli.engine.native import PLAIN


class PackedMlp:
    """Layers with LayerNorm and Mish, and a last one that is plain or has LayerNorm and Mish or SimNorm; or E such stacks, as heads. Needs
    `native.multiplies` for the weights' dtype, or for int8.
    """

    def __init__(
        self, weights: Sequence[Tensor], vectors: Sequence[Tensor], ends_in: int = PLAIN, *, int8: bool = False, apart: int = 0
    ) -> None:
        """
        Args:
            weights: each layer's, [out, in] or [E, out, in], fp32 or bf16.
            vectors: for each layer its bias and, if it has a norm, LayerNorm's weight and bias, [out] or [E, out].
            ends_in: what the last layer ends in: PLAIN, MISH or SimNorm's size; all others end in Mish.
            int8: rounds fp32 weights to 8 bits, with one scale for each output, and inputs in every product, with one for each row; what a
                plain last layer reads is rounded in two steps.
            apart: so many leading inputs are of another kind than those after them; each kind then has a scale of its own.
        """
        self.dims = [weights[0].shape[-1], *(weight.shape[-2] for weight in weights)]
        self.ends_in = ends_in
        self._int8, self._apart = int8, apart
        self.weights = torch.ops.specmpc.pack_mlp(weights, int8, None)  # [size] or [E, size]
        self.vectors = _joined(vectors)  # [V] or [E, V], fp32

    def renew(self, weights: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
        """Takes over new values of what it was made from, weights in fp32 or as those were."""
        torch.ops.specmpc.pack_mlp(weights, self._int8, self.weights)
        self.vectors.copy_(_joined(vectors))

    def __call__(
        self,
        x: Tensor,
        shared: Tensor | None = None,
        head: int | Tensor | None = None,
        expect: tuple[float, float] | None = None,
    ) -> Tensor:
        """x [N, in] or [B, N, in], fp32 → [N, out] or [B, N, out], fp32.

        Args:
            shared: [1, S] or [B, 1, S], leading inputs that x lacks because all N rows have them in common.
            head: of E stacks the one for all rows, or one for each of B [B]; None for all, then x is [1, N, in] or [E, N, in].
            expect: the outputs are bin logits over this range; → their expected scalars [N] or [B, N], as `two_hot_inv` decodes them.
        """
        whole = self.weights, self.vectors
        weights, vectors = (packed[head] for packed in whole) if isinstance(head, int) else whole
        heads = head if isinstance(head, Tensor) else None
        return torch.ops.specmpc.fused_mlp(x, shared, weights, vectors, self.dims, self.ends_in, self._apart, expect, heads)


def _joined(vectors: Sequence[Tensor]) -> Tensor:
    return torch.cat([vector.float() for vector in vectors], dim=-1)
