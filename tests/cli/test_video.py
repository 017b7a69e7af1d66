"""`--video`: the files that are written, what a frame shows, and what is refused before anything runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from specmpc_cli.envs import rendering
from specmpc_cli.envs.pointmass import PointMass
from specmpc_cli.workflows.video import SIZE
from tests.cli.conftest import Command

ORANGE, VERMILION, GREEN, GREY = (230, 159, 0), (213, 94, 0), (0, 158, 115), (120, 120, 120)


def frames(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        found = []
        for number in range(image.n_frames):  # type: ignore[attr-defined]
            image.seek(number)
            found.append(np.asarray(image.convert("RGB")))
    return found


def edge(frame: np.ndarray, column: int = 0) -> tuple[int, ...]:
    """The colour of the strip below the picture, in the middle of a column of a GIF at half size."""
    half = SIZE // 2
    return tuple(frame[half + 1, column * half + half // 2].tolist())


def near(colour: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Equal, but for a GIF's palette."""
    return bool(np.abs(np.subtract(colour, expected)).max() <= 12)


def test_eval_films_the_first_episode_and_marks_each_decision(with_teacher: Command, tmp_path: Path) -> None:
    out = tmp_path / "naive.gif"
    result = with_teacher("eval", "--mode", "naive", "--horizon", "4", "--episodes", "1", "--video", str(out))
    assert result.code == 0 and f"video:   {out} (naive 4, episode 0)" in result.out, result.err
    shown = frames(out)
    assert len(shown) == 20 and shown[0].shape[1] == SIZE // 2  # every other one of 40 decisions
    assert near(edge(shown[0]), VERMILION) and near(edge(shown[1]), GREEN) and near(edge(shown[2]), VERMILION)
    assert (shown[0][SIZE // 2 + 6 :] != shown[1][SIZE // 2 + 6 :]).any()  # the text under it changes


def test_compare_films_the_baseline_beside_the_way_that_saves_most(pipeline: Command, tmp_path: Path) -> None:
    out = tmp_path / "both.gif"
    result = pipeline("compare", "--horizons", "2,5", "--episodes", "1", "--video", str(out))
    assert result.code == 0 and "(baseline and " in result.out and " 5" in result.out.split("(baseline and ")[1], result.err
    second = frames(out)[1]
    assert second.shape[1] == 2 * (SIZE // 2)
    assert near(edge(second), VERMILION) and not near(edge(second, column=1), VERMILION)


def test_a_missed_requirement_costs_no_video(pipeline: Command, tmp_path: Path) -> None:
    out = tmp_path / "missed.gif"
    result = pipeline("compare", "--horizons", "2", "--episodes", "1", "--video", str(out), "--require", "calls_saved>2")
    assert result.code == 3 and out.exists()


def test_the_policy_has_no_gate_to_mark(with_teacher: Command, tmp_path: Path) -> None:
    out = tmp_path / "policy.gif"
    assert with_teacher("eval", "--mode", "policy", "--episodes", "1", "--video", str(out)).code == 0
    assert all(near(edge(frame), GREY) for frame in frames(out))


@pytest.mark.skipif(importlib.util.find_spec("imageio_ffmpeg") is None, reason="needs imageio-ffmpeg: pip install 'specmpc[video]'")
def test_an_mp4_has_all_frames(with_teacher: Command, tmp_path: Path) -> None:
    import imageio_ffmpeg

    out = tmp_path / "policy.mp4"
    assert with_teacher("eval", "--mode", "policy", "--episodes", "1", "--video", str(out)).code == 0
    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(out))
    assert count == 40 and seconds == pytest.approx(40 / 25, abs=0.1)


def test_what_cannot_be_written_is_refused_before_anything_runs(
    with_teacher: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specmpc_cli.workflows.compare.VectorEnv.make", lambda *_: pytest.fail("it ran"))
    for name, message in (
        ("x.avi", "--video writes .mp4 or .gif, got 'x.avi'"),
        ("none/x.gif", "there is no folder"),
        ("", "--video writes .mp4 or .gif"),
    ):
        assert message in with_teacher.fails("eval", "--mode", "policy", "--video", str(tmp_path / name))
        assert message in with_teacher.fails("compare", "--video", str(tmp_path / name))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'specmpc[video]'" in with_teacher.fails("eval", "--mode", "policy", "--video", str(tmp_path / "x.mp4"))
    monkeypatch.undo()
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    assert "no permission to write" in with_teacher.fails("eval", "--mode", "policy", "--video", str(tmp_path / "x.gif"))
    assert not list(tmp_path.iterdir())


def test_a_machine_that_cannot_draw_says_what_to_install(with_teacher: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: PointMass, height: int, width: int) -> np.ndarray:
        raise RuntimeError("an OpenGL platform library\nhas not been loaded")

    monkeypatch.setattr(PointMass, "render", broken)
    result = with_teacher("eval", "--mode", "policy", "--episodes", "1", "--video", str(tmp_path / "x.gif"), "--quiet")
    assert result.code == 2 and "has not been loaded); without a screen MuJoCo needs EGL or OSMesa" in result.err
    assert "Traceback" not in result.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "libraries", "expected"),
    [
        ({"MUJOCO_GL": "osmesa"}, {"EGL"}, "osmesa"),
        ({"DISPLAY": ":0"}, {"EGL"}, "glfw"),
        ({}, {"EGL", "OSMesa"}, "egl"),
        ({}, {"OSMesa"}, "osmesa"),
        ({}, set(), "nothing"),
    ],
)
def test_how_mujoco_draws(environment: dict[str, str], libraries: set[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("ctypes.util.find_library", lambda name: f"lib{name}.so" if name in libraries else None)
    assert rendering.choose_backend() == expected
    monkeypatch.setenv("MUJOCO_GL", "")  # what it set is undone with the test
