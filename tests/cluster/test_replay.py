"""`cluster/scripts/replay.py`, which writes docs/cluster.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.ranks import ROOT

REPLAY = ROOT / "cluster" / "scripts" / "replay.py"
PAGE = """# A page

```console 4
$ cd ray_det && ls pyproject.toml && echo $HOME
old
$ seq \\
    9
$ printf '\\033[31mred\\033[0m\\n' >&2
```

```console
$ false
(exit status 1)
```

```bash
$ not typed
```
"""


def replay(page: Path) -> str:
    done = subprocess.run([sys.executable, REPLAY, page], capture_output=True, text=True)
    return page.read_text() if done.returncode == 0 else done.stderr


def test_answers_are_replaced_and_the_rest_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    seen = replay(page)
    expected = PAGE.replace("\nold\n", "\npyproject.toml\n~\n").replace("    9\n", "    9\n1\n… (6 lines)\n8\n9\n")
    assert seen == expected.replace(" >&2\n", " >&2\nred\n")
    assert replay(page) == seen


def test_a_command_that_fails_ends_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text := PAGE.replace("(exit status 1)\n", ""))
    assert "ended with status 1: $ false" in replay(page)
    assert page.read_text() == text


def test_the_first_cluster_has_been_replayed():
    page = (ROOT / "docs" / "cluster.md").read_text()
    blocks = re.findall(r"^```console.*?\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 10 and "Traceback" not in page
    assert all(re.search(r"^[^$\s]", re.sub(r"\\\n", "", block), re.MULTILINE) for block in blocks)
