"""Requests to images, detections to answers: what the HTTP interface says, without the server behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from ray_det.evaluate.results import Results
from ray_det.types import ClassList, Detections

FORM = "multipart/form-data"
ACCEPTED = f"an image (Content-Type: image/…) or {FORM} with one file per image"


def bounded(request: Request, max_bytes: int) -> Request:
    """The same request, refused as soon as more than `max_bytes` of its body are announced or have come."""
    too_large = HTTPException(413, f"the body is larger than {max_bytes} bytes")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    seen = 0

    async def receive() -> Message:
        nonlocal seen
        message = await request.receive()
        seen += len(message.get("body", b""))
        if seen > max_bytes:
            raise too_large
        return message

    return Request(request.scope, receive)


async def images_of(request: Request, max_images: int) -> list[tuple[str, bytes]]:
    """(name, file content) of every image of a request; the name is empty where the body is the image.

    Raises:
        HTTPException: 400, 413, 415 or 422, with one line that says why.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == FORM:
        return await _files_of(request, max_images)
    if kind and kind != "application/octet-stream" and not kind.startswith("image/"):
        raise HTTPException(415, f"Content-Type {kind} is not read; send {ACCEPTED}")
    if not (content := await request.body()):
        raise HTTPException(400, f"the body is empty; send {ACCEPTED}")
    return [("", content)]


async def _files_of(request: Request, max_images: int) -> list[tuple[str, bytes]]:
    try:
        async with request.form(max_files=max_images, max_fields=0) as form:
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            if not files:
                raise HTTPException(422, "the form has no file")
            return [(file.filename or f"image {i}", await file.read()) for i, file in enumerate(files, start=1)]
    except HTTPException as error:
        if error.detail.startswith("Too many files"):  # Starlette's own words for its 400
            raise HTTPException(413, f"more than {max_images} images in one request") from None
        if error.detail.startswith("Too many fields"):
            raise HTTPException(422, "the form has a field that is no file") from None
        raise


def min_score_of(request: Request, default: float) -> float:
    """The query's `min_score`.

    Raises:
        HTTPException: 422, it is no score, or the query asks for something else.
    """
    for key in request.query_params:
        if key != "min_score":
            raise HTTPException(422, f"unknown parameter {key!r}; there is min_score")
    text = request.query_params.get("min_score")
    if text is None:
        return default
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise HTTPException(422, f"min_score is {text!r}, not a number from 0 to 1")
    return score


def answer(
    names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    found: Sequence[Detections],
    classes: ClassList,
    min_score: float,
) -> list[dict[str, Any]]:
    """JSON of images, in order; `sizes` are (h, w) as stored. Detections are as in COCO's results, best first."""
    by_id = dict(zip(classes.category_ids, classes.names, strict=True))
    images = []
    for name, (height, width), one in zip(names, sizes, found, strict=True):
        results = [result for result in Results.of([one]).to_coco(classes) if result["score"] >= min_score]
        detections = [
            {"category_id": r["category_id"], "class": by_id[r["category_id"]], "score": r["score"], "bbox": r["bbox"]}
            for r in results
        ]
        images.append({"name": name, "height": height, "width": width, "detections": detections})
    return images
