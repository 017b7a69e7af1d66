"""Kernels of our own are built once, and where they cannot be built the reason is told."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from specmpc_cli.engine import native


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
    """An empty cache, and the state before the first call."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(native, "_load", cache(native._load.__wrapped__))
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
