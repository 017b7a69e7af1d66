"""From options to an actor: the planner's numbers per task, gates, and what happens when compiling fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from specmpc_cli.api import Controller
from specmpc_cli.config.schema import PlannerConfig, RefineConfig
from specmpc_cli.engine import native
from specmpc_cli.engine.compiled import EAGER
from specmpc_cli.engine.planner import Kernels
from specmpc_cli.engine.world_model import WorldModel
from specmpc_cli.envs.registry import lookup
from specmpc_cli.envs.vector import VectorEnv
from specmpc_cli.errors import CheckpointError, ConfigError
from specmpc_cli.runtime import Purpose, Runtime
from specmpc_cli.workflows import acting
from specmpc_cli.workflows.acting import Workbench, planner_settings
from specmpc_cli.workflows.evaluate import episodes_of
from specmpc_cli.workflows.rollout import rollout
from specmpc_cli.workflows.store import Teacher
from specmpc_cli.workflows.ways import Mode, Way
from tests.conftest import make_model
from tests.workflows.workbenches import CPU, SMALL, bench, corrector


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
    note = workbench.warm_up([], rows=1)
    assert note is not None and note.endswith("no disk space for kernels") and not workbench.runtime.compiled
    assert workbench.warm_up([], rows=1) is None  # once is enough
    actor = workbench.actor(Way(Mode.NAIVE, 3))
    state = actor.begin(actor.initial_state(1), torch.tensor([0]), torch.tensor([0]))
    action, *_ = actor.act(torch.zeros(1, 4), state, torch.ones(1, dtype=torch.bool))
    assert action.shape == (1, 2)


@pytest.mark.compiler
def test_on_a_cpu_with_kernels_torch_compiles_nothing() -> None:
    """Its compiler would take seconds at every start, were it only to load what it keeps."""
    before = dict(torch._dynamo.utils.counters["stats"])  # of this process, whatever else it has compiled
    workbench = bench(Runtime(torch.device("cpu"), torch.float32, compiled=True, threads=1))
    way = Way(Mode.CORRECTED, 3, corrector())
    assert workbench.warm_up([way], rows=2) is None
    controller = Controller(workbench, way)
    for _ in range(5):
        controller.act(np.ones(4))
    rollout(workbench.actor(way), VectorEnv.make("pointmass", 2), episodes_of(Purpose.COMPARE, 0, 2), device=CPU.device, max_steps=5)
    assert torch._dynamo.utils.counters["stats"] == before


ACTING = {
    "policy": Way(Mode.POLICY),
    "distilled": Way(Mode.DISTILLED, None, corrector("distilled")),
    "naive": Way(Mode.NAIVE, 3),
    "two-tower": Way(Mode.CORRECTED, 3, corrector("two-tower")),
    "temporal": Way(Mode.CORRECTED, 3, corrector("temporal")),
}


@pytest.mark.compiler
@pytest.mark.parametrize("name", ACTING)
def test_every_way_acts_by_kernels_as_it_does_by_torchs_functions(name: str) -> None:
    """From the first step on, warmed up or not: what is packed is packed before anything is asked of it."""
    way, acted = ACTING[name], []
    if way.corrector is not None:
        torch.nn.init.normal_(way.corrector.network.head.weight, std=0.1)
    kernels = Runtime(torch.device("cpu"), torch.float32, compiled=True, threads=1)
    for runtime, prepared in ((CPU, False), (kernels, False), (kernels, True)):
        workbench = bench(runtime)
        if prepared:
            workbench.warm_up([way, Way(Mode.BASELINE, 1)], rows=1)
        actions: list[np.ndarray] = []
        episode = episodes_of(Purpose.COMPARE, 0, 1)
        envs = VectorEnv.make("pointmass", 1)
        rollout(workbench.actor(way), envs, episode, device=CPU.device, max_steps=7, on_step=lambda step, a=actions: a.append(step.action))
        acted.append(np.stack(actions))
        network = getattr(workbench.actor(way), "corrector", None) or getattr(workbench.actor(way), "network", None)
        if network is not None:
            assert any(isinstance(part, torch.nn.Linear) for part in network.modules()) == (runtime is CPU)
    by_torch, by_kernels, by_prepared = acted
    np.testing.assert_allclose(by_kernels, by_torch, rtol=0, atol=1e-4)
    assert np.array_equal(by_kernels, by_prepared)


def test_ways_that_never_plan_need_no_plan_and_on_a_gpu_no_preparation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a plan was made")

    monkeypatch.setattr(acting, "kernels_for", lambda runtime: Kernels(fail, fail))  # type: ignore[arg-type]
    workbench, policy, naive = bench(), Way(Mode.POLICY, 1), Way(Mode.NAIVE, 3)
    for device, asked in (("cpu", [True, True, True]), ("cuda", [False, True, True])):
        workbench.runtime = Runtime(torch.device(device), torch.float32, compiled=True, threads=1)
        assert [workbench.prepares(ways) for ways in ([policy], [policy, naive], [])] == asked
    workbench.runtime = CPU
    assert workbench.warm_up([policy], rows=1) is None and not workbench.warm
    with pytest.raises(AssertionError, match="a plan was made"):
        workbench.warm_up([policy, naive], rows=1)


def test_what_is_wrong_with_an_eager_planner_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(acting, "kernels_for", lambda runtime: Kernels(fail, fail))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="a defect"):
        bench().warm_up([], rows=1)


def test_full_memory_is_not_taken_for_a_compiler_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(acting, "kernels_for", lambda runtime: Kernels(fail, fail))  # type: ignore[arg-type]
    workbench = bench(Runtime(torch.device("cpu"), torch.float32, compiled=True, threads=1))
    with pytest.raises(ConfigError, match="the memory of cpu is too small.*or --device cpu"):
        workbench.warm_up([], rows=1)
    assert workbench.runtime.compiled


def test_a_planner_asked_for_in_int8_never_becomes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    runtime = Runtime(torch.device("cpu"), torch.float32, compiled=True, threads=1, int8=True)
    monkeypatch.setattr(native, "multiplies", lambda dtype: dtype is not torch.int8)
    with pytest.raises(ConfigError, match="--dtype int8 has no products here: "):
        bench(runtime).warm_up([], rows=1)
    monkeypatch.setattr(native, "multiplies", lambda dtype: True)
    monkeypatch.setattr(acting, "kernels_for", lambda runtime: Kernels(fail, fail, packed=True))  # type: ignore[arg-type]
    monkeypatch.setattr(WorldModel, "pack", lambda self, int8: None)
    with pytest.raises(ConfigError, match="--dtype int8 could not be prepared here; use --dtype auto: no space left on device"):
        bench(runtime).warm_up([], rows=1)


def test_replans_are_refined_if_asked_for_but_never_with_one_step_per_plan() -> None:
    refine = RefineConfig(iterations=1, std=0.25, below=0.7)
    workbench = bench(config=SMALL.model_copy(update={"refine": refine}))
    runner = workbench.runner(Way(Mode.NAIVE, 3))
    assert runner.refinement is not None and runner.refinement.below == 0.7
    settings = runner.refinement.planner.settings
    assert (settings.iterations, settings.first_std, settings.num_samples) == (1, 0.25, 32)
    assert (runner.planner.settings.iterations, runner.planner.settings.first_std) == (2, None)
    assert runner.refinement is workbench.runner(Way(Mode.CORRECTED, 3, corrector())).refinement  # one planner for all
    assert workbench.runner(Way(Mode.BASELINE, 1)).refinement is None and workbench.runner(Way(Mode.NAIVE, 1)).refinement is None
    assert bench().runner(Way(Mode.NAIVE, 3)).refinement is None
