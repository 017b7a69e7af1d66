"""LayerNorm and Mish, what lies between the matrix products of every TD-MPC2 network.

Code that is compiled for a CPU calls one kernel of our own instead (norm_mish.cpp), in which all of it is one pass, forwards and backwards.
It is built when the first graph that uses it is traced, and kept beside the compiler's own cache. Where it cannot be built, and in eager
code, the formulas below are computed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specmpc_cli.runtime import use_compile_cache

_SOURCE = Path(__file__).with_suffix(".cpp")
_WORTH_A_CALL = 1 << 15  # elements; below, what the compiler fuses by itself is as fast
_BUILD_SECONDS = 300


def mish(x: Tensor) -> Tensor:
    """x · tanh(softplus(x)), written with one exponential: x·n/(n+2) with n = eˣ(eˣ+2).

    The exponent is capped at 20, where the quotient is 1 in fp32, so that n cannot overflow.
    """
    e = torch.exp(x.clamp(max=20.0))
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


def norm_mish(x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """mish(LayerNorm(x + shift)), computed in fp32, in the dtype of x.

    Args:
        x: [..., D], fp32 or bf16; [G, N, D] if each of G groups has its own vectors.
        shift, weight, bias: [D] or [G, D], fp32; weight and bias are LayerNorm's. The shift is a product's bias, which is cheaper here.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() >= _WORTH_A_CALL and native_built():
        return torch.ops.specmpc.norm_mish(x, torch.zeros_like(weight) if shift is None else shift.float(), weight, bias)
    shifted = x.float() if shift is None else x.float() + over_rows(shift)
    if weight.dim() == 1:
        normed = F.layer_norm(shifted, weight.shape, weight, bias)
    else:
        normed = F.layer_norm(shifted, x.shape[-1:]) * over_rows(weight) + over_rows(bias)
    return mish(normed).to(x.dtype)


def over_rows(vectors: Tensor) -> Tensor:
    """One vector for all rows [D], or one per group of rows [..., D], as what rows [..., N, D] can be added to."""
    return vectors if vectors.dim() == 1 else vectors.unsqueeze(-2)


@torch.compiler.assume_constant_result
def native_built() -> bool:
    """Whether our kernel is at hand; builds it at the first call."""
    return _load() is None


def kernel_problem() -> str | None:
    """In one line, what kept compiled code from our kernel; None where it has it, or never asked for it."""
    if not _load.cache_info().currsize or (problem := _load()) is None:
        return None
    return f"a kernel of the planner and of training could not be built, so they are somewhat slower: {problem}"


@cache
def _load() -> str | None:
    """Makes torch.ops.specmpc known; why not, if that fails."""
    try:
        library = _build()
        try:
            torch.ops.load_library(library)
        except OSError:  # damaged, or built where other system libraries are
            library.unlink()
            torch.ops.load_library(_build())
    except (OSError, subprocess.SubprocessError) as error:
        return _reason(error)
    torch.library.register_fake("specmpc::norm_mish", lambda x, *vectors: _like(x))
    torch.library.register_fake("specmpc::norm_mish_backward", lambda grad, *inputs: tuple(map(_like, inputs)))
    torch.library.register_autograd("specmpc::norm_mish", _backward, setup_context=_remember)
    return None


def _reason(error: Exception) -> str:
    """The compiler's first complaint, or what the system says."""
    lines = [line.strip() for line in (getattr(error, "stderr", None) or "").splitlines()]
    complaint = next((line for line in lines if "error" in line), None)
    return complaint or str(error.__cause__ or error).strip().splitlines()[0]


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.specmpc.norm_mish_backward(grad, *ctx.saved_tensors)


def _build() -> Path:
    """The library's path. Raises OSError or SubprocessError where no compiler makes it."""
    if sys.platform != "linux":
        raise OSError("the kernel is built on Linux only")
    compiler = os.environ.get("CXX", "g++")
    described = _run(compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)  # the compiler's version, and what the CPU has
    flags = ["-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fopenmp"]
    if "__AVX512F__" in described:
        flags.append("-mprefer-vector-width=512")
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    source = _SOURCE.read_text(encoding="utf-8")
    key = hashlib.sha256("\0".join([source, described, *flags, torch.__version__, *platform.libc_ver()]).encode()).hexdigest()[:16]
    library = use_compile_cache() / f"norm_mish-{key}.so"
    if not library.exists():
        root = Path(torch.__file__).parent
        include, lib = root / "include", root / "lib"
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder, library.name)
            paths = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{lib}"]
            _run(compiler, *flags, "-fPIC", "-shared", *paths, str(_SOURCE), "-o", str(made), "-ltorch_cpu", "-lc10")
            made.replace(library)  # whole or not at all, whoever else builds it
    return library


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=_BUILD_SECONDS).stdout
