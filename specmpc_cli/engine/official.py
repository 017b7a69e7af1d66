"""Official TD-MPC2 checkpoints: both key layouts → our weights. Never runs code from the file.

The newer layout names the stacked Q-parameters (`_Qs.params.L.weight`), the older one counts them (`_Qs.params.I`: layer I // 4, part
I % 4 of weight, bias, ln.weight, ln.bias). Such files hold no configuration, so every size is read off the tensors.

A multi-task checkpoint becomes the single-task model of one member (`WorldModel.member`).
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specmpc_cli.engine.world_model import WorldModel, WorldModelDims
from specmpc_cli.errors import CheckpointError
from specmpc_cli.files import write_whole

State = dict[str, Tensor]

# Official prefix → ours. Keys under no prefix carry no weights of their own.
_PREFIXES = {
    "_encoder.state.": "encoder.",
    "_dynamics.": "dynamics.",
    "_reward.": "reward_net.",
    "_termination.": "termination_net.",
    "_pi.": "pi_net.",
    "_Qs.params.": "q.layers.",
    "_target_Qs.params.": "q_target.layers.",
    "_target_Qs_params.": "q_target.layers.",
    "_task_emb.": "task_emb.",
    "_action_masks": "action_masks",
}
# On files that are no checkpoints, or damaged ones, torch.load raises whatever its readers stumble over.
_WHAT_TORCH_RAISES = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error, NotImplementedError,
)  # fmt: skip
NOTHING_KNOWN: Mapping[str, Any] = {}
_COUNTED_PARTS = ("weight", "bias", "ln.weight", "ln.bias")


def load_official(path: Path, *, obs_dim: int, action_dim: int, member: int | None = None) -> WorldModel:
    """Reads an official `.pt` file as the world model of one task.

    Args:
        obs_dim: the task's observation dimensions; the file must agree (multi-task files are padded and may hold more).
        action_dim: likewise for actions.
        member: the task's index in its task set, for multi-task files; None for single-task files.

    Raises:
        CheckpointError: the file is missing, damaged, foreign, holds code, or does not fit the task.
    """
    model = read_official(path)
    tasks = model.dims.num_tasks
    if (member is not None) != bool(tasks):
        raise CheckpointError(
            f"{path.name} is a multi-task checkpoint; name its task set with --task-set mt30 or mt80"
            if tasks
            else f"{path.name} is a single-task checkpoint; leave --task-set out"
        )
    if member is not None:
        if member >= tasks:
            raise CheckpointError(f"{path.name} was trained on {tasks} tasks, the task set has more; try the other --task-set")
        if obs_dim > model.dims.obs_dim or action_dim > model.dims.action_dim:
            raise CheckpointError(
                f"the tasks of {path.name} have at most {model.dims.obs_dim} observation and {model.dims.action_dim} action dimensions, "
                f"this task has {obs_dim} and {action_dim}; check --task and --task-set"
            )
        used = int(model.action_masks[member].sum())
        if used not in (action_dim, model.dims.action_dim):  # all of them are used where the file has no masks
            raise CheckpointError(
                f"task {member} of {path.name} has {used} action dimensions and this task has {action_dim}; check --task and --task-set"
            )
        model = model.member(member, obs_dim, action_dim)
    dims = model.dims
    for what, have, want in (("observation", dims.obs_dim, obs_dim), ("action", dims.action_dim, action_dim)):
        if have != want:
            raise CheckpointError(
                f"{path.name} does not fit the task: it expects {have} {what} dimensions and the task has {want}; check --task"
            )
    return model


def read_official(path: Path, unstated: Mapping[str, Any] = NOTHING_KNOWN) -> WorldModel:
    """Reads an official `.pt` file as the model of all its tasks.

    Args:
        unstated: fields of `WorldModelDims` that no tensor tells (simnorm_dim, vmin, vmax, and in the older layout the range of log-stds),
            where they are not the official defaults.

    Raises:
        CheckpointError: the file is missing, damaged, foreign or holds code.
    """
    state = read_tensors(path)
    ours = _rename(state)
    if not ours:
        raise CheckpointError(f"{path.name} holds no TD-MPC2 weights: none of its {len(state)} tensors has a known name")
    dims = replace(infer_dims(ours, path.name, unstated), **log_std_range(state, path.name))
    if dims.num_tasks:
        # The older layout may lack the masks; then no dimension is known to be padding.
        ours.setdefault("action_masks", torch.ones(dims.num_tasks, dims.action_dim))
    return model_of(dims, ours, path.name)


def read_tensors(path: Path) -> State:
    """The named tensors of a `torch.save` file. Raises CheckpointError for anything else; other entries are ignored."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of unusual pickle protocols before it refuses them
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path.name} is not a plain TD-MPC2 checkpoint: it is damaged or holds Python objects, which are never executed"
        ) from None
    except _WHAT_TORCH_RAISES:
        raise CheckpointError(f"{path.name} is not a PyTorch checkpoint, or it is truncated; download it again") from None
    state = payload.get("model", payload) if isinstance(payload, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path.name} holds a {type(payload).__name__}; expected the dict of tensors that TD-MPC2 saves")
    return {key: value for key, value in state.items() if isinstance(key, str) and _is_plain(value)}


def _is_plain(value: object) -> bool:
    """Whether this is a dense tensor of real numbers that are all in the file (strides can claim more numbers than there are)."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_complex() or value.is_quantized:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.itemsize


def log_std_range(values: Mapping[str, Tensor | str], name: str) -> dict[str, float]:
    """The range of the policy prior's log-std: the newer layout holds it, the older one has the official default."""
    if not {"log_std_min", "log_std_dif"} & values.keys():
        return {}
    try:
        low, width = float(values["log_std_min"]), float(values["log_std_dif"])
    except (KeyError, RuntimeError, ValueError):
        low, width = math.nan, math.nan
    if not (math.isfinite(low) and math.isfinite(width) and width > 0):
        raise CheckpointError(f"{name}: log_std_min and log_std_dif must be two numbers, the second above 0; the checkpoint is damaged")
    return {"log_std_min": low, "log_std_max": low + width}


def model_of(dims: WorldModelDims, state: State, name: str) -> WorldModel:
    """The model of these sizes and weights. Raises CheckpointError where a name or shape does not fit, or a weight is not finite."""
    try:
        with torch.device("meta"):  # sizes that one tensor claims are no reason to allocate the others
            expected = WorldModel(dims).state_dict()
    except RuntimeError:
        raise CheckpointError(f"{name} claims sizes that no memory holds; the checkpoint is damaged") from None
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds an unexpected {extra[0]}"
        raise CheckpointError(f"{name} is not a complete world model: it {what} ({len(missing)} missing, {len(extra)} extra)")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise CheckpointError(f"{name}: {key} has shape {tuple(value.shape)}, expected {tuple(expected[key].shape)}")
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{name}: {key} holds values that are not finite; the checkpoint is damaged")
    model = WorldModel(dims)
    model.load_state_dict(state)
    return model


def infer_dims(state: State, name: str, unstated: Mapping[str, Any] = NOTHING_KNOWN) -> WorldModelDims:
    """Every size of a model, from its tensors' shapes (our names), but for what is `unstated` there."""
    try:
        encoder = _layers(state, "encoder")
        latent_dim, enc_dim = state[f"encoder.{encoder[-1]}.weight"].shape
        num_tasks, task_dim = state["task_emb.weight"].shape if "task_emb.weight" in state else (0, 0)
        dims = WorldModelDims(
            obs_dim=state["encoder.0.weight"].shape[1] - task_dim,
            action_dim=state["dynamics.0.weight"].shape[1] - latent_dim - task_dim,
            latent_dim=latent_dim,
            mlp_dim=state["dynamics.0.weight"].shape[0],
            enc_dim=enc_dim,
            num_enc_layers=len(encoder),
            num_q=state["q.layers.0.weight"].shape[0],
            episodic="termination_net.0.weight" in state,
            num_bins=state["reward_net.2.weight"].shape[0],
            num_tasks=num_tasks,
            task_dim=task_dim,
            **unstated,
        )
        if min(dims.obs_dim, dims.action_dim, dims.latent_dim) < 1:
            raise ValueError("its layers' inputs, which do not fit each other")
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{name} is not a complete TD-MPC2 world model: cannot read {error}") from None
    if dims.latent_dim % dims.simnorm_dim:
        raise CheckpointError(f"{name} has latents of {dims.latent_dim} dimensions; SimNorm needs a multiple of {dims.simnorm_dim}")
    for what, number in (("Q-heads", dims.num_q), ("bins of reward and value", dims.num_bins)):
        if number < 2:
            raise CheckpointError(f"{name} has {number} {what}; at least 2 are needed")
    return dims


def _layers(state: State, net: str) -> list[int]:
    return sorted({int(key.split(".")[1]) for key in state if key.startswith(f"{net}.") and key.split(".")[1].isdigit()})


def _rename(state: State) -> State:
    renamed = {}
    for key, value in state.items():
        prefix = next((p for p in _PREFIXES if key.startswith(p)), None)
        if prefix is None:
            continue
        rest = key.removeprefix(prefix)
        if re.fullmatch(r"\d+", rest):  # the older layout counts
            layer, part = divmod(int(rest), 4)
            rest = f"{layer}.{_COUNTED_PARTS[part]}"
        renamed[_PREFIXES[prefix] + rest] = value.float()
    return renamed


def official_state(model: WorldModel) -> State:
    """The model's weights as the official code saves them today: its key set, its order, fp32.

    `log_std_*`, `*.module.*` and `_detach_*` carry nothing that the rest does not, but its strict loading asks for them. Those under
    `*.module.*` have shapes and no values (meta tensors) there, and so they have here.
    """
    ours, d = model.state_dict(), model.dims

    def renamed(net: str, prefix: str) -> State:
        return {key.replace(f"{net}.", f"{prefix}.", 1): value.clone() for key, value in ours.items() if key.startswith(f"{net}.")}

    state: State = {"_action_masks": ours["action_masks"].clone()} if d.num_tasks else {}
    for name, value in (("log_std_min", d.log_std_min), ("log_std_dif", d.log_std_max - d.log_std_min)):
        state[name] = torch.tensor(int(value) if value == int(value) else value)
    for net, prefix in (("task_emb", "_task_emb"), ("encoder", "_encoder.state"), ("dynamics", "_dynamics"), ("reward_net", "_reward")):
        state |= renamed(net, prefix)
    state |= renamed("termination_net", "_termination") | renamed("pi_net", "_pi")
    state |= renamed("q.layers", "_Qs.params")
    state |= {key: value[0].to("meta") for key, value in renamed("q.layers", "_Qs.module").items()}
    state |= renamed("q.layers", "_detach_Qs_params") | renamed("q_target.layers", "_target_Qs_params")
    for prefix in ("_detach_Qs.module", "_target_Qs.module"):
        state |= {key: value.to("meta") for key, value in renamed("q.layers", prefix).items()}
    return state


def save_official(model: WorldModel, path: Path) -> None:
    """Writes an official checkpoint, {"model": state_dict}, whole or not at all. Raises StoreError where the folder cannot be written."""
    content = io.BytesIO()  # torch.save to a full disk raises what no user could read
    torch.save({"model": official_state(model)}, content)
    write_whole(path, content.getvalue())
