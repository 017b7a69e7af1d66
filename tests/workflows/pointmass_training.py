"""Small trainings on pointmass, and how to kill, read and compare them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from specmpc_cli.data.replay import read_replay_shards
from specmpc_cli.runtime import choose_runtime
from specmpc_cli.workflows.store import Store
from specmpc_cli.workflows.train import begin_training
from specmpc_cli.workflows.train_log import Progress
from specmpc_cli.workflows.training import Trainer

SMALL = [
    "train.seed_steps=80", "train.seed_updates=4", "train.updates_per_decision=0.25", "train.batch_size=8", "train.eval_every=120",
    "train.eval_episodes=1", "train.checkpoint_seconds=0", "planner.num_samples=16", "planner.num_elites=4", "planner.num_pi_trajs=4",
    "planner.iterations=1",
]  # fmt: skip
TINY = {"enc_dim": 32, "num_enc_layers": 2, "mlp_dim": 32, "latent_dim": 16, "num_q": 2}
STEPS = 200  # five episodes of 40 decisions, two of them random


class Killed(Exception):
    """Stands for a kill at any moment."""


def kill_at(decision: int) -> Callable[[Progress], None]:
    """A watcher's callback that ends the training there."""

    def kill(progress: Progress) -> None:
        if progress.decisions >= decision:
            raise Killed

    return kill


def begin(root: Path, **options: Any) -> Trainer:
    options = {"steps": STEPS, "seed": 0, "settings": SMALL, **options}
    return begin_training(Store(root, "pointmass"), choose_runtime("cpu", "fp32"), **options)


def teacher(root: Path) -> Path:
    return root / "pointmass" / "main" / "teacher"


def lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (teacher(root) / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(root: Path, straight: Path, episodes: int = STEPS // 40) -> None:
    """Weights, optimisers, counters, replay and metrics agree to the last bit."""
    for folder in ("resume/state.safetensors", "model.safetensors"):
        expected, found = learnt(teacher(straight) / folder), learnt(teacher(root) / folder)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    replays = [list(read_replay_shards(teacher(path) / "resume" / "replay", episodes)) for path in (straight, root)]
    for one, other in zip(*replays, strict=True):
        for name in ("obs", "action", "reward", "terminated"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    expected, found = ([{k: v for k, v in line.items() if k != "seconds"} for line in lines(path)] for path in (straight, root))
    assert expected == found


def learnt(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, less the metrics, which have wall times."""
    return {name: value for name, value in load_file(file).items() if name != "metrics.json"}


def same_weights(one: Path, other: Path, file: str = "model.safetensors") -> bool:
    """Whether two teachers' files hold the same tensors."""
    found, expected = learnt(teacher(one) / file), learnt(teacher(other) / file)
    return all(torch.equal(expected[name], found[name]) for name in expected)
