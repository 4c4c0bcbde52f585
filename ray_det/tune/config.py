"""What `jobs/tune.py` can be told: all of a training run, how to search, and the space of each field."""

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
        return dict(_flat(self.space.model_dump()))


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found.append((f"{prefix}{name}", value))
    return found
