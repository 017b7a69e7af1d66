"""What each of the corrector's ideas is worth: leaves one out at a time, fits to the same data, and acts in closed loop.

    python docs/ablation.py STORE TASK [--episodes 6] [--horizons 10,20] [--seed 1] [--out ablation.json]

STORE holds a teacher and data of TASK, with several rounds. Prints a table: return (or success) against plain replanning, on `compare`
episodes of a seed that chose nothing.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specmpc_cli.data.shards import Shard, read_columns
from specmpc_cli.engine.correctors import BaseCorrector, CorrectorDims, build_corrector
from specmpc_cli.engine.gate import GateRule, decide
from specmpc_cli.engine.runner import Judgement, SpeculativeRunner, judge
from specmpc_cli.envs.registry import lookup
from specmpc_cli.envs.vector import VectorEnv
from specmpc_cli.learning.corrector_fit import FitSettings, TupleTable, fit_corrector, split_by_episode
from specmpc_cli.runtime import Purpose, choose_runtime
from specmpc_cli.types import Visit
from specmpc_cli.workflows.acting import Workbench
from specmpc_cli.workflows.evaluate import calls_saved, episodes_of, scores_of
from specmpc_cli.workflows.fit_corrector import load_tuples
from specmpc_cli.workflows.rollout import EpisodeStats, rollout
from specmpc_cli.workflows.statistics import ratio, ratio_ci95
from specmpc_cli.workflows.store import Store, config_of

SETTINGS = ("epochs", "patience", "batch_size", "lr", "weight_decay", "delta_penalty")
FALLBACK_SHARES = (0.5, 0.2, 0.1)  # of a free run's steps, where the training-free gates put their thresholds


class Masked(nn.Module):
    """A corrector that sees only a part of the visit."""

    def __init__(self, corrector: BaseCorrector, mask: Callable[[Visit], Visit]) -> None:
        super().__init__()
        self.corrector, self.mask = corrector, mask
        self.dims, self.arch = corrector.dims, corrector.arch

    def forward(self, visit: Visit) -> tuple[Tensor, Tensor]:
        return self.corrector(self.mask(visit))


def without_prior(visit: Visit) -> Visit:
    return replace(visit, prior=visit.planned)


def without_prediction(visit: Visit) -> Visit:
    return replace(visit, z_pred=visit.z)


def judge_growth(model: Any, corrector: Any, metric: str, limits: Any, *seen: Tensor) -> Judgement:
    """The training-free rule: the mismatch, scaled by how much the dynamics stretch it, ‖f(z, a) − f(z_pred, a)‖."""
    judged = judge(model, corrector, metric, limits, *seen)
    growth = torch.linalg.vector_norm(model.next(judged.z, judged.planned) - model.next(judged.z_pred, judged.planned), dim=-1)
    growth = growth.masked_fill(seen[-1], torch.nan)
    decision, reason = decide(growth, torch.zeros_like(growth), seen[3], seen[-1], limits)
    return judged._replace(mismatch=growth, decision=decision, reason=reason)


class Study:
    """One task's teacher, data and paired episodes."""

    def __init__(self, store: Path, task: str, episodes: int, seed: int) -> None:
        place = Store(store, task)
        teacher = place.teacher()
        self.bench = Workbench(teacher, lookup(task).spec, config_of(teacher, [], []), choose_runtime())
        self.shards = place.newest_dataset(teacher)
        self.episodes = {purpose: episodes_of(purpose, seed, episodes) for purpose in (Purpose.COMPARE, Purpose.TUNE)}
        self.envs = VectorEnv.make(task, min(episodes, 10))
        self.rows: list[dict[str, Any]] = []
        self.baseline = scores_of(self.run(GateRule(1)), self.bench.spec.has_success)

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
        runner = SpeculativeRunner(self.bench.model, self.bench.planner, rule, corrector, history=history, **options)
        return rollout(runner, self.envs, self.episodes[purpose], device=self.bench.runtime.device)

    def add(self, name: str, setting: str, stats: list[EpisodeStats]) -> None:
        score, saved = scores_of(stats, self.bench.spec.has_success), calls_saved(stats)
        kept, interval = ratio(score, self.baseline), ratio_ci95(score, self.baseline)
        self.rows.append({"variant": name, "setting": setting, "calls_saved": saved, "mean": score.mean(), "kept": kept, "ci95": interval})
        share = f"{kept:.1%} ({interval[0]:.1%} to {interval[1]:.1%})" if kept is not None and interval is not None else "–"
        print(f"| {name} | {setting} | {saved:.1%} | {score.mean():.3g} | {share} |", flush=True)

    def at_horizons(self, name: str, horizons: Sequence[int], corrector: Any = None, **options: Any) -> None:
        accept = math.inf if corrector is None else -math.inf
        for horizon in horizons:
            self.add(name, f"{horizon} steps", self.run(GateRule(horizon, accept_below=accept), corrector, **options))

    def gated(self, name: str, **options: Any) -> None:
        """Naive reuse of at most 20 steps behind a gate; its thresholds come from what a free run meets on `tune` episodes."""
        free = self.run(GateRule(20, accept_below=math.inf), purpose=Purpose.TUNE, **options)
        values = [value for stat in free for value in stat.mismatches if math.isfinite(value)]
        for threshold in np.quantile(values, [1 - share for share in FALLBACK_SHARES]):
            rule = GateRule(20, accept_below=float(threshold), replan_above=float(threshold))
            self.add(name, f"threshold {threshold:.3g}", self.run(rule, **options))


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
    study = Study(arguments.store, arguments.task, arguments.episodes, arguments.seed)
    rounds = sorted({shard.key[1] for shard in study.shards})
    print(f"plain replanning: {study.baseline.mean():.4g} over {arguments.episodes} episodes\n")
    print("| variant | plans live | calls saved | return | of plain replanning (95 % interval) |\n|---|---|---|---|---|")

    study.at_horizons("two-tower", horizons, study.fit("two-tower", study.shards))
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
    study.at_horizons("naive, tail held", horizons, tail="hold")
    study.gated("fixed latent threshold (the published gate)")
    study.gated("sensitivity-scaled threshold (training-free)", judge=judge_growth)
    if arguments.out:
        facts = {"task": arguments.task, "episodes": arguments.episodes, "seed": arguments.seed, "baseline": study.baseline.tolist()}
        arguments.out.write_text(json.dumps({**facts, "rows": study.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
