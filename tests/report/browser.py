"""Pages in a real browser: what a script says of them when they are drawn."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
IN_A_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


def looked_at(page: Path, script: str, profile: Path, *, dark: bool = False) -> dict[str, Any]:
    """The value of a JavaScript expression on the page, 1280 pixels wide."""
    probe = f'<script>document.title = "PROBE " + JSON.stringify({script});</script>'
    page.write_text(page.read_text().replace("</body>", probe + "</body>"))
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [str(CHROMIUM), *quiet.split(), "--disable-component-update", "--disable-sync", "--window-size=1280,2000"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--user-data-dir={profile}"]
    dom = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    found = re.search(r"<title>PROBE (.*?)</title>", dom)
    assert found, dom[:500]
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
