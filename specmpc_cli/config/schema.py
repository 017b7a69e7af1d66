"""The schema. Each field: type, default, bound, one-line meaning. Knows no files; presets.py reads those."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from specmpc_cli.types import Course, Executes, Tail

ACTING_SECTIONS = ("planner", "speculation", "refine")  # what decides how a teacher acts


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

    executes: Executes = Field(
        default="drawn", description="what plans of several steps execute: the elite drawn or the elites' mean; correctors keep theirs"
    )
    tail: Tail = Field(default="policy", description="how a plan goes on beyond the planner's horizon; correctors keep theirs")
    reroll: bool = Field(
        default=False, description="whether the rest of a plan is predicted anew after a correction; correctors keep theirs"
    )
    metric: Literal["l2", "l1", "cosine"] = Field(default="l2", description="distance of real and predicted latents")
    max_age: int = Field(default=20, ge=1, le=1000, description="env steps after which an adaptive plan is replaced")

    @property
    def course(self) -> Course:
        """How plans run that no corrector brings its own way for."""
        return Course(self.executes, self.tail, self.reroll)


class RefineConfig(Section):
    """Cheaper replans: the old plan is refined instead of searching anew. Never in plain replanning, nor for labels."""

    iterations: int = Field(default=0, ge=0, le=64, description="MPPI iterations of such a replan, whatever the action's size; 0: none is")
    std: float = Field(default=0.5, gt=0, description="spread of the first of them around the old plan")
    below: float | None = Field(
        default=None, ge=0, description="mismatch, in the gate's metric, up to which plans are refined; none: where they are exhausted"
    )


class CollectConfig(Section):
    """What data a corrector learns from."""

    horizons: tuple[int, ...] = Field(default=(6, 3, 12), min_length=1, description="env steps per plan in round 1, taken in turn")
    # Correctors have learnt to hold plans for longer than naive reuse can; what they meet there is what later correctors must know.
    later_horizons: tuple[int, ...] = Field(default=(12, 20, 6), min_length=1, description="the same from round 2 on")
    teacher_share: float = Field(default=0.2, ge=0, le=1, description="share of each round's episodes driven by the teacher itself")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in ("horizons", "later_horizons"):
            horizons = getattr(self, name)
            if min(horizons) < 1 or max(horizons) > 1000:
                raise ValueError(f"{name} must lie in 1..1000, got {list(horizons)}")
        return self

    def horizons_of(self, round_: int) -> tuple[int, ...]:
        """The execution horizons of a round."""
        return self.horizons if round_ == 1 else self.later_horizons


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


class ActingConfig(Section):
    """Cheaper acting while a teacher is trained; what is left out is the planner's own number."""

    iterations: int | None = Field(default=None, ge=1, le=64, description="MPPI iterations, those for large actions included")
    num_samples: int | None = Field(default=None, ge=2, description="candidates per iteration")
    num_elites: int | None = Field(default=None, ge=1, description="top candidates that refit the distribution")
    horizon: int = Field(default=1, ge=1, le=50, description="env steps executed per plan (1: plan at every step)")
    policy_share: float = Field(default=0.0, ge=0, le=1, description="share of the rounds in which the policy prior acts alone")


class TrainConfig(Section):
    """TD-MPC2's training (appendix H): the defaults are the published ones."""

    batch_size: int = Field(default=256, ge=1, description="slices per update")
    horizon: int = Field(default=3, ge=1, le=50, description="transitions per slice: the length of the latent rollout")
    rho: float | None = Field(default=None, gt=0, le=1, description="weight of a step over the last; 0.5, or 0.7 if the task terminates")
    consistency_coef: float = Field(default=20.0, ge=0)
    reward_coef: float = Field(default=0.1, ge=0)
    value_coef: float = Field(default=0.1, ge=0)
    termination_coef: float = Field(default=1.0, ge=0)
    entropy_coef: float = Field(default=1e-4, ge=0)
    lr: float = Field(default=3e-4, gt=0, description="learning rate of Adam")
    enc_lr_scale: float = Field(default=0.3, gt=0, description="the encoder's share of it")
    grad_clip_norm: float = Field(default=20.0, gt=0)
    tau: float = Field(default=0.01, gt=0, le=1, description="rate of the target heads and of the running scale")
    dropout: float = Field(default=0.01, ge=0, lt=1, description="in the first layer of each Q-head")
    buffer_size: int = Field(default=1_000_000, ge=1, le=10**12, description="decisions that the replay holds")
    seed_steps: int | None = Field(default=None, ge=1, description="random decisions at first; max(1000, 5 episodes) if left out")
    demonstrations: int = Field(default=0, ge=0, description="episodes before those at random, played by the task's scripted policy")
    demonstration_noise: float = Field(default=0.1, ge=0, description="spread of the noise on each scripted action")
    demonstration_coef: float = Field(default=1.0, ge=0, description="weight of their imitation in the policy prior's loss")
    seed_updates: int | None = Field(
        default=None, ge=0, description="updates made after the seed phase; one per decision of it if left out"
    )
    updates_per_decision: float = Field(default=1.0, gt=0, le=64, description="updates per decision from then on")
    acting: ActingConfig = ActingConfig()
    eval_every: int = Field(default=10_000, ge=1, description="decisions between evaluations")
    eval_episodes: int = Field(default=3, ge=1, le=1000, description="episodes per evaluation, with the full planner")
    keep: Literal["last", "best"] = Field(default="last", description="weights the teacher ends up with: the last, or the best evaluated")
    checkpoint_seconds: float = Field(default=120.0, ge=0, description="wall time between checkpoints; changes nothing that is learned")

    def seed_phase(self, episode: int) -> int:
        """Decisions before the first update, for episodes of so many: demonstrations, then those at random."""
        return self.demonstrations * episode + (self.seed_steps or max(1000, 5 * episode))


class Config(Section):
    """Everything a preset may set, and what is stored beside each teacher and corrector."""

    planner: PlannerConfig = PlannerConfig()
    train: TrainConfig = TrainConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    refine: RefineConfig = RefineConfig()
    collect: CollectConfig = CollectConfig()
    corrector: CorrectorConfig = CorrectorConfig()

    @property
    def training_planner(self) -> PlannerConfig:
        """The planner's settings while training acts."""
        changes = self.train.acting.model_dump(exclude={"horizon", "policy_share"}, exclude_none=True)
        if "iterations" in changes:
            changes["large_action_iterations"] = 0
        return PlannerConfig(**{**self.planner.model_dump(), **changes})

    def acting_settings(self) -> dict[str, Any]:
        """What decides how a teacher acts, less what is switched off: for reports, and for promises about return, because another planner
        is another baseline."""
        return self.model_dump(mode="json", include={"planner", "speculation"} | ({"refine"} if self.refine.iterations else set()))

    @model_validator(mode="after")
    def _refines(self) -> Self:
        refine, planner = self.refine, self.planner
        if refine.below is not None and not refine.iterations:
            raise ValueError(f"refine.below ({refine.below}) means nothing while refine.iterations is 0")
        if refine.iterations >= planner.iterations and refine.iterations:
            raise ValueError(f"refine.iterations ({refine.iterations}) must be below planner.iterations ({planner.iterations})")
        if refine.iterations and not planner.min_std <= refine.std <= planner.max_std:
            raise ValueError(f"refine.std ({refine.std}) must lie in planner.min_std..max_std ({planner.min_std}..{planner.max_std})")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        try:
            _ = self.training_planner
        except ValidationError as error:
            raise ValueError(f"train.acting: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
        return self
