"""import → collect → fit-corrector → eval → compare, each as a user runs it, with nothing named that the store knows."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from specmpc_cli.runtime import multiplies_int8
from tests.cli.conftest import Command

ROW = {
    "mode", "horizon", "corrector", "gate", "return_mean", "return_ci95", "return_median", "return_cvar05", "return_vs_baseline",
    "return_vs_baseline_ci95", "success_rate", "termination_rate", "env_steps_per_episode", "planner_calls_per_episode",
    "planner_iterations_per_episode", "calls_saved", "accept_rate", "correct_rate", "replan_rate", "fallback_rate",
    "correction_norm_mean", "step_ms_p50", "step_ms_p99", "control_hz", "steps_per_plan_hist", "by_age", "episodes",
}  # fmt: skip
REPORT = {
    "schema", "task", "teacher", "device", "dtype", "threads", "compiled", "seed", "episodes", "config", "versions", "commit", "date",
    "rows",
}  # fmt: skip


def test_the_store_holds_what_the_contract_says(pipeline: Command) -> None:
    main = pipeline.store / "pointmass" / "main"
    three = {"model.safetensors", "config.yaml", "metrics.jsonl"}
    assert {path.name for path in (main / "teacher").iterdir()} == three
    for arch in ("two-tower", "temporal"):
        assert {path.name for path in (main / "correctors" / arch).iterdir()} == three
    (dataset,) = (main / "data").iterdir()
    names = [path.name for path in dataset.iterdir()]
    assert "index.h5" in names and len([name for name in names if re.fullmatch(r"shard-\w+-\d+\.h5", name)]) == 8


def test_the_dataset_holds_every_step_on_which_an_older_plan_exists(pipeline: Command) -> None:
    (dataset,) = (pipeline.store / "pointmass" / "main" / "data").iterdir()
    with h5py.File(dataset / "index.h5") as index:
        data = {name: index[name][:] for name in index}
    assert len(data["z"]) == 8 * 39  # 40 decisions an episode, the first has no older plan
    assert set(np.unique(data["round"])) == {1, 2}
    assert set(np.unique(data["behaviour"][data["round"] == 1])) == {1}  # 0.2 of 4 episodes is no whole teacher episode
    assert set(np.unique(data["behaviour"][data["round"] == 2])) == {2}
    episode = data["episode"] == data["episode"][0]
    assert data["step"][episode].tolist() == list(range(1, 40))
    horizon = int(data["age"][episode].max())
    assert data["age"][episode].tolist() == [1 + step % horizon for step in range(39)]
    assert np.allclose(data["mismatch"], np.linalg.norm(data["z"] - data["z_pred"], axis=1), atol=1e-5)
    # naive behaviour executes the plan, except where it is exhausted and the label's own plan takes over
    naive = data["behaviour"] == 1
    fresh = np.isclose(data["a_exec"], data["a_teacher"]).all(1)
    planned = np.isclose(data["a_exec"], data["a_plan"]).all(1)
    ages = data["age"][naive]
    last = np.array([data["age"][data["episode"] == e].max() for e in data["episode"][naive]])
    assert fresh[naive][ages == last].all() and planned[naive][ages < last].all()


def test_collecting_again_finds_nothing_to_do_and_more_episodes_only_add(with_teacher: Command) -> None:
    first = with_teacher("collect", "--episodes", "2", "--json").document
    again = with_teacher("collect", "--episodes", "2", "--json").document
    more = with_teacher("collect", "--episodes", "3", "--json").document
    assert [run["new_episodes"] for run in (first, again, more)] == [2, 0, 1]
    assert more["episodes"] == 3 and more["rows"] == 3 * 39


def test_collecting_is_deterministic(with_teacher: Command, make_command: object, checkpoint: Path) -> None:
    other = make_command("other")  # type: ignore[operator]
    assert other("import", str(checkpoint), "--task", "pointmass").code == 0
    read = []
    for command in (with_teacher, other):
        folder = Path(command("collect", "--episodes", "2", "--json").document["dataset"])
        with h5py.File(folder / "index.h5") as index:
            read.append({name: index[name][:] for name in index})
    assert all(np.array_equal(read[0][name], read[1][name]) for name in read[0])


def test_the_teachers_own_behaviour_is_labelled_with_a_shadow_plan(with_teacher: Command) -> None:
    folder = Path(with_teacher("collect", "--episodes", "2", "--set", "collect.teacher_share=1", "--json").document["dataset"])
    with h5py.File(folder / "index.h5") as index:
        assert (index["behaviour"][:] == 0).all()
        np.testing.assert_allclose(index["a_exec"][:], index["a_teacher"][:], atol=1e-6)  # it acts with fresh plans throughout
        assert not np.allclose(index["a_plan"][:], index["a_teacher"][:])


def test_a_round_learns_from_the_data_it_continues_and_leaves_the_stores_corrector_alone(
    with_teacher: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specmpc_cli.workflows import fit_corrector

    learnt_from: list[set[tuple[str, int]]] = []
    fit = fit_corrector.fit

    def spy(bench: object, arch: str, shards: list, **options: object) -> object:
        learnt_from.append({(shard.path.parent.name, shard.key[1]) for shard in shards})
        return fit(bench, arch, shards, **options)  # type: ignore[arg-type]

    first = Path(with_teacher("collect", "--episodes", "2", "--json").document["dataset"])
    assert with_teacher("fit-corrector").code == 0
    weights = with_teacher.store / "pointmass/main/correctors/two-tower/model.safetensors"
    before = weights.read_bytes()
    other = Path(with_teacher("collect", "--episodes", "2", "--set", "planner.iterations=3", "--json").document["dataset"])
    monkeypatch.setattr(fit_corrector, "fit", spy)
    collected = with_teacher("collect", "--episodes", "2", "--rounds", "2")
    assert collected.code == 0 and "two-tower fitted to 2 episodes: validation error" in collected.err
    assert "two fresh plans of one state differ by" in collected.err
    assert first != other and learnt_from == [{(first.name, 1)}]
    assert weights.read_bytes() == before


def test_data_of_other_planner_settings_can_be_fitted_with_the_teachers_defaults(with_teacher: Command) -> None:
    """The label noise must be measured with the planner that made the labels; its horizon shapes the warm starts."""
    with_teacher("collect", "--episodes", "2", "--set", "planner.horizon=5")
    result = with_teacher("fit-corrector", "--arch", "two-tower", "--json")
    assert result.code == 0 and result.document["label_noise"] > 0


def test_a_corrector_keeps_the_plans_that_it_was_fitted_with(with_teacher: Command) -> None:
    with_teacher("collect", "--episodes", "2")
    other = ("--set", "speculation.tail=hold", "--set", "speculation.executes=mean")
    fitted = with_teacher("fit-corrector", "--arch", "two-tower", *other)
    assert "the data's plans have speculation.tail=policy, this corrector's hold" in fitted.err
    assert "the data's plans have speculation.executes=drawn, this corrector's mean" in fitted.err
    acts = ("eval", "--mode", "corrected", "--horizon", "6", "--episodes", "2", "--json")
    unset, as_fitted = with_teacher(*acts), with_teacher(*acts, *other)
    assert "brings speculation.executes=mean, speculation.tail=hold; executes=drawn, tail=policy is for" in unset.err
    assert "brings" not in as_fitted.err
    assert unset.document["rows"][0]["episodes"] == as_fitted.document["rows"][0]["episodes"]


def test_the_metric_is_the_one_that_was_set(with_teacher: Command) -> None:
    folder = Path(with_teacher("collect", "--episodes", "1", "--set", "speculation.metric=l1", "--json").document["dataset"])
    with h5py.File(folder / "index.h5") as index:
        np.testing.assert_allclose(index["mismatch"][:], np.abs(index["z"][:] - index["z_pred"][:]).sum(1), atol=1e-4)


def test_compare_lists_the_rows_in_order_and_keeps_its_results(pipeline: Command) -> None:
    result = pipeline("compare", "--episodes", "3", "--horizons", "1,3,6", "--json")
    assert result.code == 0, result.err
    report = result.document
    assert report.keys() == REPORT and all(row.keys() == ROW for row in report["rows"])
    assert [(row["mode"], row["horizon"], row["corrector"]) for row in report["rows"]] == [
        ("baseline", 1, None),
        ("policy", None, None),
        ("distilled", None, "distilled"),
        ("naive", 3, None),
        ("naive", 6, None),
        ("corrected", 3, "two-tower"),
        ("corrected", 6, "two-tower"),
        ("corrected", 3, "temporal"),
        ("corrected", 6, "temporal"),
        ("corrected", 3, "distilled"),
        ("corrected", 6, "distilled"),
    ]
    kept = sorted((pipeline.store / "pointmass" / "main" / "results").iterdir())
    assert {path.suffix for path in kept} == {".json", ".png"}
    assert kept[-1].read_bytes().startswith(b"\x89PNG")


def test_the_rows_of_a_comparison_are_consistent(pipeline: Command) -> None:
    rows = pipeline("compare", "--episodes", "3", "--horizons", "4", "--json").document["rows"]
    baseline, policy, distilled, naive, corrected = rows[:5]
    seeds = [episode["seed"] for episode in baseline["episodes"]]
    for row in rows:
        assert [episode["seed"] for episode in row["episodes"]] == seeds  # paired
        assert row["return_mean"] == pytest.approx(np.mean([episode["return"] for episode in row["episodes"]]))
        assert row["calls_saved"] == pytest.approx(1 - row["planner_calls_per_episode"] / row["env_steps_per_episode"])
        if row is not policy:
            assert row["accept_rate"] + row["correct_rate"] + row["replan_rate"] == pytest.approx(1)
        if row not in (policy, distilled):
            assert sum(line["count"] for line in row["by_age"]) == 3 * 40
            lengths = range(1, len(row["steps_per_plan_hist"]) + 1)
            assert sum(n * count for n, count in zip(lengths, row["steps_per_plan_hist"], strict=True)) == 3 * 40
        assert row["control_hz"] > 0 and row["step_ms_p99"] >= row["step_ms_p50"] > 0
    assert (baseline["calls_saved"], baseline["replan_rate"]) == (0, 1)
    assert baseline["return_vs_baseline"] == 1 and baseline["return_vs_baseline_ci95"] in ([1.0, 1.0], None)
    assert (policy["calls_saved"], policy["planner_calls_per_episode"]) == (1, 0)
    assert policy["accept_rate"] is policy["correct_rate"] is policy["replan_rate"] is policy["horizon"] is policy["corrector"] is None
    assert (distilled["calls_saved"], distilled["correct_rate"], distilled["correction_norm_mean"]) == (1, 1, None)
    assert distilled["steps_per_plan_hist"] == distilled["by_age"] == [] and distilled["gate"] is None
    assert (naive["accept_rate"], naive["correct_rate"], naive["replan_rate"]) == (0.75, 0, 0.25)
    assert (corrected["accept_rate"], corrected["correct_rate"], corrected["replan_rate"]) == (0, 0.75, 0.25)
    assert corrected["correction_norm_mean"] > 0 == naive["correction_norm_mean"]
    assert naive["steps_per_plan_hist"] == [0, 0, 0, 30]
    assert naive["planner_iterations_per_episode"] == 2 * naive["planner_calls_per_episode"] == 20


def test_refined_replans_are_calls_of_fewer_iterations_and_plain_replanning_is_as_ever(pipeline: Command) -> None:
    arguments = ("compare", "--episodes", "2", "--horizons", "4", "--arch", "two-tower")
    plain = pipeline(*arguments, "--json").document
    refining = pipeline(*arguments, "--json", "--set", "refine.iterations=1").document
    assert "refine" not in plain["config"] and refining["config"]["refine"]["iterations"] == 1
    baseline, *_, corrected = refining["rows"]
    assert baseline["episodes"] == plain["rows"][0]["episodes"] and baseline["planner_iterations_per_episode"] == 2 * 40
    # Ten plans an episode as before: the first of two iterations, the others of one.
    assert (corrected["planner_calls_per_episode"], corrected["planner_iterations_per_episode"]) == (10, 11)
    assert corrected["calls_saved"] == plain["rows"][-1]["calls_saved"]
    assert "iterations" in pipeline(*arguments, "--set", "refine.iterations=1").out and "iterations" not in pipeline(*arguments).out


def test_eval_gives_the_same_numbers_as_compare(pipeline: Command) -> None:
    row = pipeline("compare", "--episodes", "2", "--horizons", "3", "--arch", "temporal", "--json").document["rows"][-1]
    report = pipeline("eval", "--episodes", "2", "--horizon", "3", "--arch", "temporal", "--json").document
    (alone,) = report["rows"]
    assert report.keys() == REPORT and alone.keys() == ROW
    for field in ("mode", "horizon", "corrector", "return_mean", "planner_calls_per_episode", "episodes", "steps_per_plan_hist"):
        assert alone[field] == row[field], field


@pytest.mark.parametrize("mode", ["baseline", "policy", "naive", "corrected", "distilled"])
def test_every_mode_evaluates(pipeline: Command, mode: str) -> None:
    result = pipeline("eval", "--mode", mode, "--episodes", "1")
    assert result.code == 0 and mode in result.out


def test_adaptive_needs_thresholds_until_a_gate_is_calibrated_and_uses_them(pipeline: Command) -> None:
    assert "--accept-below and --replan-above" in pipeline.fails("eval", "--mode", "adaptive")
    thresholds = ("--accept-below", "0.001", "--replan-above", "0.5")
    (row,) = pipeline("eval", "--mode", "adaptive", *thresholds, "--episodes", "2", "--json").document["rows"]
    assert row["mode"] == "adaptive" and row["fallback_rate"] > 0
    assert len(row["steps_per_plan_hist"]) <= 20  # an adaptive plan lives at most 20 steps
    assert "must not exceed" in pipeline.fails("eval", "--mode", "adaptive", "--accept-below", "2", "--replan-above", "1")


def test_the_table_names_every_way_in_full_and_the_detail_every_age(pipeline: Command) -> None:
    out = pipeline("compare", "--episodes", "2", "--horizons", "3", "--detail").out
    for name in ("baseline", "policy", "naive 3", "distilled", "corrected 3 (two-tower)", "corrected 3 (temporal)"):
        assert name in out
    assert "…" not in out and "by age of the plan" in out
    table = [line for line in out.splitlines() if not line.startswith(("results:", "plot:"))]
    assert max(map(len, table)) <= 140


def test_the_best_row_within_a_loss_is_named_from_episodes_that_did_not_choose_it(pipeline: Command) -> None:
    arguments = ("compare", "--horizons", "3", "--episodes", "4", "--max-return-loss", "0.9")
    report = pipeline(*arguments, "--json").document
    best = report["best"]
    assert best["episodes"] == 2 and best["row"] > 0 and best["mode"] == report["rows"][best["row"]]["mode"]
    assert "best:    " in pipeline(*arguments).out
    assert "such as 0.02; got 1" in pipeline.fails("compare", "--max-return-loss", "1")
    assert "needs --episodes 4 or more, got 3" in pipeline.fails("compare", "--episodes", "3", "--max-return-loss", "0.1")


def test_requirements_decide_the_exit_code(pipeline: Command) -> None:
    arguments = ("compare", "--episodes", "1", "--horizons", "3")
    met = pipeline(*arguments, "--require", "calls_saved>=0.6,calls_saved<1,control_hz>0")
    assert met.code == 0 and "is met by naive 3, corrected 3 (two-tower)" in met.err
    missed = pipeline(*arguments, "--require", "calls_saved>=0.6,return_mean>1e9")
    assert missed.code == 3 and "no row meets" in missed.err and "naive 3" in missed.out


def test_json_is_the_only_thing_on_standard_output_and_quiet_silences_the_other_stream(pipeline: Command) -> None:
    loud, quiet = (pipeline("eval", "--mode", "policy", "--episodes", "1", "--json", *more) for more in ((), ("--quiet",)))
    assert loud.document["task"] == quiet.document["task"] == "pointmass"
    assert "teacher: store" in loud.err and quiet.err == ""


def test_notes_say_what_was_taken(pipeline: Command) -> None:
    err = pipeline("compare", "--episodes", "1").err
    assert "task: pointmass (used last)" in err and "two-tower (store), temporal (store)" in err


def test_fit_shows_the_noise_floor_and_the_curve(with_teacher: Command) -> None:
    with_teacher("collect", "--episodes", "3")
    result = with_teacher("fit-corrector", "--arch", "two-tower", "--epochs", "4")
    assert "label noise" in result.out and "of 4" in result.out and any(block in result.out for block in "▁▂▃▄▅▆▇█")
    assert (with_teacher.store / "pointmass/main/correctors/two-tower/metrics.jsonl").read_text().count("\n") == 4
    assert not (with_teacher.store / "pointmass/main/correctors/temporal").exists()


def test_tasks_lists_all_and_checks_one_suite(command: Command) -> None:
    tasks = command("tasks", "--json").document["tasks"]
    assert len(tasks) >= 89 and "pointmass" not in {task["task"] for task in tasks}
    assert all(
        {"task", "suite", "installed", "obs_dim", "action_dim", "decisions", "teacher", "ok", "error", "steps_per_s"} == set(task)
        for task in tasks
    )
    teachers = {task["task"]: task["teacher"] for task in tasks if task["teacher"]}
    assert teachers["walker-walk"]["size"] == 1 and teachers["walker-walk"]["return"] > 900


def test_narrow_terminals_cut_nothing_off(pipeline: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specmpc_cli.cli.console.PLAIN_WIDTH", 40)
    out = pipeline("eval", "--mode", "naive", "--episodes", "1").out
    assert "way of acting" in out and "Hz" in out and "…" not in out


def test_a_task_that_fails_its_check_is_reported_beside_the_others(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from specmpc_cli.envs import registry

    kept = {name: registry.TASKS[name] for name in ("pendulum-swingup", "mw-reach")}
    monkeypatch.setattr("specmpc_cli.workflows.list_tasks.TASKS", kept)
    make = registry.make_env

    def broken(task: str) -> object:
        if task == "mw-reach":
            raise RuntimeError("no such mesh")
        return make(task)

    monkeypatch.setattr("specmpc_cli.workflows.list_tasks.make_env", broken)
    result = command("tasks", "--check", "--json")
    assert result.code == 2 and "1 of 2 tasks failed: mw-reach" in result.err
    assert [task["ok"] for task in result.document["tasks"]] == [True, False]
    assert result.document["tasks"][1]["error"] == "RuntimeError: no such mesh"


def test_version_and_help_answer_quickly() -> None:
    """In CPU time: what else the machine does is not the command's doing."""
    seconds = []
    for option, expected in (("--version", r"specmpc \d+\.\d+\.\d+\s*"), *[("--help", r".*fit-corrector.*")] * 5):
        before = os.times()
        run = subprocess.run([sys.executable, "-m", "specmpc_cli", option], capture_output=True, text=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert re.fullmatch(expected, run.stdout, re.DOTALL)
    assert 0 < min(seconds) < 0.7, seconds


def test_numbers_are_finite_or_null(pipeline: Command) -> None:
    def walk(value: object) -> None:
        if isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)
        elif isinstance(value, float):
            assert math.isfinite(value)

    walk(pipeline("compare", "--episodes", "2", "--json").document)


@pytest.mark.compiler
@pytest.mark.skipif(not multiplies_int8(), reason="needs a CPU with AVX512-VNNI")
def test_a_teacher_acts_in_int8_much_as_in_fp32(with_teacher: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECMPC_COMPILE", "1")
    common = ("eval", "--mode", "baseline", "--episodes", "2", "--json", "--dtype")
    int8, fp32 = (with_teacher(*common, dtype).document for dtype in ("int8", "fp32"))
    assert (int8["dtype"], fp32["dtype"]) == ("int8", "fp32") and int8["compiled"]
    (ours,), (exact,) = int8["rows"], fp32["rows"]
    assert ours["return_mean"] != exact["return_mean"]
    assert ours["return_mean"] == pytest.approx(exact["return_mean"], rel=0.2)


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:not captured")
def test_a_gpu_goes_all_the_way(with_teacher: Command) -> None:
    cuda = ("--device", "cuda")
    for arguments in (("collect", "--episodes", "2"), ("fit-corrector",), ("compare", "--episodes", "3", "--horizons", "3")):
        result = with_teacher(*arguments, *cuda)
        assert result.code == 0, result.err
