"""One picture of a micro-batch: an image of the manifest, or several of them composed, on the planned canvas.

It is a pure function of image, seed, epoch and occurrence: partners and all that is random come from these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import cv2
import numpy as np

from ray_det.boxes import clip
from ray_det.config import AugmentConfig
from ray_det.data import augment, compose
from ray_det.data.compose import Partners
from ray_det.data.image import LoadSpec, Size, Source, draw_view, fill, fit, pad, sources
from ray_det.data.iou_crop import centred, iou_crop
from ray_det.data.manifest import Manifest
from ray_det.data.plan import Assignment

PARTNERS, COMPOSING = 0, 1
"""Streams of random numbers beside the plain view's, so that this one is the same with and without."""


class Wanted(NamedTuple):
    """A picture to be drawn."""

    source: Source
    key: tuple[int, ...]  # of its random numbers
    partners: Partners[Source] = Partners()

    @property
    def file_bytes(self) -> int:
        """Of all its files, as far as the manifest knows them."""
        return sum(image.place.length or 0 for image in (self.source, *chain.from_iterable(self.partners)))

    def fetched(self, spec: LoadSpec) -> Wanted:
        """With the contents of all its files. This waits, and computes next to nothing.

        Raises:
            StorageError: a remote storage stayed out of reach.
        """
        partners = Partners(*(tuple(image.fetched(spec) for image in group) for group in self.partners))
        return self._replace(source=self.source.fetched(spec), partners=partners)

    def rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.key, spawn_key=stream))


class Picture(NamedTuple):
    """What lies on a canvas."""

    size: Size  # of its real pixels
    boxes_N4: np.ndarray  # float32 xyxy in canvas pixels
    labels_N: np.ndarray  # int64
    skipped: str = ""  # why the image is not there
    skipped_partners: tuple[tuple[int, str], ...] = ()  # (image id, why)

    def without(self, partner: Source, why: str) -> Picture:
        return self._replace(skipped_partners=(*self.skipped_partners, (partner.id, why)))


def wanted(manifest: Manifest, part: Assignment, spec: LoadSpec) -> list[Wanted]:
    """The pictures of an assignment, in order.

    Raises:
        UserError: a symbolic link leads out of the root.
    """
    images = sources(manifest, part.rows)
    epochs = np.repeat(part.keys[:, 0], np.diff(part.offsets)).tolist()
    plain = [
        Wanted(image, (spec.seed, epoch, image.id % 2**63, *([again] if again else [])))
        for image, epoch, again in zip(images, epochs, part.occurrence.tolist(), strict=True)
    ]
    if spec.augment is None or not spec.augment.partners:
        return plain
    trainable = manifest.trainable_rows()
    chosen = [compose.choose(one.rng(PARTNERS), spec.augment, trainable) for one in plain]
    rows = sorted({row for partners in chosen for group in partners for row in group})
    known = dict(zip(rows, sources(manifest, np.array(rows, np.int64)), strict=True))
    return [
        one._replace(partners=Partners(*(tuple(known[row] for row in group) for group in partners)))
        for one, partners in zip(plain, chosen, strict=True)
    ]


def draw(spec: LoadSpec, one: Wanted, image_size: int, canvas_HW3: np.ndarray) -> Picture:
    """Decode a picture's images, which are fetched, and draw them on the canvas; the rest of it is filled.

    Raises:
        UserError: as `collate.load`.
    """
    easel = _Easel(spec, image_size, canvas_HW3)
    if spec.augment is None:
        return easel.single(one.source, easel.whole(one.source))
    return _Composer(easel, spec.augment, one.rng(COMPOSING)).picture(one)


@dataclass(frozen=True)
class _Easel:
    """A canvas for one image."""

    spec: LoadSpec
    image_size: int
    canvas_HW3: np.ndarray

    @property
    def size(self) -> Size:
        return self.canvas_HW3.shape[0], self.canvas_HW3.shape[1]

    def fit(self, size: Size) -> Size:
        return fit(self.spec, size, self.image_size)

    def whole(self, source: Source) -> augment.View:
        return augment.whole(source.size, self.fit(source.size))

    def single(self, source: Source, view: augment.View, min_side: float = augment.MIN_SIDE) -> Picture:
        """A view of an image at the top left."""
        canvas_HW3, padding = self.canvas_HW3, self.spec.padding
        boxes, labels, why = draw_view(self.spec, source, view, canvas_HW3[: view.height, : view.width], min_side)
        if why:  # Its place in the plan is kept: nobody else's images, canvas or random numbers change.
            view = self.whole(source)
            canvas_HW3[: view.height, : view.width] = fill(padding)
        pad(canvas_HW3, view.height, view.width, padding)
        return Picture((view.height, view.width), boxes, labels, why)


@dataclass(frozen=True)
class _Composer:
    """What augmentation makes of an image and its partners."""

    easel: _Easel
    config: AugmentConfig
    rng: np.random.Generator

    def picture(self, one: Wanted) -> Picture:
        source, easel = one.source, self.easel
        if one.partners.mosaic:
            picture = self._mosaic([source, *one.partners.mosaic])
        elif self.config.iou_crop and self.rng.random() < self.config.iou_crop:
            picture = easel.single(*self._cropped(one), compose.MIN_SIDE)
        else:
            picture = easel.single(source, self._sample(one.rng(), source, easel.size))
        for other in one.partners.copy_paste:
            picture = self._pasted(picture, other)
        for other in one.partners.mixup:
            picture = self._mixed(picture, other)
        return picture

    def _sample(self, rng: np.random.Generator, source: Source, canvas: Size) -> augment.View:
        return augment.sample(rng, self.config, source.size, self.easel.fit(source.size), canvas)

    def _cropped(self, one: Wanted) -> tuple[Source, augment.View]:
        """The image with the boxes that an IoU crop leaves, and a view of the crop."""
        source, canvas = one.source, self.easel.size
        boxes_N4 = clip(source.boxes_N4, *source.size)  # the centre of what can be seen decides
        window = iou_crop(self.rng, self.config, boxes_N4, source.size, canvas[1] / canvas[0])
        x0, y0, x1, y1 = window
        height, width = self.easel.fit((y1 - y0, x1 - x0))
        shrink = min(1, canvas[0] / height, canvas[1] / width)  # the canvas was planned for the whole image
        view = augment.sample(one.rng(), self.config, (y1 - y0, x1 - x0), (height * shrink, width * shrink), canvas)
        view = replace(view, x0=view.x0 + x0, x1=view.x1 + x0, y0=view.y0 + y0, y1=view.y1 + y0)
        kept = centred(boxes_N4, window)
        return source._replace(boxes_N4=boxes_N4[kept], labels_N=source.labels_N[kept]), view

    def _mosaic(self, images: list[Source]) -> Picture:
        """The first image with three others."""
        easel, sizes = self.easel, [image.size for image in images]
        tiles, size = compose.mosaic(self.rng, self.config, sizes, list(map(easel.fit, sizes)), easel.size)
        easel.canvas_HW3[:] = fill(easel.spec.padding)
        boxes, labels, why = [], [], []
        for image, (view, top, left) in zip(images, tiles, strict=True):
            window = easel.canvas_HW3[top : top + view.height, left : left + view.width]
            found, named, reason = draw_view(easel.spec, image, view, window, compose.MIN_SIDE)
            boxes.append(found + np.array([left, top] * 2, np.float32))
            labels.append(named)
            why.append(reason)
        lost = tuple((image.id, reason) for image, reason in zip(images[1:], why[1:], strict=True) if reason)
        return Picture(size, np.concatenate(boxes), np.concatenate(labels), why[0], lost)

    def _pasted(self, picture: Picture, other: Source) -> Picture:
        """The picture with boxes of another image pasted over its real pixels."""
        view = self._sample(self.rng, other, picture.size)
        room = picture.size[0] - view.height, picture.size[1] - view.width
        top, left = self.rng.integers(0, room, endpoint=True).tolist()
        pixels = np.empty((view.height, view.width, 3), np.uint8)
        boxes, labels, why = draw_view(self.easel.spec, other, view, pixels, compose.MIN_SIDE)
        if why:
            return picture.without(other, why)
        window, shift = self.easel.canvas_HW3[top:, left:], np.array([left, top] * 2, np.float32)
        patches = compose.patches(self.rng, picture.boxes_N4 - shift, boxes, self.config.min_visible)
        for patch in patches:
            window[patch.rows, patch.columns] = pixels[patch.rows, patch.columns]
        return picture._replace(
            boxes_N4=np.concatenate([picture.boxes_N4, *(patch.boxes_J4 + shift for patch in patches)]),
            labels_N=np.concatenate([picture.labels_N, *(labels[patch.which_J] for patch in patches)]),
        )

    def _mixed(self, picture: Picture, other: Source) -> Picture:
        """The picture blended with another image, with all boxes (MixUp)."""
        weight = self.rng.beta(compose.BETA, compose.BETA)
        above = replace(self.easel, canvas_HW3=np.empty_like(self.easel.canvas_HW3))
        added = above.single(other, self._sample(self.rng, other, above.size))
        if added.skipped:
            return picture.without(other, added.skipped)
        height, width = np.maximum(picture.size, added.size).tolist()
        window = self.easel.canvas_HW3[:height, :width]
        cv2.addWeighted(window, weight, above.canvas_HW3[:height, :width], 1 - weight, 0, dst=window)
        return picture._replace(
            size=(height, width),
            boxes_N4=np.concatenate([picture.boxes_N4, added.boxes_N4]),
            labels_N=np.concatenate([picture.labels_N, added.labels_N]),
        )
