"""CUDA graphs: work that is launched once and then replayed, without Python and without launching its kernels one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

EAGER_CALLS = 2  # before a graph is captured: they load kernels and make optimisers' state, which a capture must not do


class CapturedCall:
    """A function of tensors whose work on CUDA is captured in one graph at its third call.

    The function must do the same work at each call, on tensors of the same shapes, and talk to the host in no way. Its result may be any
    tuple of tensors. Off CUDA (`enabled` false) it is simply called.
    """

    def __init__(self, fn: Callable[..., Any], enabled: bool) -> None:
        self._fn, self._enabled = fn, enabled
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._outputs: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        self._calls += 1
        if not self._enabled or self._calls <= EAGER_CALLS:
            return self._fn(*inputs)
        if self._graph is None:
            self._capture(inputs)
        if self._graph is None:
            return self._fn(*inputs)
        for static, value in zip(self._inputs, inputs, strict=True):
            static.copy_(value)
        self._graph.replay()
        return tree_map(torch.clone, self._outputs)  # the next replay writes over them

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        """Captures the function; where that fails it stays a plain call for good, and a warning says so."""
        self._inputs = tuple(value.clone() for value in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._outputs = self._fn(*self._inputs)
        except RuntimeError as error:
            self._enabled = False
            warnings.warn(f"not captured in a CUDA graph, so it runs slower: {str(error).strip().splitlines()[0]}", stacklevel=3)
            return
        self._graph = graph
