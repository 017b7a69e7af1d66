"""Exporting a teacher as an official TD-MPC2 checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from specmpc_cli.engine.official import save_official
from specmpc_cli.errors import ConfigError
from specmpc_cli.workflows.store import Store


@dataclass(frozen=True, slots=True)
class ExportReport:
    """The file that an export made, and the teacher that it holds."""

    task: str
    path: Path
    sha256: str
    source: str  # of the teacher: "store" or "embedded"


def export_teacher(store: Store, out: Path | None = None) -> ExportReport:
    """Writes the teacher of the store's task to `out`, by default `<task>.pt` in the current folder; replaces a file of that name.

    Raises:
        CheckpointError: there is no teacher.
        ConfigError: `out` is a folder, or lies in one that is not there or cannot be written.
    """
    out = out or Path(f"{store.task}.pt")
    if out.is_dir():
        raise ConfigError(f"--out must be a file, and {out} is a folder; try --out {out / f'{store.task}.pt'}")
    if not out.parent.is_dir():
        raise ConfigError(f"cannot write {out}: there is no folder {out.parent}; create it, or choose another --out")
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"no permission to write to {out.parent}; choose another --out")
    teacher = store.teacher()
    save_official(teacher.model, out)
    return ExportReport(store.task, out, teacher.sha256, teacher.source)
