"""Calibrating a corrector's gate: the fewest planner calls within a promise about return.

What chooses a gate never judges it. `tune` episodes choose, in closed loop and paired with plain replanning; `calibrate` episodes, which
nothing else has seen, decide whether the promise holds. The per-step bound on kept and wrong actions (split conformal, episodes as
units: Vovk et al., 2005) is reported beside it and promises nothing about return.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch.nn.functional import pad

from specmpc_cli.data.shards import Shard, read_columns
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.envs.vector import VectorEnv
from specmpc_cli.errors import CalibrationFailed, ConfigError
from specmpc_cli.learning.corrector_fit import plan_anew
from specmpc_cli.runtime import Purpose
from specmpc_cli.types import Actor, ReplanReason
from specmpc_cli.workflows.acting import Workbench
from specmpc_cli.workflows.evaluate import calls_saved, episodes_of, scores_of
from specmpc_cli.workflows.judged_gates import JudgedGates
from specmpc_cli.workflows.labelling import AuditedLog, Auditor
from specmpc_cli.workflows.rollout import EpisodeStats, Transition, rollout
from specmpc_cli.workflows.statistics import conformal_bound, fewest_episodes, lost_share_bound, ratio, ratio_ci95
from specmpc_cli.workflows.store import FittedCorrector
from specmpc_cli.workflows.ways import Mode, Way

FEWEST_EPISODES = 20  # a bootstrap over fewer claims more than it knows
PROMISES, CONFIDENCE = 2, 0.975  # gates that may try for the promise, each at the lower end of a paired 95 % interval
TUNE_SHARE, FEWEST_TUNE_EPISODES = 0.3, 6  # tune episodes per calibrate episode
# A gate is put to the test only if it lost at most this share of the allowed loss while it was chosen: the test needs room for chance.
TUNE_MARGIN = 0.5
FALLBACK_SHARES = (0.03, 0.06, 0.12, 0.25, 0.5)  # of the steps of a run without a gate: where thresholds are tried
AGES = (16, 12, 9, 7, 5, 4, 3, 2)
OWN_SPREAD, SPREAD_STATES, AUDIT_CONFIDENCE = 0.95, 200, 0.9
NO_SPREAD = 1e-5  # of the mean: returns that differ by less, by rounding, say no more than equal ones about episodes that were not seen


@dataclass(frozen=True, slots=True)
class Trial:
    """A gate in closed loop, paired with plain replanning on the same episodes."""

    rule: GateRule
    episodes: int
    calls_saved: float
    kept: float  # ratio of mean returns, of success rates for tasks that have success
    at_least: float  # its lower bound at CONFIDENCE
    worst_kept: float | None  # of any one episode; None where plain replanning itself earned nothing in it

    def as_json(self) -> dict[str, Any]:
        shares = ("episodes", "calls_saved", "kept", "at_least", "worst_kept")
        return {"gate": self.rule.as_json(), **{name: getattr(self, name) for name in shares}}


@dataclass(frozen=True, slots=True)
class Audit:
    """How often an action that no fresh plan made was wrong, by sampled comparison with fresh plans."""

    wrong_above: float  # squared distance to a fresh plan's mean, per action dimension, from which an action is wrong
    steps: int  # compared
    share: float  # of the steps kept and wrong
    episode_bound: float  # of the compared steps of a new episode at most this share is, with probability AUDIT_CONFIDENCE

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "confidence": AUDIT_CONFIDENCE}


@dataclass(frozen=True, slots=True)
class Calibration:
    """A gate, the promise it kept on fresh episodes, and what finding it took."""

    max_return_loss: float
    seed: int
    promise: Trial  # on the calibrate episodes
    audit: Audit
    tuned: list[Trial]  # on the tune episodes
    planner_calls: int  # of this corrector's trials and audit, and of the plain replanning that they are paired with
    seconds: float

    @property
    def worse_share(self) -> float:
        """At most this share of new episodes keeps less than the worst of the promise's, at CONFIDENCE: what an average cannot tell."""
        return lost_share_bound(0, self.promise.episodes, CONFIDENCE)

    def as_json(self) -> dict[str, Any]:
        return {
            "max_return_loss": self.max_return_loss,
            "seed": self.seed,
            "promise": {**self.promise.as_json(), "worse_share": self.worse_share},
            "audit": self.audit.as_json(),
            "tuned": [trial.as_json() for trial in self.tuned],
            "planner_calls": self.planner_calls,
            "seconds": round(self.seconds, 1),
        }


def check_promise(max_return_loss: float, episodes: int, has_success: bool) -> None:
    """Raises ConfigError for a promise that this many episodes could not support, whatever they returned."""
    if not 0 < max_return_loss < 1:
        raise ConfigError(
            f"--max-return-loss is a share of plain replanning's return between 0 and 1, such as 0.02; got {max_return_loss:g}"
        )
    if episodes < FEWEST_EPISODES:
        raise ConfigError(f"--calibrate-episodes must be at least {FEWEST_EPISODES} to say anything about return, got {episodes}")
    needed = fewest_episodes(max_return_loss, CONFIDENCE)
    if has_success and episodes < needed:
        raise ConfigError(
            f"a promise of {max_return_loss:.2g} lost success needs --calibrate-episodes {needed} or more, got {episodes}: "
            f"{episodes} successes in a row still leave room for a loss of {lost_share_bound(0, episodes, CONFIDENCE):.0%}"
        )


def check_hope(max_return_loss: float, episodes: int, tuned: np.ndarray, has_success: bool) -> None:
    """Raises CalibrationFailed where what plain replanning earned on the tune episodes [n] says that no gate could keep the promise."""
    what = "success rate" if has_success else "return"
    if tuned.mean() <= 0:
        raise CalibrationFailed(
            f"plain replanning has a mean {what} of {tuned.mean():.3g} over {len(tuned)} episodes, and no share of that can be promised; "
            "train the teacher further, or act with --mode corrected, which needs no promise"
        )
    needed = fewest_episodes(max_return_loss, CONFIDENCE)
    if has_success and episodes * tuned.mean() < needed:
        raise CalibrationFailed(
            f"plain replanning succeeds in {tuned.mean():.0%} of {len(tuned)} episodes, and a promise of {max_return_loss:.2g} lost "
            f"success needs {needed} successes: take --calibrate-episodes {math.ceil(needed / tuned.mean())} or more, or allow more "
            "with --max-return-loss"
        )
    if not has_success and np.ptp(tuned) <= NO_SPREAD * tuned.mean() and episodes < needed:
        raise CalibrationFailed(
            f"plain replanning returns {tuned[0]:.4g} in each of {len(tuned)} episodes: without spread only counting helps, and "
            f"a promise of {max_return_loss:.2g} needs --calibrate-episodes {needed} or more, got {episodes}"
        )


def own_spread(bench: Workbench, shards: Sequence[Shard], seed: int) -> tuple[float, int]:
    """The squared distance to a fresh plan's mean below which OWN_SPREAD of that plan's own drawn actions lie, and the planner calls made.

    Plans are made anew, with the planner that acts: the data's labels may be those of a lighter one, whose draws spread further.
    """
    columns = read_columns(shards, ["z", "warm_start"])
    rows = np.random.default_rng(seed).choice(len(columns["z"]), min(SPREAD_STATES, len(columns["z"])), replace=False)
    z, warm_start = (torch.from_numpy(columns[name][rows]).to(bench.runtime.device) for name in ("z", "warm_start"))
    horizon = bench.planner.settings.horizon  # the data's may be another
    warm_start = pad(warm_start[:, :horizon], (0, 0, 0, max(horizon - warm_start.shape[1], 0)))
    plan = plan_anew(bench.planner, z, warm_start, seed=seed)
    distance = (plan.actions[:, 0] - plan.mean[:, 0]).square().mean(-1)
    return float(np.quantile(distance.cpu().numpy(), OWN_SPREAD)), len(rows)


class Calibrator:
    """Finds gates for the correctors of one teacher. Plain replanning runs once, whatever the number of correctors."""

    def __init__(
        self,
        bench: Workbench,
        *,
        max_return_loss: float,
        episodes: int,
        seed: int,
        num_envs: int,
        judged: JudgedGates,
        on_run: Callable[[str, int], None] | None = None,
        on_step: Callable[[], None] | None = None,
        on_trial: Callable[[str, Trial], None] | None = None,
    ) -> None:
        """
        Args:
            judged: what the calibrate episodes of this seed have judged before.
            on_run: hears what runs next and over how many episodes.
            on_step: after each env step.
            on_trial: hears the architecture and each gate's result.

        Raises:
            ConfigError: see `check_promise`.
        """
        check_promise(max_return_loss, episodes, bench.spec.has_success)
        self._bench, self._max_return_loss = bench, max_return_loss
        self._seed, self._judged = seed, judged
        self._tune = episodes_of(Purpose.TUNE, seed, max(round(TUNE_SHARE * episodes), FEWEST_TUNE_EPISODES))
        self._fresh = episodes_of(Purpose.CALIBRATE, seed, episodes)
        self._on_run, self._on_step, self._on_trial = on_run, on_step, on_trial
        self._baselines: dict[Purpose, list[EpisodeStats]] = {}
        self._planner_calls = 0
        self._own_spread: tuple[float, int] | None = None
        self._envs = VectorEnv.make(bench.spec.task, num_envs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._envs.close()

    def calibrate(self, corrector: FittedCorrector, shards: Sequence[Shard]) -> Calibration:
        """The gate that saves most of the planner calls and keeps the promise.

        Args:
            shards: of the data that the correctors were fitted to, the same for all of them; in its states it is seen how far the
                teacher's own actions spread.

        Raises:
            CalibrationFailed: no gate keeps the promise, plain replanning earns nothing that a share of could be promised, or these
                calibrate episodes have judged too many gates already.
        """
        if not self._judged.room(corrector, PROMISES):
            raise CalibrationFailed(self._spent(corrector))
        started, has_success = time.perf_counter(), self._bench.spec.has_success
        check_hope(self._max_return_loss, len(self._fresh), self._scores(self._baseline(Purpose.TUNE)), has_success)
        if self._own_spread is None:
            self._own_spread = own_spread(self._bench, shards, self._seed)
        wrong_above, self._planner_calls = self._own_spread
        speculation = self._bench.config.speculation
        free, stats = self._tune_trial(corrector, GateRule(speculation.max_age, metric=speculation.metric))
        tuned, candidates, tested = [free], self._passing([free]), []
        while len(tested) < PROMISES:
            if not candidates and len(tuned) == 1:
                tuned += self._search(corrector, paths(free.rule, stats))
                candidates = self._passing(tuned[1:])
            if not candidates:
                break
            rule = candidates.pop(0).rule
            if not self._judged.admits(corrector, rule, PROMISES):
                if tested:
                    break
                raise CalibrationFailed(self._spent(corrector))
            promise, audit = self._promise(corrector, rule, wrong_above)
            tested.append(promise)
            if promise.at_least >= 1 - self._max_return_loss and promise.calls_saved > 0:
                calls = self._planner_calls + sum(stat.planner_calls for stats in self._baselines.values() for stat in stats)
                seconds = time.perf_counter() - started
                return Calibration(self._max_return_loss, self._seed, promise, audit, tuned, calls, seconds)
        raise CalibrationFailed(self._why(corrector, tuned, tested))

    def _search(self, corrector: FittedCorrector, gates: Sequence[Sequence[GateRule]]) -> list[Trial]:
        """Gates tried on the tune episodes: on each path, from bold to careful, a bisection for the boldest that loses little enough."""
        tuned = []
        for path in gates:
            low, high = 0, len(path)
            while low < high:
                middle = (low + high) // 2
                trial, _ = self._tune_trial(corrector, path[middle])
                tuned.append(trial)
                low, high = (low, middle) if self._passing([trial]) else (middle + 1, high)
        return tuned

    def _passing(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those that may try for the promise, the most saving first."""
        enough = 1 - TUNE_MARGIN * self._max_return_loss
        passing = [trial for trial in trials if trial.kept >= enough and trial.calls_saved > 0]
        return sorted(passing, key=lambda trial: -trial.calls_saved)

    def _why(self, corrector: FittedCorrector, tuned: Sequence[Trial], tested: Sequence[Trial]) -> str:
        """Why there is no promise, with the figures and what to do."""
        bound = f"no gate of the {corrector.arch} corrector keeps the loss within {self._max_return_loss:.2g}"
        if tested:
            figures = " and ".join(f"saving {one.calls_saved:.0%} keeps {one.kept:.1%} (at least {one.at_least:.1%})" for one in tested)
            return (
                f"{bound} on {len(self._fresh)} fresh episodes: {figures}; these are fresh no longer, so try again with another --seed: "
                "after another round of collect, with more --calibrate-episodes, or with a larger --max-return-loss"
            )
        best = max(tuned, key=lambda trial: trial.kept)
        figures = f"the best of {len(tuned)} tried keeps {best.kept:.1%} over {best.episodes} episodes and saves {best.calls_saved:.0%}"
        return f"{bound}: {figures}; allow more with --max-return-loss, or collect another round"

    def _spent(self, corrector: FittedCorrector) -> str:
        return (
            f"the calibrate episodes of seed {self._seed} have judged {PROMISES} gates of {corrector.arch} correctors already: what passes "
            "after those proves nothing; calibrate on the fresh episodes of another --seed"
        )

    def _tune_trial(self, corrector: FittedCorrector, rule: GateRule) -> tuple[Trial, list[EpisodeStats]]:
        way = Way(Mode.ADAPTIVE, rule.horizon, corrector, rule)
        stats = self._run(f"{corrector.arch}, {rule.label}", Purpose.TUNE, self._bench.actor(way))
        self._planner_calls += sum(stat.planner_calls for stat in stats)
        return self._trial(corrector, rule, Purpose.TUNE, stats), stats

    def _promise(self, corrector: FittedCorrector, rule: GateRule, wrong_above: float) -> tuple[Trial, Audit]:
        """The gate on the calibrate episodes, audited on the way; auditing changes no action."""
        auditor = Auditor(self._bench.runner(Way(Mode.ADAPTIVE, rule.horizon, corrector, rule)))
        wrong: dict[int, list[bool]] = defaultdict(list)

        def audit(transition: Transition) -> None:
            log = transition.log
            assert isinstance(log, AuditedLog)
            if log.audited:
                wrong[transition.episode.index].append(bool(log.error > wrong_above))
                self._planner_calls += int(log.planner_iterations != self._bench.planner.settings.iterations)

        stats = self._run(f"{corrector.arch}, {rule.label}", Purpose.CALIBRATE, auditor, audit)
        self._judged.add(corrector, rule)
        self._planner_calls += sum(stat.planner_calls for stat in stats)
        compared = [outcomes for outcomes in wrong.values() if outcomes]
        steps = sum(len(outcomes) for outcomes in compared)
        bound = conformal_bound(np.array([np.mean(outcomes) for outcomes in compared]), AUDIT_CONFIDENCE)
        share = sum(map(sum, compared)) / steps
        return self._trial(corrector, rule, Purpose.CALIBRATE, stats), Audit(wrong_above, steps, share, bound)

    def _trial(self, corrector: FittedCorrector, rule: GateRule, purpose: Purpose, stats: list[EpisodeStats]) -> Trial:
        score, reference = self._scores(stats), self._scores(self._baseline(purpose))
        kept = ratio(score, reference)
        if kept is None:  # on other episodes than those that gave hope
            raise CalibrationFailed(f"plain replanning earns {reference.mean():.3g} on average over {len(reference)} {purpose} episodes")
        worst = float((score / reference).min()) if (reference > 0).all() else None
        trial = Trial(rule, len(stats), calls_saved(stats), kept, kept_at_least(score, reference, self._bench.spec.has_success), worst)
        if self._on_trial is not None:
            self._on_trial(corrector.arch, trial)
        return trial

    def _baseline(self, purpose: Purpose) -> list[EpisodeStats]:
        """Plain replanning on the episodes of this purpose, run once."""
        if purpose not in self._baselines:
            self._baselines[purpose] = self._run("plain replanning", purpose, self._bench.actor(Way(Mode.BASELINE, 1)))
        return self._baselines[purpose]

    def _scores(self, stats: list[EpisodeStats]) -> np.ndarray:
        return scores_of(stats, self._bench.spec.has_success)

    def _run(
        self, what: str, purpose: Purpose, actor: Actor[Any], on_step: Callable[[Transition], None] | None = None
    ) -> list[EpisodeStats]:
        episodes = self._fresh if purpose is Purpose.CALIBRATE else self._tune
        if self._on_run is not None:
            self._on_run(f"{what} ({purpose})", len(episodes))

        def step(transition: Transition) -> None:
            if self._on_step is not None:
                self._on_step()
            if on_step is not None:
                on_step(transition)

        return rollout(actor, self._envs, episodes, device=self._bench.runtime.device, on_step=step)


def paths(free: GateRule, stats: Sequence[EpisodeStats]) -> list[list[GateRule]]:
    """Gates to try, as paths from bold to careful: shorter plans, a bound on the mismatch, a bound on the corrector's expected error.

    Args:
        free: the rule without a gate; stats: its episodes, whose steps tell where bounds are worth trying.
    """

    def bounds(values: Sequence[float]) -> list[float]:
        finite = [value for value in values if math.isfinite(value)]
        return list(dict.fromkeys(np.quantile(finite, [1 - share for share in FALLBACK_SHARES]).tolist())) if finite else []

    kept = [(stat, step) for stat in stats for step in range(stat.env_steps) if stat.reasons[step] == ReplanReason.NONE]
    return [
        [replace(free, horizon=age) for age in AGES if age < free.horizon],
        [replace(free, replan_above=bound) for bound in bounds([stat.mismatches[step] for stat, step in kept])],
        [replace(free, replan_above_error=bound) for bound in bounds([stat.expected_errors[step] for stat, step in kept])],
    ]


def kept_at_least(score: np.ndarray, reference: np.ndarray, success: bool) -> float:
    """The share of the reference's mean that the score's mean keeps at least, at CONFIDENCE, from paired episodes [n].

    Successes are counted: of the episodes in which the reference succeeds, how many may lose it, exactly (Clopper and Pearson, 1934); what
    is gained in others is not. Returns are resampled, which is nominal; where that sees no spread, an episode that differs may have been
    missed, and it may have lost everything.
    """
    if success:
        succeeded = reference == 1
        return 1 - lost_share_bound(int((score[succeeded] == 0).sum()), int(succeeded.sum()), CONFIDENCE)
    interval = ratio_ci95(score, reference)
    if interval is None:  # the reference may be worth nothing: no share of it is certain
        return 0.0
    low, high = interval
    return low if high - low > NO_SPREAD else low - lost_share_bound(0, len(score), CONFIDENCE)
