"""The bookkeeping around a CUDA graph, with a stand-in that records on capture and computes again on replay."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from specmpc_cli.engine.captured import EAGER_CALLS, CapturedCall, Layout


class Result(NamedTuple):
    total: Tensor
    doubled: Tensor
    positive: Tensor


def work(x: Tensor, y: Tensor) -> Result:
    return Result((x + y).sum(), 2 * x, x > 0)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> tuple[CapturedCall, list[str]]:
    events: list[str] = []

    class Graph:
        def replay(self) -> None:
            events.append("replay")
            assert call._layout is not None
            for static, value in zip(call._outputs, call._layout.pack(call._fn(*call._inputs)), strict=True):
                static.copy_(value)

    def capturing(graph: Graph) -> contextlib.AbstractContextManager[None]:
        events.append("capture")
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the caller's")
    monkeypatch.setattr("specmpc_cli.engine.captured._leave_failed_capture", lambda stream: events.append(f"stream is {stream}"))
    call = CapturedCall(work, CUDA)
    return call, events


CUDA = torch.device("cuda")


def inputs(number: float) -> tuple[Tensor, Tensor]:
    return torch.full((3,), number), torch.arange(3.0)


def test_it_is_eager_at_first_then_captures_once_and_replays(captured: tuple[CapturedCall, list[str]]) -> None:
    call, events = captured
    for number in range(EAGER_CALLS):
        assert torch.equal(call(*inputs(number)).doubled, 2 * inputs(number)[0])
    assert events == []
    call(*inputs(7.0))
    call(*inputs(8.0))
    assert events == ["capture", "replay", "replay"]


def test_replays_see_new_inputs_and_leave_earlier_results_alone(captured: tuple[CapturedCall, list[str]]) -> None:
    call, _ = captured
    results = [call(*inputs(number)) for number in range(6)]
    for number, result in enumerate(results):
        assert isinstance(result, Result)
        assert float(result.total) == 3 * number + 3 and torch.equal(result.doubled, torch.full((3,), 2.0 * number))
        assert torch.equal(result.positive, torch.full((3,), number > 0))


def test_what_takes_or_gives_nothing_and_what_gives_one_tensor_are_captured_too(captured: tuple[CapturedCall, list[str]]) -> None:
    call, events = captured
    seen: list[int] = []
    call._fn = lambda: (seen.append(0), ())[1]
    assert all(call() == () for _ in range(EAGER_CALLS + 2))
    assert events == ["capture", "replay", "replay"] and len(seen) == EAGER_CALLS + 3  # the stand-in computes again on replay
    with pytest.raises(AssertionError):
        call(torch.zeros(1))


def test_one_tensor_from_inputs_of_several_dtypes(captured: tuple[CapturedCall, list[str]]) -> None:
    call, events = captured
    call._fn = lambda x, horizon, limit: x * horizon + limit
    for number in range(EAGER_CALLS + 2):
        assert torch.equal(call(torch.ones(2), torch.tensor(number), torch.tensor(0.5)), torch.full((2,), number + 0.5))
    assert events == ["capture", "replay", "replay"]


def test_a_layout_keeps_shapes_and_dtypes_in_one_buffer_each() -> None:
    tree = (torch.rand(2, 3), Result(torch.rand(()), torch.rand(3, 2).T, torch.tensor([True])), torch.arange(4).view(2, 2))
    layout = Layout(tree)
    buffers = layout.pack(tree)
    assert [(buffer.dtype, buffer.shape) for buffer in buffers] == [(torch.float32, (13,)), (torch.bool, (1,)), (torch.int64, (4,))]
    first, result, last = layout.unpack(buffers)
    assert isinstance(result, Result)
    for theirs, ours in zip((tree[0], *tree[1], tree[2]), (first, *result, last), strict=True):
        assert torch.equal(theirs, ours)
    alone = torch.rand(2, 2)
    assert torch.equal(Layout(alone).unpack(Layout(alone).pack(alone)), alone)
    assert Layout(()).unpack(Layout(()).pack(())) == ()


def test_what_cannot_be_captured_is_called_for_good(captured: tuple[CapturedCall, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    call, events = captured

    def failing(graph: object) -> contextlib.AbstractContextManager[None]:
        events.append("capture")
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    with pytest.warns(UserWarning, match="not captured in a CUDA graph"):
        results = [float(call(*inputs(number)).total) for number in range(5)]
    assert results == [3 * number + 3 for number in range(5)] and events == ["capture", "stream is the caller's"]


def test_a_failure_elsewhere_has_a_graph_captured_anew(captured: tuple[CapturedCall, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure replaced the random generator that the graph draws from."""
    call, events = captured
    for number in range(EAGER_CALLS + 2):
        call(*inputs(number))
    assert events == ["capture", "replay", "replay"]
    working = torch.cuda.graph

    def failing(graph: object) -> contextlib.AbstractContextManager[None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", failing)
    other = CapturedCall(work, CUDA)
    with pytest.warns(UserWarning, match="not captured"):
        for number in range(EAGER_CALLS + 1):
            other(*inputs(number))
    monkeypatch.setattr(torch.cuda, "graph", working)
    events.clear()
    assert float(call(*inputs(5.0)).total) == 18 and float(call(*inputs(6.0)).total) == 21
    assert events == ["capture", "replay", "replay"]


def test_compiled_code_meets_the_tensors_of_the_capture_before_it(captured: tuple[CapturedCall, list[str]]) -> None:
    """Else it would be compiled again while capturing, which CUDA forbids."""
    call, _ = captured
    seen = []
    call._fn = lambda *given: (seen.append([(value.data_ptr(), value.is_inference()) for value in given]), work(*given))[1]
    for number in range(EAGER_CALLS + 1):
        with torch.inference_mode(number != 1):
            call(*inputs(number))
    assert len(seen) == EAGER_CALLS + 2 and all(given == seen[0] for given in seen)  # the last is the stand-in's replay
    assert not any(inference for _, inference in seen[0])


def test_off_cuda_it_only_calls() -> None:
    call = CapturedCall(work, torch.device("cpu"))
    for number in range(5):
        assert float(call(*inputs(number)).total) == 3 * number + 3


@pytest.mark.gpu
def test_a_real_graph_computes_what_the_function_does() -> None:
    call = CapturedCall(work, CUDA)
    for number in range(6):
        given = tuple(value.cuda() for value in inputs(number))
        assert float(call(*given).total) == 3 * number + 3


@pytest.mark.gpu
def test_a_real_capture_that_fails_leaves_stream_and_draws_usable() -> None:
    """Draws after it are the ones that the caller seeded, those of a graph captured before and of one captured later too."""

    def drawing(x: Tensor) -> Result:
        drawn = torch.randn(3, device=x.device)
        return Result(drawn.sum(), drawn, drawn > 0)

    def seeded(call: CapturedCall) -> Tensor:
        torch.manual_seed(5)
        return call(x).doubled

    before, after = CapturedCall(drawing, CUDA), CapturedCall(drawing, CUDA)

    def talking_to_the_host(x: Tensor) -> Result:
        drawn = torch.randn(3, device=x.device)
        return Result(drawn.sum() + x.sum().item(), drawn, drawn > 0)

    call, x = CapturedCall(talking_to_the_host, CUDA), torch.ones(3, device="cuda")
    stream = torch.cuda.current_stream()
    drawn = [seeded(before) for _ in range(EAGER_CALLS + 2)]
    with pytest.warns(UserWarning, match="not captured in a CUDA graph"):
        drawn += [seeded(call) for _ in range(EAGER_CALLS + 3)]
    assert torch.cuda.current_stream() == stream
    drawn += [seeded(before) for _ in range(2)] + [seeded(after) for _ in range(EAGER_CALLS + 2)]
    assert all(torch.equal(one, drawn[0]) for one in drawn)
    assert before._graph is not None and after._graph is not None and call._graph is None
