"""The schema. Each field: type, default, bound, one-line meaning. Knows no files; presets.py reads those."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PlannerConfig(Section):
    """MPPI (TD-MPC2, appendix): the defaults are the published ones."""

    horizon: int = Field(default=3, ge=1, le=50, description="actions per plan")
    iterations: int = Field(default=6, ge=1, le=64, description="MPPI iterations")
    large_action_iterations: int = Field(default=2, ge=0, le=64, description="iterations added when actions have 20 or more dimensions")
    num_samples: int = Field(default=512, ge=2, description="candidates per iteration, those of the policy prior included")
    num_elites: int = Field(default=64, ge=1, description="top candidates that refit the distribution")
    num_pi_trajs: int = Field(default=24, ge=1, description="candidates rolled out from the policy prior")
    min_std: float = Field(default=0.05, gt=0, description="lower clamp of the sampling spread")
    max_std: float = Field(default=2.0, gt=0, description="upper clamp, and the spread of the first iteration")
    temperature: float = Field(default=0.5, gt=0, description="TD-MPC2's inverse temperature")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_elites > self.num_samples:
            raise ValueError(f"num_elites ({self.num_elites}) cannot exceed num_samples ({self.num_samples})")
        if self.num_pi_trajs >= self.num_samples:
            raise ValueError(f"num_pi_trajs ({self.num_pi_trajs}) must be below num_samples ({self.num_samples})")
        if self.min_std > self.max_std:
            raise ValueError(f"min_std ({self.min_std}) cannot exceed max_std ({self.max_std})")
        return self


class SpeculationConfig(Section):
    """How plans are executed between planner calls."""

    tail: Literal["policy", "hold"] = Field(default="policy", description="how a plan goes on beyond the planner's horizon")
    metric: Literal["l2", "l1", "cosine"] = Field(default="l2", description="distance of real and predicted latents")
    max_age: int = Field(default=20, ge=1, le=1000, description="env steps after which an adaptive plan is replaced")


class CollectConfig(Section):
    """What data a corrector learns from."""

    horizons: tuple[int, ...] = Field(default=(6, 3, 12), min_length=1, description="execution horizons, taken in turn by the episodes")
    teacher_share: float = Field(default=0.2, ge=0, le=1, description="share of each round's episodes driven by the teacher itself")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if min(self.horizons) < 1 or max(self.horizons) > 1000:
            raise ValueError(f"horizons must lie in 1..1000, got {list(self.horizons)}")
        return self


class CorrectorConfig(Section):
    """Architecture and fit of the correctors."""

    width: int = Field(default=256, ge=8, le=4096, multiple_of=4, description="features per layer")
    history: int = Field(default=8, ge=1, le=64, description="steps the temporal corrector looks back on")
    layers: int = Field(default=2, ge=1, le=16, description="Transformer layers of the temporal corrector")
    dropout: float = Field(default=0.2, ge=0, lt=1, description="share of features dropped while fitting")
    epochs: int = Field(default=60, ge=1, le=10_000, description="most passes over the data")
    patience: int = Field(default=10, ge=1, description="epochs without a better validation error before stopping")
    batch_size: int = Field(default=256, ge=1, description="steps per update")
    lr: float = Field(default=1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(default=1e-3, ge=0, description="AdamW's decoupled weight decay")
    delta_penalty: float = Field(default=1e-3, ge=0, description="weight of ‖delta‖² in the loss")
    validation_share: float = Field(default=0.15, gt=0, lt=1, description="share of the episodes held out")


class Config(Section):
    """Everything a preset may set, and what is stored beside each teacher and corrector."""

    planner: PlannerConfig = PlannerConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    collect: CollectConfig = CollectConfig()
    corrector: CorrectorConfig = CorrectorConfig()
