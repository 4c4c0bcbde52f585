"""Exit with status 2 where a runtime environment or a command holds a secret: Ray shows both in its logs and its API.

python cluster/scripts/refuse_secrets.py RUNTIME_ENV.yaml [options of the job]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ray_det import yaml12
from ray_det.section import secret_in
from ray_det.types import UserError


def secrets(runtime_env: Path, options: list[str]) -> list[str]:
    """Every secret that is found, in words that do not repeat it.

    Raises:
        UserError: the file is not YAML.
    """
    found = [(str(runtime_env), secret_in(yaml12.read(runtime_env.read_text(), str(runtime_env))))]
    for before, option in zip(["", *options], options, strict=False):
        name, _, value = option.rpartition("=") if option.startswith("--") else (before, "", option)
        found.append((name, secret_in(_parsed(value), name)))
    return [f"{where}: {what}" for where, what in found if what]


def _parsed(text: str) -> Any:
    try:
        return yaml12.read(text, "option")
    except UserError:  # not JSON, then text
        return text


def main() -> None:
    try:
        found = secrets(Path(sys.argv[1]), sys.argv[2:])
    except UserError as error:
        found = [str(error)]
    for line in found:
        print(f"error: {line} would be shown by Ray; give it to the nodes (cluster/README.md)", file=sys.stderr)
    sys.exit(2 if found else 0)


if __name__ == "__main__":
    main()
