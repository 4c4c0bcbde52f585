"""Run the commands of a page as a newcomer types them, and write below each what was seen.

python cluster/scripts/replay.py docs/cluster.md

The page is its own script: every ```console block is a list of commands (`$ …`, continued after a backslash), and what
follows a command is replaced. They are typed into one shell, whose home is a new folder with a clone of the last
commit in `ray_det/`; where it is, is written as `~`. `console 12` keeps the first and last lines of each answer, twelve
in all. A command that fails ends the replay, and the page stays as it was, unless `(exit status 1)` stands below it.
The page ends Ray on this machine, as its reader would: nothing else of Ray should run there.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
KEPT = 40
"""Lines of an answer, where a block does not say."""
LIMIT_S = 900
"""For one command: what waits for longer waits for nothing."""
WIDTH = 200
"""Characters of a line."""
BLOCK = re.compile(r"^```console *(\d*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (?:.*\\\n)*.*\n", re.MULTILINE)
PREFIX = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\t[A-Z]+ \S+\.py:\d+ -- ", re.MULTILINE)
"""What Ray puts before its lines where they are not read on a terminal."""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|[^\n]*\r(?=[^\n])|\r")


class Shell:
    """A bash that one types into; errors are seen where they come, as on a terminal."""

    def __init__(self, home: Path) -> None:
        kept = ("PATH", "LANG", "TERM", "PIP_", "UV_", "SSL_")
        own = {name: value for name, value in os.environ.items() if name.startswith(kept)}
        own |= {"HOME": str(home), "COLUMNS": "120", "PIP_ROOT_USER_ACTION": "ignore"}
        self.home = home
        self._bash = subprocess.Popen(
            ["bash", "--norc"], cwd=home, env=own, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def type(self, command: str) -> tuple[str, int]:
        """-> what was seen, and the status."""
        end = secrets.token_hex(8)
        assert self._bash.stdin and self._bash.stdout
        self._bash.stdin.write(f"{command}\nprintf '\\n%s %s\\n' {end} $?\n")
        seen: list[str] = []
        limit = threading.Timer(LIMIT_S, os.killpg, (self._bash.pid, signal.SIGKILL))
        limit.daemon = True  # where the shell ends first
        limit.start()
        for line in self._bash.stdout:
            if line.startswith(f"{end} "):
                limit.cancel()
                answer = PREFIX.sub("", CONTROL.sub("", "".join(seen))).replace(str(self.home), "~")
                return answer.strip("\n"), int(line.split()[1])
            seen.append(line)
        raise SystemExit(f"the shell ended in: {command}")

    def close(self) -> None:
        self._bash.communicate("exit\n", timeout=60)


def shortened(answer: str, most: int) -> list[str]:
    """The first and the last lines: two thirds of what is kept are the last."""
    lines = [line.rstrip() if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…" for line in answer.splitlines()]
    if len(lines) <= most:
        return lines
    first = most // 3
    return [*lines[:first], f"… ({len(lines) - most + 1} lines)", *lines[first + 1 - most :]]


def replayed(page: str, shell: Shell) -> str:
    """The page with the answers of today."""

    def block(found: re.Match[str]) -> str:
        asked, text, written = found[1], found[2], []
        places = [*COMMAND.finditer(text)]
        for i, place in enumerate(places):
            before = text[place.end() : places[i + 1].start() if i + 1 < len(places) else None]
            print(place[0].rstrip(), flush=True)
            answer, status = shell.type(place[0][2:].rstrip("\n"))
            print(answer, flush=True)
            said = f"(exit status {status})"
            if status and said not in before:
                raise SystemExit(f"ended with status {status}: {place[0]}")
            written += [place[0].rstrip("\n"), *shortened(answer, int(asked or KEPT)), *([said] if status else [])]
        return "\n".join([f"```console {asked}".rstrip(), *written, "```"])

    return BLOCK.sub(block, page)


def main(page: Path) -> None:
    with TemporaryDirectory(ignore_cleanup_errors=True) as place:
        home = Path(place)
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(home / "ray_det")], check=True)
        shell = Shell(home)
        try:
            page.write_text(replayed(page.read_text(), shell))
        finally:
            shell.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
