"""Official TD-MPC2 checkpoints: both key layouts → our weights. Never runs code from the file.

The newer layout names the stacked Q-parameters (`_Qs.params.L.weight`), the older one counts them (`_Qs.params.I`: layer I // 4, part
I % 4 of weight, bias, ln.weight, ln.bias). Such files hold no configuration, so every size is read off the tensors.

A multi-task checkpoint becomes the single-task model of one member: a constant task embedding is a constant shift of each first layer, so
it is folded into that layer's bias, and the padded observation and action dimensions are cut off. The result is the same function.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from pathlib import Path

import torch
from torch import Tensor

from specmpc_cli.engine.world_model import WorldModel, WorldModelDims
from specmpc_cli.errors import CheckpointError

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
}
# On files that are no checkpoints, or damaged ones, torch.load raises whatever its readers stumble over.
_WHAT_TORCH_RAISES = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error, NotImplementedError,
)  # fmt: skip
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
    state = read_tensors(path)
    if (member is not None) != ("_task_emb.weight" in state):
        raise CheckpointError(
            f"{path.name} is a single-task checkpoint; leave --task-set out"
            if member is not None
            else f"{path.name} is a multi-task checkpoint; name its task set with --task-set mt30 or mt80"
        )
    embedding = state.get("_task_emb.weight")
    ours = _rename(state)
    if not ours:
        raise CheckpointError(f"{path.name} holds no TD-MPC2 weights: none of its {len(state)} tensors has a known name")
    if embedding is not None and member is not None:
        if embedding.ndim != 2 or member >= len(embedding):
            raise CheckpointError(f"{path.name} was trained on {len(embedding)} tasks, the task set has more; try the other --task-set")
        try:
            ours = _specialise(ours, embedding[member], obs_dim, action_dim)
        except (KeyError, IndexError, RuntimeError):
            raise CheckpointError(f"{path.name} is not a complete TD-MPC2 world model of several tasks") from None
    dims = infer_dims(ours, path.name)
    for what, have, want in (("observation", dims.obs_dim, obs_dim), ("action", dims.action_dim, action_dim)):
        if have != want:
            raise CheckpointError(
                f"{path.name} does not fit the task: it expects {have} {what} dimensions and the task has {want}; check --task"
            )
    model = WorldModel(dims)
    load_weights(model, ours, path.name)
    return model


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
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex()


def load_weights(model: WorldModel, state: State, name: str) -> None:
    """Copies tensors into the model. Raises CheckpointError where a name or shape does not fit, or a weight is not finite."""
    expected = model.state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds an unexpected {extra[0]}"
        raise CheckpointError(f"{name} is not a complete world model: it {what} ({len(missing)} missing, {len(extra)} extra)")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise CheckpointError(f"{name}: {key} has shape {tuple(value.shape)}, expected {tuple(expected[key].shape)}")
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{name}: {key} holds values that are not finite; the checkpoint is damaged")
    model.load_state_dict(state)


def infer_dims(state: State, name: str) -> WorldModelDims:
    """Every size of a single-task model, from its tensors' shapes (our names)."""
    try:
        encoder = _layers(state, "encoder")
        latent_dim, enc_dim = state[f"encoder.{encoder[-1]}.weight"].shape
        return WorldModelDims(
            obs_dim=state["encoder.0.weight"].shape[1],
            action_dim=state["dynamics.0.weight"].shape[1] - latent_dim,
            latent_dim=latent_dim,
            mlp_dim=state["dynamics.0.weight"].shape[0],
            enc_dim=enc_dim,
            num_enc_layers=len(encoder),
            num_q=state["q.layers.0.weight"].shape[0],
            episodic="termination_net.0.weight" in state,
            num_bins=state["reward_net.2.weight"].shape[0],
        )
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{name} is not a complete TD-MPC2 world model: cannot read {error}") from None


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


def _specialise(state: State, embedding: Tensor, obs_dim: int, action_dim: int) -> State:
    """The single-task weights of one member of a task set."""
    embedding = embedding.float() * (1.0 / embedding.norm().clamp(min=1.0))  # nn.Embedding(max_norm=1)
    out = dict(state)
    latent_dim = state[f"encoder.{_layers(state, 'encoder')[-1]}.weight"].shape[0]
    padded_obs = state["encoder.0.weight"].shape[1] - len(embedding)
    padded_action = state["dynamics.0.weight"].shape[1] - latent_dim - len(embedding)
    if obs_dim > padded_obs or action_dim > padded_action:
        raise CheckpointError(
            f"the checkpoint's tasks have at most {padded_obs} observation and {padded_action} action dimensions, "
            f"this task has {obs_dim} and {action_dim}; check --task and --task-set"
        )
    firsts = {"encoder.0": (padded_obs, obs_dim, 0), "pi_net.0": (latent_dim, latent_dim, 0)}
    if "termination_net.0.weight" in state:
        firsts["termination_net.0"] = (latent_dim, latent_dim, 0)
    for net in ("dynamics.0", "reward_net.0", "q.layers.0", "q_target.layers.0"):
        firsts[net] = (latent_dim, latent_dim, action_dim)
    for layer, (padded, kept, actions) in firsts.items():
        weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]  # inputs are [x, embedding, action]
        after = padded + len(embedding)
        out[f"{layer}.bias"] = bias + weight[..., padded:after] @ embedding
        out[f"{layer}.weight"] = torch.cat([weight[..., :kept], weight[..., after : after + actions]], dim=-1)
    rows = list(range(action_dim)) + list(range(padded_action, padded_action + action_dim))  # means, then log-stds
    last = f"pi_net.{_layers(state, 'pi_net')[-1]}"
    out[f"{last}.weight"], out[f"{last}.bias"] = state[f"{last}.weight"][rows], state[f"{last}.bias"][rows]
    return out
