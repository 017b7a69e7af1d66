"""The commands about tasks and teachers: tasks, import, export, train."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from specmpc_cli.cli.options import Common, PresetOption, SetOption, TaskOption, common_options, is_given, repeated
from specmpc_cli.cli.session import describe, output_for, prepare_training, runtime_for
from specmpc_cli.errors import ConfigError


@common_options
def tasks(
    common: Common,
    suite: Annotated[str | None, typer.Option(help="Only this suite.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Build, reset and step every installed task.")] = False,
) -> None:
    """List the tasks, and check that they run."""
    from specmpc_cli.cli.tables import tasks_table
    from specmpc_cli.workflows.list_tasks import list_tasks

    out = output_for(common)
    with out.progress() as progress:
        bar = progress.add_task("tasks", total=None, state="", visible=check)
        report = list_tasks(suite, check=check, on_task=lambda task: progress.update(bar, advance=1, state=task))
    out.table(tasks_table(report["tasks"], check))
    out.document(report)
    failed = [task["task"] for task in report["tasks"] if task["ok"] is False]
    if failed:
        raise ConfigError(f"{len(failed)} of {len(report['tasks'])} tasks failed: {', '.join(failed)}")


@common_options
def import_(
    common: Common,
    file: Annotated[Path, typer.Argument(help="An official TD-MPC2 checkpoint (.pt).")],
    task: TaskOption = None,
    task_set: Annotated[str | None, typer.Option(help="mt30 or mt80, for multi-task files; --task names the member.")] = None,
) -> None:
    """Import an official TD-MPC2 checkpoint as a task's teacher."""
    from specmpc_cli.workflows.import_teacher import import_teacher
    from specmpc_cli.workflows.store import Store

    out = output_for(common)
    store = Store(common.store, task, common.name)
    report = import_teacher(store, file, task_set=task_set)
    store.claim()
    out.say(f"imported a {report.parameters / 1e6:.1f} M teacher for {report.task} ({report.sha256[:8]}) into {report.path}")
    out.document({"schema": 1, "task": report.task, "path": str(report.path), "sha256": report.sha256, "dims": report.dims})


@common_options
def export(
    common: Common,
    task: TaskOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="The file to write; TASK.pt in the current folder if left out.")] = None,
) -> None:
    """Export a task's teacher as an official TD-MPC2 checkpoint."""
    from specmpc_cli.workflows.export_teacher import export_teacher
    from specmpc_cli.workflows.store import Store

    terminal = output_for(common)
    report = export_teacher(Store(common.store, task, common.name), out)
    terminal.say(f"exported the {report.source} teacher of {report.task} ({report.sha256[:8]}) to {report.path}")
    terminal.document({"schema": 1, "task": report.task, "path": str(report.path), "sha256": report.sha256, "source": report.source})


@common_options
def train(
    common: Common,
    context: typer.Context,
    task: TaskOption = None,
    size: Annotated[int | None, typer.Option(help="Millions of parameters: 1, 5, 19, 48 or 317; 1 if left out.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Decisions to train for, those already made included.")] = 100_000,
    num_envs: Annotated[int | None, typer.Option(min=1, max=1024, help="Environments that act side by side; 1 if left out.")] = None,
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--fresh", help="Insist on continuing, or begin anew; left out, it continues if it can."),
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard files.")] = False,
    preset: PresetOption = None,
    set_: SetOption = None,
) -> None:
    """Train a TD-MPC2 world model as a task's teacher."""
    from specmpc_cli.cli.progress import TrainingDisplay, show_report
    from specmpc_cli.workflows.store import Store
    from specmpc_cli.workflows.tensorboard import TensorBoardLog
    from specmpc_cli.workflows.train import begin_training, training_report

    out = output_for(common)
    store = Store(common.store, task, common.name)
    trainer = begin_training(
        store,
        runtime_for(common, out),
        steps=steps,
        seed=common.seed if is_given(context, "seed") else None,
        size=size,
        num_envs=num_envs,
        presets=preset or [],
        settings=set_ or [],
        resume=resume,
    )
    again = ["specmpc", "train", "--task", store.task, "--resume", "--steps", str(steps)]
    again += repeated(common, "store", "name", "device", "dtype")
    again += [part for option, values in (("--preset", preset), ("--set", set_)) for value in values or [] for part in (option, value)]
    trainer.again = shlex.join([*again, *(["--tensorboard"] if tensorboard else [])])
    begun = trainer.counters.decisions
    how = f"continues after {begun} decisions" if begun else "begins anew"
    out.note(f"task: {store.task} · {trainer.facts.size}M model · {describe(trainer.runtime)} · {how}")
    log = TensorBoardLog(store.folder / "teacher" / "tensorboard", begun) if tensorboard else None
    if begun < steps:
        prepare_training(out, trainer)
    else:
        out.note("nothing to do: it has these decisions already; ask for more --steps, or begin anew with --fresh")
    display = TrainingDisplay(out, trainer, steps)
    with display.running():
        trainer.run(steps, display.watcher(log))
    report = training_report(trainer, store)
    show_report(out, report)
    out.document(report)
