"""Kernels of our own for a CPU, in C++: the planner's functions in one call each (search.h), MLPs as what acts asks them (fused_mlp.h), and
what learns (learnt_mlp.h, losses.h, adam.h).

They are built at their first use, in some 25 seconds of CPU time, for the machine that they run on, and kept beside the compiler's own
cache. Where that cannot be done, the formulas that they stand for are computed instead (layers.py, correctors.py, losses.py).
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

import torch

from specmpc_cli.errors import ConfigError
from specmpc_cli.runtime import Runtime, use_compile_cache

_SOURCES = Path(__file__).parent
_BUILD_SECONDS = 300

# What an MLP's last layer ends in; a number above 0 means SimNorm in groups of so many. A norm comes before Mish and SimNorm (row_ends.h).
PLAIN, MISH = 0, -1


def built() -> bool:
    """Whether our kernels are at hand; builds them at the first call."""
    return _load() is None


def problem() -> str | None:
    """In one line, what keeps us from our kernels; None where they are, or were never asked for."""
    if not _load.cache_info().currsize or (reason := _load()) is None:
        return None
    return f"the kernels of the planner and of training could not be built, so they are somewhat slower: {reason}"


def multiplies(dtype: torch.dtype) -> bool:
    """Whether our products of this dtype are fast: fp32 wherever they are built, bf16 with AMX or AVX512-BF16, int8 with AVX512-VNNI."""
    if not built():
        return False
    match dtype:
        case torch.bfloat16:
            return torch.ops.specmpc.multiplies_bf16()
        case torch.int8:
            return torch.ops.specmpc.multiplies_int8()
        case _:
            return dtype is torch.float32


def serves(runtime: Runtime, dtype: torch.dtype) -> bool:
    """Whether this runtime computes with our kernels where products are of this dtype."""
    return runtime.compiled and runtime.device.type == "cpu" and multiplies(dtype)


def require_int8() -> None:
    """Raises ConfigError where there are no products of 8-bit integers."""
    if not multiplies(torch.int8):
        raise ConfigError(f"--dtype int8 has no products here: {_load() or 'this CPU has no AVX512-VNNI'}; use --dtype auto")


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
    return None


def _reason(error: Exception) -> str:
    """The compiler's first complaint, or what the system says."""
    lines = [line.strip() for line in (getattr(error, "stderr", None) or "").splitlines()]
    complaint = next((line for line in lines if "error" in line), None)
    return complaint or str(error.__cause__ or error).strip().splitlines()[0]


def _build() -> Path:
    """The library's path. Raises OSError or SubprocessError where no compiler makes it."""
    if sys.platform != "linux":
        raise OSError("the kernels are built on Linux only")
    compiler = os.environ.get("CXX", "g++")
    described = _run(compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)  # the compiler's version, and what the CPU has
    flags = ["-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fopenmp"]
    if "__AVX512F__" in described:
        flags.append("-mprefer-vector-width=512")
    if "__x86_64__" in described and "__clang__" not in described:
        flags.append("--param=avoid-fma-max-bits=0")  # or a row that is alone in its tile would round otherwise than the others
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    sources = [path.read_text(encoding="utf-8") for path in sorted(_SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
    key = hashlib.sha256("\0".join([*sources, described, *flags, torch.__version__, *platform.libc_ver()]).encode()).hexdigest()[:16]
    library = use_compile_cache() / f"specmpc-{key}.so"
    if not library.exists():
        root = Path(torch.__file__).parent
        include, lib = root / "include", root / "lib"
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder, library.name)
            paths = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{lib}"]
            hidden = ["-fPIC", "-shared", "-fvisibility=hidden"]
            _run(compiler, *flags, *hidden, *paths, str(_SOURCES / "ops.cpp"), "-o", str(made), "-ltorch_cpu", "-lc10")
            made.replace(library)  # whole or not at all, whoever else builds it
    return library


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=_BUILD_SECONDS).stdout
