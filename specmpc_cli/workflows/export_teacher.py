"""Exporting a teacher as an official TD-MPC2 checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from specmpc_cli.engine.official import save_official
from specmpc_cli.files import check_destination
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
        ConfigError: `out` is a folder, or lies in one that is not there or cannot be written. StoreError: the disk is full.
    """
    out = out or Path(f"{store.task}.pt")
    check_destination(out, "--out")
    teacher = store.teacher()
    save_official(teacher.model, out)
    return ExportReport(store.task, out, teacher.sha256, teacher.source)
