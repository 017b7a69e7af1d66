"""The `specmpc` command. Importing this module loads no torch: each command imports its workflow when it runs."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from specmpc_cli import __version__
from specmpc_cli.cli.console import print_error
from specmpc_cli.cli.options import (
    AcceptBelowOption,
    ArchOption,
    Common,
    EpisodesOption,
    PresetOption,
    ReplanAboveOption,
    RequireOption,
    SetOption,
    TaskOption,
    common_options,
)
from specmpc_cli.cli.session import (
    describe,
    envs_for,
    matching_correctors,
    open_store,
    output_for,
    parse_horizons,
    prepare_planner,
    prepare_training,
    runtime_for,
)
from specmpc_cli.errors import ConfigError, GateFailed, Interrupted, SpecMPCError

if TYPE_CHECKING:
    from specmpc_cli.data.shards import Shard
    from specmpc_cli.learning.corrector_fit import Epoch
    from specmpc_cli.workflows.store import FittedCorrector


_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # Typer exports no other name for it


class _Group(TyperGroup):
    """Turns errors that a user can mend into one red line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GateFailed as error:
            print_error(str(error))
            raise typer.Exit(3) from None
        except _UsageError as error:
            print_error(f"{error.format_message()} (see 'specmpc {ctx.invoked_subcommand or ''} --help')")  # type: ignore[attr-defined]
            raise typer.Exit(2) from None
        except Interrupted as error:
            print_error(str(error))
            raise typer.Exit(130) from None
        except SpecMPCError as error:
            print_error(str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print_error("interrupted; files written so far are whole, and the same command continues or starts over")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"specmpc {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Version.")] = False,
) -> None:
    """World-model control at a fraction of the planning cost: TD-MPC2 with speculative planning."""


@app.command()
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


@app.command("import")
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


@app.command()
@common_options
def train(
    common: Common,
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
        seed=common.seed,
        size=size,
        num_envs=num_envs,
        presets=preset or [],
        settings=set_ or [],
        resume=resume,
    )
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


@app.command()
@common_options
def collect(
    common: Common,
    task: TaskOption = None,
    episodes: Annotated[int, typer.Option(help="Episodes per round.")] = 10,
    rounds: Annotated[int, typer.Option(help="Rounds; from the second on the current corrector acts (DAgger).")] = 1,
    arch: Annotated[str, typer.Option(help="Corrector that acts from round 2 on: two-tower or temporal.")] = "two-tower",
    preset: PresetOption = None,
    set_: SetOption = None,
) -> None:
    """Run the teacher and label every step with what a fresh plan would do."""
    from specmpc_cli.workflows.acting import check_archs
    from specmpc_cli.workflows.collect import collect as run
    from specmpc_cli.workflows.fit_corrector import as_corrector
    from specmpc_cli.workflows.fit_corrector import fit as fit_network

    out = output_for(common)
    check_archs([arch])
    store, bench = open_store(common, out, task, preset, set_)
    with out.progress() as progress:
        bar = progress.add_task("round 1", total=None, state="")

        def begin_round(round_: int, missing: int) -> None:
            if missing:
                prepare_planner(out, bench)
            progress.reset(bar, total=missing * bench.spec.decisions, description=f"round {round_}", state="env steps")

        def fit(shards: "list[Shard]") -> "FittedCorrector":
            progress.update(bar, state=f"fitting {arch}")
            corrector = as_corrector(bench, fit_network(bench, arch, shards, seed=common.seed))
            progress.update(bar, state="env steps")
            return corrector

        report = run(
            store,
            bench,
            episodes=episodes,
            rounds=rounds,
            seed=common.seed,
            fit=fit,
            on_step=lambda: progress.advance(bar),
            on_round=begin_round,
        )
    if report.new_episodes == 0:
        out.note("nothing to do: the dataset has these episodes already; ask for more --episodes or --rounds, or another --seed")
    for group, returns in report.returns.items():
        out.note(f"{group} steps per plan: mean return {sum(returns) / len(returns):.1f} over {len(returns)} episodes")
    out.say(f"{report.rows} rows from {report.episodes} episodes ({report.new_episodes} new) in {report.folder}")
    out.document(
        {
            "schema": 1,
            "task": store.task,
            "dataset": str(report.folder),
            "episodes": report.episodes,
            "new_episodes": report.new_episodes,
            "rows": report.rows,
            "returns": report.returns,
        }
    )


@app.command("fit-corrector")
@common_options
def fit_corrector(
    common: Common,
    task: TaskOption = None,
    arch: Annotated[list[str] | None, typer.Option(help="two-tower or temporal; repeatable, both if left out.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Most passes over the data.")] = None,
    preset: PresetOption = None,
    set_: SetOption = None,
) -> None:
    """Distil the planner into a corrector."""
    from dataclasses import asdict

    from specmpc_cli.cli.tables import fit_table
    from specmpc_cli.engine.correctors import CORRECTORS
    from specmpc_cli.workflows.acting import check_archs
    from specmpc_cli.workflows.fit_corrector import fit, measure_label_noise, save

    out = output_for(common)
    archs = check_archs(list(dict.fromkeys(arch or CORRECTORS)))
    settings = [*(set_ or []), *([f"corrector.epochs={epochs}"] if epochs else [])]
    store, bench = open_store(common, out, task, preset, settings)
    shards = store.newest_dataset(bench.teacher)
    folder = shards[0].path.parent
    out.note(f"data: {folder} ({sum(shard.rows for shard in shards)} rows from {len(shards)} episodes)")
    fitted = []
    with out.progress() as progress:
        for name in archs:
            bar = progress.add_task(name, total=bench.config.corrector.epochs, state="")

            def show(line: "Epoch", bar: Any = bar) -> None:
                progress.update(bar, completed=line.epoch, state=f"validation {line.validation_error:.4f}")

            fitted.append(fit(bench, name, shards, seed=common.seed, on_epoch=show))
            progress.stop_task(bar)
    prepare_planner(out, bench)
    noise = measure_label_noise(bench, shards, seed=common.seed)
    folders = [save(store, bench, network, noise) for network in fitted]
    out.table(fit_table(fitted, noise))
    out.say(
        f"label noise: two fresh plans of one state differ by {noise:.4f}; "
        f"a corrector that knew their mean would be left with half of it, {noise / 2:.4f}"
    )
    for path in folders:
        out.say(f"{path.name}: {path}")
    out.document(
        {
            "schema": 1,
            "task": store.task,
            "dataset": str(folder),
            "label_noise": noise,
            "correctors": [
                {
                    "arch": one.network.arch,
                    "path": str(path),
                    "parameters": one.parameters,
                    "validation_error": one.fit.best.validation_error,
                    "planned_error": one.fit.planned_error,
                    "prior_error": one.fit.prior_error,
                    "curve": [asdict(line) for line in one.fit.curve],
                }
                for one, path in zip(fitted, folders, strict=True)
            ],
        }
    )


@app.command("eval")
@common_options
def eval_(
    common: Common,
    task: TaskOption = None,
    mode: Annotated[str, typer.Option(help="baseline, policy, naive, corrected or adaptive.")] = "corrected",
    horizon: Annotated[int | None, typer.Option(min=1, help="Env steps per plan, for naive and corrected; 6 if left out.")] = None,
    arch: ArchOption = None,
    episodes: EpisodesOption = 10,
    accept_below: AcceptBelowOption = None,
    replan_above: ReplanAboveOption = None,
    preset: PresetOption = None,
    set_: SetOption = None,
) -> None:
    """Run one way of acting."""
    from specmpc_cli.cli.tables import comparison_table
    from specmpc_cli.workflows.acting import Mode, check_way, choose_way
    from specmpc_cli.workflows.compare import evaluate_one
    from specmpc_cli.workflows.plots import row_label

    out = output_for(common)
    options = {"horizon": horizon, "arch": arch, "accept_below": accept_below, "replan_above": replan_above}
    check_way(mode, **options)
    store, bench = open_store(common, out, task, preset, set_)
    way = choose_way(store, bench, mode, **options)
    if way.corrector is not None:
        out.note(f"corrector: {way.corrector.arch} ({way.corrector.source})")
    if way.mode is not Mode.POLICY:
        prepare_planner(out, bench)
    with out.progress() as progress:
        bar = progress.add_task(way.label, total=episodes * bench.spec.decisions, state="env steps")
        report = evaluate_one(
            bench, way, episodes=episodes, seed=common.seed, num_envs=envs_for(episodes), on_step=lambda _: progress.advance(bar)
        )
    out.table(comparison_table(report, row_label))
    out.document(report)


@app.command()
@common_options
def compare(
    common: Common,
    task: TaskOption = None,
    horizons: Annotated[str, typer.Option(help="Env steps per plan, separated by commas.")] = "1,3,6",
    arch: Annotated[list[str] | None, typer.Option(help="Corrector to compare; repeatable, all fitted ones if left out.")] = None,
    episodes: EpisodesOption = 10,
    detail: Annotated[bool, typer.Option("--detail", help="Also a table by age of the plan.")] = False,
    require: RequireOption = None,
    preset: PresetOption = None,
    set_: SetOption = None,
) -> None:
    """All ways of acting side by side: return against planner calls saved."""
    from specmpc_cli.cli.tables import by_age_table, comparison_table
    from specmpc_cli.workflows.acting import check_archs
    from specmpc_cli.workflows.compare import compare as run
    from specmpc_cli.workflows.compare import keep_results, parse_requirements, rows_meeting, ways_of
    from specmpc_cli.workflows.plots import row_label

    out = output_for(common)
    requirements = parse_requirements(require) if require else []
    steps = parse_horizons(horizons)
    archs = check_archs(arch) if arch else None
    store, bench = open_store(common, out, task, preset, set_)
    ways = ways_of(bench, steps, matching_correctors(out, store, bench, archs))
    prepare_planner(out, bench)
    with out.progress() as progress:
        total = episodes * bench.spec.decisions
        overall = progress.add_task("ways of acting", total=len(ways), state="")
        bar = progress.add_task("", total=total, state="env steps")

        def finished(row: dict[str, Any]) -> None:
            progress.advance(overall)
            out.note(f"{row_label(row)}: return {row['return_mean']:.1f}, {row['calls_saved']:.0%} of the planner calls saved")

        report = run(
            bench,
            ways,
            episodes=episodes,
            seed=common.seed,
            num_envs=envs_for(episodes),
            on_way=lambda _, way: progress.reset(bar, total=total, description=way.label),
            on_step=lambda _: progress.advance(bar),
            on_row=finished,
        )
    out.table(comparison_table(report, row_label))
    out.document(report)
    if detail:
        out.table(by_age_table(report, row_label))
    out.note("vs baseline: ratio of means, interval from a bootstrap over paired episodes; latency: one environment, warm-up left out")
    as_json, as_png = keep_results(store, report)
    out.say(f"results: {as_json}")
    out.say(f"plot:    {as_png}")
    if requirements:
        meeting = rows_meeting(report, requirements)
        if not meeting:
            raise GateFailed(f"no row meets --require {require}")
        out.note(f"--require is met by {', '.join(row_label(row) for row in meeting)}")


main: Callable[[], None] = app
