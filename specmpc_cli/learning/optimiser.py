"""Adam with a bound on the gradients' norm: torch's, or a kernel of our own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specmpc_cli.engine import native


class ClippedAdam(torch.optim.Adam):
    """Adam, whose gradients are scaled to a norm of `max_norm` at most before each step, all together, and are gone after it."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, max_norm: float, by_kernel: bool, capturable: bool, **settings: float) -> None:
        """
        Args:
            by_kernel: on a CPU, once the kernels are built; the state is that of torch's either way.
            settings: torch's, such as `lr` and `eps`.
        """
        super().__init__(groups, fused=True, capturable=capturable, **settings)  # type: ignore[arg-type]
        self._max_norm, self.by_kernel = max_norm, by_kernel
        self._parameters: list[nn.Parameter] = [parameter for group in self.param_groups for parameter in group["params"]]

    def clipped_step(self) -> Tensor:
        """→ the norm before, []."""
        if self.by_kernel and native.built():
            norm = self._kernels_step()
        else:
            norm = clip_gradients(self._parameters, self._max_norm)
            self.step()
        self.forget_gradients()
        return norm

    def forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def begin(self) -> None:
        """Moments of zero, as before the first step."""
        for parameter in self._parameters:
            self.state[parameter] = {
                "step": torch.zeros((), device=parameter.device if self.defaults["capturable"] else "cpu"),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }

    @torch.no_grad()
    def _kernels_step(self) -> Tensor:
        if not self.state:
            self.begin()
        moments = [self.state[parameter] for parameter in self._parameters]
        means, squares, steps = ([one[name] for one in moments] for name in ("exp_avg", "exp_avg_sq", "step"))
        gradients = [parameter.grad for parameter in self._parameters]
        rates = [group["lr"] for group in self.param_groups for _ in group["params"]]
        given = (self._parameters, gradients, means, squares, steps, rates)
        return torch.ops.specmpc.clipped_adam(*given, *self.defaults["betas"], self.defaults["eps"], self._max_norm)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """As nn.utils.clip_grad_norm_, to the bit; → the norm before. On a CPU gradients within the bound are not multiplied by one."""
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None], foreach=True)
    if norm.is_cuda or not norm + 1e-6 <= max_norm:  # what torch divides by; not a number fails this, and is passed on
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm
