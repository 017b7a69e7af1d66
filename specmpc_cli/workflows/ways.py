"""Ways of acting: modes, horizons, correctors and gates; which one is meant, and what it promises. Runs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from specmpc_cli.config.schema import Config
from specmpc_cli.engine.correctors import CORRECTORS, DistilledPolicy
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.errors import ConfigError
from specmpc_cli.workflows.store import FittedCorrector, Store, Teacher

DEFAULT_HORIZON = 6  # env steps per plan where none is named
LONGEST_HORIZON = 1000  # every plan is rolled out that far


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


def choose_way(
    store: Store,
    teacher: Teacher,
    config: Config,
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
    steps = DEFAULT_HORIZON if horizon is None else horizon
    match chosen:
        case Mode.BASELINE:
            return Way(chosen, 1)
        case Mode.POLICY:
            return Way(chosen)
        case Mode.NAIVE:
            return Way(chosen, steps)
        case Mode.DISTILLED:
            return Way(chosen, None, store.corrector(teacher, DistilledPolicy.arch))
    found, _ = store.correctors(teacher, [arch] if arch else None)
    if chosen is Mode.ADAPTIVE:
        found.sort(key=lambda corrector: not corrector.facts.calibrated)  # a calibrated one first
    corrector = found[0] if found else store.corrector(teacher, arch or next(iter(CORRECTORS)))
    if chosen is Mode.ADAPTIVE:
        return adaptive_way(corrector, config, accept_below, replan_above)
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
    """The mode. Raises ConfigError for an unknown mode or architecture, a horizon out of range, and options that the mode would ignore."""
    if mode not in list(Mode):
        raise ConfigError(f"--mode must be one of {', '.join(Mode)}, got {mode!r}")
    for option, value in options.items():
        if value is not None and option not in _OPTIONS[Mode(mode)]:
            raise ConfigError(f"--{option.replace('_', '-')} has no meaning in mode {mode}; leave it out")
    check_archs([options["arch"]] if options.get("arch") else [])
    if options.get("horizon") is not None:
        check_horizons([options["horizon"]], "--horizon")
    return Mode(mode)


def check_horizons(horizons: Sequence[int], option: str = "--horizons") -> list[int]:
    """The env steps per plan. Raises ConfigError, which names the option, if one is too small or too large."""
    if not all(1 <= horizon <= LONGEST_HORIZON for horizon in horizons):
        raise ConfigError(f"{option} must lie in 1..{LONGEST_HORIZON}, got {', '.join(map(str, horizons))}")
    return list(horizons)


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


def own_settings(way: Way, config: Config) -> str | None:
    """What to tell the user if this way's corrector brings other settings of speculation than those in force."""
    if way.corrector is None or not way.mode.plans:
        return None
    facts = way.corrector.facts
    own = {**asdict(facts.course), "metric": facts.gate.metric}
    others = {name: value for name, value in own.items() if value != getattr(config.speculation, name)}
    if not others:
        return None
    brought = ", ".join(f"speculation.{name}={value}" for name, value in others.items())
    here = ", ".join(f"{name}={getattr(config.speculation, name)}" for name in others)
    return f"the {way.corrector.arch} corrector brings {brought}; {here} is for the ways without one"


def broken_promise(way: Way, config: Config, dtype: str) -> str | None:
    """What to tell the user if this way's corrector carries a calibrated gate whose promise does not hold here: the way follows another
    gate, or settings or dtype are not those that the gate was calibrated with."""
    if way.mode is not Mode.ADAPTIVE or way.corrector is None or way.rule is None:
        return None
    facts, whose = way.corrector.facts, f"the {way.corrector.arch} corrector's gate"
    if facts.promised_with is None:
        return None
    if way.rule != replace(facts.gate, horizon=min(way.rule.horizon, facts.gate.horizon)):
        return f"{whose} is replaced by thresholds given by hand: no promise holds here"
    settings = dict(facts.promised_with)
    promised_in = settings.pop("dtype", dtype)  # older files say nothing of it
    if promised_in != dtype:
        return f"{whose} was calibrated in {promised_in} and acts in {dtype}: no promise holds here"
    if _binding(settings, facts.gate) != _binding(config.acting_settings(), facts.gate):
        return f"{whose} was calibrated with other settings of planner, speculation or refine: no promise holds here"
    return None


def _binding(settings: dict[str, Any], gate: GateRule) -> dict[str, Any]:
    """Of settings that decide how a teacher acts, those that a promise depends on: a corrector brings most of `speculation`, and its gate
    the steps that a plan lives at most."""
    max_age = settings.get("speculation", {}).get("max_age")
    return {**settings, "speculation": {"max_age": max_age and min(max_age, gate.horizon)}}


def with_thresholds(rule: GateRule, accept_below: float | None, replan_above: float | None) -> GateRule:
    """The rule with thresholds given by hand. Raises ConfigError if they are in the wrong order."""
    low = rule.accept_below if accept_below is None else accept_below
    high = rule.replan_above if replan_above is None else replan_above
    if not low <= high:
        raise ConfigError(f"--accept-below ({low:g}) must not exceed --replan-above ({high:g})")
    return replace(rule, accept_below=low, replan_above=high)
