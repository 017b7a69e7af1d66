"""Random draws: what they are keyed by, and how they are spread."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from specmpc_cli.engine import native
from specmpc_cli.engine.compiled import compiled_draws
from specmpc_cli.engine.draws import Draws, _by_kernel, device_draws, host_draws, kernel_draws, philox4x32
from specmpc_cli.engine.planner import PlannerNoise, PlannerSettings

SETTINGS = PlannerSettings(discount=0.99)
FIELDS = ("prior_eps", "sample_eps", "terminal_eps", "q_index", "exponential", "action_eps")
BOTH = pytest.mark.parametrize("draws", [host_draws, device_draws])


def some(draws: Draws, streams: list[int], steps: list[int], num_q: int = 5) -> PlannerNoise:
    return draws(SETTINGS, 3, num_q, torch.tensor(streams), torch.tensor(steps))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers of the authors' own test suite (Random123)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    words = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))  # type: ignore[arg-type]
    assert tuple(int(word) for word in words) == expected


@BOTH
def test_shapes_are_the_planners(draws: Draws) -> None:
    made, s = some(draws, [1, 2], [0, 0]), SETTINGS
    shapes = [tuple(getattr(made, name).shape) for name in FIELDS]
    drawn = s.num_samples - s.num_pi_trajs
    assert shapes == [(2, 24, 3, 3), (2, 6, drawn, 3, 3), (2, 6, 512, 3), (2, 6, 2), (2, 64), (2, 3)]
    assert made.q_index.dtype == torch.int64


@BOTH
def test_draws_depend_on_stream_and_step_alone(draws: Draws) -> None:
    both, alone = some(draws, [5, 2**62 + 6], [0, 9]), some(draws, [2**62 + 6], [9])
    for name in FIELDS:
        assert torch.equal(getattr(both, name)[1], getattr(alone, name)[0]), name
    for other in (some(draws, [2**62 + 6], [10]), some(draws, [6], [9])):
        for name in set(FIELDS) - {"q_index"}:
            assert not torch.equal(getattr(other, name), getattr(alone, name)), name


@BOTH
def test_draws_are_spread_as_they_should_be(draws: Draws) -> None:
    made = some(draws, list(range(40)), [3] * 40)
    normal = torch.cat([getattr(made, name).flatten() for name in ("prior_eps", "sample_eps", "terminal_eps", "action_eps")]).double()
    n = len(normal)
    assert torch.isfinite(normal).all()
    assert abs(normal.mean()) < 5 / n**0.5 and abs(normal.var() - 1) < 5 * (2 / n) ** 0.5
    for bound, share in ((1.0, 0.317311), (2.0, 0.045500), (3.0, 0.002700)):
        assert abs(float((normal.abs() > bound).double().mean()) - share) < 5 * (share / n) ** 0.5
    for lag in (1, 2, 3, 512 * 3):
        assert abs(float((normal[lag:] * normal[:-lag]).mean())) < 5 / n**0.5
    exponential = made.exponential.flatten()
    assert (exponential > 0).all() and abs(exponential.mean() - 1) < 5 / len(exponential) ** 0.5


@BOTH
@pytest.mark.parametrize("num_q", [2, 5])
def test_two_different_heads_all_equally_likely(draws: Draws, num_q: int) -> None:
    index = some(draws, list(range(500)), [1] * 500, num_q).q_index.flatten(0, 1)
    assert (index[:, 0] != index[:, 1]).all() and index.min() == 0 and index.max() == num_q - 1
    for column in (0, 1):
        counts = torch.bincount(index[:, column], minlength=num_q).double() / len(index)
        assert (counts - 1 / num_q).abs().max() < 5 * (0.25 / len(index)) ** 0.5


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_the_extreme_words_give_finite_draws(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.full_like(counter[0], word),) * 4

    monkeypatch.setattr("specmpc_cli.engine.draws.philox4x32", constant)
    made = some(device_draws, [1], [1])
    assert (made.exponential > 0).all() and torch.isfinite(made.exponential).all() and torch.isfinite(made.sample_eps).all()
    assert ((made.q_index >= 0) & (made.q_index < 5)).all() and (made.q_index[..., 0] != made.q_index[..., 1]).all()


@pytest.mark.compiler
def test_compiled_device_draws_are_the_same_draws() -> None:
    eager, compiled = some(device_draws, [7], [11]), some(compiled_draws(), [7], [11])
    for name in FIELDS:
        expected: Tensor = getattr(eager, name)
        torch.testing.assert_close(getattr(compiled, name), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_compiled_draws_on_a_gpu_are_those_of_a_cpu() -> None:
    """The words are the same to the last bit; logarithms and cosines are not."""
    on_gpu = compiled_draws()(SETTINGS, 3, 5, torch.tensor([7, 2**62 + 6]).cuda(), torch.tensor([11, 0]).cuda())
    on_cpu = some(device_draws, [7, 2**62 + 6], [11, 0])
    for name in FIELDS:
        torch.testing.assert_close(getattr(on_gpu, name).cpu(), getattr(on_cpu, name), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.compiler
@pytest.mark.parametrize(("num_samples", "num_elites", "action_dim"), [(512, 64, 6), (33, 7, 1), (25, 5, 3)])
def test_a_kernel_draws_what_numpy_does(num_samples: int, num_elites: int, action_dim: int) -> None:
    """To the last bit, and so do the generators that go on behind it: of odd numbers of words, too."""
    assert native.built(), native.problem()
    settings = PlannerSettings(discount=0.99, num_samples=num_samples, num_elites=num_elites)
    keys = torch.arange(40)
    streams = torch.cat([keys[:20], 2**63 - 1 - keys[:20] * 0x9E3779B97F4A7C])
    expected, found = (draws(settings, action_dim, 5, streams, keys * 977) for draws in (host_draws, kernel_draws))
    for field in FIELDS:
        assert torch.equal(getattr(expected, field), getattr(found, field)), field


@pytest.mark.compiler
def test_numpy_goes_on_wherever_a_kernel_stops() -> None:
    assert native.built(), native.problem()
    for count in (1, 2, 7, 8, 9, 511, 512, 513, 4096):
        whole = np.random.Generator(np.random.Philox(key=[3, 4])).standard_normal(count + 50, dtype=np.float32)
        drawn, rng = _by_kernel(3, 4, count)
        assert np.array_equal(whole, np.concatenate([drawn, rng.standard_normal(50, dtype=np.float32)]))


def test_without_kernels_numpy_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "built", lambda: False)
    expected, found = some(host_draws, [1, 2], [3, 4]), some(kernel_draws, [1, 2], [3, 4])
    assert all(torch.equal(getattr(expected, field), getattr(found, field)) for field in FIELDS)
