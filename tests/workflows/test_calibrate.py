"""Calibration on a world whose losses are known by the age of a plan: what is chosen, what is promised, and what is refused."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from specmpc_cli.config.schema import Config, SpeculationConfig
from specmpc_cli.engine.checkpoint import CorrectorFacts
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.planner import PlannerSettings
from specmpc_cli.engine.runner import Refinement, SpeculativeRunner
from specmpc_cli.envs.adapter import RawStep, TaskEnv
from specmpc_cli.envs.vector import VectorEnv
from specmpc_cli.errors import CalibrationFailed, ConfigError, StoreError
from specmpc_cli.runtime import Purpose, Runtime
from specmpc_cli.types import Decision, EnvSpec, Plan
from specmpc_cli.workflows import calibrate as module
from specmpc_cli.workflows.calibrate import Calibration, Calibrator, check_promise, kept_at_least, paths
from specmpc_cli.workflows.judged_gates import JudgedGates
from specmpc_cli.workflows.labelling import AUDIT_SHARE, Auditor, is_audited
from specmpc_cli.workflows.rollout import Episode, EpisodeStats, rollout
from specmpc_cli.workflows.store import FittedCorrector
from specmpc_cli.workflows.ways import Way
from tests.fakes import ConstantCorrector, CountingModel, CountingSimulator, ScriptedPlanner, counting_envs

CPU = Runtime(torch.device("cpu"), torch.float32, compiled=False, threads=1)
STEPS = 40


@dataclass
class Slipping(CountingSimulator):
    """Earns about 10 a step while the action comes from within the planner's horizon (is not negative), less once the tail acts."""

    tail_reward: float = 8.0
    success: Callable[[int, int], bool] = field(default=lambda slips, seed: False)
    resets: int = 0
    noise_scale: float = 0.2

    def reset(self, seed: int) -> np.ndarray:
        self.terminates, self.actions = False, []
        self.seed, self.slips, self.resets = seed, 0, self.resets + 1
        self.noise = np.random.default_rng([seed, self.resets])  # of its own in every run, as returns have where actions differ
        super().reset(0)
        return self._obs()

    def step(self, action: np.ndarray) -> RawStep:
        slipped = action[0] < 0
        self.slips += slipped
        reward = (self.tail_reward if slipped else 10.0) + self.noise_scale * self.noise.normal()
        return RawStep(super().step(action).obs, float(reward), success=self.success(self.slips, self.seed))


class SteadyPlanner(ScriptedPlanner):
    """Plans that hardly differ: the count begins anew at each call."""

    def __call__(self, *args: Any) -> Plan:
        self.calls.clear()
        return super().__call__(*args)


@dataclass
class Bench:
    """A workbench over the counting model, whose prediction is off by a tenth more at each step of a plan."""

    spec: EnvSpec
    planner: ScriptedPlanner
    config: Config = field(default_factory=Config)
    runtime: Runtime = CPU

    def runner(self, way: Way) -> SpeculativeRunner:
        corrector = way.corrector.network if way.corrector else None
        return SpeculativeRunner(self.planner.model, self.planner, way.gate_rule("l2"), corrector)  # type: ignore[arg-type]

    actor = runner


def corrector(delta: float = 0.0) -> FittedCorrector:
    network = ConstantCorrector(delta)
    network.arch = "two-tower"  # type: ignore[attr-defined]
    return FittedCorrector(network, CorrectorFacts("abc", GateRule(20)), "memory", Path())  # type: ignore[arg-type]


def calibrate(
    monkeypatch: pytest.MonkeyPatch,
    max_return_loss: float,
    *,
    episodes: int = 20,
    has_success: bool = False,
    planner_horizon: int = 3,
    config: Config | None = None,
    runs: list[tuple[str, int]] | None = None,
    judged: JudgedGates | None = None,
    calibrated: FittedCorrector | None = None,
    **world: Any,
) -> tuple[Calibration, list[tuple[str, int]]]:
    """A calibration, and what it ran."""
    spec = EnvSpec("slipping", "tests", 2, 1, STEPS, action_repeat=1, has_success=has_success)
    envs = VectorEnv([TaskEnv(spec, Slipping(**world)) for _ in range(4)])
    monkeypatch.setattr(module.VectorEnv, "make", lambda *_: envs)
    monkeypatch.setattr(module, "own_spread", lambda *_: (0.04, 0))
    runs = [] if runs is None else runs
    options: dict[str, Any] = {"max_return_loss": max_return_loss, "episodes": episodes, "seed": 0, "num_envs": 4}
    options["judged"] = judged or JudgedGates(Path(tempfile.mkdtemp(), "judged.jsonl"), 0, 20, {})
    planner = SteadyPlanner(CountingModel(drift=0.1), PlannerSettings(discount=0.99, horizon=planner_horizon, iterations=6))
    with Calibrator(
        Bench(spec, planner, config or Config()), **options, on_run=lambda what, count: runs.append((what, count))
    ) as calibrator:  # type: ignore[arg-type]
        return calibrator.calibrate(calibrated or corrector(), []), runs


def test_the_boldest_gate_that_keeps_the_promise_is_found_and_judged_on_fresh_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 3 steps each costs a fifth: 3 steps lose nothing, 4 lose 5 %, 5 lose 8 %, 9 lose 13 %, 12 lose 15 %."""
    found, runs = calibrate(monkeypatch, 0.02)
    promise = found.promise
    assert promise.rule.horizon == 3 or promise.rule.replan_above < math.inf
    assert promise.calls_saved == pytest.approx(2 / 3, abs=0.02) and promise.kept == pytest.approx(1.0, abs=0.005)
    assert 0.98 <= promise.at_least <= promise.kept and promise.episodes == 20
    assert found.tuned[0].rule == GateRule(20) and {trial.episodes for trial in found.tuned} == {6}
    assert [run for run in runs if run[0].endswith("(calibrate)")] == [
        (f"two-tower, {promise.rule.label} (calibrate)", 20),
        ("plain replanning (calibrate)", 20),
    ]
    assert runs.count(("plain replanning (tune)", 6)) == 1

    bolder, _ = calibrate(monkeypatch, 0.12)
    assert bolder.promise.calls_saved == pytest.approx(0.75, abs=0.01) and bolder.promise.at_least >= 0.88
    free, _ = calibrate(monkeypatch, 0.5)
    assert free.promise.rule == GateRule(20) and len(free.tuned) == 1  # nothing else needed to be tried


def test_the_audit_counts_kept_steps_far_from_a_fresh_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actions of the tail are −0.5, those of fresh plans above 0: further apart than 0.2, on 17 of 20 steps."""
    free, _ = calibrate(monkeypatch, 0.5)
    assert free.audit.steps == pytest.approx(20 * STEPS * AUDIT_SHARE, abs=20)
    assert free.audit.share == pytest.approx(17 / 20, abs=0.1) and free.audit.share <= free.audit.episode_bound <= 1
    careful, _ = calibrate(monkeypatch, 0.02)
    assert careful.audit.share == 0 == careful.audit.episode_bound


def test_planner_calls_of_the_calibration_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    free, _ = calibrate(monkeypatch, 0.5)
    streams = [Episode(Purpose.CALIBRATE, 0, index).stream for index in range(20)]
    audits = sum(bool(is_audited(torch.tensor(stream), torch.tensor(step))) for stream in streams for step in range(STEPS) if step % 20)
    assert free.planner_calls == (6 + 20) * STEPS + (6 + 20) * STEPS // 20 + audits


@pytest.mark.parametrize("length", range(2, 21))
def test_no_plan_length_falls_into_step_with_the_audit(length: int) -> None:
    """Of each age within a plan about as many steps are compared."""
    steps = torch.arange(2000)
    audited = is_audited(torch.tensor(Episode(Purpose.CALIBRATE, 0, 0).stream), steps)
    by_age = torch.stack([audited[steps % length == age].float().mean() for age in range(length)])
    assert ((by_age > 0.09) & (by_age < 0.2)).all(), by_age


def test_a_bound_that_no_gate_meets_is_said_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tail earns nothing and begins with the second step of a plan: the shortest plans already lose half."""
    with pytest.raises(
        CalibrationFailed, match=r"no gate of the two-tower corrector keeps the loss within 0.02: the best of \d+ tried"
    ) as info:
        calibrate(monkeypatch, 0.02, planner_horizon=1, tail_reward=0.0)
    assert "over 6 episodes and saves" in str(info.value) and "--max-return-loss" in str(info.value)


def test_a_gate_that_only_looked_good_makes_no_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fresh episodes the tail earns nothing: whatever was chosen before is refused, after two attempts."""

    class Treacherous(Slipping):
        def step(self, action: np.ndarray) -> RawStep:
            step = super().step(action)
            fresh = Purpose.CALIBRATE in [purpose for purpose in Purpose if self.seed // 500_000_000 == list(Purpose).index(purpose)]
            return RawStep(step.obs, step.reward - (9.0 if fresh and action[0] < 0 else 0.0))

    monkeypatch.setattr("tests.workflows.test_calibrate.Slipping", Treacherous)
    with pytest.raises(CalibrationFailed, match=r"on 20 fresh episodes: saving 95% keeps \d+.\d% \(at least") as info:
        calibrate(monkeypatch, 0.1, tail_reward=10.0)
    assert " and saving " in str(info.value)


def test_episodes_that_judged_two_gates_judge_no_other_corrector(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As many as one calibration may try: what is fitted next would be chosen on them."""
    judged = JudgedGates(tmp_path / "judged.jsonl", 0, 20, {"dtype": "fp32"})
    first, _ = calibrate(monkeypatch, 0.5, judged=judged)
    again, _ = calibrate(monkeypatch, 0.5, judged=judged)  # the same command once more is told the same
    assert again.promise == first.promise and len((tmp_path / "judged.jsonl").read_text().splitlines()) == 1
    calibrate(monkeypatch, 0.5, judged=judged, calibrated=corrector(0.001))
    runs: list[tuple[str, int]] = []
    with pytest.raises(CalibrationFailed, match="seed 0 have judged 2 gates of two-tower correctors already: .* another --seed"):
        calibrate(monkeypatch, 0.5, judged=judged, calibrated=corrector(0.002), runs=runs)
    assert runs == []
    calibrate(monkeypatch, 0.5, judged=judged, calibrated=corrector(0.001))
    with pytest.raises(CalibrationFailed, match="already"):  # another gate of a corrector that was judged
        calibrate(monkeypatch, 0.02, judged=judged)
    with pytest.raises(CalibrationFailed, match="already"):  # with some more episodes: asking anew until the answer pleases
        more = JudgedGates(tmp_path / "judged.jsonl", 0, 25, {"dtype": "fp32"})
        calibrate(monkeypatch, 0.5, episodes=25, judged=more)
    calibrate(monkeypatch, 0.5, judged=JudgedGates(tmp_path / "judged.jsonl", 1, 20, {"dtype": "fp32"}), calibrated=corrector(0.002))


def test_where_one_gate_may_still_be_judged_its_figures_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    judged = JudgedGates(tmp_path / "judged.jsonl", 0, 20, {})
    calibrate(monkeypatch, 0.5, judged=judged, calibrated=corrector(0.001))
    monkeypatch.setattr(module, "kept_at_least", lambda *_: 0.0)
    with pytest.raises(
        CalibrationFailed, match=r"on 20 fresh episodes: saving \d+% keeps \S+% \(at least 0.0%\); these are fresh no longer"
    ):
        calibrate(monkeypatch, 0.02, judged=judged)


def test_a_damaged_list_of_judged_gates_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "judged.jsonl").write_text("{}\n")
    with pytest.raises(StoreError, match="which tells fresh calibrate episodes from spent ones; delete it"):
        calibrate(monkeypatch, 0.5, judged=JudgedGates(tmp_path / "judged.jsonl", 0, 20, {}))


def test_plain_replanning_that_earns_nothing_cannot_be_promised_a_share_of(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[str, int]] = []
    with pytest.raises(CalibrationFailed, match="mean success rate of 0 over 55 episodes"):
        calibrate(monkeypatch, 0.02, episodes=183, has_success=True, runs=runs)
    assert runs == [("plain replanning (tune)", 55)]


def test_promises_that_plain_replanning_leaves_no_room_for_are_refused_before_any_gate_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CalibrationFailed, match=r"succeeds in \d+% of 12 episodes, .* needs 36 successes: take --calibrate-episodes \d+"):
        calibrate(monkeypatch, 0.1, episodes=40, has_success=True, success=lambda slips, seed: seed % 3 > 0)
    with pytest.raises(CalibrationFailed, match="returns 400 in each of 6 episodes: .* needs --calibrate-episodes 183 or more"):
        calibrate(monkeypatch, 0.02, noise_scale=0.0)
    with pytest.raises(CalibrationFailed, match="returns 400 in each of 6 episodes"):
        calibrate(monkeypatch, 0.02, noise_scale=1e-4)


def test_a_gate_that_saves_nothing_is_no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(speculation=SpeculationConfig(max_age=1))
    with pytest.raises(CalibrationFailed, match="keeps the loss within 0.2"):
        calibrate(monkeypatch, 0.2, config=config)


def test_success_is_promised_from_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = calibrate(monkeypatch, 0.1, episodes=40, has_success=True, success=lambda slips, seed: slips <= 10 or seed % 10 == 0)
    assert found.promise.kept == 1.0 and found.promise.at_least == pytest.approx(1 - 0.0881, abs=1e-4)
    assert found.promise.calls_saved > 0.5


def test_promises_that_the_episodes_cannot_support_are_refused_before_anything_runs() -> None:
    for loss in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ConfigError, match="--max-return-loss is a share"):
            check_promise(loss, 20, has_success=False)
    with pytest.raises(ConfigError, match="--calibrate-episodes must be at least 20"):
        check_promise(0.02, 19, has_success=False)
    with pytest.raises(ConfigError, match="needs --calibrate-episodes 183 or more, got 182"):
        check_promise(0.02, 182, has_success=True)
    check_promise(0.02, 183, has_success=True)
    check_promise(0.02, 20, has_success=False)


def test_episodes_without_spread_are_no_certainty() -> None:
    """20 equal pairs leave room for 17 % of episodes that lose all they have; a spread is bootstrapped."""
    same = np.full(20, 1000.0)
    assert kept_at_least(same, same, success=False) == pytest.approx(1 - 0.1684, abs=1e-4)
    jittered = same + np.random.default_rng(0).normal(0, 1e-4, 20)  # rounding is no knowledge
    assert kept_at_least(jittered, same, success=False) == pytest.approx(1 - 0.1684, abs=1e-4)
    noisy = same + np.random.default_rng(0).normal(0, 10, 20)
    assert 0.98 < kept_at_least(noisy, same, success=False) < 1.0
    lost = np.r_[np.zeros(2), np.ones(38)]
    assert kept_at_least(lost, np.ones(40), success=True) == pytest.approx(1 - 0.1692, abs=1e-4)


def test_paths_lead_from_bold_to_careful() -> None:
    stat = EpisodeStats(Episode(Purpose.TUNE, 0, 0), rewards=[0.0] * 101, reasons=[1] + [0] * 100)
    stat.mismatches, stat.expected_errors = [math.nan, *np.arange(100.0)], [0.0, *np.arange(100.0) / 10]
    ages, mismatches, errors = paths(GateRule(10), [stat])
    assert [rule.horizon for rule in ages] == [9, 7, 5, 4, 3, 2]
    assert [rule.replan_above for rule in mismatches] == pytest.approx([96.03, 93.06, 87.12, 74.25, 49.5])
    assert [rule.replan_above_error for rule in errors] == pytest.approx([9.603, 9.306, 8.712, 7.425, 4.95])
    assert all(rule.horizon == 10 and rule.replan_above_error == math.inf for rule in mismatches)


def test_auditing_changes_no_action() -> None:
    def run(audited: bool) -> list[Any]:
        model = CountingModel()
        runner = SpeculativeRunner(model, ScriptedPlanner(model), GateRule(5), ConstantCorrector(0.0))  # type: ignore[arg-type]
        seen: list[Any] = []
        actor = Auditor(runner) if audited else runner
        rollout(actor, counting_envs(1, decisions=20), [Episode(Purpose.CALIBRATE, 0, 0)], device=CPU.device, on_step=seen.append)
        return seen

    plain, audited = run(False), run(True)
    assert [step.log.decision for step in plain] == [step.log.decision for step in audited]
    checked = [step for step in audited if step.log.audited]
    stream = Episode(Purpose.CALIBRATE, 0, 0).stream
    assert [step.step for step in checked] == [step for step in range(20) if is_audited(torch.tensor(stream), torch.tensor(step))]
    assert checked
    for step in checked:
        assert float(step.log.error) >= 0 and (step.log.decision != Decision.REPLAN or step.log.error == 0)
    assert all(math.isnan(step.log.error) for step in audited if not step.log.audited)


def test_an_audit_compares_refined_replans_with_whole_ones() -> None:
    model = CountingModel()
    whole, cheap = ScriptedPlanner(model), ScriptedPlanner(model, PlannerSettings(discount=0.99, horizon=3, iterations=1))
    runner = SpeculativeRunner(model, whole, GateRule(2), ConstantCorrector(0.0), refinement=Refinement(cheap))  # type: ignore[arg-type]
    seen: list[Any] = []
    rollout(Auditor(runner), counting_envs(1, decisions=40), [Episode(Purpose.CALIBRATE, 0, 0)], device=CPU.device, on_step=seen.append)
    logs = [step.log for step in seen if step.log.audited and step.log.decision == Decision.REPLAN]
    refined = [log for log in logs if log.planner_iterations == 1]
    assert refined and all(float(log.error) > 0 for log in refined)
    assert all(float(log.error) == 0 for log in logs if log.planner_iterations == 6)
    compared = sum(bool(step.log.audited) and int(step.log.planner_iterations) != 6 for step in seen)
    assert len(whole.calls) == 1 + compared  # the first step's plan, and one for each comparison


@pytest.mark.parametrize("horizon", [1, 3, 5])
def test_how_far_own_actions_spread_is_seen_with_the_planner_that_acts(monkeypatch: pytest.MonkeyPatch, horizon: int) -> None:
    """Whatever the horizon of the planner that labelled the data: here 3."""
    data = {"z": np.random.default_rng(0).uniform(size=(50, 2)).astype(np.float32), "warm_start": np.zeros((50, 3, 1), np.float32)}
    monkeypatch.setattr(module, "read_columns", lambda *_: data)
    planner = ScriptedPlanner(CountingModel(), PlannerSettings(discount=0.99, horizon=horizon, iterations=6))
    planner_of_spread = replace_actions(planner, 0.3)
    bench: Any = SimpleNamespace(planner=planner_of_spread, runtime=CPU)
    spread, calls = module.own_spread(bench, [], 0)
    assert (spread, calls) == (pytest.approx(0.09), 50)
    assert [len(warm_start) for _, warm_start in planner.calls] == [horizon] * 50


def replace_actions(planner: ScriptedPlanner, off: float) -> Any:
    """The planner, whose plans draw actions this far from their means."""

    def make(*given: Any) -> Plan:
        plan = planner(*given)
        return replace(plan, actions=plan.mean + off)

    make.settings = planner.settings  # type: ignore[attr-defined]
    return make
