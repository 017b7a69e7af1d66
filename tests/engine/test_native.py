"""Kernels of our own: an MLP in one call computes what its layers do, and where they cannot be built the reason is told."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specmpc_cli.engine import native
from specmpc_cli.engine.layers import SimNorm


class Case(NamedTuple):
    x: tuple[int, ...]
    dims: tuple[int, ...]  # inputs and each layer's outputs
    group: int = 0  # SimNorm's in the last layer, after a norm; 0: a plain one
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
                y = F.mish(y) if number < len(self.weights) - 1 else SimNorm(self.group)(y)
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
    if not case.group:
        vectors[-1] = vectors[-1][:1]
    shared = torch.randn(*case.x[:-2], 1, case.shared) if case.shared else None
    assert case.x[-1] + case.shared == case.dims[0]
    heads = None if case.heads is None else torch.tensor(case.heads)
    return Given(torch.randn(case.x), shared, weights, vectors, case.group, heads, int8=dtype is torch.int8, apart=case.apart)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)


@pytest.mark.compiler
@pytest.mark.parametrize("name", CASES)
def test_an_mlp_in_one_call_is_its_layers(name: str) -> None:
    mlp = given(name)
    out = mlp.fused()
    assert out.dtype is torch.float32 and out.is_contiguous()
    torch.testing.assert_close(out.double(), mlp.exact(), rtol=4e-6, atol=2e-5)


@pytest.mark.compiler
@pytest.mark.parametrize("name", CASES)
def test_bf16_rounds_operands_only(name: str) -> None:
    """Products of bf16 operands are exact, sums are fp32; where these differ in the last digit, a feature may be rounded the other way."""
    mlp = given(name, torch.bfloat16)
    out, expected = mlp.fused(), mlp.exact()
    assert out.dtype is torch.float32
    deep = len(mlp.weights) > 1
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=4e-3 if deep else 1e-5)
    assert (out - expected).abs().median() < (2e-4 if deep else 1e-6)


@pytest.mark.compiler
@pytest.mark.parametrize("name", CASES)
def test_int8_rounds_operands_only(name: str) -> None:
    """Sums of integers are exact; where a feature lies between two of them, it may be rounded the other way."""
    mlp = given(name, torch.int8)
    out, expected = mlp.fused(), mlp.exact()
    assert out.dtype is torch.float32
    deep = len(mlp.weights) > 1
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=5e-2 if deep else 2e-5)
    assert (out - expected).abs().median() < (2e-3 if deep else 2e-6)
    unrounded = given(name).exact()
    assert (out - unrounded).square().mean() < 1e-3 * unrounded.square().mean()  # an error of 3 %


@pytest.mark.compiler
def test_int8_takes_rows_and_weights_of_any_size() -> None:
    """Of zeros, of one sign, and of very different sizes, which are rounded apart."""
    mlp = given("a plain layer", torch.int8)
    x, weight = mlp.x.clone(), mlp.weights[0].clone()
    x[0], x[1], x[2], x[3], x[4] = 0.0, x[1].abs(), -x[2].abs(), x[3] * 1e6, -x[4].abs() * 1e-38  # the last without an inverse
    weight[0], weight[1], weight[2] = 0.0, weight[1] * 1e6, weight[2] * 1e-30
    some = mlp._replace(x=x, weights=[weight], vectors=[[torch.zeros(16)]])
    exact = x.double() @ weight.double().T
    assert not some.fused()[[0, 4]].any() and not some.fused()[:, 0].any()
    size = x.double().norm(dim=1)[:, None] * weight.double().norm(dim=1)
    assert ((some.fused().double() - exact).abs() <= 1e-2 * size + 1e-30).all()


@pytest.mark.compiler
def test_int8_keeps_small_latents_beside_large_actions() -> None:
    mlp = given("a plain layer", torch.int8)
    weight = torch.randint(-127, 128, (16, 16)) / 127.0
    weight[:, 0] = 1.0  # then rounding changes no weight
    seen = mlp._replace(x=torch.cat([mlp.x[:, :8] * 0.02, torch.ones(6, 8)], -1), weights=[weight])
    exact = seen._replace(int8=False).exact()
    apart, together = ((seen._replace(apart=at).fused() - exact).norm() for at in (8, 0))
    assert 0 < apart < 0.2 * together


@pytest.mark.compiler
@pytest.mark.parametrize("name", ["bins", "fewer outputs than lanes", "picked heads for the same rows", "three axes", "shared inputs"])
def test_bins_are_decoded(name: str) -> None:
    mlp = given(name)
    sharp = mlp._replace(weights=[*mlp.weights[:-1], mlp.weights[-1] * 30])  # near one-hot, up to the outermost bins
    for case in (mlp, sharp):
        logits, out = case.fused().double(), case._replace(expect=(-10.0, 10.0)).fused()
        mean = (torch.softmax(logits, -1) * torch.linspace(-10, 10, logits.shape[-1], dtype=torch.float64)).sum(-1)
        assert out.dtype is torch.float32 and out.shape == mean.shape
        torch.testing.assert_close(out.double(), mean.sign() * torch.expm1(mean.abs()), rtol=1e-5, atol=2e-6)


@pytest.mark.compiler
@pytest.mark.parametrize("dim", [48, 37, 200])
def test_features_between_layers_are_rounded_once(dim: int) -> None:
    """The last layer hands on what the hidden one made."""
    mlp = given("several blocks", torch.bfloat16)
    hidden, (bias, scale, shift) = torch.randn(dim, 64).bfloat16() / 8, torch.randn(3, dim).unbind()
    seen = mlp._replace(weights=[hidden, torch.eye(dim).bfloat16()], vectors=[[bias, scale, shift], [torch.zeros(dim)]])
    exact = F.mish(F.layer_norm(mlp.x.bfloat16().double() @ hidden.double().T + bias, (dim,), scale.double(), shift.double()))
    torch.testing.assert_close(seen.fused().double(), exact, rtol=2**-8, atol=1e-5)
    assert torch.equal(seen.fused().bfloat16().float(), seen.fused())


@pytest.mark.compiler
@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_it_keeps_to_the_rules_for_custom_operators(name: str, dtype: torch.dtype) -> None:
    for expect in (None, (-10.0, 10.0)) if CASES[name].group == 0 else (None,):
        torch.library.opcheck(torch.ops.specmpc.fused_mlp.default, given(name, dtype)._replace(expect=expect).arguments)


@pytest.mark.compiler
@DTYPES
@pytest.mark.parametrize("name", ["several blocks", "large weights", "bins", "odd sizes"])  # the last panel whole, or a part of one
def test_a_row_is_the_same_to_the_bit_whatever_is_computed_beside_it(name: str, dtype: torch.dtype) -> None:
    mlp, threads = given(name, dtype)._replace(expect=(-5.0, 5.0) if name == "bins" else None), torch.get_num_threads()
    whole, last = mlp.fused(), mlp.x.shape[0]
    for some in (slice(0, 1), slice(5, 18), slice(7, 39), slice(last - 51, last)):
        assert torch.equal(mlp._replace(x=mlp.x[some]).fused(), whole[some])
    try:
        torch.set_num_threads(3)
        assert torch.equal(mlp.fused(), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.compiler
def test_rows_need_not_lie_side_by_side() -> None:
    mlp = given("heads")
    apart = mlp.x.transpose(0, 1).contiguous().transpose(0, 1)
    columns = mlp.x.transpose(1, 2).contiguous().transpose(1, 2)
    for x in (apart, columns):
        assert not x.is_contiguous() and torch.equal(mlp._replace(x=x).fused(), mlp.fused())
    once = given("heads for the same rows")
    assert torch.equal(once._replace(x=once.x.expand(3, -1, -1)).fused(), once.fused())


@pytest.mark.compiler
@DTYPES
def test_one_row_may_stand_for_many(dtype: torch.dtype) -> None:
    mlp = given("three axes", dtype)
    same = mlp._replace(x=mlp.x[:, :1].expand(-1, 70, -1))
    assert same.x.stride(1) == 0 and torch.equal(same.fused(), mlp._replace(x=mlp.x[:, :1]).fused().expand(-1, 70, -1))


@pytest.mark.compiler
def test_groups_may_come_from_shared_inputs_or_heads_alone() -> None:
    rows, shared = given("shared inputs"), torch.randn(2, 1, 32)
    both = torch.cat([rows._replace(shared=one.unsqueeze(0)).fused() for one in shared.unbind()])
    assert torch.equal(rows._replace(shared=shared).fused(), both.view(2, 64, 16))
    arguments = several_blocks(heads=torch.tensor([0, 0]))
    twice = torch.ops.specmpc.fused_mlp(*arguments.values())
    assert torch.equal(twice, given("several blocks").fused().expand(2, -1, -1))
    torch.library.opcheck(torch.ops.specmpc.fused_mlp.default, tuple(arguments.values()))


@pytest.mark.compiler
@DTYPES
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 300.0, 1e5])
def test_features_far_from_and_near_zero(size: float, dtype: torch.dtype) -> None:
    """Mish over all that weights of a LayerNorm can make of a row, through a last layer that hands it on."""
    mlp, dim = given("several blocks", dtype), 96
    scale = torch.full((dim,), size)
    hands_on = torch.eye(dim).to(mlp.weights[1].dtype)
    seen = mlp._replace(weights=[mlp.weights[0], hands_on], vectors=[[torch.zeros(dim), scale, torch.zeros(dim)], [torch.zeros(dim)]])
    out, expected = seen.fused().double(), seen.exact()
    # Of each row's greatest feature; int8's last layer reads them in two steps, so its error is far below one of 1 / 255.
    steps = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.int8: 5e-4}[dtype]
    assert ((out - expected).abs() <= steps * expected.abs().amax(1, keepdim=True) + 1e-6).all()


@pytest.mark.compiler
@DTYPES
@pytest.mark.parametrize("name", ["odd sizes", "an odd number of shared inputs", "an odd number of one kind"])
def test_nothing_stale_is_read(name: str, dtype: torch.dtype) -> None:
    """What an earlier call left in memory, in rows and inputs beyond those given, does not matter."""
    mlp = given(name, dtype)._replace(x=given(name).x[:5])
    before = mlp.fused()
    for left in (torch.full_like(given(name).x, torch.nan), given(name).x * 100):
        given(name, dtype)._replace(x=left).fused()
    assert torch.equal(mlp.fused(), before)


@pytest.mark.compiler
def test_what_is_not_finite_is_not_hidden() -> None:
    for name in ("simnorm", "several blocks", "a plain layer", "an odd number of one kind"):
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            mlp = given(name, dtype)
            mlp.x[3, 0], mlp.x[5, -1] = torch.nan, torch.inf
            out = mlp.fused()
            assert not out[[3, 5]].isfinite().all(1).any() and out[[0, 1, 2, 4]].isfinite().all()
    weight = given("a plain layer", torch.int8)
    weight.weights[0][3, 7] = torch.nan
    assert weight.fused().isnan().any(0).nonzero().flatten().tolist() == [3]
    plain = given("simnorm of four")
    far = plain._replace(vectors=[[torch.zeros(20), torch.full((20,), 1e4), torch.zeros(20)]])
    torch.testing.assert_close(far.fused().double(), far.exact(), rtol=0, atol=1e-2)  # one-hot: a logit's last digit counts 1e-3


def several_blocks(**change: object) -> dict[str, object]:
    names = ("x", "shared", "packed", "vectors", "dims", "softmax_size", "apart", "range", "heads")
    return dict(zip(names, given("several blocks").arguments, strict=True)) | change


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(4, 65)}, "65 features"),
        ({"x": torch.zeros(4, 64, dtype=torch.float64)}, "fp32"),
        ({"x": torch.zeros(4, 64, dtype=torch.bfloat16)}, "fp32"),
        ({"x": torch.zeros(2, 2, 4, 64)}, "two axes"),
        ({"x": torch.zeros(4, 0)}, "two axes"),
        ({"shared": torch.zeros(1, 1)}, "65 features"),
        ({"x": torch.zeros(4, 60), "shared": torch.zeros(4, 4)}, "one row"),
        ({"dims": [64, 96, 97]}, "other sizes"),
        ({"dims": [64, 97, 96]}, "other sizes"),
        ({"dims": [64, 96]}, "other sizes"),
        ({"dims": [64]}, "no layers"),
        ({"dims": [64, 0, 96]}, "no layers"),
        ({"vectors": torch.zeros(384, dtype=torch.bfloat16)}, "fp32"),
        ({"vectors": torch.zeros(383)}, "other sizes"),
        ({"vectors": torch.zeros(1, 384)}, "other vectors"),
        ({"softmax_size": 7}, "groups of 7"),
        ({"softmax_size": -1}, "groups of -1"),
        ({"softmax_size": 8}, "other sizes"),
        ({"range": [-10.0]}, "first to the last"),
        ({"range": [-10.0, 10.0], "softmax_size": 8}, "first to the last"),
        ({"heads": torch.tensor([1])}, "head 1 of 1"),
        ({"heads": torch.tensor([0], dtype=torch.int32)}, "int64"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.specmpc.fused_mlp(*several_blocks(**change).values())


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ([torch.zeros(0, 64)], "no weights"),
        ([torch.zeros(64)], "two axes"),
        ([torch.zeros(4, 8), torch.zeros(4, 5)], "outputs of the one before"),
        ([torch.zeros(4, 8), torch.zeros(4, 4).bfloat16()], "different kinds"),
        ([torch.zeros(2, 4, 8), torch.zeros(3, 4, 4)], "different kinds"),
        ([torch.zeros(4, 8).double()], "fp32 or bf16"),
    ],
)
def test_weights_that_make_no_mlp_are_refused(weights: list[Tensor], complaint: str) -> None:
    assert native.built()
    with pytest.raises(RuntimeError, match=complaint):
        torch.ops.specmpc.pack_mlp(weights, False, None)


@pytest.mark.compiler
def test_weights_that_were_rounded_before_are_not_rounded_again() -> None:
    mlp = given("a plain layer", torch.bfloat16)
    with pytest.raises(RuntimeError, match="rounded to 8 bits must be fp32"):
        mlp._replace(int8=True).fused()


@pytest.mark.compiler
def test_weights_for_other_groups_are_refused() -> None:
    mlp = given("heads")
    with pytest.raises(RuntimeError, match="3 groups"):
        mlp._replace(x=mlp.x[:2]).fused()
    with pytest.raises(RuntimeError, match="other weights"):
        torch.ops.specmpc.pack_mlp(mlp.weights, False, torch.zeros(3, 7))


@pytest.mark.compiler
@pytest.mark.parametrize(
    "flags", ["-mamx-tile -mamx-bf16", "-mno-amx-bf16 -mno-avx512bf16 -mno-avx512vnni"], ids=["with tiles", "with neither bf16 nor int8"]
)
def test_kernels_of_other_processors_compute_the_same(flags: str, tmp_path: Path) -> None:
    """Built for tiles that this machine may refuse, or without such instructions at all: other blocks of rows and inputs, another way."""
    if platform.machine() != "x86_64":
        pytest.skip("flags of x86 compilers")
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" {flags}\n')
    compiler.chmod(0o755)
    chosen = ["-k", "one_call_is or operands_only or any_size or not_finite or far_from or rounded_once or to_the_bit or stale"]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *chosen, __file__]
    run = subprocess.run(command, env={**os.environ, "CXX": str(compiler)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.compiler
def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    runs: list[tuple[str, ...]] = []

    def run(*command: str) -> str:
        runs.append(command)
        if "-o" in command:
            Path(command[command.index("-o") + 1]).write_bytes(b"library")
        return "#define __AVX512F__ 1"

    monkeypatch.setattr(native, "_run", run)
    first, second = native._build(), native._build()
    assert first == second and first.read_bytes() == b"library" and [*tmp_path.iterdir()] == [first]
    assert sum("-o" in command for command in runs) == 1
    assert "-mprefer-vector-width=512" in runs[1]


@pytest.fixture
def unbuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and the state before the first call; this process may have the kernel already, so nothing is registered again."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(native, "_load", cache(native._load.__wrapped__))
    monkeypatch.setattr(torch.library, "register_fake", lambda *_: None)
    monkeypatch.setattr(torch.library, "register_autograd", lambda *_, **__: None)
    return tmp_path


@pytest.mark.parametrize("fault", ["no compiler", "no headers", "no C++20"])
def test_where_it_cannot_be_built_the_formula_is_computed_and_the_reason_told(
    fault: str, unbuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*command: str) -> str:
        if "-o" in command:
            stderr = "In file included from a.h,\n                 from b.h:\nb.h:1: fatal error: c.h: No such file or directory"
            raise subprocess.CalledProcessError(1, command, stderr=stderr)
        return ""

    if fault == "no headers":
        monkeypatch.setattr(native, "_run", run)
    else:
        monkeypatch.setenv("CXX", "no-such-compiler" if fault == "no compiler" else "false")
    assert native.problem() is None, "nobody asked for it yet"
    assert native.built() is False
    reason = {"no compiler": "No such file", "no headers": "b.h:1: fatal error: c.h: No such file or directory", "no C++20": "false"}
    problem = native.problem()
    assert problem is not None and "slower" in problem and reason[fault] in problem and "\n" not in problem
    assert not list(unbuilt.iterdir())


def test_a_damaged_library_is_built_anew(unbuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def build() -> Path:
        built.append(unbuilt / "specmpc.so")
        built[-1].write_bytes(b"damaged" if len(built) == 1 else b"whole")
        return built[-1]

    def load(path: Path) -> None:
        if path.read_bytes() != b"whole":
            raise OSError(f"{path}: file too short")

    monkeypatch.setattr(native, "_build", build)
    monkeypatch.setattr(torch.ops, "load_library", load)
    assert native.built() and native.problem() is None and len(built) == 2
