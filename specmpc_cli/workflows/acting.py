"""Ways of acting: from a mode, a horizon and a corrector to an actor. Knows no environments' insides and runs nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from pydantic import ValidationError
from torch._dynamo.exc import TorchDynamoException

from specmpc_cli.config.schema import Config, PlannerConfig
from specmpc_cli.engine.actors import DistilledActor, PolicyActor
from specmpc_cli.engine.batched_planner import BatchedPlanner
from specmpc_cli.engine.captured import EAGER_CALLS
from specmpc_cli.engine.compiled import batch_sizes_for, draws_for, judge_for, kernels_for
from specmpc_cli.engine.correctors import CORRECTORS, BaseCorrector, DistilledPolicy
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.planner import PlannerSettings
from specmpc_cli.engine.runner import Refinement, SpeculativeRunner
from specmpc_cli.engine.world_model import WorldModel
from specmpc_cli.errors import CheckpointError, ConfigError
from specmpc_cli.runtime import Runtime
from specmpc_cli.types import Actor, EnvSpec
from specmpc_cli.workflows.store import FittedCorrector, Store, Teacher

LARGE_ACTION_DIM = 20  # from here on TD-MPC2 adds iterations
COMPILER_ERRORS = (TorchDynamoException, RuntimeError, OSError)  # what a compiler that does not work raises
DEFAULT_HISTORY = 8
DEFAULT_HORIZON = 6  # env steps per plan where none is named


class Mode(StrEnum):
    """How `eval` and `compare` can act."""

    BASELINE = "baseline"  # replan every step
    POLICY = "policy"  # the policy prior alone
    NAIVE = "naive"  # k steps of each plan, no gate, no corrector
    CORRECTED = "corrected"  # k steps of each plan, gate and corrector
    ADAPTIVE = "adaptive"  # the gate decides
    DISTILLED = "distilled"  # a network distilled from the planner alone

    @property
    def plans(self) -> bool:
        """Whether it ever calls the planner."""
        return self not in (Mode.POLICY, Mode.DISTILLED)


@dataclass(frozen=True, slots=True)
class Way:
    """One way of acting: a row of a comparison."""

    mode: Mode
    horizon: int | None = None  # None for modes that never plan
    corrector: FittedCorrector | None = None
    rule: GateRule | None = None  # replaces the rule that mode, horizon and corrector imply

    @property
    def label(self) -> str:
        """As tables and plots name it: `corrected 6 (two-tower)`."""
        parts = [self.mode.value]
        if self.mode in (Mode.NAIVE, Mode.CORRECTED):
            parts.append(str(self.horizon))
        if self.corrector is not None and self.mode is not Mode.DISTILLED:
            parts.append(f"({self.corrector.arch})")
        return " ".join(parts)

    def gate_rule(self, metric: str) -> GateRule:
        """The gate of this way; `metric` where no corrector brings its own. Meaningless without plans."""
        if self.rule is not None:
            return self.rule
        assert self.horizon is not None
        if self.corrector is not None:
            return self.corrector.rule(self.horizon)
        return GateRule(self.horizon, accept_below=math.inf, metric=metric)


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
        dtype=runtime.dtype,
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
        self.warm = False  # whether everything that is to act has acted once, and so is compiled
        self.model = teacher.model.to(runtime.device)
        self.planner = self.planner_for(config.planner)

    def planner_for(self, config: PlannerConfig) -> BatchedPlanner:
        """A planner of this teacher with these settings."""
        return make_planner(self.model, config, self.spec, self.runtime)

    def refinement(self) -> Refinement | None:
        """Cheaper replans, if the settings ask for them."""
        speculation = self.config.speculation
        if not speculation.refine_iterations:
            return None
        planner = self.planner.with_settings(iterations=speculation.refine_iterations, first_std=speculation.refine_std)
        return Refinement(planner, math.inf if speculation.refine_below is None else speculation.refine_below)

    def gate(self, way: Way) -> GateRule | None:
        """The gate of a way; modes that never plan have none."""
        return None if not way.mode.plans else way.gate_rule(self.config.speculation.metric)

    def actor(self, way: Way) -> Actor[Any]:
        """An actor for this way. Raises CheckpointError for a corrector of another teacher."""
        match way.mode:
            case Mode.POLICY:
                return PolicyActor(self.model)
            case Mode.DISTILLED:
                network = self._network(way)
                assert isinstance(network, DistilledPolicy), way
                return DistilledActor(self.model, network)
            case _:
                return self.runner(way)

    def _network(self, way: Way) -> BaseCorrector | None:
        """The way's corrector, on the device. Raises CheckpointError for one of another teacher."""
        corrector = way.corrector
        if corrector is None:
            return None
        if corrector.facts.teacher_sha256 != self.teacher.sha256:
            raise CheckpointError(f"the corrector in {corrector.path} was distilled from another teacher; fit one for this teacher")
        return corrector.network.to(self.runtime.device)

    def runner(self, way: Way) -> SpeculativeRunner:
        """The speculative runner of a way that plans."""
        network = self._network(way)
        return SpeculativeRunner(
            self.model,
            self.planner,
            way.gate_rule(self.config.speculation.metric),
            network,
            tail=self.config.speculation.tail,
            history=network.dims.history if network else DEFAULT_HISTORY,
            judge=judge_for(self.runtime),
            refinement=None if way.mode is Mode.BASELINE else self.refinement(),
        )

    def warm_up(self, ways: Iterable[Way] = ()) -> str | None:
        """Makes one plan per batch size and one step of each corrector in `ways`, which compiles what will be compiled.

        Returns:
            What went wrong, if compiling failed on this machine; acting is eager from then on.
        """
        self.warm = True
        try:
            plan_once(self.planner, self.model, self.runtime)
            correctors = {way.corrector.arch: way for way in ways if way.corrector is not None and way.mode.plans}
            for way in correctors.values():
                step_once(self.runner(way))
        except COMPILER_ERRORS as error:
            if not self.runtime.compiled:
                raise
            self.runtime = replace(self.runtime, compiled=False)
            self.planner = self.planner_for(self.config.planner)
            return f"the planner could not be compiled and runs eagerly, about half as fast: {str(error).strip().splitlines()[0]}"
        return None


@torch.inference_mode()
def plan_once(planner: BatchedPlanner, model: WorldModel, runtime: Runtime) -> None:
    """Makes one plan per batch size, which compiles what will be compiled; on CUDA as many as it takes to capture a graph."""
    d, device = model.dims, runtime.device
    for rows in batch_sizes_for(runtime):
        z = model.encode(torch.zeros(rows, d.obs_dim, device=device))
        warm_start = torch.zeros(rows, planner.settings.horizon, d.action_dim, device=device)
        index = torch.zeros(rows, dtype=torch.int64, device=device)
        for _ in range(EAGER_CALLS + 1 if device.type == "cuda" else 1):
            planner(z, warm_start, index, index)


@torch.inference_mode()
def step_once(runner: SpeculativeRunner) -> None:
    """Plans and then acts on that plan, for one row, which compiles what will be compiled."""
    obs = torch.zeros(1, runner.model.dims.obs_dim, device=next(runner.model.parameters()).device)
    first = torch.ones(1, dtype=torch.bool, device=obs.device)
    _, state, _ = runner.act(obs, runner.initial_state(1), first)
    runner.act(obs, state, ~first)


def choose_way(
    store: Store,
    bench: Workbench,
    mode: str,
    *,
    horizon: int | None = None,
    arch: str | None = None,
    accept_below: float | None = None,
    replan_above: float | None = None,
) -> Way:
    """The way of acting that these options name; a corrector that is not named is the first that fits the teacher.

    Raises:
        ConfigError: an unknown mode or architecture, options that the mode would ignore, or no gate for adaptive mode.
        CheckpointError: no corrector of this teacher.
    """
    chosen = check_way(mode, horizon=horizon, arch=arch, accept_below=accept_below, replan_above=replan_above)
    steps = horizon or DEFAULT_HORIZON
    match chosen:
        case Mode.BASELINE:
            return Way(chosen, 1)
        case Mode.POLICY:
            return Way(chosen)
        case Mode.NAIVE:
            return Way(chosen, steps)
        case Mode.DISTILLED:
            return Way(chosen, None, store.corrector(bench.teacher, DistilledPolicy.arch))
    found, _ = store.correctors(bench.teacher, [arch] if arch else None)
    if chosen is Mode.ADAPTIVE:
        found.sort(key=lambda corrector: not corrector.facts.calibrated)  # a calibrated one first
    corrector = found[0] if found else store.corrector(bench.teacher, arch or next(iter(CORRECTORS)))
    if chosen is Mode.ADAPTIVE:
        return adaptive_way(corrector, bench.config, accept_below, replan_above)
    return Way(chosen, steps, corrector, with_thresholds(corrector.rule(steps), accept_below, replan_above))


_OPTIONS: dict[Mode, tuple[str, ...]] = {
    Mode.BASELINE: (),
    Mode.POLICY: (),
    Mode.NAIVE: ("horizon",),
    Mode.CORRECTED: ("horizon", "arch", "accept_below", "replan_above"),
    Mode.ADAPTIVE: ("arch", "accept_below", "replan_above"),
    Mode.DISTILLED: (),
}


def check_way(mode: str, **options: Any) -> Mode:
    """The mode. Raises ConfigError for an unknown mode or architecture, and for options that the mode would ignore."""
    if mode not in list(Mode):
        raise ConfigError(f"--mode must be one of {', '.join(Mode)}, got {mode!r}")
    for option, value in options.items():
        if value is not None and option not in _OPTIONS[Mode(mode)]:
            raise ConfigError(f"--{option.replace('_', '-')} has no meaning in mode {mode}; leave it out")
    check_archs([options["arch"]] if options.get("arch") else [])
    return Mode(mode)


def check_archs(archs: Sequence[str]) -> list[str]:
    """The architectures. Raises ConfigError for an unknown one."""
    for arch in archs:
        if arch not in CORRECTORS:
            raise ConfigError(f"--arch must be one of {', '.join(CORRECTORS)}, got {arch!r}")
    return list(archs)


def adaptive_way(corrector: FittedCorrector, config: Config, accept_below: float | None, replan_above: float | None) -> Way:
    """The adaptive way with the corrector's calibrated gate, or with thresholds given by hand.

    Raises:
        ConfigError: neither a calibrated gate nor both thresholds, or thresholds in the wrong order.
    """
    longest, gate = config.speculation.max_age, corrector.facts.gate
    if accept_below is not None and replan_above is not None:  # a gate of the user's own, without the bounds of the calibrated one
        rule = GateRule(longest, metric=gate.metric)
    elif corrector.facts.calibrated:
        rule = replace(gate, horizon=min(longest, gate.horizon))
    else:
        raise ConfigError(
            f"adaptive mode needs a gate, and the {corrector.arch} corrector in {corrector.path} carries no calibrated one; "
            "calibrate one with 'specmpc fit-corrector --max-return-loss 0.02', or give thresholds with --accept-below and --replan-above"
        )
    return Way(Mode.ADAPTIVE, rule.horizon, corrector, with_thresholds(rule, accept_below, replan_above))


def promise_settings(config: Config) -> dict[str, Any]:
    """The settings that a promise about return holds for: another planner is another baseline, another tail another plan."""
    return config.model_dump(mode="json", include={"planner", "speculation"})


def _as_now(promised_with: dict[str, Any]) -> dict[str, Any] | None:
    """Settings of a promise, those that have joined since at their defaults; None where one of them has gone."""
    try:
        return promise_settings(Config(**promised_with))
    except ValidationError:
        return None


def broken_promise(way: Way, config: Config) -> str | None:
    """What to tell the user if this way follows a gate that was calibrated with other settings."""
    promised_with = way.corrector.facts.promised_with if way.mode is Mode.ADAPTIVE and way.corrector else None
    if promised_with is None or _as_now(promised_with) == promise_settings(config):
        return None
    assert way.corrector is not None
    return f"the {way.corrector.arch} corrector's gate was calibrated with other settings of planner or speculation: no promise holds here"


def with_thresholds(rule: GateRule, accept_below: float | None, replan_above: float | None) -> GateRule:
    """The rule with thresholds given by hand. Raises ConfigError if they are in the wrong order."""
    low = rule.accept_below if accept_below is None else accept_below
    high = rule.replan_above if replan_above is None else replan_above
    if not low <= high:
        raise ConfigError(f"--accept-below ({low:g}) must not exceed --replan-above ({high:g})")
    return replace(rule, accept_below=low, replan_above=high)
