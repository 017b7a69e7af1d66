"""The kernel for LayerNorm and Mish computes what the formula does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specmpc_cli.engine import native
from specmpc_cli.engine.compiled import compiled
from specmpc_cli.engine.norm_mish import norm_mish

SHAPES = {  # x; shift, weight, bias: of all rows or of each group
    "rows": ((1024, 48), (48,), (48,)),
    "rows of an odd width": ((512, 101), (101,), (101,)),
    "groups": ((2, 256, 64), (2, 64), (2, 64)),
    "one shift per group": ((3, 200, 64), (3, 64), (64,)),
    "a shift of zeros": ((512, 64), None, (64,)),
    "few rows, wide": ((9, 4096), (4096,), (4096,)),
}
MASKED = [(name, masked) for name in SHAPES for masked in (False, True)]


def make(name: str) -> list[Tensor]:
    x, shift, weight = SHAPES[name]
    torch.manual_seed(0)
    return [
        torch.randn(x) * 3 + 1,
        torch.zeros(weight) if shift is None else torch.randn(shift),
        torch.rand(weight) * 3,
        torch.randn(weight) * 2,
    ]


def dropped(x: Tensor) -> Tensor:
    return F.dropout(torch.ones_like(x, dtype=torch.float32, requires_grad=False), 0.3)


def exact(x: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """In double precision, from torch's own functions."""
    y, *vectors = (v.double() if v.dim() < 2 or v is x else v.double().unsqueeze(1) for v in (x, weight, bias))
    y = y + (shift.double() if shift.dim() == 1 else shift.double().unsqueeze(1))
    if mask is not None:
        y = y * mask.double()
    return F.mish(F.layer_norm(y, x.shape[-1:]) * vectors[0] + vectors[1])


@pytest.fixture(scope="module")
def kernel() -> Callable[..., Tensor]:
    assert native.built()
    return compiled(norm_mish)


@pytest.mark.compiler
@pytest.mark.parametrize(("name", "masked"), MASKED)
def test_values_and_gradients_are_those_of_the_formula(kernel: Callable[..., Tensor], name: str, masked: bool) -> None:
    given = make(name)
    mask = dropped(given[0]) if masked else None
    wanted = [v.double().requires_grad_() for v in given]
    ours, eager = ([v.clone().requires_grad_() for v in given] for _ in range(2))
    out, expected = kernel(*ours, mask), exact(*wanted, mask)
    slope = torch.randn(out.shape)
    out.backward(slope)
    expected.backward(slope.double())
    norm_mish(*eager, mask).backward(slope)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=3e-6)
    for mine, formula, theirs in zip(ours, eager, wanted, strict=True):
        error, usual = ((got.grad.double() - theirs.grad).abs().max() for got in (mine, formula))
        assert error <= 2 * usual + 1e-6, (error, usual)


@pytest.mark.compiler
@pytest.mark.parametrize(("name", "masked"), MASKED)
def test_it_keeps_to_the_rules_for_custom_operators(kernel: Callable[..., Tensor], name: str, masked: bool) -> None:
    x, shift, weight, bias = make(name)
    leaves = [v.requires_grad_() for v in (x, shift, weight, bias)]
    mask = dropped(x) if masked else None
    torch.library.opcheck(torch.ops.specmpc.norm_mish.default, [*leaves, mask])
    torch.library.opcheck(torch.ops.specmpc.norm_mish_backward.default, [torch.randn_like(x), *(v.detach() for v in leaves), mask])


@pytest.mark.compiler
def test_rows_need_not_lie_side_by_side(kernel: Callable[..., Tensor]) -> None:
    """The heads of one wide product are columns of it."""
    x, shift, weight, bias = make("groups")
    columns = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not columns.is_contiguous()
    expected = exact(x, shift, weight, bias)
    torch.testing.assert_close(kernel(columns.requires_grad_(), shift, weight, bias).double(), expected, rtol=1e-6, atol=3e-6)
    with torch.no_grad():
        torch.testing.assert_close(kernel(columns, shift, weight, bias).double(), expected, rtol=1e-6, atol=3e-6)


@pytest.mark.compiler
def test_bf16_rows_are_rounded_only_on_the_way_in_and_out(kernel: Callable[..., Tensor]) -> None:
    x, shift, weight, bias = make("rows")
    half = x.bfloat16().requires_grad_()
    out = kernel(half, shift, weight, bias)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.double(), exact(half.detach().float(), shift, weight, bias), rtol=2**-8, atol=1e-6)
    out.sum().backward()
    wanted = half.detach().double().requires_grad_()
    exact(wanted, shift, weight, bias).sum().backward()
    torch.testing.assert_close(half.grad.double(), wanted.grad, rtol=2**-8, atol=1e-5)


@pytest.mark.compiler
def test_extremes(kernel: Callable[..., Tensor]) -> None:
    """Far tails of Mish, rows without spread, and values that are not finite: they must not be hidden."""
    x = torch.linspace(-1, 1, 64).repeat(1024, 1)
    x[1], x[2, 5], x[3, 5] = 7.0, torch.nan, torch.inf
    for scale in (1.0, 30.0, 1e4, 1e12):
        weight, bias = torch.full((64,), scale), torch.zeros(64)
        out, expected = kernel(x.clone().requires_grad_(), torch.zeros(64), weight, bias), exact(x, torch.zeros(64), weight, bias)
        torch.testing.assert_close(out[:2].double(), expected[:2], rtol=3e-6, atol=3e-6)  # features near the mean lose digits
        assert out[2:4].isnan().all() and out[4:].isfinite().all()


@pytest.mark.compiler
def test_gradients_do_not_depend_on_the_number_of_threads(kernel: Callable[..., Tensor]) -> None:
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            leaves = [v.clone().requires_grad_() for v in make("groups")]
            kernel(*leaves).square().sum().backward()
            found.append([v.grad for v in leaves])
        finally:
            torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.compiler
def test_compiled_code_calls_it_where_there_is_enough_to_do(kernel: Callable[..., Tensor]) -> None:
    for rows, used in ((1024, True), (16, False)):
        with torch.profiler.profile() as profile:
            kernel(torch.randn(rows, 48).requires_grad_(), torch.zeros(48), torch.ones(48), torch.zeros(48)).sum().backward()
        called = {event.key for event in profile.key_averages()} & {"specmpc::norm_mish", "specmpc::norm_mish_backward"}
        assert len(called) == (2 if used else 0)


def test_eager_code_never_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: pytest.fail("eager code asked for the kernel"))
    given = make("rows")
    torch.testing.assert_close(norm_mish(*given).double(), exact(*given), rtol=1e-6, atol=3e-6)
