"""The page at `/`: drop a picture on it, and see what the detector finds. It loads nothing from anywhere else."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from ray_det.report.markup import document, share, whole

HERE = Path(__file__).parent
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
"""They hold the browser to it, whatever a class or a file is named."""
SHOWN = 12
"""Classes that are named at the top."""


def page(facts: dict[str, Any]) -> str:
    """HTML; `facts` are what `GET /model` answers."""
    names = [str(category["name"]) for category in facts["classes"]]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    about = [facts["model"], f"{facts['image_size']} px", facts["device"], f"step {whole(facts['global_step'])}"]
    if facts["val_ap"] is not None:
        about.append(f"val AP {share(facts['val_ap'])}")
    style = (HERE / "page.css").read_text(encoding="utf-8")
    body = (HERE / "page.html").read_text(encoding="utf-8")
    head = (
        f"<style>\n{style}</style>\n<header><h1>{escape(facts['name'])}</h1><p>{escape(' · '.join(about))}</p>"
        f"<p>{escape(', '.join(names[:SHOWN]) + more)}</p></header>"
    )
    return document(facts["name"], f"{head}\n{body}", HERE / "page.js")
