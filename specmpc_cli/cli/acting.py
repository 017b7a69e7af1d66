"""The commands that act and measure: eval, compare, bench."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

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
    VideoOption,
    common_options,
)
from specmpc_cli.cli.session import (
    describe,
    envs_for,
    film_ways,
    first_time,
    matching_correctors,
    note_ways,
    open_store,
    output_for,
    parse_horizons,
    prepare_acting,
    prepare_filming,
    runtime_for,
)
from specmpc_cli.errors import ConfigError, GateFailed


@common_options
def eval_(
    common: Common,
    task: TaskOption = None,
    mode: Annotated[str, typer.Option(help="baseline, policy, naive, corrected, adaptive or distilled.")] = "corrected",
    horizon: Annotated[int | None, typer.Option(min=1, help="Env steps per plan, for naive and corrected; 6 if left out.")] = None,
    arch: ArchOption = None,
    episodes: EpisodesOption = 10,
    accept_below: AcceptBelowOption = None,
    replan_above: ReplanAboveOption = None,
    video: VideoOption = None,
    preset: PresetOption = None,
    set_: SetOption = None,
) -> None:
    """Run one way of acting."""
    from specmpc_cli.cli.tables import comparison_table
    from specmpc_cli.workflows.compare import evaluate_one
    from specmpc_cli.workflows.plots import row_label
    from specmpc_cli.workflows.ways import check_way, choose_way

    out = output_for(common)
    options = {"horizon": horizon, "arch": arch, "accept_below": accept_below, "replan_above": replan_above}
    check_way(mode, **options)
    prepare_filming(common, out, video, task)
    store, bench = open_store(common, out, task, preset, set_)
    way = choose_way(store, bench.teacher, bench.config, mode, **options)
    if way.corrector is not None:
        out.note(f"corrector: {way.corrector.arch} ({way.corrector.source})")
    note_ways(out, bench, [way])
    prepare_acting(out, bench, [way], envs_for(episodes))
    with out.progress() as progress:
        bar = progress.add_task(way.label, total=episodes * bench.spec.decisions, state="env steps")
        report = evaluate_one(
            bench, way, episodes=episodes, seed=common.seed, num_envs=envs_for(episodes), on_step=lambda _: progress.advance(bar)
        )
    out.table(comparison_table(report, row_label))
    out.document(report)
    if video:
        film_ways(out, bench, [way], common.seed, video)


@common_options
def compare(
    common: Common,
    task: TaskOption = None,
    horizons: Annotated[str, typer.Option(help="Env steps per plan, separated by commas.")] = "1,3,6",
    arch: Annotated[list[str] | None, typer.Option(help="Corrector to compare; repeatable, all fitted ones if left out.")] = None,
    episodes: EpisodesOption = 10,
    detail: Annotated[bool, typer.Option("--detail", help="Also a table by age of the plan.")] = False,
    require: RequireOption = None,
    max_return_loss: Annotated[float | None, typer.Option(help="Name the row that saves most within this share of lost return.")] = None,
    report_page: Annotated[Path | None, typer.Option("--report", help="Also write one self-contained HTML page.")] = None,
    video: VideoOption = None,
    preset: PresetOption = None,
    set_: SetOption = None,
) -> None:
    """All ways of acting side by side: return against planner calls saved."""
    from specmpc_cli.cli.tables import best_line, by_age_table, comparison_table
    from specmpc_cli.workflows.choose import best_within, check_loss
    from specmpc_cli.workflows.compare import compare as run
    from specmpc_cli.workflows.compare import keep_results, parse_requirements, rows_meeting, ways_of
    from specmpc_cli.workflows.plots import row_label
    from specmpc_cli.workflows.report_page import check_page, write_page
    from specmpc_cli.workflows.video import check_filming, most_saving
    from specmpc_cli.workflows.ways import check_archs

    out = output_for(common)
    requirements = [] if require is None else parse_requirements(require)
    steps = parse_horizons(horizons)
    archs = check_archs(arch) if arch else None
    if report_page:
        check_page(report_page)
    if max_return_loss is not None:
        check_loss(max_return_loss, episodes)
    prepare_filming(common, out, video, task)
    store, bench = open_store(common, out, task, preset, set_)
    if not bench.spec.has_success and any(one.field == "success_rate" for one in requirements):
        raise ConfigError(f"--require: {store.task} knows no success, so success_rate has no value there")
    ways = ways_of(bench, steps, matching_correctors(out, store, bench, archs))
    note_ways(out, bench, ways)
    if video:
        check_filming(ways)
    prepare_acting(out, bench, ways, envs_for(episodes))
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
            traces=report_page is not None,
            on_way=lambda _, way: progress.reset(bar, total=total, description=way.label),
            on_step=lambda _: progress.advance(bar),
            on_row=finished,
        )
    if max_return_loss is not None:
        report["best"] = best_within(report, max_return_loss)
    out.table(comparison_table(report, row_label))
    out.document(report)
    if detail:
        out.table(by_age_table(report, row_label))
    out.note("vs baseline: ratio of means, interval from a bootstrap over paired episodes; latency: one environment, warm-up left out")
    as_json, as_png = keep_results(store, report)
    out.say(f"results: {as_json}")
    out.say(f"plot:    {as_png}")
    best = None if max_return_loss is None else best_line(report, row_label)
    if best:
        out.say(f"best:    {best}")
    if report_page:
        write_page(report, report_page, shlex.join(["specmpc", *sys.argv[1:]]), best)
        out.say(f"report:  {report_page}")
    if video:
        film_ways(out, bench, [ways[0], most_saving(ways, report)], common.seed, video)
    if requirements:
        meeting = rows_meeting(report, requirements)
        if not meeting:
            without = [one.field for one in requirements if all(row[one.field] is None for row in report["rows"])]
            why = f": no row has a value for {', '.join(dict.fromkeys(without))}" if without else ""
            raise GateFailed(f"no row meets --require {require}{why}")
        out.note(f"--require is met by {', '.join(row_label(row) for row in meeting)}")


@common_options
def bench(
    common: Common,
    sizes: Annotated[str, typer.Option(help="Model sizes in millions of parameters, separated by commas.")] = "1,5",
    what: Annotated[str, typer.Option(help="What to time, separated by commas: plan, batch, update, step.")] = "plan,batch,update,step",
) -> None:
    """Time our path beside a plain one: fp32, eager, every Q-head, one environment at a time."""
    from specmpc_cli.cli.tables import benchmark_table
    from specmpc_cli.workflows.benchmark import benchmark, parse_sizes, parse_what

    out = output_for(common)
    asked = parse_sizes(sizes), parse_what(what)
    runtime = runtime_for(common, out)
    out.note(f"{describe(runtime)} · both paths take turns in this process; anything else that runs here disturbs the figures")

    def preparing(size: int) -> None:
        out.note(f"{size} M: preparing{first_time(runtime)}")

    def finished(row: dict[str, Any]) -> None:
        out.note(
            f"{row['what']}, {row['size']} M, batch {row['batch']}: {row['ours_ms']:.2f} ms, {row['ratio']:.2f} × as fast as the plain path"
        )

    report = benchmark(runtime, *asked, on_prepare=preparing, on_row=finished)
    for note in report["notes"]:
        out.note(f"note: {note}")
    out.table(benchmark_table(report))
    out.note("medians; floor: the products alone, at the speed of a large product on this machine")
    out.document(report)
