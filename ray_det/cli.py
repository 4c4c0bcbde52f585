"""The command line of every job: `[--config FILE.yaml | --recipe NAME] [--section.field VALUE ...]`.

Any pydantic model whose sections are models is a command line. The order is defaults, recipe, file, flags. Whatever
the user can put right is a `UserError`, which `main` prints as one line. Neither torch nor Ray is imported.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ray_det import recipes as recipe_files
from ray_det import yaml12
from ray_det.fields import help_text, is_optional, item_of, leaf_fields, members, type_text
from ray_det.types import Stopped, TrainingError, UserError

Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True)
class _Given:
    """A value and where it came from, as errors name it: `--optim.lr` or `my.yaml: optim.lr`."""

    value: Any
    source: str
    shown: str


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    description: str,
    recipes: bool = False,
    default_recipe: Callable[[dict[str, Any]], str] | None = None,
) -> tuple[Config, str | None]:
    """The configuration that `argv` (without the program's name) asks for, and the name of the recipe it started from.

    Args:
        recipes: accept `--recipe NAME`, and `recipe: NAME` in a file.
        default_recipe: names the recipe where neither `--recipe` nor `--config` is given; gets the flags' values by
            dotted name.

    Raises:
        UserError: an unknown option, a wrong value, an unreadable file.
        SystemExit: status 0, after `--help` and `--version`.
    """
    fields = dict(leaf_fields(config_class))
    reserved = {
        "config": "a YAML file of sections and fields; flags win over it",
        "help": "this text",
        "version": "the version",
    }
    if recipes:
        reserved["recipe"] = "a configuration to start from: " + ", ".join(recipe_files.names())
    flags, special = _read_flags(argv, fields, reserved)
    if "help" in special:
        _show(help_text(config_class, description, fields, reserved))
        raise SystemExit(0)
    if "version" in special:
        print(f"ray_det {metadata.version('ray-det')}")
        raise SystemExit(0)

    recipe, file = special.get("recipe"), special.get("config")
    if recipe is not None and file is not None:
        raise UserError("give --config or --recipe, not both (a file may itself say `recipe: NAME`)")
    from_file: dict[str, _Given] = {}
    if file is not None:
        tree = yaml12.read_mapping(_read_text(file), file)
        recipe = tree.pop("recipe", None) if recipes else None
        from_file = _flatten(tree, fields, file)
    elif recipe is None and default_recipe is not None:
        recipe = default_recipe({key: given.value for key, given in flags.items()})
    from_recipe: dict[str, _Given] = {}
    if recipe is not None:
        if recipe not in (known := recipe_files.names()):
            raise UserError(f"unknown recipe {recipe!r}; there are {', '.join(known)}")
        label = f"recipe {recipe}"
        from_recipe = _flatten(yaml12.read_mapping(recipe_files.text(recipe), label), fields, label)
    return _build(config_class, fields, from_recipe | from_file | flags), recipe


def parse_training(config_class: type[Config], description: str) -> Config:
    """The command line of a job that trains; says which recipe it is where one is taken."""
    config, recipe = parse(
        config_class,
        sys.argv[1:],
        description=description,
        recipes=True,
        default_recipe=lambda given: "finetune" if given.get("data.train") else "quickstart",
    )
    if recipe:
        print(f"recipe {recipe}", flush=True)
    return config


def to_yaml(config: BaseModel) -> str:
    """The whole configuration; `--config` and `from_yaml` read the same object back."""
    return yaml12.write(config.model_dump())


def from_yaml(config_class: type[Config], text: str, *, source: str = "config.yaml") -> Config:
    """What `to_yaml` wrote; `source` is how errors name the text.

    Raises:
        UserError: not YAML, an unknown key, a wrong value.
    """
    fields = dict(leaf_fields(config_class))
    return _build(config_class, fields, _flatten(yaml12.read_mapping(text, source), fields, source))


def main(function: Callable[[], object]) -> None:
    """Run a job. One line and status 2 for a `UserError`, 1 for a `TrainingError`, 128 + the signal where one ended it.

    Any other exception keeps its traceback.
    """
    try:
        function()
    except (UserError, TrainingError) as error:
        print("error:", " ".join(line.strip() for line in str(error).splitlines() if line.strip()), file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except Stopped as stopped:
        print(stopped)
        sys.exit(128 + stopped.signal_number)
    except KeyboardInterrupt:
        sys.exit(130)


def _show(text: str) -> None:
    """Print what may be piped into `head`, which reads a part only."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Flags and files, flattened to dotted names


def _read_flags(
    argv: Sequence[str], fields: dict[str, FieldInfo], reserved: dict[str, str]
) -> tuple[dict[str, _Given], dict[str, str]]:
    """Flags by dotted name, and the reserved ones (`config`, `recipe`, `help`, `version`)."""
    flags: dict[str, _Given] = {}
    special: dict[str, str] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        word = "--help" if word == "-h" else word
        if not word.startswith("--") or word == "--":
            raise UserError(f"unexpected argument {word!r}; options are --section.field VALUE (see --help)")
        key, has_value, value = word[2:].partition("=")
        if key not in fields and key not in reserved:
            raise UserError(unknown_name(key, [*fields, *reserved], "option --", "--"))
        if not has_value and key not in ("help", "version"):
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif key in fields and bool in members(fields[key].annotation):
                value = "true"
            else:
                wanted = type_text(fields[key].annotation, fields[key].metadata) if key in fields else reserved[key]
                raise UserError(f"--{key}: the value is missing; expected {wanted}")
        if key in reserved:
            special[key] = value
        else:
            flags[key] = _Given(_from_text(value, fields[key].annotation, f"--{key}"), f"--{key}", repr(value))
    return flags, special


def _flatten(tree: dict[str, Any], fields: dict[str, FieldInfo], source: str, prefix: str = "") -> dict[str, _Given]:
    """A file's values by dotted name; a section without content counts as not given."""
    flat: dict[str, _Given] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        is_section = any(field.startswith(f"{name}.") for field in fields)
        if name in fields:
            flat[name] = _Given(value, f"{source}: {name}", json.dumps(value, default=str, ensure_ascii=False))
        elif is_section and isinstance(value, dict):
            flat |= _flatten(value, fields, source, f"{name}.")
        elif not (is_section and value is None):
            raise UserError(f"{source}: {unknown_name(name, list(fields), 'key ', '')}")
    return flat


def unknown_name(key: str, known: list[str], kind: str, dashes: str) -> str:
    """The error for an unknown key, with the nearest known one: by its whole name, or by its last part (`--lr`)."""
    within = [name for name in known if name.startswith(f"{key}.")]
    if within:
        return f"{dashes}{key} is a section; name one of its fields, such as {dashes}{within[0]}"

    def likeness(name: str) -> float:
        whole = difflib.SequenceMatcher(None, key, name).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], name.rpartition(".")[2]).ratio()
        return max(whole, 0.9 * last)

    return f"unknown {kind}{key}; did you mean {dashes}{max(known, key=likeness)}?"


def _build(config_class: type[Config], fields: dict[str, FieldInfo], given: dict[str, _Given]) -> Config:
    tree: dict[str, Any] = {}
    for name, item in given.items():
        takes_bool = members(fields[name].annotation) & {bool, Any}
        if isinstance(item.value, bool) and not takes_bool:  # pydantic would take true for 1
            raise UserError(_wrong(fields[name], item))
        *sections, field = name.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
        branch[field] = item.value
    try:
        return config_class.model_validate(tree)
    except ValidationError as error:
        raise UserError(_first_error(error, fields, given)) from None


def _first_error(error: ValidationError, fields: dict[str, FieldInfo], given: dict[str, _Given]) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    place = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    for end in range(len(place), 0, -1):  # below a field, pydantic's place goes on with union members and indices
        name = ".".join(place[:end])
        if name in fields:
            if first["type"] == "missing" and end == len(place):
                return f"--{name} is required: {fields[name].description or type_text(fields[name].annotation)}"
            if first["type"] == "value_error":
                return f"{given[name].source}: {message}"
            return _wrong(fields[name], given[name])
    return ": ".join(filter(None, [".".join(place), message]))


def _wrong(info: FieldInfo, item: _Given) -> str:
    hint = "" if isinstance(item.value, str) or members(info.annotation) != {str} else " (put it in quotes)"
    return f"{item.source}: expected {type_text(info.annotation, info.metadata)}, got {item.shown}{hint}"


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"--config {path}: {reason}") from None


def _from_text(text: str, annotation: Any, source: str) -> Any:
    """A flag's value: text stays as typed, the rest is read as YAML (which holds JSON), lists also without brackets."""
    kinds = members(annotation)
    if is_optional(annotation) and text.lower() in ("none", "null"):
        return None
    if kinds <= {str, Path}:
        return text
    if kinds & {tuple, list}:
        if text.lstrip().startswith("["):
            return yaml12.read(text, source)
        if members(item_of(annotation)) <= {str, Path}:
            return [part.strip() for part in text.split(",") if part.strip()]
        return yaml12.read(f"[{text}]", source)
    value = yaml12.read(text, source)
    return text if value is None else value
