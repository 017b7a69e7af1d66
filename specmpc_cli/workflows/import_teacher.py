"""Importing an official TD-MPC2 checkpoint as a task's teacher."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

from specmpc_cli.config.schema import PlannerConfig
from specmpc_cli.engine.checkpoint import weights_sha256
from specmpc_cli.engine.official import load_official
from specmpc_cli.engine.world_model import model_size
from specmpc_cli.envs.registry import TASK_SETS, lookup
from specmpc_cli.errors import ConfigError
from specmpc_cli.versions import versions
from specmpc_cli.workflows.store import Store, timestamp
from specmpc_cli.workflows.train_state import ResumeFolder


@dataclass(frozen=True, slots=True)
class ImportReport:
    """The teacher that an import made."""

    task: str
    path: Path
    sha256: str
    parameters: int
    dims: dict[str, float | int | bool]


def import_teacher(store: Store, file: Path, *, task_set: str | None = None) -> ImportReport:
    """Reads an official checkpoint, checks it against the task and puts it into the store.

    Args:
        task_set: mt30 or mt80, for multi-task checkpoints; the store's task names the member.

    Raises:
        ConfigError: an unknown task set, a task outside it, or a training that the import would overwrite.
        CheckpointError: see `engine.official.load_official`.
    """
    member = None
    if task_set is not None:
        if task_set not in TASK_SETS:
            raise ConfigError(f"--task-set must be {' or '.join(TASK_SETS)}, got {task_set!r}")
        if store.task not in TASK_SETS[task_set]:
            raise ConfigError(f"{store.task} is not in {task_set}; its tasks are {', '.join(TASK_SETS[task_set])}")
        member = TASK_SETS[task_set].index(store.task)
    spec = lookup(store.task).spec
    model = load_official(file, obs_dim=spec.obs_dim, action_dim=spec.action_dim, member=member)
    origin = {
        "made_by": "specmpc import",
        "file": file.name,
        "file_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "task_set": task_set,
        "task": store.task,
        "size": model_size(model.dims),
        "date": timestamp(),
        "versions": versions(),
    }
    config = {"planner": PlannerConfig().model_dump(), "dims": asdict(model.dims), "origin": origin}
    training = ResumeFolder(store.resume_folder())
    with training.undisturbed():
        if training.state_file.exists():
            raise ConfigError(
                f"{store.folder / 'teacher'} holds a training of {store.task} that can be continued; import under another --name, "
                "or delete that folder first"
            )
        path = store.save_teacher(model, config, [{"event": "import", **origin}])
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return ImportReport(store.task, path, weights_sha256(model.state_dict()), parameters, asdict(model.dims))
