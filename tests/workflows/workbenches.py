"""A workbench and correctors for tests: a tiny pointmass teacher and a planner of milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch

from specmpc_cli.config.schema import Config, PlannerConfig
from specmpc_cli.engine.checkpoint import CorrectorFacts
from specmpc_cli.engine.correctors import CorrectorDims, build_corrector
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.envs.registry import lookup
from specmpc_cli.runtime import Runtime
from specmpc_cli.workflows.acting import Workbench
from specmpc_cli.workflows.store import FittedCorrector, Teacher
from tests.conftest import make_model

CPU = Runtime(torch.device("cpu"), torch.float32, compiled=False, threads=1)
SMALL = Config(planner=PlannerConfig(iterations=2, num_samples=32, num_elites=8, num_pi_trajs=4))


def bench(runtime: Runtime = CPU, config: Config = SMALL) -> Workbench:
    teacher = Teacher(make_model(), "abc", "store", Path("teacher"), {})
    return Workbench(teacher, lookup("pointmass").spec, config, runtime)


def corrector(arch: str = "two-tower", *, teacher: str = "abc", calibrated: bool = False) -> FittedCorrector:
    facts = CorrectorFacts(teacher, GateRule(15, 0.1, 0.4, 0.3, "l1"), SMALL.acting_settings() if calibrated else None)
    return FittedCorrector(build_corrector(arch, CorrectorDims(16, 2, 16, 4)).eval(), facts, "store", Path("corrector"))
