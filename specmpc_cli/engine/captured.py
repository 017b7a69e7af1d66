"""CUDA graphs: work that is launched once and then replayed, without Python and without launching its kernels one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

EAGER_CALLS = 2  # before a graph is captured: they load kernels and make optimisers' state, which a capture must not do


class CapturedCall:
    """A function of tensors whose work on CUDA is captured in one graph at its third call.

    The function must do the same work at each call, on tensors of the same shapes, and talk to the host in no way. Its result may be any
    tuple of tensors. Off CUDA (`enabled` false) it is simply called.
    """

    _failures: ClassVar[int] = 0  # captures that failed in this process

    def __init__(self, fn: Callable[..., Any], enabled: bool) -> None:
        self._fn, self._enabled = fn, enabled
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failures_before = 0  # the capture
        self._inputs: tuple[Tensor, ...] = ()  # what the function is always called with, so that the graph finds its inputs there
        self._outputs: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        if not self._enabled:
            return self._fn(*inputs)
        self._calls += 1
        if self._calls == 1:
            with torch.inference_mode(False):  # tensors of one kind, whatever the caller's mode: compiled code tells them apart
                self._inputs = tuple(torch.empty_like(value) for value in inputs)
        for static, value in zip(self._inputs, inputs, strict=True):
            static.copy_(value)
        if self._failures_before != CapturedCall._failures:
            self._graph = None  # it would draw from the random generator that was replaced since
        if self._graph is None and self._calls > EAGER_CALLS:
            self._capture()
        if self._graph is None:
            return tree_map(torch.clone, self._fn(*self._inputs))
        self._graph.replay()
        return tree_map(torch.clone, self._outputs)  # the next call writes over them

    def _capture(self) -> None:
        """Captures the function; where that fails it stays a plain call for good, and a warning says so."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                self._outputs = self._fn(*self._inputs)
        except RuntimeError as error:
            self._enabled = False
            CapturedCall._failures += 1
            _leave_failed_capture(stream)
            warnings.warn(f"not captured in a CUDA graph, so it runs slower: {str(error).strip().splitlines()[0]}", stacklevel=3)
            return
        self._graph, self._failures_before = graph, CapturedCall._failures


def _leave_failed_capture(stream: torch.cuda.Stream) -> None:
    """Takes back what a capture that fails leaves behind: its stream as the current one, the default generator bound to its graph."""
    torch.cuda.set_stream(stream)
    generator = torch.cuda.default_generators[stream.device_index]
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())
