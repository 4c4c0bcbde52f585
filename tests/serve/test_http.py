"""A real server, over HTTP: Ray Serve's proxy, a replica, and what both say."""

from __future__ import annotations

import http.client
import io
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest
import requests
from PIL import Image

import ray_det
from tests.models.zoo import CLASSES
from tests.serve.conftest import MAX_BYTES, ONGOING, QUEUED
from tests.serve.same import require_same

pytestmark = pytest.mark.ray

JPEG = {"Content-Type": "image/jpeg"}


@pytest.fixture(scope="module")
def detector(checkpoint):
    return ray_det.load(str(checkpoint), device="cpu")


def ask(url: str, body: object, headers: dict[str, str] = JPEG, query: str = "") -> requests.Response:
    return requests.post(f"{url}/predict{query}", data=body, headers=headers, timeout=60)  # type: ignore[arg-type]


def upload(url: str, files: list[tuple[str, bytes]]) -> requests.Response:
    return requests.post(f"{url}/predict", files=[("image", file) for file in files], timeout=60)


def refused(reply: requests.Response, status: int) -> str:
    """The one line that says why."""
    assert reply.status_code == status, reply.text
    assert list(content := reply.json()) == ["error"]
    assert content["error"] and "\n" not in content["error"]
    return content["error"]


def test_the_same_numbers_as_in_python(url, detector, pictures):
    for name, content in pictures.items():
        reply = ask(url, content, {})
        assert reply.status_code == 200, reply.text
        (image,) = reply.json()["images"]
        assert (image["width"], image["height"]) == Image.open(io.BytesIO(content)).size, name
        require_same(image, detector.predict([content])[0], CLASSES)


def test_requests_that_meet_get_the_same_numbers(url, detector, pictures):
    """Some in a request of their own, some with others."""
    names = ["turned.jpg", "clear.png", "test_0002.jpg"]
    with ThreadPoolExecutor(ONGOING) as pool:
        alone = [pool.submit(ask, url, pictures[name]) for name in names]
        together = pool.submit(upload, url, [(name, pictures[name]) for name in names])
        images = [reply.result().json()["images"][0] for reply in alone] + together.result().json()["images"]
    assert [image["name"] for image in images] == ["", "", "", *names]
    for name, image in zip(names * 2, images, strict=True):
        require_same(image, detector.predict([pictures[name]])[0], CLASSES, rtol=1e-5)


def test_min_score(url, pictures):
    everything = ask(url, pictures["gray.jpg"]).json()["images"][0]["detections"]
    middle = everything[len(everything) // 2]["score"]
    some = ask(url, pictures["gray.jpg"], query=f"?min_score={middle}").json()["images"][0]["detections"]
    assert some == [one for one in everything if one["score"] >= middle] != everything


def test_what_is_no_image_is_refused(url, pictures):
    assert refused(ask(url, b"hello"), 400) == "not an image, or of a kind that is not read"
    assert "the body is empty" in refused(ask(url, b""), 400)
    assert "truncated" in refused(ask(url, pictures["clear.png"][:2000]), 400)
    files = [("a.jpg", pictures["gray.jpg"]), ("b.jpg", b"no")]
    assert refused(upload(url, files), 400).startswith("b.jpg: not an image")


def test_too_much_is_refused(url, pictures):
    assert "larger than 131072 bytes" in refused(ask(url, bytes(MAX_BYTES + 1)), 413)
    chunks = (bytes(MAX_BYTES // 4) for _ in range(5))  # without a Content-Length
    assert "larger than 131072 bytes" in refused(ask(url, chunks), 413)
    file = io.BytesIO()
    Image.new("1", (600, 600)).save(file, "PNG")
    assert "600 x 600 are more pixels than max_pixels 262144" in refused(ask(url, file.getvalue()), 413)
    files = [(f"{i}.jpg", b"any") for i in range(4)]
    assert refused(upload(url, files), 413) == "more than 3 images in one request"


def test_other_content_is_refused(url, pictures):
    for kind in ("application/json", "application/x-www-form-urlencoded"):  # the latter is curl's own
        line = refused(ask(url, pictures["gray.jpg"], {"Content-Type": kind}), 415)
        assert kind in line and "image/" in line and "multipart/form-data" in line


def test_wrong_requests_are_refused(url, pictures):
    content = pictures["gray.jpg"]
    assert "'high'" in refused(ask(url, content, query="?min_score=high"), 422)
    assert "'nan'" in refused(ask(url, content, query="?min_score=nan"), 422)
    assert "there is min_score" in refused(ask(url, content, query="?threshold=0.5"), 422)
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert refused(ask(url, b"--x--\r\n", form), 422) == "the form has no file"
    field = b'--x\r\nContent-Disposition: form-data; name="min_score"\r\n\r\n1\r\n--x--\r\n'
    assert refused(ask(url, field, form), 422) == "the form has a field that is no file"
    assert refused(ask(url, content, {"Content-Type": "multipart/form-data"}), 400) == "Missing boundary in multipart."
    refused(requests.get(f"{url}/predict", timeout=30), 405)
    refused(requests.get(f"{url}/nothing", timeout=30), 404)


def test_clients_that_go_away_hold_no_place(url, pictures):
    for _ in range(2 * ONGOING):
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        connection.putrequest("POST", "/predict")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"the rest never comes")
        connection.close()
    deadline = time.monotonic() + 10  # the server hears of the last ones a moment later
    while (status := ask(url, pictures["gray.jpg"]).status_code) == 503 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert status == 200


def test_an_overload_is_refused_and_passes(url, pictures):
    clients = 10 * (ONGOING + QUEUED)
    with ThreadPoolExecutor(clients) as pool:
        replies = list(pool.map(lambda _: ask(url, pictures["gray.jpg"]), range(clients)))
    statuses = Counter(reply.status_code for reply in replies)
    assert set(statuses) == {200, 503} and statuses[200] >= ONGOING, statuses
    assert {reply.headers["Retry-After"] for reply in replies if reply.status_code == 503} == {"1"}
    assert ask(url, pictures["gray.jpg"]).status_code == 200


def test_model_health_and_page(url):
    model = requests.get(f"{url}/model", timeout=30).json()
    assert model["classes"] == CLASSES.to_json()
    assert (model["name"], model["image_size"], model["global_step"], model["val_ap"]) == ("cells", 160, 7, 0.25)
    assert model["limits"] == {"bytes": MAX_BYTES, "pixels": 1 << 18, "images": 3}
    assert requests.get(f"{url}/health", timeout=30).json() == {"status": "ok"}
    assert requests.get(f"{url}/-/healthz", timeout=30).text == "success"  # the proxy's own
    page = requests.get(url, timeout=30)
    assert "red, green, blue" in page.text
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none';")
