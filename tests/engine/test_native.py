"""Kernels of our own: an MLP in one call computes what its layers do."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specmpc_cli.engine import native
from tests.engine.fused_mlps import CASES, given

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)


@pytest.mark.compiler
@pytest.mark.parametrize("name", CASES)
def test_an_mlp_in_one_call_is_its_layers(name: str) -> None:
    mlp = given(name)
    out = mlp.fused()
    assert out.dtype is torch.float32 and out.is_contiguous()
    torch.testing.assert_close(out.double(), mlp.exact(), rtol=4e-6, atol=2e-5)


class Near(NamedTuple):
    """How far results may be from exact sums of rounded operands, at most and in the middle; through several layers, and through one."""

    most: tuple[float, float]
    median: tuple[float, float]


NEAR = {torch.bfloat16: Near((2e-2, 1e-5), (2e-4, 1e-6)), torch.int8: Near((5e-2, 2e-5), (2e-3, 2e-6))}


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_narrow_products_round_operands_only(name: str, dtype: torch.dtype) -> None:
    """Products of bf16 are exact and summed in fp32, sums of integers are exact; a feature that is computed to 2^-13 and lies between two
    steps may be rounded the other way.
    """
    mlp = given(name, dtype)
    out, expected = mlp.fused(), mlp.exact()
    assert out.dtype is torch.float32
    most, median = (bound[len(mlp.weights) == 1] for bound in NEAR[dtype])
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=most)
    assert (out - expected).abs().median() < median


@pytest.mark.compiler
@pytest.mark.parametrize("name", CASES)
def test_int8_errs_by_three_per_cent_at_most(name: str) -> None:
    out, unrounded = given(name, torch.int8).fused(), given(name).exact()
    assert (out - unrounded).square().mean() < 1e-3 * unrounded.square().mean()


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
@DTYPES
@pytest.mark.parametrize("name", ["bins", "fewer outputs than lanes", "picked heads for the same rows", "three axes", "shared inputs"])
def test_bins_are_decoded(name: str, dtype: torch.dtype) -> None:
    mlp, near = given(name, dtype), 1e-6 if dtype is torch.float32 else 5e-5
    sharp = mlp._replace(weights=[*mlp.weights[:-1], mlp.weights[-1] * 30])  # near one-hot, up to the outermost bins
    for case in (mlp, sharp):
        logits, out = case.fused().double(), case._replace(expect=(-10.0, 10.0)).fused()
        mean = (torch.softmax(logits, -1) * torch.linspace(-10, 10, logits.shape[-1], dtype=torch.float64)).sum(-1)
        assert out.dtype is torch.float32 and out.shape == mean.shape
        torch.testing.assert_close(out.double(), mean.sign() * torch.expm1(mean.abs()), rtol=10 * near, atol=near)


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
def test_it_changes_nothing_that_it_is_given(name: str, dtype: torch.dtype) -> None:
    for expect in (None, (-10.0, 10.0)) if CASES[name].group == 0 else (None,):
        arguments = given(name, dtype)._replace(expect=expect).arguments
        torch.library.opcheck(torch.ops.specmpc.fused_mlp.default, arguments, test_utils="test_schema")


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
    steps = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.int8: 5e-4}[dtype]
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
    names = ("x", "shared", "packed", "vectors", "dims", "ends_in", "apart", "range", "heads")
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
        ({"ends_in": 7}, "groups of 7"),
        ({"ends_in": -2}, "groups of -2"),
        ({"ends_in": -1}, "other sizes"),
        ({"ends_in": 8}, "other sizes"),
        ({"range": [-10.0]}, "first to the last"),
        ({"range": [-10.0, 10.0], "ends_in": 8}, "first to the last"),
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
    "flags",
    [
        "-mamx-tile -mamx-bf16",
        "-mno-amx-bf16 -mno-avx512bf16",
        "-mno-amx-bf16 -mno-avx512bf16 -mno-avx512vnni",
        "-mno-avx512f",
        "-mno-avx",
    ],
    ids=["with tiles", "with int8 alone", "with neither bf16 nor int8", "with AVX2", "with SSE"],
)
def test_kernels_of_other_processors_compute_the_same(flags: str, tmp_path: Path) -> None:
    """Built for tiles that this machine may refuse, or without such instructions at all: other blocks of rows and inputs, another way."""
    run_built_with(flags, tmp_path)


@pytest.mark.compiler
def test_kernels_compute_the_same_in_tiles(tmp_path: Path) -> None:
    """Emulated ones, as strict as a processor's, if this machine has none."""
    told = tmp_path / "products"
    run_built_with(
        f"-mamx-tile -mamx-bf16 -include {Path(__file__).with_name('emulated_tiles.h')}", tmp_path, SPECMPC_EMULATED_TILES=str(told)
    )
    assert int(told.read_text()) > 10_000


def run_built_with(flags: str, folder: Path, **environment: str) -> None:
    """What products and the MLPs made of them are tested for, in a process whose kernels are built with these flags more."""
    if platform.machine() != "x86_64":
        pytest.skip("flags of x86 compilers")
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" {flags}\n')
    compiler.chmod(0o755)
    in_test_native = "one_call_is or operands_only or any_size or not_finite or far_from or rounded_once or to_the_bit or stale"
    in_test_learnt_mlp = "values_and_gradients or bf16_rounds or far_tails or side_by_side or threads or a_rollout"
    in_test_packed_planner = "is_the_formulas or are_the_formulas or the_same_to_the_bit"
    chosen = ["-k", f"{in_test_native} or {in_test_learnt_mlp} or {in_test_packed_planner}"]
    files = [str(Path(__file__).with_name(name)) for name in ("test_native.py", "test_learnt_mlp.py", "test_packed_planner.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *chosen, *files]
    run = subprocess.run(command, env={**os.environ, "CXX": str(compiler)} | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
