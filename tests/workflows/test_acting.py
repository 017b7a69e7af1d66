"""From options to an actor: the planner's numbers per task, gates, and what happens when compiling fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specmpc_cli.config.schema import Config, PlannerConfig, SpeculationConfig
from specmpc_cli.engine.checkpoint import CorrectorFacts
from specmpc_cli.engine.compiled import EAGER
from specmpc_cli.engine.correctors import CorrectorDims, build_corrector
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.planner import Kernels
from specmpc_cli.envs.registry import lookup
from specmpc_cli.errors import CheckpointError
from specmpc_cli.runtime import Runtime
from specmpc_cli.workflows import acting
from specmpc_cli.workflows.acting import Workbench, planner_settings
from specmpc_cli.workflows.store import FittedCorrector, Teacher
from specmpc_cli.workflows.ways import Mode, Way, promise_settings
from tests.conftest import make_model

CPU = Runtime(torch.device("cpu"), torch.float32, compiled=False, threads=1)
SMALL = Config(planner=PlannerConfig(iterations=2, num_samples=32, num_elites=8, num_pi_trajs=4))


def bench(runtime: Runtime = CPU, config: Config = SMALL) -> Workbench:
    teacher = Teacher(make_model(), "abc", "store", Path("teacher"), {})
    return Workbench(teacher, lookup("pointmass").spec, config, runtime)


def corrector(*, teacher: str = "abc", calibrated: bool = False) -> FittedCorrector:
    facts = CorrectorFacts(teacher, GateRule(15, 0.1, 0.4, 0.3, "l1"), promise_settings(SMALL) if calibrated else None)
    return FittedCorrector(build_corrector("two-tower", CorrectorDims(16, 2, 16, 4)).eval(), facts, "store", Path("corrector"))


def test_large_actions_get_two_more_iterations_and_the_discount_follows_the_episode() -> None:
    walker, humanoid, push = (planner_settings(PlannerConfig(), lookup(t).spec) for t in ("walker-walk", "humanoid-walk", "mw-push"))
    assert (walker.iterations, humanoid.iterations) == (6, 8)
    assert (walker.discount, push.discount) == (0.99, 0.95)


def test_a_teacher_of_another_task_is_refused() -> None:
    teacher = Teacher(make_model(7, 2), "abc", "store", Path("teacher"), {})
    with pytest.raises(CheckpointError, match="expects 7 observation dimensions, pointmass has 4"):
        Workbench(teacher, lookup("pointmass").spec, SMALL, CPU)


def test_a_corrector_of_another_teacher_never_acts() -> None:
    with pytest.raises(CheckpointError, match="distilled from another teacher"):
        bench().actor(Way(Mode.CORRECTED, 3, corrector(teacher="xyz")))


def test_when_compiling_fails_planning_goes_on_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no disk space for kernels\nand a long story")

    broken = Kernels(fail, fail)  # type: ignore[arg-type]
    monkeypatch.setattr(acting, "kernels_for", lambda runtime: broken if runtime.compiled else EAGER)
    workbench = bench(Runtime(torch.device("cpu"), torch.float32, compiled=True, threads=1))
    note = workbench.warm_up()
    assert note is not None and note.endswith("no disk space for kernels") and not workbench.runtime.compiled
    assert workbench.warm_up() is None  # once is enough
    actor = workbench.actor(Way(Mode.NAIVE, 3))
    state = actor.begin(actor.initial_state(1), torch.tensor([0]), torch.tensor([0]))
    action, *_ = actor.act(torch.zeros(1, 4), state, torch.ones(1, dtype=torch.bool))
    assert action.shape == (1, 2)


def test_what_is_wrong_with_an_eager_planner_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(acting, "kernels_for", lambda runtime: Kernels(fail, fail))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="a defect"):
        bench().warm_up()


def test_replans_are_refined_if_asked_for_but_never_in_the_baseline() -> None:
    speculation = SpeculationConfig(refine_iterations=1, refine_std=0.25, refine_below=0.7)
    workbench = bench(config=SMALL.model_copy(update={"speculation": speculation}))
    runner = workbench.runner(Way(Mode.NAIVE, 3))
    assert runner.refinement is not None and runner.refinement.below == 0.7
    settings = runner.refinement.planner.settings
    assert (settings.iterations, settings.first_std, settings.num_samples) == (1, 0.25, 32)
    assert (runner.planner.settings.iterations, runner.planner.settings.first_std) == (2, None)
    assert workbench.runner(Way(Mode.BASELINE, 1)).refinement is None and bench().runner(Way(Mode.NAIVE, 3)).refinement is None
