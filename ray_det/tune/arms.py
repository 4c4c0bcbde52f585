"""What a comparison compares: `zero_padding`, `baseline`, or `wide: data.image_size=800 + optim.lr=1e-4`.

An arm is the training run of the command line with a few values of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ray_det import recipes, yaml12
from ray_det.cli import unknown_name
from ray_det.config import TrainJobConfig
from ray_det.fields import leaf_fields
from ray_det.tune.config import CHANGES, FIXED, flat
from ray_det.tune.space import Params, with_params
from ray_det.types import UserError

REFERENCE = "reference"
"""The arm without changes."""
OF_A_RECIPE = ("optim.", "augment.", "data.padding", "data.window")
"""What an arm takes of a recipe; model, size of images and length of training are those of the comparison."""


@dataclass(frozen=True)
class Arm:
    name: str
    params: Params  # by dotted name of the field


def parse_arms(base: TrainJobConfig, texts: Sequence[str]) -> list[Arm]:
    """The reference, then the arms of these texts; each an optional `name:` and parts joined by ` + `.

    A part is `field=value`, one of `CHANGES`, or a recipe.

    Raises:
        UserError: a part that is none of these, a value that its field does not take, two arms with one name or with
            the same values.
    """
    arms = [Arm(REFERENCE, {})]
    for text in texts:
        arm = _parse(text)
        require_different(arm, arms, base)
        arms.append(arm)
    return arms


def require_different(arm: Arm, others: Sequence[Arm], base: TrainJobConfig) -> None:
    """
    Raises:
        UserError: it takes a name, or trains what another one trains.
    """
    config = with_params(base, arm.params)
    for other in others:
        if arm.name == other.name:
            raise UserError(f"--compare.arms: two arms have the name {arm.name!r}; `name: …` gives another one")
        if config == with_params(base, other.params):
            raise UserError(f"--compare.arms: {arm.name} has the same values as {other.name}")


def points_of(arms: Sequence[Arm], seeds: Sequence[int]) -> list[Params]:
    """The values of each trial: all arms with the first seed, then with the next one."""
    return [{"seed": seed, **arm.params} for seed in seeds for arm in arms]


def _parse(text: str) -> Arm:
    name, colon, rest = text.partition(":")
    if not colon or "=" in name:
        name, rest = text, text
    params: Params = {}
    for part in rest.split(" + "):
        params |= _params_of(part.strip())
    return Arm(re.sub(r"\s+", " ", name.strip()), params)


def _params_of(part: str) -> Params:
    if part in CHANGES:
        return _parse(CHANGES[part]).params
    if part in recipes.names():
        tree = flat(yaml12.read_mapping(recipes.text(part), f"recipe {part}"))
        return {field: value for field, value in tree.items() if field.startswith(OF_A_RECIPE)}
    field, equals, value = part.partition("=")
    if not equals:
        names = ", ".join([*CHANGES, *recipes.names()])
        raise UserError(f"--compare.arms: {part!r} is neither field=value nor one of {names}")
    field = field.strip().removeprefix("--")
    if field not in (known := dict(leaf_fields(TrainJobConfig))):
        raise UserError(unknown_name(field, list(known), "field ", ""))
    if field.startswith(FIXED) or field == "seed":
        raise UserError(f"--compare.arms: {field} is the same for all arms")
    return {field: yaml12.read(value.strip(), f"--compare.arms {field}")}
