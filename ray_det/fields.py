"""What a configuration's fields take: by dotted name, in words, and as the text of `--help`."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def leaf_fields(config_class: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every field that is not a section, by dotted name."""
    for name, info in config_class.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from leaf_fields(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def members(annotation: Any) -> set[Any]:
    """The types of a union, without `Annotated` and None; `Literal`s of text count as str."""
    if get_origin(annotation) is Annotated:
        return members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return set().union(*(members(a) for a in get_args(annotation)))
    if get_origin(annotation) is Literal:
        return {type(value) for value in get_args(annotation)}
    return set() if annotation in (None, type(None)) else {get_origin(annotation) or annotation}


def is_optional(annotation: Any) -> bool:
    """Whether None is a value."""
    if get_origin(annotation) is Annotated:
        return is_optional(get_args(annotation)[0])
    return annotation in (None, type(None)) or (
        get_origin(annotation) in (Union, types.UnionType) and any(is_optional(a) for a in get_args(annotation))
    )


def item_of(annotation: Any) -> Any:
    """What a list or tuple holds, also one that may be none."""
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return next((item for a in get_args(annotation) if (item := item_of(a)) is not None), None)
    return next(iter(get_args(annotation)), None)


def type_text(annotation: Any, constraints: Sequence[Any] = ()) -> str:
    """What a field takes, in words: `int >= 1 or none`, `mean | zero`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(args[0], [*args[1:], *constraints])
    if origin in (Union, types.UnionType):
        return " or ".join(type_text(a) for a in args)
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin in (tuple, list):
        items = [type_text(a) for a in args if a is not Ellipsis]
        return f"list of {items[0]}" if origin is list or Ellipsis in args else ", ".join(items)
    plain: dict[Any, str] = {bool: "true | false", str: "text", Path: "path", type(None): "none", dict: "JSON object"}
    words = plain.get(origin or annotation, getattr(annotation, "__name__", str(annotation)))
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "pattern": "matching"}
    limits = [m for c in constraints for m in (c.metadata if isinstance(c, FieldInfo) else [c])]
    found = [f"{s} {v}" for m in limits for n, s in signs.items() if (v := getattr(m, n, None)) is not None]
    return f"{words} {' and '.join(found)}".rstrip()


def help_text(
    config_class: type[BaseModel], description: str, fields: dict[str, FieldInfo], reserved: dict[str, str]
) -> str:
    """What `--help` prints, wrapped to the terminal; `reserved` are the options besides the fields, with their text."""
    width = max(shutil.get_terminal_size().columns, 40)

    def entry(head: str, body: str) -> list[str]:
        return [
            *textwrap.wrap(head, width, initial_indent="  ", subsequent_indent="      ", break_long_words=False),
            *textwrap.wrap(body, width, initial_indent="      ", subsequent_indent="      "),
        ]

    start = "--config FILE.yaml | --recipe NAME" if "recipe" in reserved else "--config FILE.yaml"
    usage = f"usage: {Path(sys.argv[0]).name} [{start}] [--section.field VALUE ...]"
    lines = [*textwrap.wrap(usage, width, subsequent_indent="    "), "", *textwrap.wrap(description, width), ""]
    values = {"config": " FILE.yaml", "recipe": " NAME"}
    for name, text in reserved.items():
        lines += entry(f"--{name}{values.get(name, '')}", text)
    section = None
    for name, info in sorted(fields.items(), key=lambda item: "." in item[0]):
        if (here := name.rpartition(".")[0]) != section:
            section = here
            lines += ["", f"{section or 'run'}:"]
        head = f"--{name}  {type_text(info.annotation, info.metadata)}"
        lines += entry(head, f"{info.description or ''} [{_default_text(info)}]".strip())
    return "\n".join(lines)


def _default_text(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    return f"default: {text}"
