"""Device, dtype and thread choice, random streams, clocks. Knows nothing of models and environments."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from specmpc_cli.errors import ConfigError

EPISODES_PER_SEED = 10_000
SEEDS = 50_000

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}


class Purpose(StrEnum):
    """What an episode is run for. Purposes never share an environment seed."""

    TRAIN = "train"
    TRAIN_EVAL = "train-eval"
    COLLECT = "collect"
    CALIBRATE = "calibrate"
    TUNE = "tune"
    COMPARE = "compare"


def env_seed(purpose: Purpose, seed: int, episode: int) -> int:
    """Environment seed of an episode: base[purpose] + seed·10⁴ + episode, below 2³². Raises ConfigError outside the disjoint ranges.

    Only a long training runs more than 10⁴ episodes; it goes on into the numbers of the next seeds' trainings, not of other purposes.
    """
    if not 0 <= seed < SEEDS:
        raise ConfigError(f"--seed must lie in 0..{SEEDS - 1}, got {seed}")
    within = EPISODES_PER_SEED * (SEEDS - seed if purpose is Purpose.TRAIN else 1)
    if not 0 <= episode < within:
        raise ConfigError(f"at most {within} episodes run under one seed, got episode {episode}; use another --seed")
    base = list(Purpose).index(purpose) * SEEDS * EPISODES_PER_SEED
    return base + seed * EPISODES_PER_SEED + episode


def stream_key(purpose: Purpose, seed: int, episode: int) -> int:
    """The 63-bit name of an episode's planner and policy draws, the same on every machine."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{episode}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where and how tensors are computed; fixed for the life of a command."""

    device: torch.device
    dtype: torch.dtype  # of the matrix products of training, and of planning unless that is int8; everything else is fp32
    compiled: bool
    threads: int
    notes: tuple[str, ...] = ()  # what the user should know about these choices
    int8: bool = False  # whether a planner's products are of 8-bit integers

    @property
    def prepares(self) -> bool:
        """Whether the first plans compile kernels or capture graphs."""
        return self.compiled or self.device.type == "cuda"

    @property
    def planning_dtype(self) -> torch.dtype:
        """Of the matrix products that value a planner's candidates."""
        return torch.int8 if self.int8 else self.dtype

    @property
    def dtype_name(self) -> str:
        return DTYPE_NAMES[self.planning_dtype]

    @property
    def learning_dtype_name(self) -> str:
        """Of planning and, where that differs, of updates."""
        return f"int8, updates {DTYPE_NAMES[self.dtype]}" if self.int8 else self.dtype_name

    @property
    def facts(self) -> dict[str, Any]:
        """What reports say of it."""
        return {"device": str(self.device), "dtype": self.dtype_name, "threads": self.threads, "compiled": self.compiled}


def choose_runtime(device: str = "auto", dtype: str = "auto") -> Runtime:
    """Resolves `--device` and `--dtype`.

    `auto` takes CUDA where there is one, and bf16 where the hardware multiplies it (GPUs since Ampere; CPUs with AMX or
    AVX512-BF16), fp32 elsewhere: emulated bf16 is several times slower than fp32. `int8` is for planning on CPUs with AVX512-VNNI and
    never chosen by `auto`; all else is then computed as `auto` would. Compilation needs a C++ compiler, and can be switched off with
    SPECMPC_COMPILE=0.

    Raises:
        ConfigError: an unknown device or dtype, CUDA asked for where there is none, or int8 where nothing multiplies it.
    """
    notes = []
    chosen = _choose_device(device)
    fast_bf16 = multiplies_bf16(chosen)
    match dtype:
        case "auto" | "int8":
            resolved = torch.bfloat16 if fast_bf16 else torch.float32
        case "bf16":
            resolved = torch.bfloat16
            if not fast_bf16:
                what = "GPU" if chosen.type == "cuda" else "CPU"
                notes.append(f"this {what} has no bf16 instructions: --dtype bf16 is emulated here and slower than fp32")
        case "fp32":
            resolved = torch.float32
        case _:
            raise ConfigError(f"--dtype must be auto, bf16, fp32 or int8, got {dtype!r}")
    compiled = os.environ.get("SPECMPC_COMPILE", "1") != "0"
    use_compile_cache()
    if dtype == "int8" and (reason := _no_int8(chosen, compiled)):
        raise ConfigError(f"--dtype int8 plans on a CPU with AVX512-VNNI, with compiled code: {reason}")
    if compiled and chosen.type == "cpu" and (missing := _missing_for_compilation()):
        compiled = False
        remedy = " (on Debian: apt-get install g++)" if sys.platform == "linux" else ""
        notes.append(f"{missing}: planning runs eagerly, at a third to half of the speed{remedy}")
    if chosen.type == "cpu":
        _keep_freed_memory()
    return Runtime(chosen, resolved, compiled, torch.get_num_threads(), tuple(notes), dtype == "int8")


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}") from None
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cpu" and chosen.index is not None):
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if chosen.index is not None:
        torch.cuda.set_device(chosen)  # graphs are captured on the current device
    return chosen


def multiplies_bf16(device: torch.device) -> bool:
    """Whether this device has instructions for products of bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def multiplies_int8() -> bool:
    """Whether this CPU has the instructions for products of 8-bit integers that our kernels use."""
    return torch.cpu._is_vnni_supported()


def _no_int8(device: torch.device, compiled: bool) -> str | None:
    """Why there is no planning in 8 bits; None where there is."""
    if device.type != "cpu":
        return f"this would run on {device}; add --device cpu"
    if not multiplies_int8():
        return "this one does not have it; use --dtype auto"
    if not compiled:
        return "SPECMPC_COMPILE=0 switches that off; use --dtype auto"
    return f"{missing}; use --dtype auto" if (missing := _missing_for_compilation()) else None


def _missing_for_compilation() -> str | None:
    """What our kernels need, or Inductor's C++ backend where there are none, and this machine lacks; None if nothing is missing."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler found"
    if sys.platform != "linux" and not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python headers found"
    return None


def _keep_freed_memory() -> None:
    """Tells glibc to reuse large freed blocks instead of returning them to the kernel.

    A plan allocates and frees hundreds of 0.8 MB activations; by default each is a fresh mapping whose every page faults,
    which took a quarter of an eager plan's time where this was measured.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, 512 << 20)


def use_compile_cache() -> Path:
    """Keeps compiled kernels in the user's cache folder, so that a second start compiles nothing; → that folder.

    Before torch's compiler is imported, which any of its optimisers does: it would choose a folder of its own.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(root / "specmpc" / "inductor")))


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Times stretches of work; synchronises the device before each reading of the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = 0.0

    def start(self) -> None:
        synchronise(self._device)
        self._started = time.perf_counter()

    def stop_ms(self) -> float:
        """Milliseconds since `start`."""
        synchronise(self._device)
        return (time.perf_counter() - self._started) * 1e3
