"""Shards: whole or absent, immutable, merged; and what is said of those that are damaged or foreign."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from specmpc_cli.data import shards as shards_module
from specmpc_cli.data.shards import INDEX, DatasetFacts, ShardWriter, read_columns, read_shards, write_index
from specmpc_cli.data.tuples import TupleDims, stack_rows
from specmpc_cli.errors import DatasetError, StoreError

DIMS = TupleDims(obs_dim=3, action_dim=2, latent_dim=4, horizon=3)
FACTS = DatasetFacts("pointmass", "abc", DIMS, planner={"horizon": 3}, runner={"tail": "policy"})


def columns(rows: int, value: float = 1.0) -> dict[str, np.ndarray]:
    return {name: np.full((rows, *shape), value, np.float32) for name, shape in DIMS.columns().items()}


def write(folder: Path, episodes: list[tuple[int, int]], *, seed: int = 0) -> list[Path]:
    """Shards of (episode, rows), filled with the episode's number."""
    writer = ShardWriter(folder, FACTS, seed=seed, versions={"specmpc": "0"})
    return [writer.write(columns(rows, episode), round_=1, episode=episode, horizon=6) for episode, rows in episodes]


def test_shards_come_back_in_episode_order_with_their_attributes(tmp_path: Path) -> None:
    write(tmp_path, [(2, 5), (0, 3), (1, 4)])
    shards = read_shards(tmp_path)
    assert [shard.key for shard in shards] == [(0, 1, 0), (0, 1, 1), (0, 1, 2)]
    assert [shard.rows for shard in shards] == [3, 4, 5]
    assert {(shard.task, shard.teacher_sha256) for shard in shards} == {("pointmass", "abc")}
    read = read_columns(shards, ["step", "warm_start"])
    assert read["warm_start"].shape == (12, 3, 2) and read["step"].tolist() == [0] * 3 + [1] * 4 + [2] * 5
    with h5py.File(shards[0].path) as file:
        assert set(file) == set(DIMS.columns())
        assert int(file.attrs["horizon"]) == 6
        assert {"schema", "task", "teacher_sha256", "planner", "runner", "seed", "versions", "behaviours"} <= set(file.attrs)
        assert all(file[name].dtype == np.float32 for name in file)


def test_shards_that_were_collected_otherwise_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, [(0, 3)])
    other = replace(FACTS, planner={**FACTS.planner, "iterations": 99})
    ShardWriter(tmp_path, other, seed=1, versions={}).write(columns(3), round_=1, episode=0, horizon=6)
    with pytest.raises(DatasetError, match=r"shard-.*h5 was collected with other settings of planner or speculation than shard-"):
        read_shards(tmp_path)


def test_shards_of_before_a_setting_have_its_default(tmp_path: Path) -> None:
    write(tmp_path, [(0, 3)])
    newer = replace(FACTS, runner={**FACTS.runner, "executes": "drawn", "reroll": False})
    ShardWriter(tmp_path, newer, seed=1, versions={}).write(columns(3), round_=1, episode=0, horizon=6)
    assert len(read_shards(tmp_path)) == 2


def test_the_index_shows_all_shards_as_one(tmp_path: Path) -> None:
    write(tmp_path, [(0, 3), (1, 4)])
    write_index(tmp_path, DIMS)
    moved = tmp_path.parent / "moved"
    os.rename(tmp_path, moved)  # the index names its shards relative to itself
    with h5py.File(moved / INDEX) as index:
        assert index["z"].shape == (7, 4)
        assert index["z"][:, 0].tolist() == [0] * 3 + [1] * 4
        assert list(index.attrs["rows"]) == [3, 4] and list(index.attrs["seed"]) == [0, 0]
        with h5py.File(moved / index.attrs["shards"][0]) as shard:
            for name in ("schema", "task", "teacher_sha256", "planner", "runner"):
                assert index.attrs[name] == shard.attrs[name]
            assert list(index.attrs["behaviours"]) == list(shard.attrs["behaviours"])


def test_a_crash_while_writing_leaves_the_earlier_shards_and_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, FACTS, seed=0, versions={})
    writer.write(columns(3), round_=1, episode=0, horizon=6)
    write = Path.write_bytes

    def fail_midway(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail_midway)
    with pytest.raises(StoreError, match="No space left"):
        writer.write(columns(3), round_=1, episode=1, horizon=6)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 1  # not even a hidden file beside it
    assert [shard.key for shard in read_shards(tmp_path)] == [(0, 1, 0)]
    writer.write(columns(3), round_=1, episode=1, horizon=6)
    assert len(read_shards(tmp_path)) == 2


def test_a_killed_writers_leftovers_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, [(0, 3)])
    (tmp_path / ".shard-dead-00000.h5.4711.part").write_bytes(b"half a shard")
    assert len(read_shards(tmp_path)) == 1


def test_two_writers_share_a_folder_and_an_episode_written_twice_counts_once(tmp_path: Path) -> None:
    write(tmp_path, [(0, 3), (1, 3)])
    write(tmp_path, [(1, 3), (2, 3)])
    write(tmp_path, [(0, 3)], seed=1)
    assert [shard.key for shard in read_shards(tmp_path)] == [(0, 1, 0), (0, 1, 1), (0, 1, 2), (1, 1, 0)]


def test_a_truncated_shard_is_named_with_the_remedy(tmp_path: Path) -> None:
    (path,) = write(tmp_path, [(0, 50)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=f"{path.name} is damaged.*delete it"):
        read_shards(tmp_path)


def test_a_foreign_hdf5_file_is_named(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "shard-x-0.h5", "w") as file:
        file["data"] = [1, 2, 3]
    with pytest.raises(DatasetError, match="another program"):
        read_shards(tmp_path)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    (path,) = write(tmp_path, [(0, 3)])
    with h5py.File(path, "a") as file:
        file.attrs["schema"] = 99
    with pytest.raises(DatasetError, match="has schema 99, this version reads 1"):
        read_shards(tmp_path)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    (path,) = write(tmp_path, [(0, 3)])
    with h5py.File(path, "a") as file:
        del file["a_plan"]
    with pytest.raises(DatasetError, match="lacks the column 'a_plan'"):
        read_columns(read_shards(tmp_path), ["z", "a_plan"])


def test_rows_must_hold_the_whole_schema() -> None:
    row = {name: np.zeros(shape) for name, shape in DIMS.columns().items()}
    assert stack_rows([row, row], DIMS)["warm_start"].shape == (2, 3, 2)
    del row["mismatch"]
    with pytest.raises(AssertionError):
        stack_rows([row], DIMS)


def test_an_index_knows_the_shard_that_another_writer_finished_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [(0, 3)])
    whole = shards_module.write_whole

    def overtaken(path: Path, content: bytes | str) -> None:
        whole(path, content)
        if path.name == INDEX and len(read_shards(tmp_path)) == 1:
            write(tmp_path, [(1, 4)])

    monkeypatch.setattr(shards_module, "write_whole", overtaken)
    assert len(write_index(tmp_path, DIMS)) == 2
    with h5py.File(tmp_path / INDEX) as index:
        assert index["z"].shape == (7, 4)


def test_a_full_disk_is_named_when_the_index_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [(0, 3)])

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match=f"cannot write .*{INDEX}: No space left on device"):
        write_index(tmp_path, DIMS)


def test_shards_of_before_the_horizon_was_written_are_read(tmp_path: Path) -> None:
    (path,) = write(tmp_path, [(0, 3)])
    with h5py.File(path, "r+") as file:
        del file.attrs["horizon"]
    assert [shard.horizon for shard in read_shards(tmp_path)] == [None]


def test_a_shard_that_cannot_be_read_now_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "shard-x-00000.h5").mkdir()
    with pytest.raises(DatasetError, match=r"cannot read .*shard-x-00000.h5: Is a directory; try again"):
        read_shards(tmp_path)
