"""The compiled planner computes what the eager one does, and is cached."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from specmpc_cli import runtime
from specmpc_cli.engine import native
from specmpc_cli.engine.batched_planner import BatchedPlanner
from specmpc_cli.engine.captured import EAGER_CALLS
from specmpc_cli.engine.compiled import (
    batch_sizes_for,
    captured_judge,
    compiled,
    compiled_kernels,
    judge_for,
    kernels_for,
)
from specmpc_cli.engine.correctors import CorrectorDims, build_corrector
from specmpc_cli.engine.draws import device_draws
from specmpc_cli.engine.gate import GateRule, limits_of
from specmpc_cli.engine.planner import EAGER, PlannerSettings, Search, select
from specmpc_cli.engine.runner import judge
from specmpc_cli.errors import ConfigError
from specmpc_cli.types import Plan
from specmpc_cli.workflows.acting import compilers_fault
from tests.conftest import make_model

SMALL = PlannerSettings(discount=0.99, iterations=2, num_samples=32, num_elites=8, num_pi_trajs=4)


@pytest.mark.compiler
@pytest.mark.parametrize(("num_q", "fused"), [(2, False), (5, True)])
def test_compiled_and_eager_plans_agree(num_q: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With MLPs in one call, and as where there are none for the dtype."""
    if not fused:
        monkeypatch.setattr(native, "multiplies", lambda dtype: False)
    model = make_model(num_q=num_q)
    with torch.inference_mode():
        z, warm = model.encode(torch.randn(2, 4)), torch.zeros(2, 3, 2)
        keys = torch.tensor([1, 2]), torch.tensor([3, 4])
        eager = BatchedPlanner(model, SMALL)(z, warm, *keys)
        compiled = BatchedPlanner(model, SMALL, kernels=compiled_kernels())(z, warm, *keys)
    torch.testing.assert_close(eager.mean, compiled.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(eager.actions, compiled.actions, rtol=0, atol=1e-4)


def test_a_cpu_judges_a_row_the_same_whatever_shares_the_batch() -> None:
    model = make_model()
    corrector = build_corrector("temporal", CorrectorDims(16, 2, 32, 4)).requires_grad_(False).eval()
    judged = judge_for(torch.device("cpu"))
    seen = (torch.randn(9, 4), torch.rand(9, 16), torch.rand(9, 2), torch.arange(9), torch.rand(9, 4, 50), torch.zeros(9, dtype=torch.bool))
    limits = limits_of(GateRule(6), torch.device("cpu"))
    together = judged(model, corrector, "l2", limits, *seen)
    for row in range(9):
        alone = judged(model, corrector, "l2", limits, *(value[row : row + 1] for value in seen))
        assert all(torch.equal(a, b[row : row + 1]) for a, b in zip(alone, together, strict=True))


def visits(rows: int, number: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(number)
    first = torch.arange(rows) == number % 3
    return (torch.randn(rows, 4), torch.rand(rows, 16), torch.rand(rows, 2), torch.arange(rows) + number, torch.rand(rows, 4, 50), first)


def test_a_captured_judgement_has_a_graph_for_each_number_of_rows_and_sees_new_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the graph, which like one reads its inputs where those of the first call lay."""
    graphs = []

    class Replaying:
        def __init__(self, fn: Callable[..., Any], device: torch.device) -> None:
            self.fn, self.inputs = fn, ()
            assert device.type == "cpu", "where nothing is captured"

        def __call__(self, *inputs: torch.Tensor) -> Any:
            if not self.inputs:
                graphs.append(self)
                self.inputs = tuple(torch.empty_like(value) for value in inputs)
            for static, value in zip(self.inputs, inputs, strict=True):
                static.copy_(value)
            return self.fn(*self.inputs)

    monkeypatch.setattr("specmpc_cli.engine.compiled.CapturedCall", Replaying)
    judged, model = captured_judge(), make_model()
    corrector = build_corrector("two-tower", CorrectorDims(16, 2, 32, 4)).requires_grad_(False).eval()
    for number, (rows, horizon, above) in enumerate([(5, 3, 2), (5, 8, 1.5), (2, 3, math.inf), (5, 4, 2)]):  # an int is as good as a float
        limits = limits_of(GateRule(horizon, accept_below=0.1 * number, replan_above=above), torch.device("cpu"))
        for one in (None, corrector):
            seen = visits(rows, number)
            for ours, theirs in zip(judged(model, one, "l2", limits, *seen), judge(model, one, "l2", limits, *seen), strict=True):
                torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert len(graphs) == 4


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:not captured")
@pytest.mark.parametrize("arch", [None, "two-tower", "temporal"])
def test_captured_judgements_on_a_gpu_are_the_eager_ones(arch: str | None) -> None:
    judged, model = captured_judge(), make_model().cuda()
    corrector = build_corrector(arch, CorrectorDims(16, 2, 32, 4)).requires_grad_(False).eval().cuda() if arch else None
    for number in range(EAGER_CALLS + 3):
        limits = limits_of(GateRule(3 + number, accept_below=0.1 * number, replan_above=2.0), torch.device("cuda"))
        seen = tuple(value.cuda() for value in visits(5, number))
        with torch.inference_mode():
            for ours, theirs in zip(
                judged(model, corrector, "l2", limits, *seen), judge(model, corrector, "l2", limits, *seen), strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_without_a_compiler_planning_is_eager_with_one_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("SPECMPC_COMPILE", "1")
    chosen = runtime.choose_runtime("cpu", "fp32")
    assert not chosen.compiled and len(chosen.notes) == 1 and "no C++ compiler" in chosen.notes[0]
    assert kernels_for(chosen) is EAGER


@pytest.mark.parametrize("lacking", ["g++", "Python.h"])
def test_clang_alone_or_off_linux_missing_headers_are_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lacking: str) -> None:
    monkeypatch.setenv("SPECMPC_COMPILE", "1")
    monkeypatch.delenv("CXX", raising=False)
    if lacking == "g++":
        monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/clang++" if name == "clang++" else None)
    else:
        monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
        assert runtime.choose_runtime("cpu", "fp32").compiled == (sys.platform == "linux"), "our kernels need none"
        monkeypatch.setattr("sys.platform", "darwin")
    chosen = runtime.choose_runtime("cpu", "fp32")
    assert not chosen.compiled and len(chosen.notes) == 1


def test_auto_takes_bf16_only_where_the_hardware_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, avx, expected in ((False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert runtime.choose_runtime("cpu", "auto").dtype_name == expected
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    chosen = runtime.choose_runtime("cpu", "bf16")
    assert chosen.dtype == torch.bfloat16 and "emulated" in chosen.notes[0]


def test_int8_is_the_planners_alone_and_never_chosen_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECMPC_COMPILE", "1")
    monkeypatch.setattr(runtime, "_missing_for_compilation", lambda: None)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    asked, auto = runtime.choose_runtime("cpu", "int8"), runtime.choose_runtime("cpu", "auto")
    assert (asked.dtype_name, asked.planning_dtype, asked.dtype) == ("int8", torch.int8, auto.dtype)
    assert auto.planning_dtype is auto.dtype and asked.facts["dtype"] == "int8"
    assert asked.learning_dtype_name == f"int8, updates {auto.dtype_name}" and auto.learning_dtype_name == auto.dtype_name
    with pytest.raises(ConfigError, match="could not be prepared here; use --dtype auto: no space left$"):
        compilers_fault(OSError("no space left\nmore"), asked)


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        ("instructions", "this one does not have it; use --dtype auto"),
        ("compiling", "SPECMPC_COMPILE=0 switches that off; use --dtype auto"),
        ("compiler", "no C.. compiler found; use --dtype auto"),
        ("CPU", "this would run on cuda; add --device cpu"),
    ],
)
def test_int8_is_refused_where_nothing_multiplies_it(monkeypatch: pytest.MonkeyPatch, lacking: str, reason: str) -> None:
    monkeypatch.setenv("SPECMPC_COMPILE", "0" if lacking == "compiling" else "1")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: lacking != "instructions")
    monkeypatch.setattr(runtime, "_missing_for_compilation", lambda: "no C++ compiler found" if lacking == "compiler" else None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    with pytest.raises(ConfigError, match=f"--dtype int8 plans on a CPU with AVX512-VNNI, with compiled code: {reason}$"):
        runtime.choose_runtime("cuda" if lacking == "CPU" else "cpu", "int8")


def test_gpus_without_bf16_products_take_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for supported, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, supported=supported: supported)
        assert runtime.choose_runtime("cuda", "auto").dtype_name == expected
    assert "this GPU has no bf16" in runtime.choose_runtime("cuda", "bf16").notes[0]


@pytest.mark.parametrize("options", [("gpu", "auto"), ("cuda:99", "auto"), ("meta", "auto"), ("cpu", "fp16")])
def test_unknown_devices_and_dtypes_are_refused(options: tuple[str, str]) -> None:
    with pytest.raises(ConfigError):
        runtime.choose_runtime(*options)


def test_a_gpu_plans_many_rows_at_once_and_a_cpu_one() -> None:
    on_cpu = runtime.Runtime(torch.device("cpu"), torch.float32, False, 1)
    on_gpu = runtime.Runtime(torch.device("cuda"), torch.bfloat16, False, 1)
    assert batch_sizes_for(on_cpu) == (1,)
    assert 1 in batch_sizes_for(on_gpu) and max(batch_sizes_for(on_gpu)) >= 64


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:not captured")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("refined", [False, True])
def test_captured_plans_on_a_gpu_are_the_eager_ones(dtype: torch.dtype, refined: bool) -> None:
    """Before and after the capture, for both batch sizes, with new weights each time, whose taking over is captured too."""
    model = make_model().cuda()
    z, warm = torch.rand(5, 16).cuda(), torch.zeros(5, 3, 2).cuda()

    def make() -> tuple[BatchedPlanner, BatchedPlanner]:
        first = BatchedPlanner(model, SMALL, batch_sizes=(1, 4), dtype=dtype, draws=device_draws)
        return first, first.refining(1, 0.5) if refined else first

    first, captured = make()
    means = []
    keys = torch.arange(5).cuda(), torch.full((5,), 7).cuda()
    for _ in range(EAGER_CALLS + 3):
        with torch.no_grad():  # of layers that no LayerNorm follows, or whose softmax feels it
            model.reward_net[-1].weight.add_(0.1 * torch.randn_like(model.reward_net[-1].weight))
            model.dynamics[-1].ln.weight.mul_(1.5)
        first.refresh()
        _, fresh = make()  # never called often enough to capture
        with torch.inference_mode():
            found, expected = captured(z, warm, *keys), fresh(z, warm, *keys)
        for field in fields(Plan):
            torch.testing.assert_close(getattr(found, field.name), getattr(expected, field.name), rtol=1e-5, atol=1e-5)
        means.append(found.mean)
    assert first._refresh._graph is not None and captured._calls[1]._graph is not None
    assert all((one - other).abs().max() > 1e-3 for one, other in pairwise(means)), "new weights must matter"


@pytest.mark.gpu
@pytest.mark.compiler
@pytest.mark.filterwarnings("error:not captured")
@pytest.mark.parametrize("explore", [False, True])
def test_compiled_and_captured_plans_on_a_gpu_are_the_eager_ones(explore: bool) -> None:
    """Of a model that is being trained: its parameters want gradients, and its copy plans."""
    model = make_model().cuda().requires_grad_(True).train()
    z, warm = torch.rand(5, 16).cuda(), torch.zeros(5, 3, 2).cuda()
    eager, compiled = (
        BatchedPlanner(model, SMALL, batch_sizes=(1, 4), kernels=kernels, explore=explore, draws=device_draws)
        for kernels in (EAGER, compiled_kernels())
    )
    with torch.inference_mode():
        for number in range(EAGER_CALLS + 3):
            keys = torch.arange(5).cuda(), torch.full((5,), number).cuda()
            found, expected = compiled(z, warm, *keys), eager(z, warm, *keys)
            for field in fields(Plan):
                torch.testing.assert_close(getattr(found, field.name), getattr(expected, field.name), rtol=1e-4, atol=1e-4)
    assert compiled._calls[4]._graph is not None


@pytest.mark.compiler
@pytest.mark.parametrize("explore", [False, True])
def test_a_compiled_selection_is_the_eager_one(explore: bool) -> None:
    """As a GPU has it; on a CPU plans take the eager one."""
    torch.manual_seed(3)
    model, rows, kept = make_model(), 3, SMALL.num_elites
    scores = torch.rand(rows, kept)
    search = Search(
        mean=torch.rand(rows, 3, 2),
        std=torch.rand(rows, 3, 2),
        elites=torch.rand(rows, kept, 3, 2) * 2 - 1,
        scores=scores / scores.sum(1, keepdim=True),
        elite_values=torch.randn(rows, kept),
        values=torch.randn(rows, SMALL.num_samples),
    )
    given = torch.rand(rows, 16), search, torch.rand(rows, kept), torch.randn(rows, 2) if explore else None
    with torch.inference_mode():
        for ours, theirs in zip(compiled(select)(model, *given), select(model, *given), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("named", [False, True])
def test_the_compile_cache_lies_in_the_users_cache_folder_unless_named(tmp_path: Path, named: bool) -> None:
    env = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "SPECMPC_COMPILE": "1"}
    expected = tmp_path / ("elsewhere" if named else "specmpc/inductor")
    if named:
        env["TORCHINDUCTOR_CACHE_DIR"] = str(expected)
    code = """
import sys, torch
import specmpc_cli.workflows.benchmark, specmpc_cli.workflows.compare, specmpc_cli.workflows.training
from specmpc_cli.engine.compiled import kernels_for
from specmpc_cli.runtime import choose_runtime, use_compile_cache
kernels_for(choose_runtime("cpu", "fp32"))
imported = "torch._dynamo" in sys.modules
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])  # imports the compiler, which then has a folder
print(use_compile_cache(), imported)
"""
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(expected), "False"], "the import takes more than a second, and is for what is compiled"
