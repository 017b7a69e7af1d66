"""The tuple schema, once: one row per visited step on which an older plan exists (see docs/data.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

SCHEMA_VERSION = 1


class Behaviour(IntEnum):
    """Who chose the executed action; stored as its number, named by the shard's `behaviours` attribute."""

    TEACHER = 0
    NAIVE = 1
    CORRECTED = 2


@dataclass(frozen=True, slots=True)
class TupleDims:
    """What fixes the shapes of the columns."""

    obs_dim: int
    action_dim: int
    latent_dim: int
    horizon: int

    def columns(self) -> dict[str, tuple[int, ...]]:
        """Column → shape of one row. All columns are float32."""
        z, a = (self.latent_dim,), (self.action_dim,)
        return {
            "z": z,  # encode(obs)
            "z_pred": z,  # what the older plan predicted here
            "a_plan": a,  # what it proposes here, after the tail rule
            "a_teacher_mean": a,  # weighted elite mean of a fresh plan here: the label
            "a_teacher_std": a,  # its spread
            "a_teacher": a,  # the drawn action of that fresh plan
            "a_exec": a,  # what was executed
            "warm_start": (self.horizon, self.action_dim),  # of the fresh plan
            "obs": (self.obs_dim,),
            "reward": (),
            "mismatch": (),
            "age": (),
            "episode": (),
            "step": (),
            "behaviour": (),
            "round": (),
        }


def stack_rows(rows: Sequence[Mapping[str, np.ndarray | float]], dims: TupleDims) -> dict[str, np.ndarray]:
    """Rows, in order, as columns [rows, ...]. The rows must hold exactly the schema's columns."""
    columns = dims.columns()
    assert rows and all(row.keys() == columns.keys() for row in rows)
    stacked = {name: np.stack([np.asarray(row[name], dtype=np.float32) for row in rows]) for name in columns}
    for name, shape in columns.items():
        assert stacked[name].shape[1:] == shape, (name, stacked[name].shape, shape)
    return stacked
