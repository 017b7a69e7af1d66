"""Fixtures shared by all tests: everything runs on the CPU, eagerly and seeded, unless a test says otherwise."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("SPECMPC_COMPILE", "0")  # compiling takes a minute; tests/engine/test_compiled.py switches it on
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they, and the processes they start, share the cores
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(workers))))

import torch

from specmpc_cli.engine.official import official_state
from specmpc_cli.engine.world_model import WorldModel, WorldModelDims

DATA = Path(__file__).parent / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    no_compiler = pytest.mark.skip(reason="needs a C++ compiler (g++ or clang++)")
    slow = pytest.mark.skip(reason="takes minutes; run with --slow")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if "compiler" in item.keywords and not (shutil.which("g++") or shutil.which("clang++")):
            item.add_marker(no_compiler)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(slow)


def make_model(obs_dim: int = 4, action_dim: int = 2, *, seed: int = 0, num_q: int = 2, episodic: bool = False) -> WorldModel:
    """A tiny world model whose reward and value heads are not zero, as if it had been trained."""
    torch.manual_seed(seed)
    model = WorldModel(WorldModelDims(obs_dim, action_dim, 16, 24, 24, 2, num_q, episodic=episodic))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official checkpoint for pointmass."""
    path = tmp_path_factory.mktemp("checkpoint") / "pointmass.pt"
    torch.save({"model": official_state(make_model())}, path)
    return path
