"""`specmpc bench`: the report, the table, and the options it refuses. Speeds are not tested here; what is counted and paired is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from specmpc_cli.engine import native
from specmpc_cli.engine.planner import EAGER, Kernels
from specmpc_cli.engine.world_model import MODEL_SIZES
from specmpc_cli.runtime import choose_runtime
from specmpc_cli.workflows.benchmark import WHAT, Case, benchmark, machine_name, measure, peak_gflops
from tests.cli.conftest import Command

ROW = {"what", "size", "batch", "ours_ms", "plain_ms", "ratio", "floor_ms", "gflop", "dtype", "pairs", "compiled"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_SIZES, 1, {"enc_dim": 8, "num_enc_layers": 2, "mlp_dim": 8, "latent_dim": 8, "num_q": 2})
    monkeypatch.setattr("specmpc_cli.workflows.benchmark._SECONDS", 0.0)
    monkeypatch.setattr("specmpc_cli.workflows.benchmark.PEAK_SIZE", {"cpu": 64, "cuda": 256})


def test_each_row_pairs_both_paths_and_counts_the_products() -> None:
    seen: list[str] = []
    report = benchmark(choose_runtime("cpu", "fp32"), [1], seconds=0.0, on_row=lambda row: seen.append(row["what"]))
    assert [row["what"] for row in report["rows"]] == list(WHAT) == seen
    assert report["schema"] == 1 and report["device"] == "cpu" and report["dtype"] == "fp32" and report["machine"]
    for row in report["rows"]:
        assert set(row) == ROW and row["size"] == 1 and row["pairs"] >= 5
        assert row["ratio"] == pytest.approx(row["plain_ms"] / row["ours_ms"])
        assert row["floor_ms"] == pytest.approx(row["gflop"] / report["peak_gflops"] * 1e3)
    by_name = {row["what"]: row for row in report["rows"]}
    assert by_name["batch"]["gflop"] == pytest.approx(by_name["batch"]["batch"] * by_name["plan"]["gflop"])
    assert {row["dtype"] for row in report["rows"]} == {"fp32"}
    assert by_name["update"]["batch"] == 256 and by_name["step"]["gflop"] < by_name["plan"]["gflop"] / 10


@pytest.mark.parametrize(("seconds_a_run", "turn"), [(0.004, 2), (0.02, 1)])
def test_paths_take_turns_and_short_runs_several_at_a_time(seconds_a_run: float, turn: int) -> None:
    ran: list[str] = []

    def path(name: str) -> Callable[[], None]:
        def run() -> None:
            ran.append(name)
            time.sleep(seconds_a_run)

        return run

    row = measure(Case("step", 1, 1, path("o"), path("p"), lambda: None), choose_runtime("cpu", "fp32"), 0.0)
    counted = "".join(ran)[6:]  # three of each are warm-up
    assert counted == ("o" * turn + "p" * turn) * (len(counted) // (2 * turn)) and row["pairs"] == len(counted) // 2 >= 5
    assert row["ours_ms"] >= seconds_a_run * 1e3


def test_floors_are_at_the_highest_speed_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([3.0, 8.0, 5.0])
    monkeypatch.setattr("specmpc_cli.workflows.benchmark.peak_gflops", lambda runtime, dtype: next(speeds))
    report = benchmark(choose_runtime("cpu", "fp32"), [1], ["plan", "update", "step"], seconds=0.0)
    assert report["peak_gflops"] == 8.0
    for row in report["rows"]:
        assert row["floor_ms"] == pytest.approx(row["gflop"] / 8.0 * 1e3)


@pytest.mark.compiler
def test_our_own_product_counts_among_the_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECMPC_COMPILE", "1")
    timed = []

    def timing(product: Callable[[], torch.Tensor], multiplications: int, device: torch.device) -> float:
        timed.append((tuple(product().shape), multiplications))
        return float(len(timed))

    monkeypatch.setattr("specmpc_cli.workflows.benchmark._gflops", timing)
    runtime = choose_runtime("cpu", "fp32")
    assert peak_gflops(runtime, torch.float32) == 2.0
    assert timed == [((64, 64), 64**3), ((64, 16), 64 * 16**2)]
    assert peak_gflops(replace(runtime, compiled=False), torch.float32) == 3.0
    monkeypatch.setattr(native, "multiplies", lambda dtype: True)
    assert peak_gflops(runtime, torch.int8) == 4.0 and timed[3] == ((64, 16), 64 * 16**2)  # torch has no such product


def test_the_count_of_products_is_the_planners(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an iteration draws passes reward and dynamics at each step, as the prior's candidates do once; at the end all pass the policy
    and two heads in every iteration.
    """
    report = benchmark(choose_runtime("cpu", "fp32"), [1], ["plan"], seconds=0.0)
    z, a, h, bins, n, horizon, prior = 8, 6, 8, 101, 512, 3, 24
    hidden = (z + a) * h + h * h
    step, act = 2 * hidden + h * bins + h * z, z * h + h * h + h * 2 * a
    # At the first step drawn candidates share the latent: its part of the first layers is computed once.
    drawn = 2 * (n - prior) * (horizon * step - 2 * z * h) + 2 * 2 * z * h
    per_iteration = drawn + 2 * n * (act + 2 * (hidden + h * bins))
    policy = 2 * prior * horizon * (act + step)
    rollout = 2 * horizon * (hidden + h * z) + 2 * (24 * h + h * z)
    assert report["rows"][0]["gflop"] * 1e9 == pytest.approx(6 * per_iteration + policy + rollout, rel=1e-3)


def test_a_compiler_that_fails_while_the_cases_are_made_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECMPC_COMPILE", "1")
    monkeypatch.setattr("specmpc_cli.runtime._missing_for_compilation", lambda: None)

    def broken(*given: object) -> object:
        raise RuntimeError("the compiler is broken")

    monkeypatch.setattr("specmpc_cli.workflows.acting.kernels_for", lambda runtime: Kernels(broken, broken) if runtime.compiled else EAGER)
    report = benchmark(choose_runtime("cpu", "fp32"), [1], ["step"], seconds=0.0)
    assert report["notes"] == ["compiling failed, so our path is timed eagerly: the compiler is broken"]
    assert [row["compiled"] for row in report["rows"]] == [False] and report["compiled"] is False


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:not captured")
def test_a_gpu_is_timed_with_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECMPC_COMPILE", "1")
    report = benchmark(choose_runtime("cuda", "bf16"), [1], seconds=0.0)
    assert [row["what"] for row in report["rows"]] == list(WHAT) and all(row["compiled"] for row in report["rows"])


def test_the_command_prints_a_table_or_one_document(command: Command) -> None:
    table = command("bench", "--sizes", "1", "--what", "step")
    assert table.code == 0 and "plain ms" in table.out and "step" in table.out and "1 M" in table.out
    document = command("bench", "--sizes", "1", "--what", "step,plan", "--json").document
    assert [row["what"] for row in document["rows"]] == ["plan", "step"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sizes", "2"), "--sizes must be among 1, 5, 19, 48, 317, got 2"),
        (("--sizes", "one"), "--sizes takes sizes separated by commas, such as 1,5; got 'one'"),
        (("--sizes", ""), "--sizes takes sizes"),
        (("--what", "plan,nap"), "--what must be among plan, batch, update, step, got 'nap'"),
        (("--device", "tpu"), "--device must be"),
    ],
)
def test_bad_options_are_refused(command: Command, arguments: tuple[str, ...], message: str) -> None:
    assert message in command.fails("bench", *arguments)


def test_the_machine_has_a_name() -> None:
    assert machine_name(torch.device("cpu"))
