"""One row's numbers do not depend on the rows beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_Result = TypeVar("_Result")  # a tensor or a tuple of tensors


def row_by_row(fn: Callable[..., _Result], *given: Tensor) -> _Result:
    """fn of tensors [B, ...], whose results have B rows, too. On a CPU it sees one row at a time.

    A CPU's products of one row and of several differ in their last bits, and a closed loop makes returns of that. A GPU wants all rows at
    once, and promises no bits.
    """
    if len(given[0]) == 1 or given[0].device.type != "cpu":
        return fn(*given)
    parts = [fn(*row) for row in zip(*(value.split(1) for value in given), strict=True)]
    return tree_map(lambda *rows: torch.cat(rows), *parts)
