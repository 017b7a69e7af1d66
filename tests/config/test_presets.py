"""Presets and settings: every shipped preset validates, and mistakes are answered with what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from specmpc_cli.config.presets import load_config, preset_names, presets_root, read_preset
from specmpc_cli.errors import ConfigError


def test_there_are_presets() -> None:
    assert preset_names()


@pytest.mark.parametrize("name", preset_names())
def test_shipped_presets_validate_and_say_what_they_are_for(name: str) -> None:
    load_config([name])
    assert (presets_root() / f"{name}.yaml").read_text().startswith("# ")


@pytest.mark.parametrize("name", preset_names())
def test_shipped_presets_hold_only_differences(name: str) -> None:
    default = load_config().model_dump()
    for section, values in read_preset(name).items():
        for key, value in values.items():
            assert default[section][key] != value, f"{name}: {section}.{key} is the default"


def test_later_presets_win_and_settings_win_over_presets(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("planner: {iterations: 3, num_samples: 128}")
    (tmp_path / "b.yaml").write_text("planner: {iterations: 5}")
    config = load_config([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")], ["planner.horizon=4", "collect.horizons=[2, 4]"])
    planner = config.planner
    assert (planner.iterations, planner.num_samples, planner.horizon, config.collect.horizons) == (5, 128, 4, (2, 4))


def test_config_is_read_only() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().planner.horizon = 9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["planner.horizn=3"], "there is no setting planner.horizn; did you mean horizon?"),
        (["plannr.horizon=3"], "there is no setting plannr; did you mean planner?"),
        (["planner.horizon=0"], "planner.horizon.*greater than or equal to 1, got 0"),
        (["planner.horizon=three"], "planner.horizon.*got 'three'"),
        (["planner.num_elites=600"], r"num_elites \(600\) cannot exceed num_samples \(512\)"),
        (["planner.num_pi_trajs=512"], "num_pi_trajs.*must be below"),
        (["planner.min_std=3"], "min_std.*cannot exceed max_std"),
        (["speculation.executes=best"], "speculation.executes.*'drawn' or 'mean', got 'best'"),
        (["speculation.tail=forever"], "speculation.tail.*'policy' or 'hold', got 'forever'"),
        (["refine.iterations=6"], r"refine.iterations \(6\) must be below planner.iterations \(6\)"),
        (["refine.iterations=2", "refine.std=3"], r"refine.std \(3.0\) must lie in planner.min_std..max_std"),
        (["collect.horizons=[0]"], "horizons must lie in"),
        (["collect.later_horizons=[1001]"], "later_horizons must lie in"),
        (["planner.horizon"], "--set takes a.b=value"),
        (["planner..horizon=3"], "--set takes a.b=value"),
        (["planner.horizon=[1"], "not a YAML value"),
    ],
)
def test_mistakes_are_answered(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([], settings)


def test_unknown_presets_are_answered_with_the_nearest_or_all() -> None:
    name = preset_names()[0]
    with pytest.raises(ConfigError, match=f"did you mean {name}"):
        load_config([name[:-1]])
    with pytest.raises(ConfigError, match=f"there are .*{name}"):
        load_config(["zzz"])


@pytest.mark.parametrize(("content", "message"), [("a: [", "is not YAML"), ("- 1", "expected a mapping"), ("\x00", "is not YAML")])
def test_files_that_are_no_presets_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config([str(tmp_path / "x.yaml")])
    with pytest.raises(ConfigError, match="cannot read"):
        load_config([str(tmp_path / "gone.yaml")])
