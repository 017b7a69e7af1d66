"""The replay ring, its sampling and its shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from specmpc_cli.data.replay import Replay, ReplayEpisode, delete_replay_shards, write_replay_shard
from specmpc_cli.data.replay import read_replay_shards as iterate_replay_shards
from specmpc_cli.errors import DatasetError

CPU = torch.device("cpu")


def read_replay_shards(folder: Path, episodes: int) -> list[ReplayEpisode]:
    return list(iterate_replay_shards(folder, episodes))


def make_episode(index: int, decisions: int = 5, *, terminated: bool = False) -> ReplayEpisode:
    """An episode whose every number tells where it belongs: 1000·episode + step."""
    steps = (1000 * index + np.arange(decisions + 1)).astype(np.float32)
    ends = np.zeros(decisions, dtype=np.float32)
    ends[-1] = terminated
    return ReplayEpisode(index, np.stack([steps, -steps], 1), steps[:-1, None] / 2, steps[:-1] / 4, ends)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def filled(count: int, capacity: int = 1000, decisions: int = 5) -> Replay:
    replay = Replay(2, 1, capacity, CPU)
    for index in range(count):
        replay.add(make_episode(index, decisions))
    return replay


def test_slices_are_consecutive_steps_of_one_episode() -> None:
    slices = filled(7).sample(256, 3, rng())
    steps = slices["obs"][..., 0]
    assert slices["obs"].shape == (4, 256, 2) and slices["reward"].shape == (3, 256) and slices["action"].shape == (3, 256, 1)
    assert torch.equal(steps[1:] - steps[:-1], torch.ones(3, 256))
    assert torch.equal(torch.floor(steps[0] / 1000), torch.floor(steps[-1] / 1000))
    assert torch.equal(slices["action"][..., 0], steps[:-1] / 2) and torch.equal(slices["reward"], steps[:-1] / 4)


def test_every_start_of_every_episode_is_drawn_and_the_final_observation_too() -> None:
    steps = filled(3).sample(2000, 3, rng())["obs"][..., 0]
    assert {int(value) for value in steps[0]} == {1000 * episode + start for episode in range(3) for start in range(3)}
    assert 2005 in steps[-1]


def test_episodes_are_drawn_evenly_whatever_their_length() -> None:
    replay = Replay(2, 1, 1000, CPU)
    replay.add(make_episode(0, 4))
    replay.add(make_episode(1, 400))
    starts = replay.sample(4000, 3, rng())["obs"][0, :, 0]
    assert 0.45 < float((starts < 1000).float().mean()) < 0.55


def test_termination_stays_with_its_step() -> None:
    replay = Replay(2, 1, 100, CPU)
    replay.add(make_episode(0, 4, terminated=True))
    slices = replay.sample(200, 2, rng())
    assert torch.equal(slices["terminated"] == 1, slices["obs"][:-1, :, 0] == 3)


@pytest.mark.parametrize("capacity", [18, 20, 23])
def test_the_oldest_episodes_make_room(capacity: int) -> None:
    replay = filled(11, capacity)  # rows of 6 each: three fit
    starts = replay.sample(500, 3, rng())["obs"][0, :, 0]
    assert {int(start) // 1000 for start in starts} == {8, 9, 10}
    assert len(replay) == 15


def test_episodes_of_different_lengths_never_overlap_in_the_ring() -> None:
    replay, generator = Replay(2, 1, 61, CPU), rng(1)
    for index in range(200):
        replay.add(make_episode(index, int(generator.integers(3, 25))))
        steps = replay.sample(64, 3, generator)["obs"][..., 0]
        assert torch.equal(steps[1:] - steps[:-1], torch.ones(3, 64)), index


def test_too_short_or_too_long_episodes_are_refused() -> None:
    with pytest.raises(DatasetError, match="no episode in the replay has 3 decisions"):
        filled(2, decisions=2).sample(4, 3, rng())
    with pytest.raises(DatasetError, match="does not fit a replay of 5"):
        filled(1, capacity=5)


def test_shards_bring_back_the_same_episodes(tmp_path: Path) -> None:
    episodes = [make_episode(index, 3 + index, terminated=index == 1) for index in range(5)]
    write_replay_shard(tmp_path, episodes[:2])
    write_replay_shard(tmp_path, episodes[2:])
    for before, after in zip(episodes, read_replay_shards(tmp_path, 5), strict=True):
        assert before.index == after.index
        for name in ("obs", "action", "reward", "terminated"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


def test_shards_written_after_the_checkpoint_are_not_read_and_can_be_deleted(tmp_path: Path) -> None:
    write_replay_shard(tmp_path, [make_episode(0)])
    late = write_replay_shard(tmp_path, [make_episode(1)])
    assert len(read_replay_shards(tmp_path, 1)) == 1 and late.exists()
    delete_replay_shards(tmp_path, 1)
    assert len(read_replay_shards(tmp_path, 1)) == 1 and not late.exists()


def test_a_gap_or_a_damaged_shard_is_named(tmp_path: Path) -> None:
    first = write_replay_shard(tmp_path, [make_episode(0)])
    write_replay_shard(tmp_path, [make_episode(1)])
    with pytest.raises(DatasetError, match="holds 2 episodes, expected 3"):
        read_replay_shards(tmp_path, 3)
    data = bytearray(first.read_bytes())
    first.write_bytes(data[: len(data) // 2])
    with pytest.raises(DatasetError, match=f"{first.name} is damaged"):
        read_replay_shards(tmp_path, 2)
    first.unlink()
    with pytest.raises(DatasetError, match="lacks episode 0"):
        read_replay_shards(tmp_path, 2)
