"""What `jobs/tune.py` and `jobs/compare.py` can be told: all of a training run, and what of it is varied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, create_model

from ray_det.config import TrainJobConfig
from ray_det.section import PositiveInt, Section

DEFAULT_TRIALS = 16
FIXED = ("name", "storage", "overwrite", "allow_changes", "train.epochs", "eval.", "workers.", "wandb.")
FIXED += ("data.train", "data.val", "data.test", "data.images", "data.classes", "data.rename", "data.strict")
FIXED += ("data.max_pixels", "data.max_bytes")
"""What all trials have in common: the data, how it is evaluated, and where."""


class SearchConfig(Section):
    search: Literal["random", "grid", "optuna"] = Field(
        default="random", description="how values are proposed; grid: all combinations of choices; optuna: TPE"
    )
    trials: PositiveInt | None = Field(
        default=None, description=f"trials in all; default: {DEFAULT_TRIALS}, or the whole grid"
    )
    scheduler: Literal["asha", "median", "none"] = Field(
        default="asha",
        description="which trials are stopped by their val/AP: those not among the best at an epoch of "
        "their rung (successive halving), those below the median, or none",
    )
    grace_epochs: PositiveInt | None = Field(
        default=None, description="epochs before which no trial is stopped; default: a quarter of all"
    )
    reduction: Annotated[int, Field(ge=2)] = Field(
        default=3, description="asha: one of this many goes on at a rung, and the next is at this many times its epochs"
    )
    concurrent: PositiveInt | None = Field(
        default=None, description="most trials at the same time; default: as many as the cluster has room for"
    )


CHANGES = {
    "zero_padding": "data.padding=zero",
    "random_batches": "data.window=1",
    "no_clipping": "optim.clip_norm=0",
    "constant_1e-4": "optim.schedule=constant + optim.lr=1e-4",
    "no_weight_decay": "optim.weight_decay=0",
    "weight_decay_1e-2": "optim.weight_decay=1e-2",
}
"""What a comparison calls single changes: what the recipe replaced, part by part. 1e-2 is the weight decay of torch's
AdamW where nobody says another."""


class CompareConfig(Section):
    arms: tuple[str, ...] = Field(
        default=(*CHANGES, "baseline"),
        description="what is compared with this run, separated by commas; each: [name:] parts joined by ' + ', a part "
        f"being field=value, a recipe, or one of {', '.join(CHANGES)}",
    )
    seeds: PositiveInt = Field(default=3, description="runs of each arm, with this run's seed and those after it")
    resamples: PositiveInt = Field(default=1000, description="bootstrap samples behind the intervals")
    concurrent: PositiveInt | None = Field(
        default=None, description="most runs at the same time; default: as many as the cluster has room for"
    )


def _space_of(config_class: type[BaseModel], prefix: str = "") -> type[Section]:
    """A section with an optional domain for every field that can be searched."""
    fields: dict[str, Any] = {}
    for name, info in config_class.model_fields.items():
        if f"{prefix}{name}" in FIXED or f"{prefix}{name}." in FIXED:
            continue
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            section = _space_of(info.annotation, f"{prefix}{name}.")
            fields[name] = (section, section())
        else:
            fields[name] = (str | None, Field(default=None, description=f"values of {prefix}{name} to search"))
    return create_model(f"SpaceOf{config_class.__name__}", __base__=Section, **fields)


if TYPE_CHECKING:
    Space = Section
else:
    Space = _space_of(TrainJobConfig)


class TuneJobConfig(TrainJobConfig):
    """Everything that a training run can be told, and what of it is searched, how."""

    tune: SearchConfig = SearchConfig()
    space: Space = Space()

    def base(self) -> TrainJobConfig:
        """The training run that the trials vary."""
        return TrainJobConfig.model_validate(self.model_dump(exclude={"tune", "space"}))

    def asked_space(self) -> dict[str, str]:
        """The text of each domain that was given, by dotted name of the field."""
        return flat(self.space.model_dump(exclude_none=True))


class CompareJobConfig(TrainJobConfig):
    """Everything that a training run can be told, and with what it is compared."""

    compare: CompareConfig = CompareConfig()

    def base(self) -> TrainJobConfig:
        """The reference."""
        return TrainJobConfig.model_validate(self.model_dump(exclude={"compare"}))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted name, of sections in sections."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
