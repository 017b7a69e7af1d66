"""LayerNorm and Mish are what torch's own functions compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specmpc_cli.engine.norm_mish import norm_mish

SHAPES = {  # x; shift, weight, bias: of all rows or of each group
    "rows": ((64, 48), (48,), (48,)),
    "groups": ((2, 32, 64), (2, 64), (2, 64)),
    "one shift per group": ((3, 20, 64), (3, 64), (64,)),
}


def exact(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """In double precision, from torch's own functions."""
    c, w, b = (v.double() if v.dim() == 1 else v.double().unsqueeze(1) for v in (shift, weight, bias))
    y = x.double() + c
    if mask is not None:
        y = y * mask.double()
    return F.mish(F.layer_norm(y, x.shape[-1:]) * w + b)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_formula(name: str, masked: bool) -> None:
    x_shape, shift, weight = SHAPES[name]
    torch.manual_seed(0)
    given = torch.randn(x_shape) * 3 + 1, torch.randn(shift), torch.rand(weight) * 3, torch.randn(weight) * 2
    mask = F.dropout(torch.ones(x_shape), 0.3) if masked else None
    torch.testing.assert_close(norm_mish(*given, mask).double(), exact(*given, mask), rtol=1e-6, atol=3e-6)


def test_bf16_rows_are_rounded_only_on_the_way_in_and_out() -> None:
    x, vectors = torch.randn(64, 48).bfloat16(), (torch.randn(48), torch.rand(48), torch.randn(48))
    out = norm_mish(x, *vectors)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.double(), exact(x, *vectors), rtol=2**-8, atol=1e-6)
