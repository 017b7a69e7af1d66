"""The planner's random draws, keyed by (stream, step), so that a row's plan does not depend on which other rows are planned beside it.

On a CPU they come from numpy's Philox generators, one per row, or are the same numbers from a kernel of our own. On an accelerator that
would be the slowest part of a plan, and a captured graph cannot call the host, so there the counter-based generator itself is computed, for
all rows at once. The two give different draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from specmpc_cli.engine import native
from specmpc_cli.engine.planner import PlannerNoise, PlannerSettings

# (settings, action_dim, num_q, streams [B], steps [B]) → the draws of B rows
Draws = Callable[[PlannerSettings, int, int, Tensor, Tensor], PlannerNoise]
# (stream, step, count) → so many normal draws, and the generator that goes on from there
_Normals = Callable[[int, int, int], tuple[np.ndarray, np.random.Generator]]


def host_draws(s: PlannerSettings, action_dim: int, num_q: int, streams: Tensor, steps: Tensor) -> PlannerNoise:
    """All draws of B rows, made by numpy; streams and steps [B] int64."""
    return _drawn_by(_by_numpy, s, action_dim, num_q, streams, steps)


def kernel_draws(s: PlannerSettings, action_dim: int, num_q: int, streams: Tensor, steps: Tensor) -> PlannerNoise:
    """`host_draws`, number for number; where they are built, nearly all by a kernel of our own, in a third of the time."""
    return _drawn_by(_by_kernel if native.built() else _by_numpy, s, action_dim, num_q, streams, steps)


def _drawn_by(normals: _Normals, s: PlannerSettings, action_dim: int, num_q: int, streams: Tensor, steps: Tensor) -> PlannerNoise:
    keys = zip(streams.tolist(), steps.tolist(), strict=True)
    rows = [_host_row(s, action_dim, num_q, *key, normals) for key in keys]
    # One row is not copied.
    return PlannerNoise(*(torch.from_numpy(draws[0][None] if len(rows) == 1 else np.stack(draws)) for draws in zip(*rows, strict=True)))


def _host_row(s: PlannerSettings, action_dim: int, num_q: int, stream: int, step: int, normals: _Normals) -> tuple[np.ndarray, ...]:
    """One row's draws, in the order and with the shapes (less B) of `PlannerNoise`."""
    *shapes, last = _normal_shapes(s, action_dim).values()
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    drawn, rng = normals(stream, step, int(ends[-1]))
    prior, samples, terminal = (part.reshape(shape) for part, shape in zip(np.split(drawn, ends[:-1]), shapes, strict=True))
    q_index = np.stack([rng.permutation(num_q)[:2] for _ in range(s.iterations)]).astype(np.int64)
    exponential = rng.standard_exponential(s.num_elites, dtype=np.float32)
    return prior, samples, terminal, q_index, exponential, rng.standard_normal(last, dtype=np.float32)


def _by_numpy(stream: int, step: int, count: int) -> tuple[np.ndarray, np.random.Generator]:
    rng = np.random.Generator(np.random.Philox(key=[stream, step]))
    return rng.standard_normal(count, dtype=np.float32), rng


def _by_kernel(stream: int, step: int, count: int) -> tuple[np.ndarray, np.random.Generator]:
    drawn, after = torch.ops.specmpc.draw_normals(stream, step, count)
    counter, *block, taken, halved, half = after.numpy().view(np.uint64)
    bits = np.random.Philox(key=[stream, step])
    bits.state = {
        "bit_generator": "Philox",
        "state": {"counter": np.array([counter, 0, 0, 0], np.uint64), "key": np.array([stream, step], np.uint64)},
        "buffer": np.array(block, np.uint64),
        "buffer_pos": int(taken),
        "has_uint32": int(halved),
        "uinteger": int(half),
    }
    return drawn.numpy(), np.random.Generator(bits)


def device_draws(s: PlannerSettings, action_dim: int, num_q: int, streams: Tensor, steps: Tensor) -> PlannerNoise:
    """All draws of B rows, computed where streams and steps [B] int64 lie, without a word to the host."""
    return draws_from(s, action_dim, num_q, streams, steps, block_numbers(s, action_dim, streams.device))


def block_numbers(s: PlannerSettings, action_dim: int, device: torch.device) -> Tensor:
    """The counters of one row's draws, int64: each gives four words."""
    return torch.arange(math.ceil(sum(_counts(s, action_dim)) / 4), device=device)


def draws_from(s: PlannerSettings, action_dim: int, num_q: int, streams: Tensor, steps: Tensor, blocks: Tensor) -> PlannerNoise:
    """`device_draws` from its block numbers. To a compiler they must be data: products of an index it computes in 32 bits."""
    counts = _counts(s, action_dim)
    for_normal, for_heads, for_elites = _uniform(streams, steps, blocks)[:, : sum(counts)].split(counts, dim=1)
    first, second = for_normal.chunk(2, dim=1)
    radius, angle = torch.sqrt(-2.0 * torch.log(first)), 2.0 * math.pi * second  # Box and Muller
    normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    shapes = _normal_shapes(s, action_dim)
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = normal[:, : sum(sizes)].split(sizes, dim=1)
    return PlannerNoise(
        q_index=_two_of(num_q, for_heads.unflatten(1, (s.iterations, 2))),
        exponential=-torch.log(for_elites),
        **{name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)},
    )


def _normal_shapes(s: PlannerSettings, action_dim: int) -> dict[str, tuple[int, ...]]:
    """The normal draws of one row."""
    return {
        "prior_eps": (s.num_pi_trajs, s.horizon, action_dim),
        "sample_eps": (s.iterations, s.num_samples - s.num_pi_trajs, s.horizon, action_dim),
        "terminal_eps": (s.iterations, s.num_samples, action_dim),
        "action_eps": (action_dim,),
    }


def _counts(s: PlannerSettings, action_dim: int) -> list[int]:
    """The uniform draws behind one row: for its normal draws (an even number), its Q-heads and its elites."""
    normal = sum(math.prod(shape) for shape in _normal_shapes(s, action_dim).values())
    return [normal + normal % 2, 2 * s.iterations, s.num_elites]


def _two_of(num_q: int, uniform: Tensor) -> Tensor:
    """Two different heads for each pair of uniforms [..., 2] → int64 [..., 2]."""
    first = (uniform[..., 0] * num_q).long().clamp(max=num_q - 1)
    second = (uniform[..., 1] * (num_q - 1)).long().clamp(max=num_q - 2)
    return torch.stack([first, second + (second >= first)], dim=-1)


def _uniform(streams: Tensor, steps: Tensor, blocks: Tensor) -> Tensor:
    """Uniform draws in (0, 1) of each row's (stream, step), four for each block number; fp32 [B, n]."""
    index = blocks.expand(len(streams), -1)
    step = steps.unsqueeze(1).expand_as(index)
    zero = torch.zeros_like(index)
    words = philox4x32((index, step & _LOW, (step >> 32) & _LOW, zero), (streams.unsqueeze(1) & _LOW, (streams.unsqueeze(1) >> 32) & _LOW))
    # With 23 bits the half, which keeps 0 and 1 out, still fits into fp32's mantissa.
    return ((torch.stack(words, dim=2).flatten(1) >> 9).float() + 0.5) * 2.0**-23


_LOW = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., 2011): four words of counter and two of key → four random words, each in [0, 2³²) as int64."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        # The products wrap around in int64; their low 64 bits are right, and so are both halves.
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = ((right >> 32) & _LOW) ^ b ^ k, right & _LOW, ((left >> 32) & _LOW) ^ d ^ m, left & _LOW
        k, m = (k + 0x9E3779B9) & _LOW, (m + 0xBB67AE85) & _LOW
    return a, b, c, d
