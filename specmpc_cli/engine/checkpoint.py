"""Weights on disk: safetensors, never pickles; written beside, flushed and renamed, so that a file is whole or absent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from specmpc_cli.engine.correctors import CORRECTORS, BaseCorrector, CorrectorDims, build_corrector
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.official import infer_dims, log_std_range, model_of
from specmpc_cli.engine.world_model import LOG_STD_RANGE, WorldModel
from specmpc_cli.errors import CheckpointError
from specmpc_cli.files import write_whole
from specmpc_cli.types import DEFAULT_COURSE, Course, Executes, Tail

TEACHER_KIND = "specmpc-world-model"
CORRECTOR_KIND = "specmpc-corrector"


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Identity of weights: SHA-256 over (name, dtype, shape, bytes) in name order, not over a file."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes())
    return digest.hexdigest()


def save_world_model(model: WorldModel, path: Path, dtype: torch.dtype = torch.float32) -> str:
    """Writes the weights, rounded to `dtype`, and returns the SHA-256 of what `load_world_model` will give back (always fp32)."""
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    metadata, (low, high) = {"kind": TEACHER_KIND}, (model.dims.log_std_min, model.dims.log_std_max)
    if (low, high) != LOG_STD_RANGE:  # safetensors orders several entries at random, and the same weights are to be the same file
        metadata |= {"log_std_min": str(low), "log_std_dif": str(high - low)}
    _save(state, path, metadata)
    return weights_sha256({name: tensor.float() for name, tensor in state.items()})


def load_world_model(path: Path) -> tuple[WorldModel, str]:
    """A frozen fp32 world model and its SHA-256. Raises CheckpointError for a missing, damaged or foreign file."""
    state, metadata = _load(path)
    _expect_kind(metadata, TEACHER_KIND, path)
    state = {name: tensor.float() for name, tensor in state.items()}
    dims = replace(infer_dims(state, path.name), **log_std_range(metadata, path.name))
    model = model_of(dims, state, path.name)
    return model.requires_grad_(False).eval(), weights_sha256(state)


@dataclass(frozen=True, slots=True)
class CorrectorFacts:
    """What a corrector's file says beside its weights."""

    teacher_sha256: str  # of the teacher it was distilled from
    gate: GateRule  # its horizon: the env steps that an adaptive plan lives at most
    promised_with: dict[str, Any] | None = None  # settings of acting that the gate's promise was checked with
    course: Course = DEFAULT_COURSE  # of the plans that it corrects

    @property
    def calibrated(self) -> bool:
        """Whether a promise about return stands behind the gate."""
        return self.promised_with is not None


def save_corrector(corrector: BaseCorrector, path: Path, facts: CorrectorFacts) -> str:
    """Writes a corrector, in fp16, and what is known about it."""
    metadata = {
        "kind": CORRECTOR_KIND,
        "teacher_sha256": facts.teacher_sha256,
        "config": json.dumps(corrector.config()),
        "gate": json.dumps({**asdict(facts.gate), "promised_with": facts.promised_with}),
        **{name: str(value) for name, value in asdict(facts.course).items()},
    }
    return _save({name: tensor.half() for name, tensor in corrector.state_dict().items()}, path, metadata)


def load_corrector(path: Path) -> tuple[BaseCorrector, CorrectorFacts]:
    """A frozen corrector and what its file says. Raises CheckpointError for a missing, damaged or foreign file."""
    state, metadata = _load(path)
    _expect_kind(metadata, CORRECTOR_KIND, path)
    try:
        config, gate = json.loads(metadata["config"]), json.loads(metadata["gate"])
        arch = config.pop("arch")
        course = _course(metadata)
        if arch not in CORRECTORS:
            raise KeyError(arch)
        gate.pop("calibrated", None)  # files of before there was a calibration say so, and name no horizon
        promised_with = gate.pop("promised_with", None)
        rule = GateRule(**{"horizon": 20, **gate})
        corrector = build_corrector(arch, CorrectorDims(**config))
        corrector.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path} is not a corrector this version can read ({reason}); fit it again") from None
    facts = CorrectorFacts(metadata.get("teacher_sha256", ""), rule, promised_with, course)
    return corrector.requires_grad_(False).eval(), facts


def _course(metadata: Mapping[str, str]) -> Course:
    """How a corrector's plans run; older files lack some of it. Raises ValueError for what no version knows."""
    values = {name: metadata.get(name, str(value)) for name, value in asdict(DEFAULT_COURSE).items()}
    for name, known in (("executes", get_args(Executes)), ("tail", get_args(Tail)), ("reroll", ("False", "True"))):
        if values[name] not in known:
            raise ValueError(f"{name} {values[name]!r} is none of {', '.join(known)}")
    return Course(**{**values, "reroll": values["reroll"] == "True"})  # type: ignore[arg-type] (checked above)


def _save(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> str:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_whole(path, save(tensors, metadata))
    return weights_sha256(tensors)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file, or it is truncated ({error})") from None


def _expect_kind(metadata: dict[str, str], kind: str, path: Path) -> None:
    if metadata.get("kind") != kind:
        found = metadata.get("kind", "weights of another program")
        raise CheckpointError(f"{path} holds {found}, expected {kind}")
