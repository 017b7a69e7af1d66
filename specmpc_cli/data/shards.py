"""A dataset is a folder of immutable HDF5 shards, each of whole episodes, with `index.h5`, a virtual dataset over them.

Shards appear whole, so a killed writer loses at most the shard it was writing. Several processes may write to one folder: each names its
own shards, and an episode that two of them wrote counts once.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from specmpc_cli.data.tuples import SCHEMA_VERSION, Behaviour, TupleDims
from specmpc_cli.errors import DatasetError
from specmpc_cli.files import make_folder, why_unreadable, write_whole
from specmpc_cli.types import DEFAULT_COURSE

INDEX = "index.h5"
_INDEX_TRIES = 3
EpisodeKey = tuple[int, int, int]  # seed, round, episode


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """What all shards of a dataset agree on."""

    task: str
    teacher_sha256: str
    dims: TupleDims
    planner: Mapping[str, Any]
    runner: Mapping[str, Any]

    def attributes(self) -> dict[str, Any]:
        return _common_attributes(self.task, self.teacher_sha256, self.planner, self.runner)


def _common_attributes(task: str, teacher_sha256: str, planner: Mapping[str, Any], runner: Mapping[str, Any]) -> dict[str, Any]:
    """What shards and index say of the dataset."""
    return {
        "schema": SCHEMA_VERSION,
        "task": task,
        "teacher_sha256": teacher_sha256,
        "planner": json.dumps(dict(planner), sort_keys=True),
        "runner": json.dumps(dict(runner), sort_keys=True),
        "behaviours": [behaviour.name.lower() for behaviour in Behaviour],
    }


@dataclass(frozen=True, slots=True)
class Shard:
    """One readable shard."""

    path: Path
    task: str
    teacher_sha256: str
    key: EpisodeKey
    rows: int
    horizon: int | None  # env steps per plan; older shards say nothing of it
    planner: dict[str, Any]  # settings of the planner that labelled it
    runner: dict[str, Any]  # how plans were executed: the `speculation` settings

    @property
    def settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of planner and speculation, those included that are newer than the shard."""
        return self.planner, {**asdict(DEFAULT_COURSE), **self.runner}


class ShardWriter:
    """Writes one shard per episode."""

    def __init__(self, folder: Path, facts: DatasetFacts, *, seed: int, versions: Mapping[str, str]) -> None:
        make_folder(folder)
        self._folder = folder
        self._facts = facts
        self._seed = seed
        self._versions = json.dumps(dict(versions), sort_keys=True)
        self._writer = uuid.uuid4().hex[:8]
        self._count = 0

    def write(self, columns: Mapping[str, np.ndarray], *, round_: int, episode: int, horizon: int) -> Path:
        """Writes an episode's columns [rows, ...] as the next shard.

        Args:
            episode: its number within the round; the column `episode` has the one that names its environment seed.
            horizon: env steps per plan.
        """
        path = self._folder / f"shard-{self._writer}-{self._count:05d}.h5"
        buffer = io.BytesIO()  # on a full disk HDF5 itself would complain on standard error
        with h5py.File(buffer, "w") as file:
            for name, values in columns.items():
                file.create_dataset(name, data=values, dtype=np.float32, chunks=True, compression="lzf", fletcher32=True)
            for name, value in self._facts.attributes().items():
                file.attrs[name] = value
            for name, value in {"seed": self._seed, "round": round_, "episode": episode, "horizon": horizon}.items():
                file.attrs[name] = value
            file.attrs["versions"] = self._versions
        write_whole(path, buffer.getvalue())
        self._count += 1
        return path


def read_shards(folder: Path) -> list[Shard]:
    """The dataset's shards in order of (seed, round, episode), each episode once.

    Raises:
        DatasetError: a shard is damaged, foreign, of another schema or collected in another way than the others; it is named.
    """
    shards: dict[EpisodeKey, Shard] = {}
    for path in sorted(folder.glob("shard-*.h5")):
        shard = _inspect(path)
        first = next(iter(shards.values()), shard)
        if shard.settings != first.settings:
            raise DatasetError(
                f"{path} was collected with other settings of planner or speculation than {first.path.name}, and a dataset has one of "
                "each; remove one of them"
            )
        shards.setdefault(shard.key, shard)
    return [shards[key] for key in sorted(shards)]


def _inspect(path: Path) -> Shard:
    try:
        with h5py.File(path, "r") as file:
            attrs: dict[str, Any] = dict(file.attrs)
            if int(attrs["schema"]) != SCHEMA_VERSION:
                raise DatasetError(f"{path} has schema {attrs['schema']}, this version reads {SCHEMA_VERSION}; collect again")
            key = (int(attrs["seed"]), int(attrs["round"]), int(attrs["episode"]))
            planner, runner = json.loads(attrs["planner"]), json.loads(attrs["runner"])
            task, teacher, rows = str(attrs["task"]), str(attrs["teacher_sha256"]), len(_column(file, "z"))
            horizon = int(attrs["horizon"]) if "horizon" in attrs else None
            return Shard(path, task, teacher, key, rows, horizon, planner, runner)
    except (OSError, RuntimeError) as error:
        raise _unreadable(path, error) from None
    except (KeyError, TypeError, ValueError):
        raise DatasetError(f"{path} is an HDF5 file of another program, not a specmpc shard; remove it from the dataset") from None


def read_columns(shards: Sequence[Shard], names: Sequence[str]) -> dict[str, np.ndarray]:
    """These columns of these shards, one after the other, [rows, ...]. Raises DatasetError for a damaged or incomplete shard."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for shard in shards:
        try:
            with h5py.File(shard.path, "r") as file:
                for name in names:
                    parts[name].append(_column(file, name)[:])
        except KeyError as error:
            raise DatasetError(f"{shard.path} lacks the column {error}; delete it and collect again") from None
        except (OSError, RuntimeError) as error:
            raise _unreadable(shard.path, error) from None
    return {name: np.concatenate(values) for name, values in parts.items()}


def _unreadable(path: Path, error: Exception) -> DatasetError:
    """What to raise."""
    if reason := why_unreadable(error):
        return DatasetError(f"cannot read {path}: {reason}; try again once it can be")
    return DatasetError(f"{path} is damaged or truncated; delete it, and 'specmpc collect' makes its episode again")


def _column(file: h5py.File, name: str) -> h5py.Dataset:
    column = file.get(name)
    if not isinstance(column, h5py.Dataset):
        raise KeyError(name)
    return column


def write_index(folder: Path, dims: TupleDims) -> list[Shard]:
    """Rebuilds `index.h5` if there are shards: every column as one virtual dataset over them, which it names relative to itself.

    Returns:
        The shards in it.
    """
    shards, written = read_shards(folder), []
    for _ in range(_INDEX_TRIES):
        if shards == written:
            break
        write_whole(folder / INDEX, _index_of(shards, dims))
        # Another writer may have come between, and our older index may have replaced its newer one.
        written, shards = shards, read_shards(folder)
    return written


def _index_of(shards: Sequence[Shard], dims: TupleDims) -> bytes:
    """The index of these shards, as a file's content."""
    total = sum(shard.rows for shard in shards)
    buffer = io.BytesIO()  # as in `ShardWriter.write`
    with h5py.File(buffer, "w", libver="latest") as index:
        for name, shape in dims.columns().items():
            layout = h5py.VirtualLayout(shape=(total, *shape), dtype=np.float32)
            start = 0
            for shard in shards:
                layout[start : start + shard.rows] = h5py.VirtualSource(shard.path.name, name, shape=(shard.rows, *shape))
                start += shard.rows
            index.create_virtual_dataset(name, layout)
        first = shards[0]
        index.attrs.update(_common_attributes(first.task, first.teacher_sha256, first.planner, first.runner))
        index.attrs["shards"] = [shard.path.name for shard in shards]
        index.attrs["rows"] = [shard.rows for shard in shards]
        index.attrs["seed"] = [shard.key[0] for shard in shards]
    return buffer.getvalue()
