"""Is bf16, or int8, another controller? Plays the same episodes in fp32 and in it, and prints what the difference does to the return.

    python docs/precision.py STORE TASK [--dtype bf16] [--episodes 20] [--horizons 12] [--seed 0] [--out precision.json]

Rows: plain replanning, and each corrector at each horizon. Both precisions draw the same numbers and play the same `compare` episodes;
the interval is that of the ratio of paired returns.

int8 needs a processor that has it. A machine that does not multiply bf16 computes what oneDNN does on one that does: operands rounded to
bf16, products and sums in fp32, results rounded to bf16 (where our own kernels multiply, only what goes into the next product is rounded).
That leaves the order of the sums, in which two such machines differ as well. It takes about as long as fp32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specmpc_cli.cli.session import envs_for
from specmpc_cli.engine import layers
from specmpc_cli.envs.registry import lookup
from specmpc_cli.envs.vector import VectorEnv
from specmpc_cli.runtime import Purpose, choose_runtime, multiplies_bf16
from specmpc_cli.workflows.acting import Workbench
from specmpc_cli.workflows.evaluate import calls_saved, episodes_of, evaluate, scores_of
from specmpc_cli.workflows.statistics import ratio, ratio_ci95
from specmpc_cli.workflows.store import Store, config_of
from specmpc_cli.workflows.ways import Mode, Way


# Opaque to the compiler, which would otherwise drop a rounding to bf16 between two fp32 kernels.
@torch.library.custom_op("specmpc_docs::linear", mutates_args=())
def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of bf16 tensors as bf16 hardware computes it: exact products, sums in fp32, one rounding at the end."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(torch.bfloat16)


@torch.library.custom_op("specmpc_docs::bmm", mutates_args=())
def rounded_bmm(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.bmm` of bf16 tensors, likewise."""
    return torch.bmm(x.float(), weight.float()).to(torch.bfloat16)


@rounded_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@rounded_bmm.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[2])


def emulate_bf16() -> None:
    """Sends the layers' bf16 products through fp32 units; fp32 products stay as they are."""
    linear, bmm = F.linear, torch.bmm

    def linear_of(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return rounded_linear(x, weight, bias) if weight.dtype is torch.bfloat16 else linear(x, weight, bias)

    def bmm_of(x: Tensor, weight: Tensor) -> Tensor:
        return rounded_bmm(x, weight) if weight.dtype is torch.bfloat16 else bmm(x, weight)

    layers.F = SimpleNamespace(**{**vars(F), "linear": linear_of})
    layers.torch = SimpleNamespace(**{**vars(torch), "bmm": bmm_of})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("task")
    parser.add_argument("--dtype", choices=("bf16", "int8"), default="bf16")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--horizons", default="12")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    dtype = options.dtype
    precisions = {name: choose_runtime("auto", name) for name in ("fp32", dtype)}
    emulated = dtype == "bf16" and not multiplies_bf16(precisions["bf16"].device)
    if emulated:
        emulate_bf16()
    spec = lookup(options.task).spec
    store = Store(options.store, spec.task, "main")
    teacher = store.teacher()
    config = config_of(teacher, [], [])
    benches = {name: Workbench(teacher, spec, config, runtime) for name, runtime in precisions.items()}
    ways = [Way(Mode.BASELINE, 1)]
    ways += [Way(Mode.CORRECTED, int(k), corrector) for corrector in store.correctors(teacher)[0] for k in options.horizons.split(",")]
    envs = VectorEnv.make(spec.task, envs_for(options.episodes))
    episodes = episodes_of(Purpose.COMPARE, options.seed, options.episodes)

    print(f"{spec.task}, {options.episodes} episodes, seed {options.seed}, {dtype} {'emulated' if emulated else 'by the hardware'}\n")
    print(f"| way | calls saved | fp32 | {dtype} | {dtype} / fp32 |\n|---|---|---|---|---|", flush=True)
    rows: list[dict[str, Any]] = []
    for way in ways:
        stats = {name: evaluate(bench, way, envs, episodes) for name, bench in benches.items()}
        returns = {name: scores_of(of, use_success=False) for name, of in stats.items()}
        value, interval = ratio(returns[dtype], returns["fp32"]), ratio_ci95(returns[dtype], returns["fp32"])
        within = f"{value:.1%} ({interval[0]:.1%}–{interval[1]:.1%})" if value is not None and interval else "–"
        print(
            f"| {way.label} | {calls_saved(stats['fp32']):.1%} | {returns['fp32'].mean():.1f} | {returns[dtype].mean():.1f} | {within} |",
            flush=True,
        )
        rows.append(
            {"way": way.label, "returns": {name: of.tolist() for name, of in returns.items()}, "ratio": value, "ratio_ci95": interval}
        )
        if options.out:
            played = {"task": spec.task, "dtype": dtype, "seed": options.seed, "emulated": emulated}
            options.out.write_text(json.dumps(played | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
