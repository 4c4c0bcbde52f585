"""Which values a trial gets: drawn, taken from a grid, or proposed by Optuna from the trials before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from typing import Any, Protocol

import numpy as np

from ray_det.report.sweep_trial import SweepTrial
from ray_det.tune.space import Domain, Params, holds
from ray_det.types import UserError

Space = Mapping[str, Domain]


class Proposer(Protocol):
    """Proposes a trial's values by its number, from 0; a sweep that goes on tells again what it knows."""

    def propose(self, number: int) -> Params: ...

    def tell(self, number: int, params: Params, value: float) -> None:
        """A trial has ended with this value, of which more is better."""
        ...


class Random:
    """A trial's values depend on the seed and its number alone."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed

    def propose(self, number: int) -> Params:
        rng = np.random.default_rng([self._seed, number])
        return {name: domain.sample(rng) for name, domain in self._space.items()}

    def tell(self, number: int, params: Params, value: float) -> None:
        pass


class Listed:
    """Points that are known beforehand, by the number of the trial."""

    def __init__(self, points: Mapping[int, Params]) -> None:
        self._points = points

    def propose(self, number: int) -> Params:
        return self._points[number]

    def tell(self, number: int, params: Params, value: float) -> None:
        pass


class Tpe:
    """Optuna's Tree-structured Parzen Estimator (Bergstra et al., https://papers.nips.cc/paper/4443).

    Args:
        known: trials that there are already: a sweep that goes on must not draw the same numbers again.
    """

    def __init__(self, space: Space, seed: int, known: int) -> None:
        try:
            import optuna
        except ImportError:
            raise UserError("--tune.search optuna needs Optuna: pip install 'ray-det[optuna]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._space = optuna, space
        self._distributions = {name: self._distribution(domain) for name, domain in space.items()}
        sampler = optuna.samplers.TPESampler(seed=int(np.random.default_rng([seed, known]).integers(1 << 31)))
        self._study = optuna.create_study(direction="maximize", sampler=sampler)

    def propose(self, number: int) -> Params:
        params = self._study.ask(self._distributions).params
        # Optuna's choices are plain values; lists go by their place.
        return {name: self._value(name, params[name]) for name in self._space}

    def tell(self, number: int, params: Params, value: float) -> None:
        if not holds(self._space, params):  # of a sweep that goes on in another space
            return
        point = {name: self._place(name, params[name]) for name in self._space}
        trial = self._optuna.trial.create_trial(params=point, distributions=self._distributions, value=value)
        self._study.add_trial(trial)

    def _distribution(self, domain: Domain) -> Any:
        kinds = self._optuna.distributions
        if domain.kind == "choice":
            return kinds.CategoricalDistribution(range(len(domain.values)))
        if domain.kind == "randint":
            return kinds.IntDistribution(*domain.values)
        return kinds.FloatDistribution(*domain.values, log=domain.kind == "loguniform")

    def _value(self, name: str, suggested: Any) -> Any:
        domain = self._space[name]
        return domain.values[suggested] if domain.kind == "choice" else domain.tidy(suggested)

    def _place(self, name: str, value: Any) -> Any:
        domain = self._space[name]
        return domain.values.index(value) if domain.kind == "choice" else value


def grid(space: Space) -> list[Params]:
    """All combinations, the first field's values changing last."""
    return [dict(zip(space, point, strict=True)) for point in product(*(domain.values for domain in space.values()))]


def grid_size(space: Space) -> int:
    """
    Raises:
        UserError: a field has no list of choices.
    """
    for name, domain in space.items():
        if domain.kind != "choice":
            raise UserError(f"--space.{name} {domain}: a grid takes choice(a, b, …) (see --tune.search)")
    return prod(len(domain.values) for domain in space.values())


def fresh_points(points: Sequence[Params], known: Sequence[SweepTrial]) -> tuple[list[int], Listed]:
    """The points that no known trial has, numbered on after the known ones."""
    had = [trial.params for trial in known]
    left = [point for point in points if point not in had]
    first = max((trial.number for trial in known), default=-1) + 1
    return [*range(first, first + len(left))], Listed(dict(enumerate(left, first)))


def fresh_trials(
    search: str, space: Space, seed: int, count: int, known: Sequence[SweepTrial]
) -> tuple[list[int], Proposer]:
    """Numbers of the trials that a sweep of `count` lacks, and what proposes their values."""
    if search == "grid":
        return fresh_points(grid(space)[:count], known)
    numbers = sorted({*range(count)} - {trial.number for trial in known})
    return numbers, Tpe(space, seed, len(known)) if search == "optuna" else Random(space, seed)
