"""Kernels of our own: an MLP that learns, one call each way, computes what its layers and their gradients do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specmpc_cli.engine import native
from specmpc_cli.engine.layers import SimNorm
from specmpc_cli.engine.native.learnt_mlp import Dropout, Keep, LearntCall, LearntMlp
from specmpc_cli.learning.learner import draw_dropout

pytestmark = pytest.mark.compiler


class Case(NamedTuple):
    rows: int
    parts: tuple[int, ...]  # widths of the inputs' parts
    outs: tuple[int, ...]  # each layer's
    ends_in: int = 0
    stacks: int = 0  # E heads; 0: no axis for them
    heads: tuple[int, ...] | None = None
    drops: bool = False
    wanted: tuple[bool, ...] | None = None  # which parts get a gradient; all if left out


CASES = {
    "a plain layer": Case(6, (16,), (16,)),
    "a row": Case(1, (40,), (24, 24)),
    "odd sizes": Case(101, (37,), (53, 29, 53)),
    "several chunks": Case(301, (64,), (96, 96)),
    "an odd number of rows in the last": Case(133, (24,), (40, 20)),
    "many rows": Case(1030, (34,), (40, 24)),
    "many sums": Case(1030, (34,), (640, 24), stacks=2),
    "wide": Case(70, (600,), (520, 40)),
    "simnorm": Case(100, (48,), (64, 128), 8),
    "simnorm of four": Case(100, (48,), (20,), 4),
    "simnorm of heads": Case(70, (48,), (40, 24), 8, stacks=3),
    "mish at the end of heads": Case(70, (48,), (40, 21), -1, stacks=3),
    "mish at the end": Case(256, (24,), (72,), -1),
    "fewer outputs than lanes": Case(70, (33,), (40, 3)),
    "two parts": Case(130, (32, 6), (48, 16)),
    "two parts, the first is wanted": Case(130, (32, 6), (48, 16), wanted=(True, False)),
    "two parts, the second is wanted": Case(130, (37, 6), (48, 16), wanted=(False, True)),
    "none is wanted": Case(130, (32, 6), (48, 16), wanted=(False, False)),
    "three parts, the middle is wanted": Case(130, (16, 5, 9), (48, 16), wanted=(False, True, False)),
    "dropout": Case(130, (40,), (64, 24), drops=True),
    "heads": Case(130, (32, 6), (40, 101), stacks=3),
    "heads with dropout": Case(130, (32, 6), (40, 24, 101), stacks=5, drops=True),
    "picked heads": Case(130, (32, 6), (40, 24), stacks=5, heads=(4, 1), wanted=(False, True)),
    "a head picked twice": Case(70, (32, 6), (40, 24), stacks=2, heads=(1, 1)),
}


@dataclass
class Given:
    parts: list[Tensor]
    weights: list[Tensor]
    vectors: list[Tensor]
    ends_in: int
    heads: Tensor | None
    dropout: Dropout | None

    def leaves(self) -> Iterator[Tensor]:
        yield from (*self.parts, *self.weights, *self.vectors)

    def doubled(self) -> Given:
        def twin(given: list[Tensor]) -> list[Tensor]:
            return [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in given]

        return replace(self, parts=twin(self.parts), weights=twin(self.weights), vectors=twin(self.vectors))

    def mlp(self, bf16: bool = False) -> LearntMlp:
        return LearntMlp(self.weights, self.vectors, self.ends_in, bf16=bf16)

    def call(self, keep: Keep, bf16: bool = False) -> LearntCall:
        with torch.no_grad():
            return self.mlp(bf16)(*self.parts, keep=keep, heads=self.heads, dropout=self.dropout)

    def ours(self, bf16: bool = False) -> Tensor:
        """What autograd can go through."""
        return _Differentiable.apply(self, bf16, *self.leaves())

    def formula(self, bf16: bool = False) -> Tensor:
        """From torch's own functions, in the tensors' precision; products of bf16 are of rounded operands."""

        def rounded(x: Tensor) -> Tensor:
            return x.bfloat16().to(x.dtype) if bf16 else x

        def of_heads(x: Tensor) -> Tensor:
            return x if self.heads is None else x[self.heads]

        x, rest = torch.cat(self.parts, -1), iter(self.vectors)
        for number, weight in enumerate(self.weights):

            def vector(grouped: bool = weight.dim() == 3) -> Tensor:
                return of_heads(next(rest)).unsqueeze(-2) if grouped else next(rest)

            x = rounded(x) @ rounded(of_heads(weight)).transpose(-1, -2) + vector()
            if number == 0 and self.dropout is not None:
                mask = self.dropout.mask()
                x = x * (mask if weight.dim() == 3 else mask[0])
            last = number == len(self.weights) - 1
            if not last or self.ends_in:
                x = F.layer_norm(x, x.shape[-1:]) * vector() + vector()
                x = SimNorm(self.ends_in)(x) if last and self.ends_in > 0 else F.mish(x)
        return x


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, some: Given, bf16: bool, *leaves: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[2:]
        ctx.wanted, ctx.learns = wanted[: len(some.parts)], any(wanted[len(some.parts) :])
        keep = Keep.FOR_PARAMETERS if ctx.learns else Keep.FOR_INPUTS if any(ctx.wanted) else Keep.NOTHING
        ctx.call = some.call(keep, bf16)
        return ctx.call.y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        of_parts, of_parameters = ctx.call.gradients(*grad_outputs, *ctx.wanted)
        rest = iter(of_parts)
        learnt = of_parameters if ctx.learns else [None] * (len(ctx.needs_input_grad) - 2 - len(ctx.wanted))
        return None, None, *(next(rest) if wants else None for wants in ctx.wanted), *learnt


def given(name: str) -> Given:
    assert native.built()
    torch.manual_seed(0)
    return made(CASES[name])


def made(case: Case) -> Given:
    stacks, learns = (case.stacks,) if case.stacks else (), case.heads is None
    weights, vectors = [], []
    for i, o in zip((sum(case.parts), *case.outs), case.outs, strict=False):
        weights.append((torch.randn(*stacks, o, i) / i**0.5).requires_grad_(learns))
        for vector in (torch.randn(*stacks, o), torch.rand(*stacks, o) * 2, torch.randn(*stacks, o)):
            vectors.append(vector.requires_grad_(learns))
    if not case.ends_in:
        del vectors[-2:]
    wanted = case.wanted or [True] * len(case.parts)
    parts = [torch.randn(case.rows, width).requires_grad_(wants) for width, wants in zip(case.parts, wanted, strict=True)]
    heads = None if case.heads is None else torch.tensor(case.heads)
    groups = len(case.heads or ()) or case.stacks or 1
    dropout = draw_dropout((groups, case.rows, case.outs[0]), 0.3, torch.device("cpu")) if case.drops else None
    return Given(parts, weights, vectors, case.ends_in, heads, dropout)


def error(ours: Tensor, exact: Tensor) -> float:
    """The largest, as a share of the largest value."""
    return ((ours - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_its_layers(name: str) -> None:
    some = given(name)
    twin = some.doubled()
    out, expected = some.ours(), twin.formula()
    slope = torch.randn(expected.shape)
    out.backward(slope)
    expected.backward(slope.double())
    assert out.dtype is torch.float32 and out.shape == expected.shape and error(out.detach(), expected.detach()) < 2e-6
    for mine, exact in zip(some.leaves(), twin.leaves(), strict=True):
        assert (mine.grad is None) == (exact.grad is None)
        if mine.grad is not None and exact.grad is not None:
            assert mine.grad.shape == exact.shape and error(mine.grad, exact.grad) < 2e-6


@pytest.mark.parametrize("name", CASES)
def test_bf16_rounds_operands_and_what_is_kept(name: str) -> None:
    """But for what is kept of norms, and gradients between layers, which the formula does not round."""
    some = given(name)
    twin = some.doubled()
    out, expected = some.ours(bf16=True), twin.formula(bf16=True)
    slope = torch.randn(expected.shape)
    out.backward(slope)
    expected.backward(slope.double())
    assert out.dtype is torch.float32 and error(out.detach(), expected.detach()) < 4e-3
    for mine, exact in zip(some.leaves(), twin.leaves(), strict=True):
        assert (mine.grad is None) == (exact.grad is None)
        if mine.grad is not None and exact.grad is not None:
            assert error(mine.grad, exact.grad) < 2e-2
            assert (mine.grad - exact.grad).norm() < 6e-3 * exact.grad.norm()


def test_without_gradients_nothing_is_kept() -> None:
    some = given("odd sizes")
    sizes = [some.call(keep).kept.numel() for keep in Keep]
    assert sizes[0] == 0 < sizes[1] < sizes[2]
    with torch.no_grad():
        torch.testing.assert_close(some.ours(), some.doubled().formula().float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("learning", ["vectors", "the last weight", "parts"])
def test_what_learns_gets_a_gradient_whatever_does_not(learning: str) -> None:
    some = given("odd sizes")
    chosen = {"vectors": some.vectors, "the last weight": some.weights[-1:], "parts": some.parts}[learning]
    for leaf in some.leaves():
        leaf.requires_grad_(any(leaf is one for one in chosen))
    twin = some.doubled()
    for one in (some.ours(), twin.formula()):
        one.square().sum().backward()
    for mine, exact in zip(some.leaves(), twin.leaves(), strict=True):
        assert (mine.grad is None) == (exact.grad is None)
        if mine.grad is not None and exact.grad is not None:
            assert error(mine.grad, exact.grad) < 2e-6


def test_nothing_needs_to_lie_side_by_side() -> None:
    """Inputs, weights and gradients of any strides."""
    some = given("heads with dropout")

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x.detach(), torch.full_like(x, torch.nan)], -1)[..., 0].requires_grad_(x.requires_grad)

    apart = Given([*map(strided, some.parts)], [*map(strided, some.weights)], [*map(strided, some.vectors)], 0, None, some.dropout)
    assert not any(tensor.is_contiguous() for tensor in apart.leaves())
    slope = torch.randn(5, 1, 101).expand(-1, 130, -1)
    for one in (some, apart):
        one.ours().backward(slope)
    for mine, theirs in zip(some.leaves(), apart.leaves(), strict=True):
        assert mine.grad is not None and theirs.grad is not None and torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("bf16", [False, True])
def test_nothing_stale_is_read(bf16: bool) -> None:
    """What an earlier call left in memory, in rows and features beyond those given, does not matter."""

    def found() -> list[Tensor]:
        some = given("odd sizes")
        out = some.ours(bf16)
        out.square().sum().backward()
        return [out, *(leaf.grad for leaf in some.leaves() if leaf.grad is not None)]

    before = found()
    for left in (torch.nan, 1e6):
        larger = given("wide")
        with torch.no_grad():
            larger.parts[0].fill_(left)
        larger.ours(bf16).sum().backward()
        assert all(torch.equal(one, other) for one, other in zip(before, found(), strict=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_do_not_depend_on_the_number_of_threads(bf16: bool) -> None:
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            some = given("heads with dropout")
            some.ours(bf16).square().sum().backward()
            found.append([tensor.grad for tensor in some.leaves()])
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_not_finite_is_not_hidden_and_stays_in_its_row(bf16: bool) -> None:
    some = given("simnorm")
    (part,) = some.parts
    with torch.no_grad():
        part[3, 5], part[70, 2] = torch.nan, torch.inf
    out = some.ours(bf16)
    broken = torch.zeros(len(part), dtype=torch.bool)
    broken[[3, 70]] = True
    assert out[broken].isnan().all() and out[~broken].isfinite().all()
    out.sum().backward()
    assert part.grad is not None and part.grad[broken].isnan().all() and part.grad[~broken].isfinite().all()
    assert some.weights[0].grad is not None and some.weights[0].grad.isnan().any()


@pytest.mark.parametrize("bf16", [False, True])
def test_far_tails_of_mish(bf16: bool) -> None:
    """Features near the mean lose digits; none becomes anything but a number."""
    x = torch.linspace(-1, 1, 64).repeat(64, 1).requires_grad_()
    for scale in (1.0, 30.0, 1e4, 1e12):
        vectors = [torch.zeros(64), torch.full((64,), scale), torch.zeros(64)]
        some = Given([x], [torch.eye(64)], vectors, -1, None, None)
        torch.testing.assert_close(some.ours(bf16), some.formula(bf16), rtol=1e-3 if bf16 else 3e-6, atol=1e-3 if bf16 else 3e-6)
        bias = [one.clone().requires_grad_() for one in (vectors[2], vectors[2])]  # it gets Mish's slope
        for one, function in zip(bias, (Given.ours, Given.formula), strict=True):
            function(replace(some, vectors=[*vectors[:2], one]), bf16).sum().backward()
        torch.testing.assert_close(bias[0].grad, bias[1].grad, rtol=5e-3 if bf16 else 1e-5, atol=0.2 if bf16 else 1e-4)  # of 64 rows


def test_what_does_not_fit_is_refused() -> None:
    some = given("heads")
    zeros = torch.arange(3 * 130 * 40)

    def dropping(zeros: Tensor, share: float = 0.3) -> Given:
        return replace(some, dropout=Dropout(zeros, (3, 130, 40), share))

    wrong: dict[str, Given] = {
        "38 features, weights for 37": replace(some, weights=[some.weights[0][..., 1:], some.weights[1]]),
        "inputs are fp32": replace(some, parts=[some.parts[0].double(), some.parts[1]]),
        "inputs are fp32 [N, I]": replace(some, parts=[some.parts[0][:3], some.parts[1]]),
        "weights are fp32": replace(some, weights=[some.weights[0].bfloat16(), some.weights[1]]),
        "weights of different heads": replace(some, weights=[some.weights[0], some.weights[1][:2]]),
        "5 vectors, expected 4": replace(some, vectors=[*some.vectors, some.vectors[0]]),
        "vectors are": replace(some, vectors=some.vectors[:3]),
        "vectors of another shape": replace(some, vectors=[some.vectors[0][:, 1:], *some.vectors[1:]]),
        "101 features are not groups of 8": replace(some, ends_in=8),
        "what is dropped is int64": dropping(zeros.float()),
        "what is dropped comes in rising order": dropping(zeros.flip(0)),
        "rising order, from 0 to at most 15600": dropping(zeros + 2),
        "rising order, from 0 to": dropping(zeros - 1),
        "not all features can be dropped": dropping(zeros, 1.0),
        "head 3 of 3": replace(some, heads=torch.tensor([3])),
        "heads are int64": replace(some, heads=torch.tensor([1.0])),
        "heads of weights that have none": replace(given("two parts"), heads=torch.tensor([0, 0])),
        "inputs are fp32 [N": replace(some, parts=[part[:0] for part in some.parts]),
        "not groups of -7": replace(some, ends_in=-7),
    }
    for message, case in wrong.items():
        with pytest.raises(RuntimeError) as raised, torch.no_grad():
            case.ours()
        assert message in str(raised.value)
    with pytest.raises(RuntimeError, match="picked heads do not learn"):
        replace(some, heads=torch.tensor([0])).ours()


def test_gradients_of_another_call_are_refused() -> None:
    some = given("two parts")
    settings = (None, None, 0.0, 0, False)
    lists = [[tensor.detach() for tensor in tensors] for tensors in (some.parts, some.weights, some.vectors)]
    y, kept = torch.ops.specmpc.mlp(*lists, *settings, 2)
    for grad, made, seen, keep in ((y, y, kept, 1), (y, y, kept, 0), (y, y[:5], kept, 2), (y[:5], y[:5], kept, 2), (y, y, kept[1:], 2)):
        with pytest.raises(RuntimeError, match="mlp_backward"):
            torch.ops.specmpc.mlp_backward(grad, made, seen, *lists, *settings, keep, [True, True])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("task", [False, True], ids=["alone", "beside a task"])
def test_a_rollout_is_one_step_after_the_other(task: bool, bf16: bool) -> None:
    """Its gradients, too, where latents have some of their own: weights' are sums over steps."""
    assert native.built()
    torch.manual_seed(0)
    rows, steps, width = 130, 3, 40
    beside = torch.randn(rows, 5) if task else None
    case = Case(rows, (width, 5, 3) if task else (width, 3), (48, 53, width), 8)
    some = made(case)
    z, actions, slopes = torch.rand(rows, width), torch.randn(steps, rows, 3), torch.randn(steps + 1, rows, width)
    leaves = [z, *([] if beside is None else [beside]), *some.weights, *some.vectors]
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    weights, vectors = twins[-len(some.weights) - len(some.vectors) :][: len(some.weights)], twins[-len(some.vectors) :]
    latents = [twins[0]]
    for action in actions.double():
        parts = [latents[-1], *([] if beside is None else twins[1:2]), action]
        latents.append(replace(some, parts=parts, weights=weights, vectors=vectors).formula(bf16))
    expected = torch.stack(latents)
    (expected * slopes).sum().backward()

    with torch.no_grad():
        rollout = some.mlp(bf16).rollout(z, beside, actions)
        of_latents = slopes.clone()
        of_beside, of_parameters = rollout.gradients(of_latents)
    assert torch.equal(rollout.latents[0], z) and torch.equal(of_latents[-1], slopes[-1])
    assert error(rollout.latents, expected.detach()) < (4e-3 if bf16 else 2e-6)
    for mine, twin in zip((of_latents[0], *of_beside, *of_parameters), twins, strict=True):
        assert twin.grad is not None and mine.shape == twin.shape
        assert error(mine, twin.grad) < (2e-2 if bf16 else 2e-6)


def test_what_is_no_rollout_is_refused() -> None:
    some = made(Case(6, (16, 3), (24, 16), 8))
    net, z, actions = some.mlp(), torch.rand(6, 16), torch.randn(3, 6, 3)
    other = made(Case(6, (16, 3), (24, 24), 8)).mlp()
    with torch.no_grad():
        for message, call in {
            "results are not as the latents were": lambda: other.rollout(z, None, actions),
            "actions are": lambda: net.rollout(z, None, actions[0]),
            "z is": lambda: net.rollout(z[0], None, actions),
            "21 features": lambda: net.rollout(z, torch.rand(6, 2), actions),
            "inputs are fp32": lambda: net.rollout(z, None, actions[:, :5]),
        }.items():
            with pytest.raises(RuntimeError, match=message):
                call()
        rollout = net.rollout(z, None, actions)
        for wrong in (torch.zeros(3, 6, 16), torch.zeros(4, 6, 16).double(), torch.zeros(6, 4, 16).transpose(0, 1)):
            with pytest.raises(RuntimeError, match="gradients of another call"):
                rollout.gradients(wrong)
