"""From a way of acting (ways.py) to an actor: planners, runners, and their compilation. Knows no environments' insides and runs nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch

from specmpc_cli.config.schema import Config, PlannerConfig
from specmpc_cli.engine import native
from specmpc_cli.engine.actors import DistilledActor, PolicyActor
from specmpc_cli.engine.batched_planner import BatchedPlanner
from specmpc_cli.engine.captured import EAGER_CALLS
from specmpc_cli.engine.compiled import batch_sizes_for, draws_for, judge_for, kernels_for
from specmpc_cli.engine.correctors import BaseCorrector, DistilledPolicy, packed
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.planner import PlannerSettings
from specmpc_cli.engine.runner import Planner, Refinement, SpeculativeRunner
from specmpc_cli.engine.world_model import WorldModel
from specmpc_cli.errors import CheckpointError, ConfigError
from specmpc_cli.runtime import Runtime
from specmpc_cli.types import Actor, EnvSpec
from specmpc_cli.workflows.store import Teacher
from specmpc_cli.workflows.ways import Mode, Way

LARGE_ACTION_DIM = 20  # from here on TD-MPC2 adds iterations
COMPILER_ERRORS = (RuntimeError, OSError)  # what a compiler that does not work raises
DEFAULT_HISTORY = 8


def planner_settings(config: PlannerConfig, spec: EnvSpec) -> PlannerSettings:
    """The planner's numbers for one task: TD-MPC2 adds iterations where actions are large."""
    extra = config.large_action_iterations if spec.action_dim >= LARGE_ACTION_DIM else 0
    values = config.model_dump(exclude={"large_action_iterations"})
    return PlannerSettings(discount=spec.discount, **{**values, "iterations": config.iterations + extra})


def make_planner(model: WorldModel, config: PlannerConfig, spec: EnvSpec, runtime: Runtime, *, explore: bool = False) -> BatchedPlanner:
    """A planner for this model, compiled as the runtime says; `explore` adds training noise."""
    return BatchedPlanner(
        model,
        planner_settings(config, spec),
        dtype=runtime.planning_dtype,
        kernels=kernels_for(runtime),
        batch_sizes=batch_sizes_for(runtime),
        explore=explore,
        draws=draws_for(runtime),
    )


class Workbench:
    """A teacher on a device, ready to act in any way. Its planner is built, and compiled, once."""

    def __init__(self, teacher: Teacher, spec: EnvSpec, config: Config, runtime: Runtime) -> None:
        """Raises CheckpointError if the teacher's dimensions are not the task's."""
        dims = teacher.model.dims
        for what, have, want in (("observation", dims.obs_dim, spec.obs_dim), ("action", dims.action_dim, spec.action_dim)):
            if have != want:
                raise CheckpointError(
                    f"the teacher in {teacher.path} expects {have} {what} dimensions, {spec.task} has {want}; import the right one"
                )
        self.teacher, self.spec, self.config, self.runtime = teacher, spec, config, runtime
        self.warm = False  # whether what plans has planned once, and so is compiled
        self.model = teacher.model.to(runtime.device)
        self._make_planners()

    @property
    def acts_with(self) -> dict[str, Any]:
        """What decides how it acts: settings and precision."""
        return self.config.acting_settings() | {"dtype": self.runtime.dtype_name}

    def planner_for(self, config: PlannerConfig) -> BatchedPlanner:
        """A planner of this teacher with these settings."""
        return make_planner(self.model, config, self.spec, self.runtime)

    def _make_planners(self) -> None:
        refine = self.config.refine
        self._judge = judge_for(self.runtime.device)
        self.planner = self.planner_for(self.config.planner)
        self.refinement = Refinement(self.planner.refining(refine.iterations, refine.std), refine.below) if refine.iterations else None

    def gate(self, way: Way) -> GateRule | None:
        """The gate of a way; modes that never plan have none."""
        return None if not way.mode.plans else way.gate_rule(self.config.speculation.metric)

    def actor(self, way: Way) -> Actor[Any]:
        """An actor for this way. Raises CheckpointError for a corrector of another teacher."""
        match way.mode:
            case Mode.POLICY:
                return PolicyActor(self.model, behaviour=self.planner.networks)
            case Mode.DISTILLED:
                network = self._network(way)
                assert isinstance(network, DistilledPolicy), way
                return DistilledActor(self.model, network, behaviour=self.planner.networks)
            case _:
                return self.runner(way)

    def _network(self, way: Way) -> BaseCorrector | None:
        """The way's corrector, on the device and for it. Raises CheckpointError for one of another teacher."""
        corrector = way.corrector
        if corrector is None:
            return None
        if corrector.facts.teacher_sha256 != self.teacher.sha256:
            raise CheckpointError(f"the corrector in {corrector.path} was distilled from another teacher; fit one for this teacher")
        network = corrector.network.to(self.runtime.device)
        return packed(network) if native.serves(self.runtime, torch.float32) else network

    def runner(self, way: Way) -> SpeculativeRunner:
        """The speculative runner of a way that plans."""
        network, rule = self._network(way), way.gate_rule(self.config.speculation.metric)
        return SpeculativeRunner(
            self.model,
            self.planner,
            rule,
            network,
            course=way.corrector.facts.course if way.corrector else self.config.speculation.course,
            history=network.dims.history if network else DEFAULT_HISTORY,
            judge=self._judge,
            refinement=self.refinement if rule.horizon > 1 else None,  # with one step per plan it is plain replanning
            behaviour=self.planner.networks,
        )

    def prepares(self, ways: Collection[Way]) -> bool:
        """Whether there is something to build, compile or capture before these act: for ways that never plan, on a CPU alone."""
        return self.runtime.prepares and not self.warm and (self.runtime.device.type != "cuda" or _plan(ways))

    def warm_up(self, ways: Collection[Way], rows: int) -> str | None:
        """Makes one plan per batch size that up to `rows` rows meet and, on a GPU, steps with each kind of corrector in `ways`.

        That builds, compiles or captures what will be. For ways that never plan it prepares their networks, without any the planner alone.

        Returns:
            What went wrong, if compiling failed on this machine: acting is eager from then on, or lacks a kernel.

        Raises:
            ConfigError: the device's memory is too small.
        """
        self.warm |= _plan(ways)
        try:
            self.planner.networks.ready()
            sizes = self.planner.sizes_for(rows) if _plan(ways) else []
            plan_once(self.planner, self.model, sizes)
            if self.refinement is not None:
                plan_once(self.refinement.planner, self.model, sizes)
            archs = {way.corrector.arch if way.corrector else None: way for way in ways if way.mode.plans}
            for way in archs.values() if self.runtime.device.type == "cuda" else []:
                step_once(self.runner(way))
        except COMPILER_ERRORS as error:
            reason = compilers_fault(error, self.runtime)
            self.runtime = replace(self.runtime, compiled=False)
            self._make_planners()
            return f"the planner could not be compiled and runs eagerly, at a third to half of the speed: {reason}"
        return native.problem()


def _plan(ways: Collection[Way]) -> bool:
    return not ways or any(way.mode.plans for way in ways)


def compilers_fault(error: Exception, runtime: Runtime) -> str:
    """In one line, why first calls failed that were to be compiled. Raises the error itself if the compiler cannot be the reason."""
    if isinstance(error, torch.OutOfMemoryError):
        raise ConfigError(
            f"the memory of {runtime.device} is too small for this model and batch; take a smaller one, or --device cpu"
        ) from error
    if not runtime.compiled:
        raise error
    if runtime.int8:
        raise ConfigError(f"--dtype int8 could not be prepared here; use --dtype auto: {_first_line(error)}") from error
    return "; ".join(filter(None, [_first_line(error), native.problem()]))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


@torch.inference_mode()
def plan_once(planner: Planner, model: WorldModel, batch_sizes: Iterable[int]) -> None:
    """Makes one plan of each size, which compiles what will be compiled; on CUDA as many as it takes to capture a graph."""
    d, device = model.dims, next(model.parameters()).device
    for rows in batch_sizes:
        z = model.encode(torch.zeros(rows, d.obs_dim, device=device))
        warm_start = torch.zeros(rows, planner.settings.horizon, d.action_dim, device=device)
        index = torch.zeros(rows, dtype=torch.int64, device=device)
        for _ in range(EAGER_CALLS + 1 if device.type == "cuda" else 1):
            planner(z, warm_start, index, index)


@torch.inference_mode()
def step_once(runner: SpeculativeRunner) -> None:
    """Plans and then acts on that plan, for one row, which captures what will be."""
    obs = torch.zeros(1, runner.model.dims.obs_dim, device=next(runner.model.parameters()).device)
    first = torch.ones(1, dtype=torch.bool, device=obs.device)
    _, state, _ = runner.act(obs, runner.initial_state(1), first)
    for _ in range(EAGER_CALLS):
        runner.act(obs, state, ~first)
