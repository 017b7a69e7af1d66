"""What a training continues from: one file of weights, optimiser and counters, and the replay's append-only shards beside it.

Random states need no saving: every draw of a training is keyed by the seed and a counter (episode and step, or the update's number).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from specmpc_cli.config.presets import validate
from specmpc_cli.config.schema import Config
from specmpc_cli.data.replay import ReplayEpisode, read_replay_shards, write_replay_shard
from specmpc_cli.errors import CheckpointError
from specmpc_cli.files import write_whole

KIND = "specmpc-training"


def kept_config(config: Config) -> dict[str, Any]:
    """The part of a config that a training depends on."""
    return config.model_dump(mode="json", include={"planner", "train"})


@dataclass(frozen=True, slots=True)
class TrainFacts:
    """What a training is; continuing it needs the same."""

    task: str
    size: int
    seed: int
    num_envs: int
    config: dict[str, Any]

    def differences(self, other: TrainFacts) -> list[str]:
        """`size is 5, was 1` for everything in which `other` (the saved training) differs."""
        mine, theirs = _flat(asdict(self)), _flat(asdict(other))
        keys = sorted(mine.keys() | theirs.keys())
        return [f"{key} is {mine.get(key)}, was {theirs.get(key)}" for key in keys if mine.get(key) != theirs.get(key)]


@dataclass(frozen=True, slots=True)
class Counters:
    """How far a training is."""

    decisions: int = 0
    episodes: int = 0
    updates: int = 0
    seed_decisions: int | None = None  # decisions made at random; None until the seed phase is over
    seconds: float = 0.0  # wall time spent so far


@dataclass(frozen=True, slots=True)
class SavedTraining:
    """A checkpoint of a training: its facts, and how far it was."""

    facts: TrainFacts
    counters: Counters


class ResumeFolder:
    """<teacher>/resume: `state.safetensors`, and `replay/` with the episodes that it has seen."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def state_file(self) -> Path:
        return self.path / "state.safetensors"

    def clear(self) -> None:
        """Forgets what is there."""
        self.state_file.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def saved(self) -> SavedTraining | None:
        """The checkpoint that is there; None if there is none. Raises CheckpointError for a damaged one."""
        return self._open(lambda file: None)[0] if self.state_file.exists() else None

    def save(self, training: SavedTraining, tensors: Mapping[str, Tensor], new_episodes: list[ReplayEpisode]) -> None:
        """Writes the episodes since the last checkpoint, then the state: a checkpoint is there when its state is."""
        if new_episodes:
            write_replay_shard(self.path / "replay", new_episodes)
        metadata = {"kind": KIND, "facts": json.dumps(asdict(training.facts)), "counters": json.dumps(asdict(training.counters))}
        write_whole(self.state_file, save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata))

    def load(self) -> tuple[SavedTraining, dict[str, Tensor], list[ReplayEpisode]]:
        """The checkpoint, its tensors and all its episodes. Raises CheckpointError or DatasetError for a damaged one."""
        training, tensors = self._open(lambda file: {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
        return training, tensors, read_replay_shards(self.path / "replay", training.counters.episodes)

    def _open(self, read: Any) -> tuple[SavedTraining, Any]:
        try:
            with safe_open(self.state_file, framework="pt") as file:
                metadata = file.metadata() or {}
                training = SavedTraining(_facts(json.loads(metadata["facts"])), Counters(**json.loads(metadata["counters"])))
                return training, read(file)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            raise CheckpointError(f"{self.state_file} is damaged; start over with --fresh") from None


def _facts(values: dict[str, Any]) -> TrainFacts:
    """Facts as they were saved; settings that are newer than they have their defaults."""
    return TrainFacts(**{**values, "config": kept_config(validate(values["config"], "the saved training"))})


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b`: value."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
