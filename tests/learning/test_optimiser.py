"""Adam with a bound on the gradients' norm: torch's own, and the kernel that stands for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from specmpc_cli.engine import native
from specmpc_cli.learning.optimiser import ClippedAdam, clip_gradients

SHAPES = ((70, 130), (3,), (2, 5, 7))  # more than the kernel's pieces, and less


def make_adam(by_kernel: bool) -> tuple[ClippedAdam, list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    first, *rest = parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    groups = [{"params": [first], "lr": 1e-3}, {"params": rest}]
    return ClippedAdam(groups, lr=3e-3, eps=1e-5, max_norm=20.0, by_kernel=by_kernel, capturable=False), parameters


def give_gradients(parameters: list[nn.Parameter], number: int) -> None:
    """Their norm is 9 to 900: some steps are bounded."""
    generator = torch.Generator().manual_seed(number)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.1 * 10.0 ** (number % 3)


def states(adam: ClippedAdam, parameters: list[nn.Parameter]) -> list[Tensor]:
    return [*parameters, *(value for parameter in parameters for value in adam.state[parameter].values())]


@pytest.mark.compiler
def test_the_kernel_steps_as_torch_does() -> None:
    assert native.built(), native.problem()
    (kernels, ours), (torchs, theirs) = make_adam(True), make_adam(False)
    for number in range(7):
        for parameters in (ours, theirs):
            give_gradients(parameters, number)
        torch.testing.assert_close(kernels.clipped_step(), torchs.clipped_step(), rtol=1e-6, atol=0)
        assert all(parameter.grad is None for parameter in (*ours, *theirs))
        for mine, other in zip(states(kernels, ours), states(torchs, theirs), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.compiler
def test_either_goes_on_from_the_others_state() -> None:
    assert native.built(), native.problem()
    for first in (False, True):
        adam, parameters = make_adam(first)
        give_gradients(parameters, 0)
        adam.clipped_step()
        adam.by_kernel = not first
        give_gradients(parameters, 1)
        adam.clipped_step()
        assert [float(adam.state[parameter]["step"]) for parameter in parameters] == [2.0] * 3


@pytest.mark.compiler
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_the_kernel_does_not_hide_what_is_not_finite(broken: float) -> None:
    assert native.built(), native.problem()
    adam, parameters = make_adam(True)
    give_gradients(parameters, 0)
    assert parameters[1].grad is not None
    parameters[1].grad[1] = broken
    assert not adam.clipped_step().isfinite() and parameters[1][1].isnan()


@pytest.mark.compiler
def test_the_kernels_step_does_not_depend_on_the_number_of_threads() -> None:
    assert native.built(), native.problem()
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            adam, parameters = make_adam(True)
            for number in range(2):
                give_gradients(parameters, number)
                adam.clipped_step()
            found.append(states(adam, parameters))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for others in found[1:] for one, other in zip(found[0], others, strict=True))


@pytest.mark.compiler
def test_the_kernel_refuses_what_does_not_fit() -> None:
    assert native.built(), native.problem()
    adam, parameters = make_adam(True)
    give_gradients(parameters, 0)
    adam.clipped_step()
    give_gradients(parameters, 1)
    parameters[-1].grad = torch.zeros(7, 5, 2).T
    before = [value.clone() for value in states(adam, parameters)]
    with pytest.raises(RuntimeError, match="side by side and of one shape"):
        adam.clipped_step()
    assert all(torch.equal(value, former) for value, former in zip(states(adam, parameters), before, strict=True))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1 - 2e-7, 1 - 4e-8, 1.0, 1 + 1e-6, 3.0, torch.inf, torch.nan])
def test_gradients_are_clipped_as_torch_clips_them(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.zeros(5, 7)), torch.nn.Parameter(torch.zeros(3))] for _ in range(2))
    whole = torch.randn(38, generator=generator, dtype=torch.float64)
    whole = (whole / whole.norm() * 20 * scale).float()
    for parameters in (ours, theirs):
        parameters[0].grad, parameters[1].grad = whole[:35].view(5, 7).clone(), whole[35:].clone()
    norm, expected = clip_gradients(ours, 20.0), torch.nn.utils.clip_grad_norm_(theirs, 20.0)
    assert torch.equal(norm, expected) or (norm.isnan() and expected.isnan())
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None and other.grad is not None
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0, equal_nan=True)
