"""YAML with the scalars of version 1.2, read and written so that values come back as they were.

What JSON has not is refused: tags of other types, and aliases, by which a few lines can stand for billions of values.
PyYAML speaks 1.1, where 5e-5 is text, 010 is eight, `no` is false, 1:30 is ninety and 2024-01-01 is a date.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

import yaml
from yaml.composer import ComposerError

from ray_det.types import UserError


def read(text: str, source: str) -> Any:
    """The value that `text` holds; `source` is how errors name it.

    Raises:
        UserError: not YAML, or a key given twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text.strip() else ""
        raise UserError(f"{source}: not valid YAML{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, LookupError) as error:  # the latter two from values such as `!!float x`
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None


def read_mapping(text: str, source: str) -> dict[str, Any]:
    """As `read`, for a file that holds `key: value` lines; an empty one is an empty mapping."""
    tree = read(text, source)
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{source}: expected `section: {{field: value}}`, got {type(tree).__name__}")
    return tree or {}


def write(tree: dict[str, Any]) -> str:
    """What `read` and any reader of YAML 1.1 read back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors = {t: c for t, c in yaml.SafeLoader.yaml_constructors.items() if t in _TAGS or t is None}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(problem="aliases (*name) are not read", problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(problem="a key appears twice", problem_mark=node.start_mark)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would take for something other than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # In single quotes PyYAML writes breaks such as U+0085 as they are and reads them back as spaces.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text)
_Dumper.add_multi_representer(PurePath, lambda dumper, path: _text(dumper, str(path)))
_NUMBER_STARTS = list("-+.0123456789")
for _tag, _pattern, _starts in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", _NUMBER_STARTS),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        _NUMBER_STARTS,
    ),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _starts)
# PyYAML's own takes 010 for 8.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(str(node.value)))
