"""Kernels of our own: a layer in one call computes what the layer does, and where they cannot be built nothing else changes."""

from __future__ import annotations

import copy
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specmpc_cli.engine import native
from specmpc_cli.engine.batched_planner import BatchedPlanner
from specmpc_cli.engine.compiled import compiled_kernels
from specmpc_cli.engine.layers import LinearEnsemble, NormedLinear, SimNorm, mlp
from specmpc_cli.engine.planner import PlannerSettings
from specmpc_cli.engine.world_model import WorldModel
from tests.conftest import make_model


class Case(NamedTuple):
    x: tuple[int, ...]
    weight: tuple[int, ...]
    group: int | None = 0  # 0: norm and Mish; 8, 4: norm and SimNorm of so many; None: neither
    skipped: int = 0  # leading inputs that the rows lack


CASES = {
    "one tile": Case((6, 16), (16, 16)),
    "a row": Case((1, 40), (24, 40)),
    "odd sizes": Case((101, 37), (53, 37)),
    "several blocks": Case((301, 64), (96, 64)),
    "more inputs than one pass takes": Case((50, 1100), (40, 1100)),
    "simnorm": Case((100, 48), (128, 48), 8),
    "simnorm of four": Case((100, 48), (20, 48), 4),
    "plain, fewer outputs than lanes": Case((70, 33), (3, 33), None),
    "plain, bins": Case((70, 64), (101, 64), None),
    "last inputs": Case((64, 6), (48, 38), 0, 32),
    "last inputs, from the middle of a tile": Case((64, 50), (48, 95), 0, 45),
    "three axes": Case((1, 70, 40), (24, 40)),
    "groups": Case((3, 70, 40), (3, 24, 40)),
    "groups of the same rows": Case((1, 70, 40), (3, 24, 40)),
    "groups through the same weights": Case((3, 70, 40), (24, 40), None),
}


class Given(NamedTuple):
    x: Tensor
    weight: Tensor
    shift: Tensor
    norm: tuple[Tensor, Tensor] | tuple[None, None]
    group: int

    def fused(self) -> Tensor:
        packed = torch.ops.specmpc.pack_weights(self.weight, None)
        return torch.ops.specmpc.fused_layer(self.x, packed, self.weight.shape[-1], self.shift, *self.norm, self.group)

    def exact(self) -> Tensor:
        """In double precision, from torch's own functions."""
        weight, shift = self.weight.double(), self.shift.double()
        rows = self.x.double().expand(max(self.x.shape[:-2].numel(), weight.shape[:-2].numel()), -1, -1)
        y = rows @ weight[..., -self.x.shape[-1] :].transpose(-1, -2) + (shift if shift.dim() == 1 else shift.unsqueeze(1))
        if self.norm[0] is not None:
            scale, offset = (v.double() if v.dim() == 1 else v.double().unsqueeze(1) for v in self.norm if v is not None)
            y = F.layer_norm(y, y.shape[-1:]) * scale + offset
            y = SimNorm(self.group)(y) if self.group else F.mish(y)
        return y if self.x.dim() == 3 or weight.dim() == 3 else y.squeeze(0)


def given(name: str, dtype: torch.dtype = torch.float32) -> Given:
    assert native.built()
    case = CASES[name]
    torch.manual_seed(0)
    vectors = (*case.weight[:-2], case.weight[-2])
    norm = (None, None) if case.group is None else (torch.rand(vectors) * 2, torch.randn(vectors))
    weight = torch.randn(case.weight) / case.weight[-1] ** 0.5
    assert case.x[-1] + case.skipped == case.weight[-1]
    return Given(torch.randn(case.x), weight.to(dtype), torch.randn(vectors), norm, case.group or 0)


@pytest.mark.compiler
@pytest.mark.parametrize("name", CASES)
def test_a_layer_in_one_call_is_the_layer(name: str) -> None:
    layer = given(name)
    out = layer.fused()
    assert out.dtype is torch.float32 and out.is_contiguous()
    torch.testing.assert_close(out.double(), layer.exact(), rtol=2e-6, atol=1e-5)


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_bf16_rounds_operands_and_results_only(name: str, dtype: torch.dtype) -> None:
    """As AMX computes: products of bf16 operands are exact, sums are fp32. Rows may come in either dtype."""
    layer = given(name, torch.bfloat16)
    layer = layer._replace(x=layer.x.to(dtype))
    out, expected = layer.fused(), layer._replace(x=layer.x.bfloat16()).exact()
    after_mish = layer.norm[0] is not None and layer.group == 0
    assert out.dtype is (torch.bfloat16 if after_mish else torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8 if after_mish else 2e-6, atol=1e-5)


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_it_keeps_to_the_rules_for_custom_operators(name: str, dtype: torch.dtype) -> None:
    layer = given(name, dtype)
    packed = torch.ops.specmpc.pack_weights(layer.weight, None)
    arguments = (layer.x, packed, layer.weight.shape[-1], layer.shift, *layer.norm, layer.group)
    torch.library.opcheck(torch.ops.specmpc.fused_layer.default, arguments)


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["several blocks", "plain, bins", "odd sizes"])  # the last panel whole, half full, and a part of one
def test_a_row_is_the_same_to_the_bit_whatever_is_computed_beside_it(name: str, dtype: torch.dtype) -> None:
    layer, threads = given(name, dtype), torch.get_num_threads()
    whole, last = layer.fused(), layer.x.shape[0]
    for some in (slice(0, 1), slice(5, 18), slice(7, 39), slice(last - 51, last)):
        assert torch.equal(layer._replace(x=layer.x[some]).fused(), whole[some])
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer.fused(), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.compiler
def test_rows_need_not_lie_side_by_side() -> None:
    layer = given("groups")
    apart = layer.x.transpose(0, 1).contiguous().transpose(0, 1)
    columns = layer.x.transpose(1, 2).contiguous().transpose(1, 2)
    for x in (apart, columns):
        assert not x.is_contiguous() and torch.equal(layer._replace(x=x).fused(), layer.fused())
    once = given("groups of the same rows")
    assert torch.equal(once._replace(x=once.x.expand(3, -1, -1)).fused(), once.fused())


@pytest.mark.compiler
def test_what_is_not_finite_is_not_hidden() -> None:
    layer = given("simnorm")
    layer.x[3, 0], layer.x[5, 1] = torch.nan, torch.inf
    out = layer.fused()
    assert out[[3, 5]].isnan().any(1).all() and out[[0, 1, 2, 4, 6]].isfinite().all()
    far = layer._replace(x=layer.x.nan_to_num(0, 0, 0), norm=(torch.full((128,), 1e4), torch.zeros(128)))
    torch.testing.assert_close(far.fused().double(), far.exact(), rtol=0, atol=1e-2)  # one-hot: a logit's last digit counts 1e-3


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x": torch.zeros(4, 65)}, "65 features"),
        ({"x": torch.zeros(4, 64, dtype=torch.float64)}, "fp32 or bf16"),
        ({"x": torch.zeros(2, 2, 4, 64)}, "two axes"),
        ({"shift": torch.zeros(95)}, "other sizes|another shape"),
        ({"shift": torch.zeros(200)}, "other sizes|another shape"),
        ({"shift": torch.zeros(96, dtype=torch.bfloat16)}, "fp32"),
        ({"norm": (torch.zeros(96), None)}, "a weight and a bias"),
        ({"norm": (torch.zeros(96), torch.zeros(95))}, "another shape"),
        ({"group": 7}, "groups of 7"),
        ({"x": torch.zeros(4, 0)}, "no features"),
        ({"weight": torch.zeros(0, 64)}, "no weights"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        given("several blocks")._replace(**change).fused()  # type: ignore[arg-type]


@pytest.mark.compiler
def test_weights_for_other_groups_are_refused() -> None:
    layer = given("groups")
    with pytest.raises(RuntimeError, match="3 groups"):
        layer._replace(x=layer.x[:2]).fused()


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_layers_compute_what_plain_ones_do(dtype: torch.dtype) -> None:
    assert native.built()
    torch.manual_seed(0)
    net = mlp(38, [48, 48], 32, SimNorm(8))
    ensemble = LinearEnsemble(4, 38, 48, normed=True)
    for layer in (*net, ensemble):
        torch.nn.init.normal_(layer.requires_grad_(False).bias)
        layer.weight.data, layer.bias.data = layer.weight.data.to(dtype), layer.bias.data.to(dtype)
    packed_net, packed_ensemble = copy.deepcopy(net), copy.deepcopy(ensemble)
    for layer in (*packed_net, packed_ensemble):
        assert isinstance(layer, NormedLinear | LinearEnsemble)
        layer.pack()
    x, shared, own = torch.randn(1, 50, 38), torch.randn(1, 1, 32), torch.randn(1, 50, 6)
    close = dict(rtol=0, atol=1e-5 if dtype is torch.float32 else 0.05)
    torch.testing.assert_close(packed_net(x), net(x), **close)
    plain, packed = (first(own, shared=shared.to(dtype).float()) for first in (net[0], packed_net[0]))
    torch.testing.assert_close(packed, plain, **close)
    for heads, rows in (
        (1, x),
        (None, x),
        (None, x.expand(4, -1, -1)),
        (torch.tensor([2]), x),
        (torch.tensor([0, 3]), x.expand(2, -1, -1)),
    ):
        plain, packed = ensemble(rows, heads), packed_ensemble(rows, heads)
        assert plain.shape == packed.shape and plain.dtype == packed.dtype
        torch.testing.assert_close(packed, plain, **close)


SMALL = PlannerSettings(discount=0.99, iterations=2, num_samples=32, num_elites=8, num_pi_trajs=4)


def layers_called(planner: BatchedPlanner, model: WorldModel) -> int:
    """By one plan."""
    keys = torch.tensor([1]), torch.tensor([3])
    with torch.inference_mode():
        arguments = model.encode(torch.randn(1, 4)), torch.zeros(1, 3, 2), *keys
        planner(*arguments)
        with torch.profiler.profile() as profile:
            planner(*arguments)
    return sum(event.count for event in profile.key_averages() if event.key == "specmpc::fused_layer")


@pytest.mark.compiler
def test_a_compiled_planner_uses_them_and_takes_over_new_weights() -> None:
    model, other = make_model(), make_model()
    planner = BatchedPlanner(model, SMALL, kernels=compiled_kernels())
    # dynamics and reward at three steps, the policy prior and two Q-heads, of three layers each, in two iterations; its own rollouts before
    assert layers_called(planner, model) == 2 * 3 * (3 + 3 + 1 + 2) + 3 * (3 + 2)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs + 0.01)
    planner.refresh()
    arguments = torch.rand(1, 16), torch.zeros(1, 3, 2), torch.tensor([1]), torch.tensor([3])
    with torch.inference_mode():
        expected = BatchedPlanner(model, SMALL)(*arguments)
        torch.testing.assert_close(planner(*arguments).mean, expected.mean, rtol=0, atol=1e-4)


@pytest.mark.compiler
def test_a_model_without_kernels_for_its_dtype_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "multiplies", lambda dtype: dtype is torch.float32)
    half, full = (make_model().compute_copy(dtype) for dtype in (torch.bfloat16, torch.float32))
    for model in (half, full):
        model.pack()
    assert half.dynamics[0].packed is None and full.dynamics[0].packed is not None
    assert full.encoder[0].packed is None, "it does not plan"


@pytest.mark.compiler
def test_a_copy_for_another_dtype_is_not_packed_for_the_old_one() -> None:
    model = make_model().compute_copy(torch.float32)
    model.pack()
    twin = model.compute_copy(torch.bfloat16)
    assert model.dynamics[0].packed is not None and twin.dynamics[0].packed is None
    twin.take_weights(model)


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
