"""Videos of episodes: each frame is marked with the decision, the running return and the planner calls saved."""

# An extra, which may not be installed where types are checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from specmpc_cli.envs.adapter import TaskEnv
from specmpc_cli.envs.registry import make_env
from specmpc_cli.envs.rendering import INSTALL
from specmpc_cli.envs.vector import VectorEnv
from specmpc_cli.errors import CannotRender, ConfigError
from specmpc_cli.files import check_destination, replacing
from specmpc_cli.types import Decision
from specmpc_cli.workflows.acting import Workbench
from specmpc_cli.workflows.evaluate import Report
from specmpc_cli.workflows.rollout import Episode, Transition, rollout
from specmpc_cli.workflows.ways import Mode, Way

FORMATS = (".mp4", ".gif")
SIZE = 384  # pixels of a frame's side
_CAPTION = 52  # pixels below it
_FPS = 25
# A GIF holds every other frame, at half the size.
_GIF_EVERY, _GIF_SCALE = 2, 2
# Colour-blind safe (Okabe and Ito): green, orange, vermilion; grey for actors without a gate.
_COLOURS = {Decision.ACCEPT: (0, 158, 115), Decision.CORRECT: (230, 159, 0), Decision.REPLAN: (213, 94, 0)}
_NO_GATE = (120, 120, 120)
_SPECULATIVE = (Mode.NAIVE, Mode.CORRECTED, Mode.ADAPTIVE)


def check_video(path: Path) -> None:
    """Raises ConfigError for an unknown format or a place that cannot be written, before anything runs."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--video writes {' or '.join(FORMATS)}, got {path.name!r}")
    if path.suffix.lower() == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ConfigError("an mp4 needs imageio-ffmpeg; run: pip install 'specmpc[video]', or name a .gif, which needs nothing")
    check_destination(path, "--video")


def check_drawing(task: str) -> None:
    """Draws one frame of the task. Raises CannotRender, with the reason, where this machine cannot."""
    env = make_env(task)
    try:
        env.reset(seed=0)
        _drawn(env)
    finally:
        env.close()


def check_filming(ways: Sequence[Way]) -> None:
    """Raises ConfigError where there is no way to film beside the baseline."""
    if not any(way.mode in _SPECULATIVE for way in ways):
        raise ConfigError("--video films a speculative way beside the baseline, and there is none; name --horizons above 1")


def film(bench: Workbench, ways: Sequence[Way], episode: Episode, path: Path, on_step: Callable[[Transition], None] | None = None) -> None:
    """Plays one episode in each way and writes them side by side; one that ends before the others stands still.

    Raises:
        CannotRender: this machine cannot draw the task.
        StoreError: the file cannot be written; none is left behind.
    """
    films = []
    for way in ways:
        recorder = _Recorder(VectorEnv.make(bench.spec.task, 1), way.label, on_step)
        try:
            rollout(bench.actor(way), recorder.envs, [episode], device=bench.runtime.device, on_step=recorder.step)
        finally:
            recorder.envs.close()
        films.append(recorder.frames)
    with replacing(path) as beside:
        if path.suffix.lower() == ".gif":
            _write_gif(beside, _side_by_side(films))
        else:
            _write_mp4(beside, _side_by_side(films), len(ways) * SIZE, SIZE + _CAPTION)


def most_saving(ways: Sequence[Way], report: Report) -> Way:
    """The way that `compare` films beside the baseline: of those that plan at times, the one that saves most, then returns most."""
    rows = [(row["calls_saved"], row["return_mean"], way) for row, way in zip(report["rows"], ways, strict=True)]
    return max((row for row in rows if row[2].mode in _SPECULATIVE), key=lambda row: row[:2])[2]


@dataclass
class _Recorder:
    """Draws each step of one environment."""

    envs: VectorEnv
    label: str
    on_step: Callable[[Transition], None] | None = None
    frames: list[bytes] = field(default_factory=list)  # JPEG: raw ones of a long episode would fill gigabytes
    episode_return: float = 0.0
    calls: int = 0

    def step(self, transition: Transition) -> None:
        decision = int(transition.log.decision)
        self.episode_return += transition.reward
        self.calls += decision == Decision.REPLAN
        saved = 1 - self.calls / (transition.step + 1)
        name = Decision(decision).name.lower() if decision >= 0 else "no gate"
        lines = (f"{self.label}  ·  {name}", f"return {self.episode_return:.1f}  ·  {saved:.0%} of the calls saved")
        colour = _COLOURS[Decision(decision)] if decision >= 0 else _NO_GATE
        jpeg = io.BytesIO()
        _captioned(_drawn(self.envs.envs[0]), lines, colour).save(jpeg, format="JPEG", quality=95)
        self.frames.append(jpeg.getvalue())
        if self.on_step is not None:
            self.on_step(transition)


def _drawn(env: TaskEnv) -> np.ndarray:
    # Drivers and simulators fail to draw in many ways; all of them mean the same to the user.
    try:
        return env.render(SIZE, SIZE)
    except CannotRender:
        raise
    except Exception as error:  # noqa: BLE001
        reason = " ".join(str(error).split()) or type(error).__name__
        task = env.task_spec.task
        raise CannotRender(f"this machine cannot draw {task} ({reason}); without a screen MuJoCo needs EGL or OSMesa, {INSTALL}") from None


def _captioned(frame: np.ndarray, lines: tuple[str, str], colour: tuple[int, int, int]) -> Image.Image:
    """The frame with two lines of text below it, on a strip whose edge has the decision's colour."""
    image = Image.new("RGB", (SIZE, SIZE + _CAPTION), (24, 24, 24))
    image.paste(Image.fromarray(frame), (0, 0))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, SIZE, SIZE, SIZE + 5), fill=colour)
    for number, line in enumerate(lines):
        draw.text((8, SIZE + 9 + 20 * number), line, font=ImageFont.load_default(15), fill=(240, 240, 240))
    return image


def _side_by_side(films: Sequence[Sequence[bytes]]) -> Iterator[np.ndarray]:
    shown = [film[0] for film in films]
    for frames in zip_longest(*films):
        shown = [last if frame is None else frame for frame, last in zip(frames, shown, strict=True)]
        yield np.concatenate([np.asarray(Image.open(io.BytesIO(frame))) for frame in shown], axis=1)


def _write_mp4(path: Path, frames: Iterator[np.ndarray], width: int, height: int) -> None:
    import imageio_ffmpeg

    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=_FPS, macro_block_size=2, output_params=["-f", "mp4"])
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def _write_gif(path: Path, frames: Iterator[np.ndarray]) -> None:
    images = (Image.fromarray(frame).reduce(_GIF_SCALE) for frame in islice(frames, 0, None, _GIF_EVERY))
    first, *rest = [image.quantize(64, dither=Image.Dither.NONE) for image in images]
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=1000 * _GIF_EVERY // _FPS, loop=0, optimize=True)
