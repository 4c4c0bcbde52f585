"""The page at /, in a browser: a picture is chosen, another is dropped, boxes are seen where the server says."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from PIL import Image

from tests.report.browser import CHROMIUM, IN_A_BROWSER
from tests.serve.browser import Tab, tab

pytestmark = [pytest.mark.ray, IN_A_BROWSER]

SEEN = """(() => {
  const picture = document.getElementById("picture"), frame = picture.getBoundingClientRect();
  const place = (box) => {
    const { x, y, width, height } = box.getBoundingClientRect();
    return { text: box.textContent, line: getComputedStyle(box).borderTopColor,
      bbox: [x - frame.x, y - frame.y, width, height].map((pixels) => pixels / frame.width) };
  };
  return { frame: [frame.x, frame.y, frame.width, frame.height], count: document.getElementById("count").textContent,
    boxes: [...document.querySelectorAll(".box")].reverse().map(place),
    rows: document.querySelectorAll("tbody tr").length,
    trouble: document.getElementById("trouble").hidden ? "" : document.getElementById("trouble").textContent,
    background: getComputedStyle(document.body).backgroundColor, overflow: document.body.scrollWidth > innerWidth };
})()"""


@pytest.fixture
def page(tmp_path):
    with tab(str(CHROMIUM), tmp_path / "profile") as opened:
        yield opened


def answered(url: str, content: bytes) -> dict[str, Any]:
    return requests.post(f"{url}/predict", data=content, timeout=60).json()["images"][0]


def wait_for(page: Tab, name: str) -> None:
    shown = "document.getElementById('picture')"
    page.until(f"{shown}.alt === {name!r} && {shown}.complete && document.querySelector('.box') !== null")


def score_from(page: Tab, value: float) -> None:
    page.value(f"""(() => {{ const slider = document.getElementById("score");
      slider.value = {value}; slider.dispatchEvent(new Event("input")); }})()""")


def require_boxes(seen: dict[str, Any], answer: dict[str, Any]) -> None:
    """Drawn where the answer has them, best first, to a pixel of the screen."""
    assert len(seen["boxes"]) == seen["rows"] == len(answer["detections"]) > 0
    for box, one in zip(seen["boxes"], answer["detections"], strict=True):
        assert box["text"] == f"{one['class']} {one['score']:.2f}"
        wanted = np.array(one["bbox"]) * seen["frame"][2] / answer["width"]
        wanted[2:] = np.maximum(wanted[2:], 4)  # two borders of two pixels, also where a box has no width
        np.testing.assert_allclose(np.array(box["bbox"]) * seen["frame"][2], wanted, rtol=0, atol=1)


def test_a_picture_that_is_chosen_and_one_that_is_dropped(page, url, pictures, tmp_path):
    for name in ("test_0002.jpg", "turned.jpg"):
        (tmp_path / name).write_bytes(pictures[name])
    page.open(url)
    first = page.value(SEEN)
    assert (first["boxes"], first["trouble"], first["overflow"]) == ([], "", False)
    page.choose("#file", tmp_path / "test_0002.jpg")
    score_from(page, 0)
    wait_for(page, "test_0002.jpg")
    answer = answered(url, pictures["test_0002.jpg"])
    seen = page.value(SEEN)
    require_boxes(seen, answer)
    assert seen["count"] == f"{len(answer['detections'])} of {len(answer['detections'])} detections"
    best = answer["detections"][0]["score"]
    score_from(page, round(best - 0.01, 2))
    kept = [one for one in answer["detections"] if one["score"] >= round(best - 0.01, 2)]
    assert 0 < len(page.value(SEEN)["boxes"]) == len(kept) < len(answer["detections"])

    page.drop(tmp_path / "turned.jpg", 600, 60)
    wait_for(page, "turned.jpg")
    score_from(page, 0)
    require_boxes(page.value(SEEN), answered(url, pictures["turned.jpg"]))
    require_as_stored(page, pictures["turned.jpg"], tmp_path)

    (tmp_path / "text.jpg").write_bytes(b"hello")
    page.drop(tmp_path / "text.jpg", 600, 60)
    page.until("!document.getElementById('trouble').hidden")
    assert page.value(SEEN)["trouble"] == "400: not an image, or of a kind that is not read"
    asked = {urlsplit(e["params"]["request"]["url"]) for e in page.events if e["method"] == "Network.requestWillBeSent"}
    assert {one.netloc for one in asked if one.scheme != "blob"} == {urlsplit(url).netloc}


def require_as_stored(page: Tab, content: bytes, tmp_path: Path) -> None:
    """The screen shows the stored pixels, to which the boxes belong, not those that the EXIF orientation asks for."""
    score_from(page, 1)
    page.screenshot(tmp_path / "seen.png")
    x, y, width, height = map(round, page.value(SEEN)["frame"])
    seen = Image.open(tmp_path / "seen.png").convert("RGB").crop((x, y, x + width, y + height))
    stored = Image.open(io.BytesIO(content)).convert("RGB")
    pixels = [np.asarray(image.resize((16, 16)), float) for image in (seen, stored, stored.rotate(-90, expand=True))]
    assert np.abs(pixels[0] - pixels[1]).mean() < 5 < np.abs(pixels[0] - pixels[2]).mean()


def test_light_and_dark(page, url):
    for dark, background in ((False, "rgb(246, 247, 249)"), (True, "rgb(18, 21, 26)")):
        page.open(url, dark)
        assert page.value(SEEN)["background"] == background
