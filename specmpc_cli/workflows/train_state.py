"""What a training continues from: one file of weights, optimisers, counters and metrics, and the replay's append-only shards beside it.

Random states need no saving: every draw of a training is keyed by the seed and a counter (episode and step, or the update's number).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from specmpc_cli.config.presets import validate
from specmpc_cli.config.schema import Config
from specmpc_cli.data.replay import ReplayEpisode, delete_replay_shards, read_replay_shards, write_replay_shard
from specmpc_cli.errors import CheckpointError, ConfigError, StoreError
from specmpc_cli.files import make_folder, stamp, why_unreadable, write_whole

KIND = "specmpc-training"
_METRICS = "metrics.json"  # the tensor of their bytes
KEPT_SECTIONS = ("planner", "train")  # of a config, in a training
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# Settings that change nothing that is learned, so that a training may continue with others.
_FREE = ("config.train.eval_every", "config.train.eval_episodes", "config.train.checkpoint_seconds")
# How it acts may change on the way, and the metrics say when; how it learns may not.
_ACTING = ("config.planner.", "config.train.acting.")


@dataclass(frozen=True, slots=True)
class TrainFacts:
    """What a training is; continuing it needs the same."""

    task: str
    size: int
    seed: int
    num_envs: int
    config: dict[str, Any]  # as `kept_config` gives it
    decisions: int | None = None  # of an episode, which the discount follows; older files say nothing of it

    def differences(self, other: TrainFacts) -> list[str]:
        """`size is 5, was 1` for everything that `other` (the saved training) was begun with and that cannot change."""
        return [line for key, line in self._changed(other) if key not in _FREE and not key.startswith(_ACTING)]

    def acting_changes(self, other: TrainFacts) -> list[str]:
        """The same for what may change: how it acts."""
        return [line for key, line in self._changed(other) if key.startswith(_ACTING)]

    def _changed(self, other: TrainFacts) -> list[tuple[str, str]]:
        mine, theirs = _flat(asdict(self)), _flat(asdict(other))
        keys = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
        if other.decisions is None:
            keys = [key for key in keys if key != "decisions"]
        names = {"decisions": "decisions per episode"}
        return [(key, f"{names.get(key, key)} is {mine.get(key)}, was {theirs.get(key)}") for key in keys]


@dataclass(frozen=True, slots=True)
class Counters:
    """How far a training is."""

    decisions: int = 0
    episodes: int = 0
    updates: int = 0
    seed_decisions: int | None = None  # demonstrated or made at random; None until the seed phase is over
    seconds: float = 0.0  # wall time spent so far


@dataclass(frozen=True, slots=True)
class SavedTraining:
    """A checkpoint of a training, less its tensors and episodes."""

    facts: TrainFacts
    counters: Counters = Counters()
    computed_on: str = ""  # device, dtype, compiled or eager, threads
    metrics: list[dict[str, Any]] = field(default_factory=list)


def kept_config(config: Config) -> dict[str, Any]:
    """The part of a config that a training depends on."""
    return config.model_dump(mode="json", include=set(KEPT_SECTIONS))


class ResumeFolder:
    """<teacher>/resume: `state.safetensors`, and `replay/` with the episodes that it has seen."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def state_file(self) -> Path:
        return self.path / "state.safetensors"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other trainings out inside. Raises ConfigError if one is at work, StoreError if the folder cannot be written."""
        make_folder(self.path)
        try:
            lock = open(self.path / ".lock", "w")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise StoreError(f"cannot write to {self.path}: {error.strerror}; choose another --store") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another 'specmpc train' is at work in {self.path}; wait for it, or use another --name") from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:  # a filesystem without them is no reason not to train
                    raise StoreError(f"cannot lock {lock.name}: {error.strerror}; choose another --store") from None
            yield

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """The same for what is no training and leaves no folder: where there is none, no training is at work."""
        with self.locked() if self.path.exists() else contextlib.nullcontext():
            yield

    def stamp(self) -> tuple[int, int] | None:
        """Tells one checkpoint from the next; None where there is none."""
        return stamp(self.state_file)

    def tidy(self, episodes: int | None) -> None:
        """Deletes what no checkpoint knows: shards from episode `episodes` on, and half-written files; everything if None."""
        if episodes is None:
            self.state_file.unlink(missing_ok=True)
        delete_replay_shards(self.path / "replay", episodes or 0)
        for half in (*self.path.rglob(".*.part"), *self.path.parent.glob(".*.part")):  # the teacher's files lie beside
            half.unlink(missing_ok=True)

    def saved(self) -> SavedTraining | None:
        """The checkpoint that is there; None if there is none. Raises CheckpointError for one that cannot be read."""
        opened = self._open(lambda file: None)
        return opened[0] if opened else None

    def save(self, training: SavedTraining, tensors: Mapping[str, Tensor], new_episodes: list[ReplayEpisode]) -> None:
        """Writes the episodes since the last checkpoint, then the state: a checkpoint is there when its state is."""
        if new_episodes:
            write_replay_shard(self.path / "replay", new_episodes)
        values = asdict(training)
        # As a tensor, because a long training has more of them than the file's header takes.
        metrics = torch.frombuffer(bytearray(json.dumps(values.pop("metrics")).encode()), dtype=torch.uint8)
        kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        write_whole(self.state_file, save({**kept, _METRICS: metrics}, {"kind": KIND, "training": json.dumps(values)}))

    def load(self) -> tuple[SavedTraining, dict[str, Tensor], Iterator[ReplayEpisode]]:
        """The checkpoint, its tensors and all its episodes. Raises CheckpointError; reading the episodes DatasetError."""
        opened = self._open(lambda file: {name: file.get_tensor(name) for name in file.keys() if name != _METRICS})  # noqa: SIM118
        if opened is None:
            raise CheckpointError(f"there is no file {self.state_file}")
        training, tensors = opened
        return training, tensors, read_replay_shards(self.path / "replay", training.counters.episodes)

    def _open(self, read: Any) -> tuple[SavedTraining, Any] | None:
        try:
            open(self.state_file, "rb").close()  # for the reason: safe_open calls whatever it cannot open a missing file
            with safe_open(self.state_file, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("kind") != KIND:
                    raise CheckpointError(f"{self.state_file} is not a training of this program; start over with --fresh")
                training = json.loads(metadata["training"])
                if "metrics" not in training:  # files of before have them here
                    training["metrics"] = json.loads(file.get_tensor(_METRICS).numpy().tobytes())
                return _saved_training(training), read(file)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            if reason := why_unreadable(error):
                raise CheckpointError(f"cannot read {self.state_file}: {reason}; the training goes on once it can be") from None
            raise CheckpointError(f"{self.state_file} is damaged or of another version; start over with --fresh") from None


def _saved_training(values: dict[str, Any]) -> SavedTraining:
    """As it was saved; settings that are newer than it have their defaults."""
    config = kept_config(validate(values["facts"]["config"], "the saved training"))
    facts = TrainFacts(**{**values["facts"], "config": config})
    return SavedTraining(**{**values, "facts": facts, "counters": Counters(**values["counters"])})


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `a.b`: value."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
