"""What each of the corrector's ideas is worth: leaves one out at a time, fits to the same data, and acts in closed loop.

    python docs/ablation.py STORE TASK [--episodes 6] [--horizons 10,20] [--seed 1] [--out ablation.json]

STORE holds a teacher and data of TASK, with several rounds. Prints a table: return (or success) against plain replanning, on `compare`
episodes of a seed that chose nothing.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specmpc_cli.data.shards import Shard, read_columns
from specmpc_cli.engine.compiled import judge_for
from specmpc_cli.engine.correctors import BaseCorrector, CorrectorDims, build_corrector
from specmpc_cli.engine.gate import GateLimits, GateRule, decide
from specmpc_cli.engine.runner import Judge, Judgement, Refinement, SpeculativeRunner, judge
from specmpc_cli.engine.world_model import WorldModel
from specmpc_cli.envs.registry import lookup
from specmpc_cli.envs.vector import VectorEnv
from specmpc_cli.learning.corrector_fit import FitSettings, TupleTable, fit_corrector, split_by_episode
from specmpc_cli.runtime import Purpose, choose_runtime
from specmpc_cli.types import Corrector, Course, Visit
from specmpc_cli.workflows.acting import Workbench
from specmpc_cli.workflows.evaluate import calls_saved, episodes_of, scores_of
from specmpc_cli.workflows.fit_corrector import load_tuples
from specmpc_cli.workflows.rollout import EpisodeStats, rollout
from specmpc_cli.workflows.statistics import ratio, ratio_ci95
from specmpc_cli.workflows.store import Store, config_of

SETTINGS = ("epochs", "patience", "batch_size", "lr", "weight_decay", "delta_penalty")
FALLBACK_SHARES = (0.5, 0.2, 0.1)  # of a free run's steps, where gates put their thresholds


class Masked(nn.Module):
    """A corrector that sees only a part of the visit."""

    def __init__(self, corrector: BaseCorrector, mask: Callable[[Visit], Visit]) -> None:
        super().__init__()
        self.corrector, self.mask = corrector, mask
        self.dims, self.arch = corrector.dims, corrector.arch

    def forward(self, visit: Visit) -> tuple[Tensor, Tensor]:
        return self.corrector(self.mask(visit))

    def added(self, visit: Visit, delta: Tensor) -> Tensor:
        return self.corrector.added(self.mask(visit), delta)


def without_prior(visit: Visit) -> Visit:
    return replace(visit, prior=visit.planned)


def without_prediction(visit: Visit) -> Visit:
    return replace(visit, z_pred=visit.z)


Signal = Callable[[WorldModel, Judgement], Tensor]  # what a gate may look at, [B]; the larger, the sooner it plans again


def growth(model: WorldModel, judged: Judgement) -> Tensor:
    """The training-free rule: the mismatch, scaled by how much the dynamics stretch it, ‖f(z, a) − f(z_pred, a)‖."""
    return torch.linalg.vector_norm(model.next(judged.z, judged.planned) - model.next(judged.z_pred, judged.planned), dim=-1)


def expected_error(model: WorldModel, judged: Judgement) -> Tensor:
    """The corrector's own guess of how wrong it is."""
    return judged.expected_error


def mismatch(model: WorldModel, judged: Judgement) -> Tensor:
    """The distance of the real latent from the predicted one."""
    return judged.mismatch


def value_below_prior(model: WorldModel, judged: Judgement) -> Tensor:
    """How much more the world model expects of the policy prior's action than of the corrected one, Q(z, π(z)) − Q(z, a)."""
    return q_value(model, judged.z, model.pi_mean(judged.z)) - q_corrected(model, judged)


def value_lost(model: WorldModel, judged: Judgement) -> Tensor:
    """What the state is worth less than the one the plan predicted, Q(z_pred, planned) − Q(z, a)."""
    return q_value(model, judged.z_pred, judged.planned) - q_corrected(model, judged)


def q_corrected(model: WorldModel, judged: Judgement) -> Tensor:
    """The value of the corrected action at the real latent [B]."""
    return q_value(model, judged.z, (judged.planned + judged.delta).clamp(-1, 1))


def q_value(model: WorldModel, z: Tensor, action: Tensor) -> Tensor:
    """The mean of the first two Q-heads [B]."""
    heads = torch.tensor([[0, 1]], device=z.device).expand(len(z), 2)
    return model.q_pair(z.unsqueeze(1), action.unsqueeze(1), heads).squeeze(1)


def judging_by(signal: Signal) -> Judge:
    """A judgement whose mismatch is this signal."""

    def judge_by_signal(model: WorldModel, corrector: Corrector | None, metric: str, limits: GateLimits, *seen: Tensor) -> Judgement:
        judged, (age, first) = judge(model, corrector, metric, limits, *seen), (seen[3], seen[-1])
        value = signal(model, judged).masked_fill(first, torch.nan)
        decision, reason = decide(value, torch.zeros_like(value), age, first, limits)
        return judged._replace(mismatch=value, decision=decision, reason=reason)

    return judge_by_signal


class Recorder:
    """Judges as usual, and keeps what each signal says but on episodes' first steps. Implements `Judge`."""

    def __init__(self, signals: Iterable[Signal]) -> None:
        self.values: dict[Signal, list[Tensor]] = {signal: [] for signal in signals}

    def __call__(self, model: WorldModel, corrector: Corrector | None, metric: str, limits: GateLimits, *seen: Tensor) -> Judgement:
        judged, first = judge(model, corrector, metric, limits, *seen), seen[-1]
        for signal, values in self.values.items():
            values.append(signal(model, judged)[~first])
        return judged


GATES = {"the mismatch": mismatch, "the expected error": expected_error, "the value below the prior's": value_below_prior,
         "the value lost since the plan": value_lost}  # fmt: skip


class Study:
    """One task's teacher, data and paired episodes."""

    def __init__(self, store: Path, task: str, episodes: int, seed: int, out: Path | None = None) -> None:
        """`out` is written anew with each row."""
        place = Store(store, task)
        teacher = place.teacher()
        self.bench = Workbench(teacher, lookup(task).spec, config_of(teacher, [], []), choose_runtime())
        self.shards = place.newest_dataset(teacher)
        self.episodes = {purpose: episodes_of(purpose, seed, episodes) for purpose in (Purpose.COMPARE, Purpose.TUNE)}
        self.envs = VectorEnv.make(task, min(episodes, 10))
        self.rows: list[dict[str, Any]] = []
        self.baseline = scores_of(self.run(GateRule(1)), self.bench.spec.has_success)
        self.facts = {"task": task, "episodes": episodes, "seed": seed, "baseline": self.baseline.tolist()}
        self.out = out

    def fit(
        self,
        arch: str,
        shards: Sequence[Shard],
        wrap: Callable[[BaseCorrector], Any] = lambda network: network,
        label: str = "a_teacher_mean",
    ) -> Any:
        """A corrector fitted as `specmpc fit-corrector` does, but for the wrapping and the label's column."""
        columns, group = load_tuples(shards, self.bench)
        config, d = self.bench.config.corrector, self.bench.model.dims
        table = TupleTable(columns, group, self.bench.model, config.history)
        device = self.bench.runtime.device
        table.label = torch.from_numpy(read_columns(shards, [label])[label]).to(device)
        torch.manual_seed(0)
        dims = CorrectorDims(d.latent_dim, d.action_dim, config.width, config.history, config.layers, dropout=config.dropout)
        network = wrap(build_corrector(arch, dims)).to(device)
        settings = FitSettings(**config.model_dump(include=set(SETTINGS)))
        fit_corrector(network, table, *split_by_episode(group, config.validation_share, 0), settings, seed=0)
        return network

    def run(self, rule: GateRule, corrector: Any = None, purpose: Purpose = Purpose.COMPARE, **options: Any) -> list[EpisodeStats]:
        history = corrector.dims.history if corrector is not None else 8
        options.setdefault("judge", judge_for(self.bench.runtime.device))  # row by row; by torch's functions, which some of its judges need
        runner = SpeculativeRunner(self.bench.model, self.bench.planner, rule, corrector, history=history, **options)
        return rollout(runner, self.envs, self.episodes[purpose], device=self.bench.runtime.device)

    def add(self, name: str, setting: str, stats: list[EpisodeStats]) -> None:
        score, saved = scores_of(stats, self.bench.spec.has_success), calls_saved(stats)
        kept, interval = ratio(score, self.baseline), ratio_ci95(score, self.baseline)
        iterations = float(np.mean([sum(one.planner_iterations) for one in stats]))
        figures = {"calls_saved": saved, "planner_iterations_per_episode": iterations, "mean": score.mean(), "kept": kept, "ci95": interval}
        self.rows.append({"variant": name, "setting": setting, **figures})
        if self.out:
            self.out.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")
        share = f"{kept:.1%} ({interval[0]:.1%} to {interval[1]:.1%})" if kept is not None and interval is not None else "–"
        print(f"| {name} | {setting} | {saved:.1%} | {iterations:.0f} | {score.mean():.3g} | {share} |", flush=True)

    def at_horizons(self, name: str, horizons: Sequence[int], corrector: Any = None, **options: Any) -> None:
        accept = math.inf if corrector is None else -math.inf
        for horizon in horizons:
            self.add(name, f"{horizon} steps", self.run(GateRule(horizon, accept_below=accept), corrector, **options))

    def gated(self, gates: Mapping[str, Signal], corrector: Any = None) -> None:
        """Plans of at most 20 steps behind each gate; thresholds come from what a free run meets on `tune` episodes.

        Below them the corrector corrects; without one the plan is accepted.
        """
        accept = math.inf if corrector is None else -math.inf
        met = Recorder(gates.values())
        self.run(GateRule(20, accept), corrector, Purpose.TUNE, judge=met)
        for name, signal in gates.items():
            values = torch.cat(met.values[signal]).numpy()
            for threshold in map(float, np.quantile(values, [1 - share for share in FALLBACK_SHARES])):
                rule = GateRule(20, threshold if corrector is None else accept, threshold)
                self.add(name, f"threshold {threshold:.3g}", self.run(rule, corrector, judge=judging_by(signal)))

    def refined(self, name: str, horizons: Sequence[int], iterations: int, corrector: Any) -> None:
        """Replans of so few iterations, which refine the old plan."""
        planner = self.bench.planner.refining(iterations, self.bench.config.refine.std)
        self.at_horizons(name, horizons, corrector, refinement=Refinement(planner))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("store", type=Path)
    parser.add_argument("task")
    parser.add_argument("--episodes", type=int, default=6)
    parser.add_argument("--horizons", default="10,20")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    horizons = [int(part) for part in arguments.horizons.split(",")]
    study = Study(arguments.store, arguments.task, arguments.episodes, arguments.seed, arguments.out)
    rounds = sorted({shard.key[1] for shard in study.shards})
    print(f"plain replanning: {study.baseline.mean():.4g} over {arguments.episodes} episodes\n")
    print("| variant | plans live | calls saved | MPPI iterations | return | of plain replanning (95 % interval) |")
    print("|---|---|---|---|---|---|")

    two_tower = study.fit("two-tower", study.shards)
    study.at_horizons("two-tower", horizons, two_tower)
    for iterations in (1, 2):
        study.refined(f"two-tower, replans refine in {iterations}", horizons, iterations, two_tower)
    study.gated({f"two-tower behind a gate on {what}": signal for what, signal in GATES.items()}, two_tower)
    study.at_horizons("temporal", horizons, study.fit("temporal", study.shards))
    study.at_horizons("plain distillation, z alone", horizons, study.fit("distilled", study.shards))
    for last in rounds[:-1]:
        few = [shard for shard in study.shards if shard.key[1] <= last]
        study.at_horizons(f"two-tower, data of round {f'1 to {last}' if last > 1 else 1}", horizons, study.fit("two-tower", few))
    study.at_horizons("two-tower, labels: drawn actions", horizons, study.fit("two-tower", study.shards, label="a_teacher"))
    variants: dict[str, Callable[[BaseCorrector], Any]] = {
        "two-tower without the policy prior": lambda network: Masked(network, without_prior),
        "two-tower without the predicted latent": lambda network: Masked(network, without_prediction),
    }
    for name, wrap in variants.items():
        study.at_horizons(name, horizons, study.fit("two-tower", study.shards, wrap))
    study.at_horizons("naive", horizons)
    study.at_horizons("naive, tail held", horizons, course=Course(tail="hold"))
    study.gated({"fixed latent threshold (the published gate)": mismatch, "sensitivity-scaled threshold (training-free)": growth})


if __name__ == "__main__":
    main()
