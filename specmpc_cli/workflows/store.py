"""The store: where teachers, correctors, data and results lie, and what is taken when nothing is named.

Layout: <store>/<task>/<name>/{teacher,correctors/<arch>,data/<dataset>,results} (docs/architecture.md). The embedded zoo has the same
layout, less <name>, and is only read.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from specmpc_cli.config.presets import load_config, read_yaml, zoo_root
from specmpc_cli.config.schema import Config
from specmpc_cli.data.shards import Shard, read_shards
from specmpc_cli.engine.checkpoint import CorrectorFacts, load_corrector, load_world_model, save_corrector, save_world_model
from specmpc_cli.engine.correctors import CORRECTORS, BaseCorrector
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.world_model import WorldModel
from specmpc_cli.envs.registry import lookup
from specmpc_cli.errors import CheckpointError, ConfigError, DatasetError, StoreError
from specmpc_cli.files import make_folder, stamp, write_whole

DEFAULT_TASK = "walker-walk"


@dataclass(frozen=True, slots=True)
class Teacher:
    """A world model and where it came from."""

    model: WorldModel
    sha256: str
    source: str  # "store" or "embedded"
    path: Path
    config: dict[str, Any]  # as config.yaml holds it: settings, and how the model was made under `origin`

    @property
    def settings(self) -> dict[str, Any]:
        """The part of the config that a preset may change."""
        return {key: value for key, value in self.config.items() if key in Config.model_fields}


@dataclass(frozen=True, slots=True)
class FittedCorrector:
    """A corrector with its gate and where it came from."""

    network: BaseCorrector
    facts: CorrectorFacts
    source: str
    path: Path

    @property
    def arch(self) -> str:
        return self.network.arch

    def rule(self, horizon: int) -> GateRule:
        """The gate it carries, for plans of this many steps."""
        return replace(self.facts.gate, horizon=horizon)


class Store:
    """One task's part of a store folder."""

    def __init__(self, root: Path, task: str | None = None, name: str = "main") -> None:
        """`task` None takes the one used last in this store, else walker-walk. Raises UnknownTask, and ConfigError for a name that is no
        folder's."""
        if re.fullmatch(r"[\w-][\w.-]*", name) is None:
            raise ConfigError(f"--name takes letters, digits, '_', '-' and '.', and does not begin with '.'; got {name!r}")
        self.root = root
        self.task = task or self._last_task() or DEFAULT_TASK
        lookup(self.task)
        self.name = name
        self.folder = root / self.task / name

    def claim(self) -> None:
        """Makes this the task that later commands take when none is named; before long work, because it proves that the store can be
        written. Raises StoreError where it cannot."""
        make_folder(self.folder)
        if not os.access(self.folder, os.W_OK):
            raise StoreError(f"no permission to write to {self.folder}; choose another --store")
        write_whole(self._memory, json.dumps({"task": self.task}) + "\n")

    @property
    def _memory(self) -> Path:
        return self.root / "last.json"

    @property
    def used_before(self) -> bool:
        """Whether this store knows a task used last."""
        return _exists(self._memory)

    def _last_task(self) -> str | None:
        try:
            return str(json.loads(self._memory.read_text())["task"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise StoreError(f"cannot read {self._memory}; delete it, or name the task with --task") from None

    # Teachers

    def teacher(self) -> Teacher:
        """The store's teacher, else the embedded one. Raises CheckpointError naming the commands that make one."""
        for source, folder in (("store", self.folder / "teacher"), ("embedded", zoo_root() / self.task / "teacher")):
            if _exists(folder / "model.safetensors"):
                model, sha256 = load_world_model(folder / "model.safetensors")
                return Teacher(model, sha256, source, folder, read_yaml(folder / "config.yaml"))
        raise CheckpointError(
            f"there is no teacher for {self.task}, neither in {self.folder} nor embedded; "
            f"train one with 'specmpc train --task {self.task}', or import one with 'specmpc import FILE --task {self.task}'"
        )

    def save_teacher(
        self, model: WorldModel, config: dict[str, Any], metrics: list[dict[str, Any]], dtype: torch.dtype = torch.float32
    ) -> Path:
        """Writes the teacher's three files, the weights (in `dtype`) last: a teacher is there when its weights are."""
        folder = self.save_teacher_metrics(metrics)
        write_whole(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        save_world_model(model, folder / "model.safetensors", dtype)
        return folder

    def save_teacher_metrics(self, metrics: list[dict[str, Any]]) -> Path:
        """Renews metrics.jsonl beside a teacher; → its folder."""
        folder = self.folder / "teacher"
        write_whole(folder / "metrics.jsonl", _jsonl(metrics))
        return folder

    def resume_folder(self) -> Path:
        """What a training of this store's teacher continues from."""
        return self.folder / "teacher" / "resume"

    def has_teacher(self) -> bool:
        """Whether this store has a teacher of its own for the task."""
        return _exists(self.folder / "teacher" / "model.safetensors")

    def teacher_stamp(self) -> tuple[int, int] | None:
        """Tells one teacher of this store's own from the next; None where there is none."""
        return stamp(self.folder / "teacher" / "model.safetensors")

    # Correctors

    def correctors(self, teacher: Teacher, archs: list[str] | None = None) -> tuple[list[FittedCorrector], list[str]]:
        """The correctors of this teacher, the store's before the embedded ones, and notes on those of another teacher."""
        found, notes = [], []
        for arch in archs or list(CORRECTORS):
            candidates = [self._corrector(arch, source) for source in ("store", "embedded")]
            present = [corrector for corrector in candidates if corrector is not None]
            matching = [corrector for corrector in present if corrector.facts.teacher_sha256 == teacher.sha256]
            if matching:
                found.append(matching[0])
            elif present:
                notes.append(f"the {arch} corrector in {present[0].path} was distilled from another teacher")
        return found, notes

    def corrector(self, teacher: Teacher, arch: str) -> FittedCorrector:
        """One corrector. Raises CheckpointError if there is none, or only one of another teacher."""
        found, notes = self.correctors(teacher, [arch])
        if found:
            return found[0]
        why = notes[0] if notes else f"there is no {arch} corrector for {self.task}"
        raise CheckpointError(
            f"{why}; make one with 'specmpc collect --task {self.task}' and 'specmpc fit-corrector --task {self.task} --arch {arch}'"
        )

    def corrector_folder(self, arch: str) -> Path:
        return self.folder / "correctors" / arch

    @property
    def judged_gates(self) -> Path:
        """The file of the gates that calibrate episodes have judged (judged_gates.py)."""
        return self.folder / "correctors" / "judged-gates.jsonl"

    def _corrector(self, arch: str, source: str) -> FittedCorrector | None:
        root = self.folder if source == "store" else zoo_root() / self.task
        path = root / "correctors" / arch / "model.safetensors"
        if not _exists(path):
            return None
        return FittedCorrector(*load_corrector(path), source, path.parent)

    def save_corrector(
        self,
        network: BaseCorrector,
        facts: CorrectorFacts,
        config: dict[str, Any],
        metrics: list[dict[str, Any]],
    ) -> Path:
        """Writes a corrector's three files, the weights last."""
        folder = self.corrector_folder(network.arch)
        write_whole(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        write_whole(folder / "metrics.jsonl", _jsonl(metrics))
        save_corrector(network, folder / "model.safetensors", facts)
        return folder

    # Data

    def dataset_folder(self, dataset: str) -> Path:
        return self.folder / "data" / dataset

    def newest_dataset(self, teacher: Teacher) -> list[Shard]:
        """The shards of the newest dataset of this teacher. Raises DatasetError if there is none, or only others' data."""
        folders = [folder for folder in (self.folder / "data").glob("*") if folder.is_dir()]
        others = 0
        for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True):
            shards = read_shards(folder)
            if shards and {shard.teacher_sha256 for shard in shards} == {teacher.sha256}:
                return shards
            others += bool(shards)
        what = "only data of other teachers" if others else "no data"
        raise DatasetError(f"there is {what} for {self.task} in {self.folder}; make some with 'specmpc collect --task {self.task}'")

    # Results

    def results_folder(self) -> Path:
        return self.folder / "results"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise StoreError(f"cannot read {path.parent}: {error.strerror}; choose another --store") from None


def config_of(teacher: Teacher, presets: list[str], settings: list[str]) -> Config:
    """The teacher's own settings ← presets ← --set. Raises ConfigError."""
    return load_config(presets, settings, base=teacher.settings)


def timestamp() -> str:
    """The moment, sortable and fit for a file name."""
    return time.strftime("%Y%m%d-%H%M%S")


def _jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
