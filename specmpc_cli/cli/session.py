"""What the commands share: opening the store, saying what was taken, preparing the planner. Loads no torch when imported."""

import time
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specmpc_cli.cli.console import Output
from specmpc_cli.cli.options import Common
from specmpc_cli.errors import ConfigError

if TYPE_CHECKING:
    from specmpc_cli.runtime import Runtime
    from specmpc_cli.workflows.acting import Workbench
    from specmpc_cli.workflows.store import FittedCorrector, Store
    from specmpc_cli.workflows.training import Trainer
    from specmpc_cli.workflows.ways import Way


def output_for(common: Common) -> Output:
    return Output(as_json=common.json, quiet=common.quiet)


def runtime_for(common: Common, out: Output) -> "Runtime":
    """Where this command computes; says what the user should know about it."""
    from specmpc_cli.runtime import choose_runtime

    runtime = choose_runtime(common.device, common.dtype)
    for note in runtime.notes:
        out.note(f"note: {note}")
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # the compiler's advice where fp32 is meant to be fp32
    return runtime


def describe(runtime: "Runtime") -> str:
    """`cpu, fp32, compiled, 2 threads`."""
    from specmpc_cli.workflows.plots import computed_on

    return computed_on(runtime.facts)


def open_store(
    common: Common,
    out: Output,
    task: str | None,
    preset: list[str] | None,
    settings: list[str] | None,
    *,
    also: Sequence[str] = (),
    simulates: bool = True,
) -> tuple["Store", "Workbench"]:
    """The store and a workbench for its teacher; says what it took.

    Args:
        also: sections of the settings that the command reads besides those that decide how a teacher acts.
        simulates: whether it will run the task's environment; what that needs is looked for before anything is kept or compiled.
    """
    from specmpc_cli.config.presets import check_sections
    from specmpc_cli.config.schema import ACTING_SECTIONS
    from specmpc_cli.envs.registry import expect_ready, lookup
    from specmpc_cli.workflows.acting import Workbench
    from specmpc_cli.workflows.store import Store, config_of

    store = Store(common.store, task, common.name)
    teacher = store.teacher()
    check_sections(settings or [], (*ACTING_SECTIONS, *also), "this command")
    config = config_of(teacher, preset or [], settings or [])
    if simulates:
        expect_ready(store.task)
    runtime = runtime_for(common, out)
    bench = Workbench(teacher, lookup(store.task).spec, config, runtime)
    how = "named" if task else "used last" if store.used_before else "default"
    store.claim()
    out.note(f"task: {store.task} ({how}) · teacher: {teacher.source} {teacher.sha256[:8]} · {describe(runtime)}")
    return store, bench


def matching_correctors(out: Output, store: "Store", bench: "Workbench", archs: list[str] | None) -> list["FittedCorrector"]:
    """The correctors that match the teacher, all or those named; says what it took and what it left out."""
    if archs:
        found = [store.corrector(bench.teacher, arch) for arch in dict.fromkeys(archs)]
    else:
        found, notes = store.correctors(bench.teacher)
        for note in notes:
            out.note(f"note: {note}; left out")
    if found:
        out.note("correctors: " + ", ".join(f"{corrector.arch} ({corrector.source})" for corrector in found))
    else:
        out.note(
            "note: no corrector of this teacher, so there are no corrected rows; 'specmpc collect' and 'specmpc fit-corrector' make one"
        )
    return found


def note_ways(out: Output, bench: "Workbench", ways: "Sequence[Way]") -> None:
    """Says how long plans live in adaptive ways, whether the promise behind their gates holds here, and which settings correctors bring."""
    from specmpc_cli.workflows.ways import Mode, broken_promise, own_settings

    for note in dict.fromkeys(filter(None, (own_settings(way, bench.config) for way in ways))):
        out.note(f"note: {note}")
    for way in ways:
        if way.mode is Mode.ADAPTIVE:
            gate = bench.gate(way)
            assert gate is not None
            out.note(f"{way.label}: a plan lives {gate.label}")
            if problem := broken_promise(way, bench.config, bench.runtime.dtype_name):
                out.note(f"note: {problem}")


def parse_horizons(text: str) -> list[int]:
    from specmpc_cli.workflows.ways import check_horizons

    try:
        horizons = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--horizons takes whole numbers separated by commas, such as 1,3,6; got {text!r}") from None
    return check_horizons(horizons)


def envs_for(episodes: int) -> int:
    """Environments stepped side by side."""
    return min(episodes, 10)


def prepare_training(out: Output, trainer: "Trainer") -> None:
    """Makes the first plans and losses, which builds or compiles what they need, and says so."""
    for note in trainer.notes:
        out.note(f"note: {note}")
    if trainer.runtime.prepares:
        _prepare(out, "planner and losses", trainer.runtime, trainer.prepare)


def prepare_acting(out: Output, bench: "Workbench", ways: "Collection[Way]", rows: int) -> None:
    """Makes the first plans of up to `rows` rows, and what else these ways need before they act, and says so."""
    if bench.prepares(ways):
        _prepare(out, "the controller", bench.runtime, lambda: bench.warm_up(ways, rows))


def first_time(runtime: "Runtime") -> str:
    """What a preparation does when it is the first one, or nothing."""
    takes = "one to two minutes" if runtime.device.type == "cuda" else "about half a minute"
    return f"; the first time on a machine this compiles, {takes}" if runtime.prepares else ""


def _prepare(out: Output, what: str, runtime: "Runtime", prepare: Callable[[], str | None]) -> None:
    """Runs a preparation that compiles, and says what it is, how long it took, and what went wrong, if anything."""
    out.note(f"preparing {what}{first_time(runtime)}")
    started = time.perf_counter()
    problem = prepare()
    if problem:
        out.note(f"note: {problem}")
    out.note(f"{what} ready after {time.perf_counter() - started:.0f} s")


def prepare_filming(common: Common, out: Output, video: Path | None, task: str | None) -> None:
    """Checks where a video is to go, settles how it is drawn before any simulator is imported, and draws one frame."""
    if video is None:
        return
    from specmpc_cli.envs.rendering import choose_backend
    from specmpc_cli.workflows.store import Store
    from specmpc_cli.workflows.video import check_drawing, check_video

    check_video(video)
    backend = choose_backend()
    check_drawing(Store(common.store, task, common.name).task)
    out.note(f"video: drawn with {backend} (MUJOCO_GL chooses another: egl, osmesa or glfw)")


def film_ways(out: Output, bench: "Workbench", ways: "list[Way]", seed: int, video: Path) -> None:
    """Films the first `compare` episode in these ways, side by side."""
    from specmpc_cli.runtime import Purpose
    from specmpc_cli.workflows.rollout import Episode
    from specmpc_cli.workflows.video import film

    names = " and ".join(way.label for way in ways)
    with out.progress() as progress:
        bar = progress.add_task(f"filming {names}", total=len(ways) * bench.spec.decisions, state="env steps")
        film(bench, ways, Episode(Purpose.COMPARE, seed, 0), video, on_step=lambda _: progress.advance(bar))
    out.say(f"video:   {video} ({names}, episode 0)")
