"""Files in and out: round trips, identity of weights, and files that are damaged, foreign or hostile."""

from __future__ import annotations

import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specmpc_cli.engine.checkpoint import (
    CORRECTOR_KIND,
    CorrectorFacts,
    load_corrector,
    load_world_model,
    save_corrector,
    save_world_model,
    weights_sha256,
)
from specmpc_cli.engine.correctors import CORRECTORS, CorrectorDims, build_corrector
from specmpc_cli.engine.gate import GateRule
from specmpc_cli.engine.official import load_official, official_state, read_official, save_official
from specmpc_cli.engine.world_model import WorldModel, WorldModelDims
from specmpc_cli.errors import CheckpointError
from specmpc_cli.types import Course
from tests.conftest import DATA, make_model

FACTS = CorrectorFacts(
    "abc",
    GateRule(12, replan_above=0.5, replan_above_error=0.1, metric="l1"),
    {"planner": {"horizon": 3}},
    Course("mean", "hold", reroll=True),
)


@pytest.mark.parametrize("options", [{}, {"num_q": 5, "episodic": True}])
def test_world_models_survive_the_disk(tmp_path: Path, options: dict[str, int]) -> None:
    model = make_model(7, 3, **options)
    sha = save_world_model(model, tmp_path / "model.safetensors")
    loaded, loaded_sha = load_world_model(tmp_path / "model.safetensors")
    assert loaded.dims == model.dims and loaded_sha == sha == weights_sha256(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))


@pytest.mark.parametrize("arch", CORRECTORS)
def test_correctors_survive_the_disk_with_their_gate(tmp_path: Path, arch: str) -> None:
    network = build_corrector(arch, CorrectorDims(16, 2, 32, 4))
    save_corrector(network, tmp_path / "c.safetensors", FACTS)
    loaded, facts = load_corrector(tmp_path / "c.safetensors")
    assert loaded.arch == arch and facts == FACTS
    rounded = [value.half().float() for value in network.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(rounded, loaded.state_dict().values(), strict=True))


def test_correctors_of_before_there_was_a_calibration_are_uncalibrated(tmp_path: Path) -> None:
    network = build_corrector("two-tower", CorrectorDims(16, 2, 32, 4))
    gate = {"metric": "l2", "accept_below": -math.inf, "replan_above": math.inf, "calibrated": False}
    metadata = {"kind": CORRECTOR_KIND, "teacher_sha256": "abc", "config": json.dumps(network.config()), "gate": json.dumps(gate)}
    save_file(network.state_dict(), tmp_path / "old.safetensors", metadata)
    _, facts = load_corrector(tmp_path / "old.safetensors")
    assert facts == CorrectorFacts("abc", GateRule(20)) and not facts.calibrated


@pytest.mark.parametrize("odd", ["tail", "executes", "reroll"])
def test_a_corrector_whose_plans_run_in_an_unknown_way_is_refused(odd: str, tmp_path: Path) -> None:
    save_corrector(
        build_corrector("two-tower", CorrectorDims(16, 2, 32, 4)),
        tmp_path / "c.safetensors",
        replace(FACTS, course=replace(FACTS.course, **{odd: "spin"})),
    )
    with pytest.raises(CheckpointError, match="'spin' is none of"):
        load_corrector(tmp_path / "c.safetensors")


def test_a_teacher_in_half_precision_is_half_as_large_and_keeps_its_hash(tmp_path: Path) -> None:
    model = make_model(7, 3)
    save_world_model(model, tmp_path / "full.safetensors")
    sha = save_world_model(model, tmp_path / "half.safetensors", torch.float16)
    loaded, found = load_world_model(tmp_path / "half.safetensors")
    assert found == sha == weights_sha256(loaded.state_dict())
    assert all(value.dtype == torch.float32 for value in loaded.state_dict().values())
    assert (tmp_path / "half.safetensors").stat().st_size < 0.65 * (tmp_path / "full.safetensors").stat().st_size


def test_the_hash_is_of_the_weights_and_sees_names_shapes_dtypes_and_values() -> None:
    state = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    base = weights_sha256(state)
    assert weights_sha256(dict(reversed(state.items()))) == base
    variants = [
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"].view(2, 2), "b": state["b"]},
        {"a": state["a"].double(), "b": state["b"]},
        {"a": state["a"] + 1, "b": state["b"]},
    ]
    assert len({base, *map(weights_sha256, variants)}) == 5


def test_both_official_layouts_give_the_same_weights() -> None:
    vectors = DATA / "vectors"
    new = load_official(vectors / "single.pt", obs_dim=24, action_dim=6)
    old = load_official(vectors / "single.old-format.pt", obs_dim=24, action_dim=6)
    assert weights_sha256(new.state_dict()) == weights_sha256(old.state_dict())


OFFICIAL = ["single.pt", "large-action.pt", "episodic.pt", "multitask.pt"]


@pytest.mark.parametrize("name", OFFICIAL)
def test_what_is_exported_has_the_official_keys_shapes_and_values(name: str) -> None:
    path = DATA / "vectors" / name
    theirs = torch.load(path, weights_only=True)["model"]
    ours = official_state(read_official(path))
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert (ours[key].shape, ours[key].dtype, ours[key].device) == (value.shape, value.dtype, value.device), key
        assert value.is_meta or torch.equal(ours[key], value), key


@pytest.mark.parametrize("name", [*OFFICIAL, "single.old-format.pt", "multitask.old-format.pt"])
def test_import_export_import_is_the_identity(tmp_path: Path, name: str) -> None:
    first = read_official(DATA / "vectors" / name)
    save_official(first, tmp_path / "out.pt")
    again = read_official(tmp_path / "out.pt")
    assert again.dims == first.dims
    assert weights_sha256(again.state_dict()) == weights_sha256(first.state_dict())


def test_the_member_of_another_task_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has 1 action dimensions and this task has 2; check --task"):
        load_official(DATA / "vectors" / "multitask.pt", obs_dim=5, action_dim=2, member=2)
    with pytest.raises(CheckpointError, match="at most 39 observation and 6 action dimensions, this task has 5 and 7"):
        load_official(DATA / "vectors" / "multitask.pt", obs_dim=5, action_dim=7, member=2)


class Hostile:
    """Unpickling it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_code_in_a_checkpoint_is_never_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    torch.save({"model": Hostile(marker)}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Hostile(marker)))
    for name in ("evil.pt", "evil.pkl"):
        with pytest.raises(CheckpointError, match="never executed|not a PyTorch checkpoint"):
            load_official(tmp_path / name, obs_dim=4, action_dim=2)
    assert not marker.exists()


def damaged_state(kind: str) -> dict[str, torch.Tensor]:
    state = official_state(make_model())
    if kind == "missing":
        del state["_pi.2.bias"]
    elif kind == "shape":
        state["_pi.2.bias"] = torch.zeros(9)
    elif kind == "nan":
        state["_reward.0.weight"][0, 0] = torch.nan
    elif kind == "foreign":
        state = {"conv.weight": torch.zeros(3)}
    elif kind == "no-encoder":
        state = {key: value for key, value in state.items() if "_encoder" not in key}
    return state


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "lacks pi_net.2.bias"),
        ("shape", "has shape"),
        ("nan", "not finite"),
        ("foreign", "no TD-MPC2 weights"),
        ("no-encoder", "not a complete"),
    ],
)
def test_incomplete_and_foreign_checkpoints_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    torch.save({"model": damaged_state(kind)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        load_official(tmp_path / "x.pt", obs_dim=4, action_dim=2)


def tiny_state(**sizes: int) -> dict[str, torch.Tensor]:
    """A complete model with these sizes, as an official file would hold it."""
    dims = {"latent_dim": 16, "mlp_dim": 24, "enc_dim": 24, "num_enc_layers": 2, "num_q": 2, "simnorm_dim": 1}
    return official_state(WorldModel(WorldModelDims(4, 2, **{**dims, **sizes})))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"latent_dim": 12}, "latents of 12 dimensions; SimNorm needs a multiple of 8"),
        ({"num_q": 1}, "has 1 Q-heads; at least 2"),
        ({"num_bins": 1}, "has 1 bins of reward and value; at least 2"),
    ],
)
def test_sizes_that_no_tdmpc2_has_are_refused(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    torch.save({"model": tiny_state(**sizes)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        load_official(tmp_path / "x.pt", obs_dim=4, action_dim=2)


@pytest.mark.parametrize("weight", [torch.empty(4, device="meta"), torch.zeros(1).expand(10**14)])
def test_tensors_whose_numbers_are_not_in_the_file_are_refused(tmp_path: Path, weight: torch.Tensor) -> None:
    torch.save({"model": official_state(make_model()) | {"_pi.2.bias": weight}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"lacks pi_net\.2\.bias"):
        load_official(tmp_path / "x.pt", obs_dim=4, action_dim=2)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("_reward.2.weight", (10**7, 0), "shape"),  # not a number in the file, and ten million bins of everything to allocate
        ("_Qs.params.0.weight", (10**9, 0, 0), "shape"),
        ("_dynamics.0.weight", (10**18, 0), "no memory holds|cannot read|lacks|shape"),
    ],
)
def test_sizes_that_a_single_tensor_claims_are_not_allocated(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    torch.save({"model": official_state(make_model()) | {name: torch.zeros(shape)}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        load_official(tmp_path / "x.pt", obs_dim=4, action_dim=2)


def test_what_no_tensor_tells_may_be_given(tmp_path: Path) -> None:
    torch.save({"model": tiny_state(latent_dim=12, simnorm_dim=4, vmax=5.0)}, tmp_path / "x.pt")
    dims = read_official(tmp_path / "x.pt", {"simnorm_dim": 4, "vmax": 5.0}).dims
    assert (dims.latent_dim, dims.simnorm_dim, dims.vmin, dims.vmax) == (12, 4, -10.0, 5.0)


def test_the_range_of_the_priors_log_std_is_the_files_own(tmp_path: Path) -> None:
    state = official_state(make_model()) | {"log_std_min": torch.tensor(-5), "log_std_dif": torch.tensor(6.5)}
    torch.save({"model": state}, tmp_path / "x.pt")
    model = load_official(tmp_path / "x.pt", obs_dim=4, action_dim=2)
    assert (model.dims.log_std_min, model.dims.log_std_max) == (-5.0, 1.5)
    save_world_model(model, tmp_path / "model.safetensors")
    assert load_world_model(tmp_path / "model.safetensors")[0].dims == model.dims
    exported = official_state(model)
    assert all(torch.equal(exported[name], state[name]) for name in ("log_std_min", "log_std_dif"))


@pytest.mark.parametrize("odd", [torch.tensor(0), torch.tensor(torch.nan), torch.zeros(3), None])
def test_a_senseless_range_of_log_std_is_refused(tmp_path: Path, odd: torch.Tensor | None) -> None:
    torch.save({"model": official_state(make_model()) | {"log_std_dif": odd}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="log_std_min and log_std_dif must be two numbers"):
        load_official(tmp_path / "x.pt", obs_dim=4, action_dim=2)


@pytest.mark.parametrize(
    "change",
    [
        {"_task_emb.weight": torch.zeros(5)},
        {"_pi.2.bias": torch.zeros(4).to_sparse()},
        {"_pi.2.bias": torch.zeros(4, dtype=torch.complex64)},
        {"_pi.2.bias": "a string"},
        {7: torch.zeros(4)},
    ],
)
def test_odd_entries_are_ignored_or_refused_but_never_crash(tmp_path: Path, change: dict) -> None:
    torch.save({"model": official_state(make_model()) | change}, tmp_path / "x.pt")
    for member in (None, 0):
        try:
            load_official(tmp_path / "x.pt", obs_dim=4, action_dim=2, member=member)
        except CheckpointError as error:
            assert "\n" not in str(error)


def test_a_partial_multi_task_checkpoint_is_refused(tmp_path: Path) -> None:
    state = {"_task_emb.weight": torch.zeros(3, 8), "_encoder.state.0.weight": torch.zeros(8, 12)}
    torch.save({"model": state}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a complete"):
        load_official(tmp_path / "x.pt", obs_dim=4, action_dim=2, member=0)


def test_dimensions_must_fit_the_task(tmp_path: Path) -> None:
    torch.save({"model": official_state(make_model())}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="expects 4 observation dimensions and the task has 24"):
        load_official(tmp_path / "x.pt", obs_dim=24, action_dim=2)
    with pytest.raises(CheckpointError, match="expects 2 action dimensions and the task has 6"):
        load_official(tmp_path / "x.pt", obs_dim=4, action_dim=6)


def test_task_sets_are_asked_for_and_refused_where_they_do_not_belong() -> None:
    with pytest.raises(CheckpointError, match="--task-set mt30 or mt80"):
        load_official(DATA / "vectors" / "multitask.pt", obs_dim=39, action_dim=6)
    with pytest.raises(CheckpointError, match="leave --task-set out"):
        load_official(DATA / "vectors" / "single.pt", obs_dim=24, action_dim=6, member=0)
    with pytest.raises(CheckpointError, match="trained on 3 tasks"):
        load_official(DATA / "vectors" / "multitask.pt", obs_dim=39, action_dim=6, member=7)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip", b"task,loss\n1,2\n", bytes(range(256)) * 9])
def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError):
        load_official(tmp_path / "x.pt", obs_dim=4, action_dim=2)
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_world_model(tmp_path / "x.safetensors")


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    save_world_model(make_model(), tmp_path / "whole.safetensors")
    torch.save({"model": official_state(make_model())}, tmp_path / "whole.pt")
    for name in ("whole.safetensors", "whole.pt"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        load_world_model(tmp_path / "whole.safetensors")
    with pytest.raises(CheckpointError, match="truncated"):
        load_official(tmp_path / "whole.pt", obs_dim=4, action_dim=2)


def test_weights_of_another_program_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="weights of another program"):
        load_world_model(tmp_path / "foreign.safetensors")
    save_world_model(make_model(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected specmpc-corrector"):
        load_corrector(tmp_path / "model.safetensors")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*gone\.pt"):
        load_official(tmp_path / "gone.pt", obs_dim=4, action_dim=2)
    with pytest.raises(CheckpointError, match="there is no file"):
        load_world_model(tmp_path / "gone.safetensors")
