"""Replay of whole episodes: a ring in memory, and append-only HDF5 shards from which it is rebuilt. Knows no models and no environments.

An episode of T decisions takes T + 1 rows: row t holds the observation, the action taken there and what followed; the last row holds the
final observation alone. Slices are drawn within one episode, so they never cross an end.
"""

from __future__ import annotations

import contextlib
import io
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from specmpc_cli.errors import DatasetError
from specmpc_cli.files import why_unreadable, write_whole

_COLUMNS = ("obs", "action", "reward", "terminated")


@dataclass(frozen=True, slots=True)
class ReplayEpisode:
    """One finished episode of T decisions; arrays are float32."""

    index: int
    obs: np.ndarray  # [T+1, O]
    action: np.ndarray  # [T, A]
    reward: np.ndarray  # [T]
    terminated: np.ndarray  # [T] 1.0 at the last decision of an episode that terminated

    def __len__(self) -> int:
        return len(self.reward)


class Replay:
    """The newest episodes, as many as fit into `capacity` rows, each in one piece; slices come back on `device`."""

    def __init__(self, obs_dim: int, action_dim: int, capacity: int, device: torch.device, demonstrations: int = 0) -> None:
        """`demonstrations`: the first so many episodes are some. Raises DatasetError if memory for `capacity` decisions cannot be had."""
        self._capacity, self._demonstrations = capacity, demonstrations
        try:
            # Untouched pages cost nothing: a short training fills only the front.
            self._columns = {
                "obs": torch.empty(capacity, obs_dim, device=device),
                "action": torch.empty(capacity, action_dim, device=device),
                "reward": torch.empty(capacity, device=device),
                "terminated": torch.empty(capacity, device=device),
            }
        except RuntimeError:
            raise DatasetError(f"no memory for a replay of {capacity} decisions; lower it with --set train.buffer_size=N") from None
        self._episodes: deque[tuple[int, int, int]] = deque()  # first row, number of decisions and index of each, oldest first
        self._next_row = 0
        self._table: np.ndarray | None = None  # the same as columns; None after an episode was added

    def __len__(self) -> int:
        """Decisions held."""
        return sum(length for _, length, _ in self._episodes)

    def add(self, episode: ReplayEpisode) -> None:
        """Appends an episode; the oldest ones make room."""
        rows = len(episode) + 1
        if rows > self._capacity:
            raise DatasetError(f"an episode of {len(episode)} decisions does not fit a replay of {self._capacity}; raise train.buffer_size")
        if self._next_row + rows > self._capacity:  # an episode stays in one piece: what is left of the ring's end stays empty
            self._evict(self._next_row, self._capacity)
            self._next_row = 0
        start, end = self._next_row, self._next_row + rows
        self._evict(start, end)
        self._columns["obs"][start:end] = torch.from_numpy(episode.obs)
        for name in ("action", "reward", "terminated"):
            self._columns[name][start : end - 1] = torch.from_numpy(getattr(episode, name))
        self._episodes.append((start, len(episode), episode.index))
        self._next_row = end
        self._table = None

    def _evict(self, start: int, end: int) -> None:
        """Forgets the oldest episodes as long as they lie in these rows."""
        while self._episodes and start <= self._episodes[0][0] < end:
            self._episodes.popleft()

    def sample(self, batch_size: int, horizon: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Slices, time-first: obs [H+1, B, O], action [H, B, A], reward [H, B], terminated [H, B]; and demonstrated [B] if some were.

        Episodes are drawn evenly, then the start within each, as the official code does.

        Raises:
            DatasetError: no episode is as long as a slice.
        """
        if self._table is None:
            self._table = np.array(self._episodes, dtype=np.int64).reshape(-1, 3).T
        starts, lengths, indices = self._table
        long_enough = np.flatnonzero(lengths >= horizon)
        if not len(long_enough):
            raise DatasetError(f"no episode in the replay has {horizon} decisions; lower train.horizon")
        drawn = long_enough[rng.integers(len(long_enough), size=batch_size)]
        offset = rng.integers(lengths[drawn] - horizon + 1)
        rows = torch.from_numpy(starts[drawn] + offset) + torch.arange(horizon + 1).unsqueeze(1)  # [H+1, B]
        rows = rows.to(self._columns["obs"].device)
        steps = rows[:-1]
        slices = {"obs": self._columns["obs"][rows], **{name: self._columns[name][steps] for name in _COLUMNS[1:]}}
        if self._demonstrations:
            demonstrated = (indices[drawn] < self._demonstrations).astype(np.float32)
            slices["demonstrated"] = torch.from_numpy(demonstrated).to(rows.device)
        return slices


def write_replay_shard(folder: Path, episodes: Sequence[ReplayEpisode]) -> Path:
    """Writes consecutive episodes as one shard that appears whole. Raises StoreError."""
    first, last = episodes[0].index, episodes[-1].index
    assert [episode.index for episode in episodes] == list(range(first, last + 1))
    path = folder / f"episodes-{first:07d}-{last:07d}.h5"
    # In memory first: on a full disk HDF5 itself would complain on standard error, write_whole raises one clear error.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name in _COLUMNS:
            values = np.concatenate([getattr(episode, name) for episode in episodes])
            file.create_dataset(name, data=values, dtype=np.float32, chunks=True, compression="lzf", fletcher32=True)
        file.create_dataset("decisions", data=[len(episode) for episode in episodes])
        file.attrs["first"] = first
    write_whole(path, buffer.getvalue())
    return path


def read_replay_shards(folder: Path, episodes: int) -> Iterator[ReplayEpisode]:
    """Episodes 0 .. episodes−1 of a folder, in order; shards of later ones are left alone.

    Raises:
        DatasetError: a shard is missing or damaged; it is named.
    """
    found = 0
    for path in sorted(folder.glob("episodes-*.h5")):
        first = _first(path)
        if first >= episodes:
            break
        if first != found:
            raise DatasetError(f"the replay in {folder} lacks episode {found}; the training cannot continue, start over with --fresh")
        for episode in _read_shard(path):
            found += 1
            yield episode
    if found != episodes:
        raise DatasetError(f"the replay in {folder} holds {found} episodes, expected {episodes}; start over with --fresh")


def delete_replay_shards(folder: Path, episodes: int) -> None:
    """Deletes the shards from episode `episodes` on: written after a checkpoint that was never finished."""
    for path in folder.glob("episodes-*.h5"):
        if _first(path) >= episodes:
            path.unlink()


def _first(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _read_shard(path: Path) -> list[ReplayEpisode]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(h5py.File(path, "r"))
            columns = {name: np.asarray(file[name]) for name in _COLUMNS}
            decisions, first = np.asarray(file["decisions"]), int(file.attrs["first"])  # type: ignore[arg-type]
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            if reason := why_unreadable(error):
                raise DatasetError(f"cannot read {path}: {reason}; the training goes on once it can be") from None
            raise DatasetError(f"{path} is damaged; the training cannot continue from it, start over with --fresh") from None
    episodes, row = [], 0
    for number, length in enumerate(decisions.tolist()):
        steps = slice(row, row + length)
        obs = columns["obs"][row + number : row + number + length + 1]
        episodes.append(ReplayEpisode(first + number, obs, *(columns[name][steps] for name in _COLUMNS[1:])))
        row += length
    return episodes
