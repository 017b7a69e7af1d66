"""The commands that distil a planner: collect, fit-corrector."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specmpc_cli.cli.console import Output
from specmpc_cli.cli.options import Common, PresetOption, SetOption, TaskOption, common_options
from specmpc_cli.cli.session import envs_for, open_store, output_for, prepare_acting
from specmpc_cli.errors import CalibrationFailed, ConfigError, SpecMPCError

if TYPE_CHECKING:
    from specmpc_cli.data.shards import Shard
    from specmpc_cli.learning.corrector_fit import Epoch
    from specmpc_cli.workflows.acting import Workbench
    from specmpc_cli.workflows.calibrate import Calibration
    from specmpc_cli.workflows.fit_corrector import Fitted
    from specmpc_cli.workflows.store import FittedCorrector, Store


@common_options
def collect(
    common: Common,
    task: TaskOption = None,
    episodes: Annotated[int, typer.Option(help="Episodes per round.")] = 10,
    rounds: Annotated[int, typer.Option(help="Rounds; from the second on the current corrector acts (DAgger).")] = 1,
    arch: Annotated[str, typer.Option(help="Corrector that acts from round 2 on: two-tower, temporal or distilled.")] = "two-tower",
    preset: PresetOption = None,
    set_: SetOption = None,
) -> None:
    """Run the teacher and label every step with what a fresh plan would do."""
    from specmpc_cli.workflows.collect import collect as run
    from specmpc_cli.workflows.fit_corrector import as_corrector, measure_label_noise
    from specmpc_cli.workflows.fit_corrector import fit as fit_network
    from specmpc_cli.workflows.ways import check_archs

    out = output_for(common)
    check_archs([arch])
    store, bench = open_store(common, out, task, preset, set_, also=("collect", "corrector"))
    with out.progress() as progress:
        bar = progress.add_task("round 1", total=None, state="")

        def begin_round(round_: int, missing: int) -> None:
            if missing:
                prepare_acting(out, bench, [], 1)
            progress.reset(bar, total=missing * bench.spec.decisions, description=f"round {round_}", state="env steps")

        def fit(shards: "list[Shard]") -> "FittedCorrector":
            progress.update(bar, state=f"fitting {arch}")
            fitted = fit_network(bench, arch, shards, seed=common.seed)
            noise = measure_label_noise(bench, shards, seed=common.seed)
            error = fitted.fit.best.validation_error
            out.note(f"{arch} fitted to {len(shards)} episodes: validation error {error:.4f}; {noise_floor(noise)}")
            progress.update(bar, state="env steps")
            return as_corrector(bench, fitted)

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
    if report.other_episodes:
        out.note(
            f"note: {report.other_episodes} episodes were collected before with other steps per plan than collect.horizons and "
            "collect.later_horizons now say, and stay; another --seed collects anew"
        )
    for group, returns in report.returns.items():
        out.note(f"{group}: mean return {sum(returns) / len(returns):.1f} over {len(returns)} episodes")
    if report.new_episodes:
        out.note(f"{report.planner_calls} planner calls labelled the new episodes, in {report.seconds / 60:.1f} minutes")
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
            "planner_calls": report.planner_calls,
            "seconds": round(report.seconds, 1),
        }
    )


@common_options
def fit_corrector(
    common: Common,
    task: TaskOption = None,
    arch: Annotated[list[str] | None, typer.Option(help="two-tower, temporal or distilled; repeatable, the first two if left out.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Most passes over the data.")] = None,
    max_return_loss: Annotated[
        float | None, typer.Option(help="Calibrate the gate: save what can be saved within this share of lost return.")
    ] = None,
    calibrate_episodes: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Fresh episodes that must keep the promise of --max-return-loss; 20 if left out.")
    ] = None,
    preset: PresetOption = None,
    set_: SetOption = None,
) -> None:
    """Distil the planner into a corrector, and calibrate when it is to be trusted."""
    from dataclasses import asdict

    from specmpc_cli.cli.tables import fit_table
    from specmpc_cli.engine.correctors import DEFAULT_ARCHS
    from specmpc_cli.types import DEFAULT_COURSE
    from specmpc_cli.workflows.calibrate import FEWEST_EPISODES, check_promise
    from specmpc_cli.workflows.fit_corrector import NOISE_SAMPLE, as_corrector, fit, measure_label_noise, save
    from specmpc_cli.workflows.ways import DEFAULT_HORIZON, Mode, Way, check_archs

    out = output_for(common)
    archs = check_archs(list(dict.fromkeys(arch or DEFAULT_ARCHS)))
    settings = [*(set_ or []), *([f"corrector.epochs={epochs}"] if epochs else [])]
    calibrates = max_return_loss is not None
    store, bench = open_store(common, out, task, preset, settings, also=("corrector",), simulates=calibrates)
    promise_over = calibrate_episodes or FEWEST_EPISODES
    if max_return_loss is not None:
        check_promise(max_return_loss, promise_over, bench.spec.has_success)
    elif calibrate_episodes is not None:
        raise ConfigError("--calibrate-episodes has no meaning without --max-return-loss; leave it out")
    promised = [old.arch for old in store.correctors(bench.teacher, archs)[0] if old.facts.calibrated and old.source == "store"]
    for name in promised:
        when = "" if max_return_loss is None else " if the new one keeps its promise"
        out.note(f"note: the {name} corrector in the store, and its calibrated gate, will be replaced{when}")
    shards = store.newest_dataset(bench.teacher)
    folder = shards[0].path.parent
    out.note(f"data: {folder} ({sum(shard.rows for shard in shards)} rows from {len(shards)} episodes)")
    for name, unnamed in asdict(DEFAULT_COURSE).items():
        ours, of_data = getattr(bench.config.speculation, name), shards[0].runner.get(name, unnamed)
        if ours != of_data:
            out.note(f"note: the data's plans have speculation.{name}={of_data}, this corrector's {ours}")
    fitted = []
    with out.progress() as progress:
        for name in archs:
            bar = progress.add_task(name, total=bench.config.corrector.epochs, state="")

            def show(line: "Epoch", bar: Any = bar) -> None:
                progress.update(bar, completed=line.epoch, state=f"validation {line.validation_error:.4f}")

            fitted.append(fit(bench, name, shards, seed=common.seed, on_epoch=show))
            progress.stop_task(bar)
    ways = [Way(Mode.CORRECTED, DEFAULT_HORIZON, as_corrector(bench, one)) for one in fitted]
    prepare_acting(out, bench, ways, max(envs_for(promise_over), NOISE_SAMPLE))
    noise = measure_label_noise(bench, shards, seed=common.seed)
    waiting = promised if max_return_loss is not None else []  # what carries a promise stays until a new one is kept
    saved: dict[str, str] = {}
    for one in fitted:
        if one.network.arch not in waiting:
            saved[one.network.arch] = str(save(store, bench, one, noise))
    out.table(fit_table(fitted, noise))
    out.say(f"label noise: {noise_floor(noise)}")
    for name, path in saved.items():
        out.say(f"{name}: {path}")
    calibrated: dict[str, Calibration] = {}
    failure: SpecMPCError | None = None
    if max_return_loss is not None:
        try:
            for one, calibration in _calibrate(common, out, store, bench, fitted, max_return_loss, promise_over, waiting):
                saved[one.network.arch] = str(save(store, bench, one, noise, calibration))
                calibrated[one.network.arch] = calibration
        except SpecMPCError as error:
            failure = error  # what was fitted is reported all the same
    out.document(
        {
            "schema": 1,
            "task": store.task,
            "dataset": str(folder),
            "label_noise": noise,
            "correctors": [
                {
                    "arch": one.network.arch,
                    "path": saved.get(one.network.arch),
                    "parameters": one.parameters,
                    "validation_error": one.fit.best.validation_error,
                    "planned_error": one.fit.planned_error,
                    "prior_error": one.fit.prior_error,
                    "curve": [asdict(line) for line in one.fit.curve],
                    "calibration": calibrated[one.network.arch].as_json() if one.network.arch in calibrated else None,
                }
                for one in fitted
            ],
        }
    )
    if failure is not None:
        raise failure


def noise_floor(noise: float) -> str:
    """What a validation error is to be held against."""
    half = "a corrector that knew their mean would be left with half of it"
    return f"two fresh plans of one state differ by {noise:.4f}; {half}, {noise / 2:.4f}"


def _calibrate(
    common: Common,
    out: Output,
    store: "Store",
    bench: "Workbench",
    fitted: "list[Fitted]",
    max_return_loss: float,
    episodes: int,
    waiting: list[str],
) -> "Iterator[tuple[Fitted, Calibration]]":
    """The fitted correctors that found a gate, each as soon as it has; says what was tried. Raises CalibrationFailed if none did.

    Those of the architectures `waiting` are in no store yet.
    """
    from specmpc_cli.cli.tables import calibration_table, percent
    from specmpc_cli.workflows.calibrate import Calibrator
    from specmpc_cli.workflows.fit_corrector import as_saved
    from specmpc_cli.workflows.judged_gates import JudgedGates

    found: dict[str, Calibration] = {}
    failures = []
    with out.progress() as progress:
        bar = progress.add_task("calibrating", total=None, state="env steps")
        with Calibrator(
            bench,
            max_return_loss=max_return_loss,
            episodes=episodes,
            seed=common.seed,
            num_envs=envs_for(episodes),
            judged=JudgedGates(store.judged_gates, common.seed, episodes, bench.acts_with),
            on_run=lambda what, count: progress.reset(bar, total=count * bench.spec.decisions, description=what),
            on_step=lambda: progress.advance(bar),
            on_trial=lambda arch, trial: out.note(
                f"{arch}, {trial.rule.label}: keeps {trial.kept:.1%} and saves {trial.calls_saved:.1%} over {trial.episodes} episodes"
            ),
        ) as calibrator:
            for one in fitted:
                arch = one.network.arch
                try:
                    found[arch] = calibrator.calibrate(as_saved(bench, one), one.shards)
                except CalibrationFailed as failure:
                    stays = "; the store keeps its earlier corrector and that one's gate" if arch in waiting else ""
                    failures.append(f"{failure}{stays}")
                else:
                    yield one, found[arch]
    for failure in failures if found else failures[1:]:
        out.note(f"note: {failure}")
    if not found:
        raise CalibrationFailed(failures[0])
    out.table(calibration_table(found))
    labelled = sum(shard.rows + 1 for shard in fitted[0].shards)  # an episode's first step has a label and no row
    for arch, calibration in found.items():
        promise, audit = calibration.promise, calibration.audit
        out.say(
            f"{arch}: saves {promise.calls_saved:.1%} of the planner calls and keeps {promise.kept:.1%} of plain replanning, "
            f"at least {promise.at_least:.1%}, on {promise.episodes} fresh episodes"
        )
        out.note(
            f"{arch}: its worst episode keeps {percent(promise.worst_kept, 1)}, and of others up to {calibration.worse_share:.0%} may keep "
            "less; "
            f"{audit.share:.1%} of {audit.steps} compared steps were kept and wrong, in nine of ten new episodes at most "
            f"{audit.episode_bound:.1%}"
        )
        calls = labelled + calibration.planner_calls
        out.note(
            f"{arch}: {labelled} planner calls labelled the data, {calibration.planner_calls} calibrated the gate "
            f"({calibration.seconds / 60:.1f} minutes); acting has saved as many after {calls / promise.calls_saved:,.0f} env steps"
        )
