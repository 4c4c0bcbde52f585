"""What is searched: `loguniform(1e-5, 1e-3)`, `uniform(0, 1)`, `randint(2, 8)`, `choice(mean, zero)`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError

from ray_det import yaml12
from ray_det.config import TrainJobConfig
from ray_det.types import UserError

KINDS = ("loguniform", "uniform", "randint", "choice")
FORMS = "loguniform(low, high), uniform(low, high), randint(low, high) or choice(a, b, …)"
DIGITS = 4
"""Of a number that is drawn: enough to tell trials apart, and to be read in a table."""

Params = dict[str, Any]
"""A trial's values by dotted name of the field."""


@dataclass(frozen=True)
class Domain:
    """Values of one field.

    `values` are the bounds, both included, or the choices.
    """

    kind: str
    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(str, self.values))})"

    def sample(self, rng: np.random.Generator) -> Any:
        if self.kind == "choice":
            return self.values[int(rng.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "randint":
            return int(rng.integers(low, high, endpoint=True))
        if self.kind == "loguniform":
            return self.tidy(float(np.exp(rng.uniform(np.log(low), np.log(high)))))
        return self.tidy(float(rng.uniform(low, high)))

    def holds(self, value: Any) -> bool:
        if self.kind == "choice":
            return value in self.values
        number = isinstance(value, int if self.kind == "randint" else (int, float)) and not isinstance(value, bool)
        return number and self.values[0] <= value <= self.values[1]

    def tidy(self, value: Any) -> Any:
        """A float with few digits, inside the bounds."""
        if self.kind not in ("loguniform", "uniform"):
            return value
        return min(max(float(f"{value:.{DIGITS}g}"), self.values[0]), self.values[1])


def parse_domain(text: str, source: str) -> Domain:
    """
    Raises:
        UserError: it is none of `KINDS`, or its bounds hold no value.
    """
    match = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", text, re.DOTALL)
    if not match or match[1] not in KINDS:
        raise UserError(f"{source}: expected {FORMS}, got {text!r}")
    kind, values = match[1], yaml12.read(f"[{match[2]}]", source)
    if kind == "choice":
        if not values:
            raise UserError(f"{source}: expected choice(a, b, …) with at least one value, got {text!r}")
        return Domain(kind, tuple(values))
    number = int if kind == "randint" else (int, float)
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, number) for v in values):
        wanted = "two whole numbers" if kind == "randint" else "two numbers"
        raise UserError(f"{source}: expected {kind}(low, high) with {wanted}, got {text!r}")
    low, high = values if kind == "randint" else map(float, values)
    if low >= high or (kind == "loguniform" and low <= 0) or not np.isfinite([low, high]).all():
        more = " and above 0" if kind == "loguniform" else ""
        raise UserError(f"{source}: expected {kind}(low, high) with low below high{more}, got {text!r}")
    return Domain(kind, (low, high))


def default_space(config: TrainJobConfig, *, grid: bool) -> dict[str, Domain]:
    """Learning rate and weight decay around those of the configuration."""
    lr, decay = config.optim.lr, config.optim.weight_decay or 1e-4
    if grid:
        steps = {"optim.lr": (lr / 3, lr, lr * 3), "optim.weight_decay": (decay / 10, decay, decay * 10)}
        return {name: Domain("choice", tuple(float(f"{v:.{DIGITS}g}") for v in v3)) for name, v3 in steps.items()}
    return {
        "optim.lr": Domain("loguniform", (lr / 10, lr * 10)),
        "optim.weight_decay": Domain("loguniform", (decay / 100, decay * 100)),
    }


def holds(space: Mapping[str, Domain], params: Params) -> bool:
    """Whether it is a point of this space."""
    return params.keys() == space.keys() and all(domain.holds(params[name]) for name, domain in space.items())


def with_params(config: TrainJobConfig, params: Mapping[str, Any]) -> TrainJobConfig:
    """The configuration with a trial's values.

    Raises:
        UserError: a field does not take its value.
    """
    tree = config.model_dump()
    for name, value in params.items():
        *sections, field = name.split(".")
        branch = tree
        for section in sections:
            branch = branch[section]
        branch[field] = value
    try:
        return TrainJobConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{place}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")) from None


def require_values(config: TrainJobConfig, space: Mapping[str, Domain]) -> None:
    """
    Raises:
        UserError: a field does not take one of its bounds or choices.
    """
    for name, domain in space.items():
        for value in domain.values:
            try:
                with_params(config, {name: value})
            except UserError as error:
                raise UserError(f"--space.{name} {domain}: {value!r} is no value for it ({error})") from None
