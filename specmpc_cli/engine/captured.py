"""CUDA graphs: work that is launched once and then replayed, without Python and without launching its kernels one by one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

EAGER_CALLS = 2  # before a graph is captured: they load kernels and make optimisers' state, which a capture must not do


class Layout:
    """How a tree of tensors lies in one flat buffer per dtype, so that copying all of it takes one launch for each, not one per tensor."""

    def __init__(self, tree: Any) -> None:
        leaves, self._tree = tree_flatten(tree)
        self._shapes = [leaf.shape for leaf in leaves]
        self._places = places_by_dtype(leaves)
        self._sizes = [[leaves[place].numel() for place in places] for places in self._places]

    @torch.no_grad()
    def pack(self, tree: Any) -> list[Tensor]:
        """The buffers of a tree like the first."""
        leaves = tree_leaves(tree)
        return [torch.cat([leaves[place].reshape(-1) for place in places]) for places in self._places]

    def unpack(self, buffers: Sequence[Tensor]) -> Any:
        """The tree, of views into these buffers."""
        leaves: list[Tensor | None] = [None] * len(self._shapes)
        for places, sizes, buffer in zip(self._places, self._sizes, buffers, strict=True):
            for place, part in zip(places, buffer.split(sizes), strict=True):
                leaves[place] = part.view(self._shapes[place])
        return tree_unflatten(leaves, self._tree)


def places_by_dtype(values: Sequence[Tensor]) -> list[list[int]]:
    """The indices of values of each dtype."""
    places: dict[torch.dtype, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(value.dtype, []).append(place)
    return list(places.values())


class CapturedCall:
    """A function of tensors whose work on CUDA is captured in one graph at its third call.

    The function must do the same work at each call, on tensors of the same shapes, and talk to the host in no way. Its result may be a
    tensor or a tuple of tensors; those of one call share their memory, so that keeping one keeps all. Off CUDA it is simply called.
    """

    _failures: ClassVar[int] = 0  # captures that failed in this process

    def __init__(self, fn: Callable[..., Any], device: torch.device) -> None:
        """`device`: where the function's tensors are."""
        self._fn, self._device = fn, device
        self._enabled = device.type == "cuda"
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failures_before = 0  # the capture
        self._inputs: tuple[Tensor, ...] = ()  # what the function is always called with, so that the graph finds its inputs there
        self._places: list[list[int]] = []  # the inputs of each dtype
        self._layout: Layout | None = None
        self._outputs: list[Tensor] = []  # buffers

    def __call__(self, *inputs: Tensor) -> Any:
        if not self._enabled:
            return self._fn(*inputs)
        self._calls += 1
        if self._calls == 1:
            with torch.inference_mode(False):  # tensors of one kind, whatever the caller's mode: compiled code tells them apart
                self._inputs = tuple(torch.empty_like(value) for value in inputs)
            self._places = places_by_dtype(inputs)
        assert len(inputs) == len(self._inputs)
        for places in self._places:
            torch._foreach_copy_([self._inputs[place] for place in places], [inputs[place] for place in places])
        if self._failures_before != CapturedCall._failures:
            self._graph = None  # it would draw from the random generator that was replaced since
        if self._graph is None and self._calls > EAGER_CALLS:
            with torch.cuda.device(self._device):
                self._capture()
        if self._graph is None:
            return tree_map(torch.clone, self._fn(*self._inputs))
        self._graph.replay()
        assert self._layout is not None
        return self._layout.unpack([buffer.clone() for buffer in self._outputs])  # the next call writes over them

    def _capture(self) -> None:
        """Captures the function; where that fails it stays a plain call for good, and a warning says so."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                result = self._fn(*self._inputs)
                self._layout = Layout(result)
                self._outputs = self._layout.pack(result)
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
