"""Which images meet in which step, on which canvas: a pure function of sizes, seed and epoch.

Nothing here depends on how many workers there are. An epoch is S steps, a step is a global batch of M micro-batches of
B images on one canvas. Ranks take whole micro-batches (`EpochPlan.assign`), so the world size decides who computes a
micro-batch, never what is in it, and resuming is skipping steps.

Shape legend: N images, S steps, M micro-batches of a step, B images of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ray_det.config import DatasetConfig
from ray_det.data.sampling import Sampler, occurrences
from ray_det.types import UserError

SHORTEST_CAP = 5 / 3
"""With `resize: shortest` the longest side is at most this times image_size (800 / 1333 of the R-CNN papers)."""

STEPS_AT_ONCE = 4096


@dataclass(frozen=True)
class Assignment:
    """The micro-batches of one rank, in order. Micro-batch i holds manifest rows `rows[offsets[i]:offsets[i + 1]]`."""

    keys: np.ndarray  # int32 (n, 3): epoch, step, index
    canvas: np.ndarray  # int32 (n, 2): h, w
    image_size: np.ndarray  # int32 (n,): side that images are resized to, pixels
    offsets: np.ndarray  # int64 (n + 1,)
    rows: np.ndarray  # int64
    occurrence: np.ndarray  # int32, as `rows`: how many times the epoch's sampling drew the image before

    def __len__(self) -> int:
        return len(self.keys)

    def slice(self, start: int, stop: int) -> Assignment:
        """Micro-batches start..stop - 1, with their rows only."""
        a, b = self.offsets[start], self.offsets[stop]
        return Assignment(
            self.keys[start:stop],
            self.canvas[start:stop],
            self.image_size[start:stop],
            self.offsets[start : stop + 1] - a,
            self.rows[a:b],
            self.occurrence[a:b],
        )


@dataclass(frozen=True)
class EpochPlan:
    """One epoch of training."""

    epoch: int
    rows_SMB: np.ndarray  # int64 manifest rows
    occurrence_SMB: np.ndarray  # int32, see `Assignment`
    canvas_S2: np.ndarray  # int32 (h, w)
    image_size_S: np.ndarray  # int32
    wrapped: int  # images seen again to fill the last global batch
    dropped: int  # images left out of this epoch

    @property
    def steps(self) -> int:
        return len(self.rows_SMB)

    @property
    def one_canvas(self) -> bool:
        """Whether all steps have the same."""
        return bool((self.canvas_S2 == self.canvas_S2[:1]).all())

    def micro_batches_of(self, rank: int, world: int) -> range:
        """Rank `rank`'s micro-batches of every step: M / world of them, rounded up or down.

        Raises:
            ValueError: there are more ranks than micro-batches.
        """
        micro = self.rows_SMB.shape[1]
        if world > micro:
            raise ValueError(f"{micro} micro-batches per step are too few for {world} workers")
        return range(rank * micro // world, (rank + 1) * micro // world)

    def assign(self, rank: int, world: int, start_step: int = 0) -> Assignment:
        """Rank `rank`'s micro-batches of every step from `start_step` on."""
        steps, _, size = self.rows_SMB.shape
        own = self.micro_batches_of(rank, world)
        index = np.tile(np.arange(own.start, own.stop), steps - start_step)
        step = np.repeat(np.arange(start_step, steps), len(own))
        return Assignment(
            keys=np.stack([np.full_like(step, self.epoch), step, index], axis=1).astype(np.int32),
            canvas=self.canvas_S2[step],
            image_size=self.image_size_S[step],
            offsets=np.arange(len(step) + 1, dtype=np.int64) * size,
            rows=self.rows_SMB[step, index].reshape(-1),
            occurrence=self.occurrence_SMB[step, index].reshape(-1),
        )


def resized(heights: np.ndarray, widths: np.ndarray, image_size: np.ndarray | int, mode: str) -> np.ndarray:
    """int32 (..., 2): (h, w) of images after the resize that `DatasetConfig.resize` names, at least 1 pixel a side."""
    h, w = np.asarray(heights, np.float64), np.asarray(widths, np.float64)
    if mode == "square":
        side = np.broadcast_to(np.asarray(image_size, np.int32), h.shape)
        return np.stack([side, side], axis=-1)
    longest, shortest = np.maximum(h, w), np.minimum(h, w)
    if mode == "longest":
        scale = image_size / longest
    else:
        scale = np.minimum(image_size / shortest, np.round(image_size * SHORTEST_CAP) / longest)
    return np.maximum(np.round(np.stack([h * scale, w * scale], axis=-1)), 1).astype(np.int32)


def round_up(sizes: np.ndarray, divisor: int) -> np.ndarray:
    """Sizes rounded up to multiples of the divisor."""
    return -(-sizes // divisor) * divisor


def plan_epoch(
    heights_N: np.ndarray,
    widths_N: np.ndarray,
    rows_N: np.ndarray,
    config: DatasetConfig,
    *,
    micro_batches: int,
    micro_batch_size: int,
    divisor: int,
    seed: int,
    epoch: int,
    sampler: Sampler | None = None,
) -> EpochPlan:
    """Plan one epoch over the images at manifest rows `rows_N`.

    A seeded permutation is cut in windows of `config.window` global batches; inside a window images are sorted by
    aspect ratio and cut in global batches, whose order is shuffled again. That leaves few padded pixels and still
    mixes: an image meets others of its shape from its window, and windows are new every epoch.

    Args:
        heights_N, widths_N: of these images, pixels.
        sampler: draws the images; None: every one once.

    Raises:
        UserError: there is no image.
    """
    if not len(heights_N) == len(widths_N) == len(rows_N):
        raise ValueError(f"{len(heights_N)} heights and {len(widths_N)} widths of {len(rows_N)} images")
    if not len(rows_N):
        raise UserError("empty dataset: no image can be trained on")
    rng = np.random.default_rng([seed, epoch])
    batch = micro_batches * micro_batch_size
    drawn = rng.permutation(len(rows_N)) if sampler is None else sampler.draw(rng)
    steps = steps_per_epoch(len(drawn), batch, config.last_batch)
    place = np.resize(np.arange(len(drawn)), steps * batch)  # of each image among those drawn
    place = place[_like_shapes((widths_N / heights_N)[drawn[place]], batch * config.window)].reshape(steps, batch)
    place = place[np.lexsort((rng.random(steps), np.arange(steps) // config.window))]
    order = drawn[place]
    occurrence = np.zeros(place.shape, np.int32) if sampler is None else occurrences(drawn)[place]

    scales = np.array(config.multi_scale or (config.image_size,), np.int32)
    image_size_S = scales[rng.integers(len(scales), size=steps)]
    canvas_S2 = round_up(_largest(heights_N, widths_N, order, image_size_S, config.resize), divisor).astype(np.int32)
    shape, more = (steps, micro_batches, micro_batch_size), steps * batch - len(drawn)
    rows_SMB, occurrence_SMB = rows_N[order].reshape(shape), occurrence.reshape(shape)
    return EpochPlan(epoch, rows_SMB, occurrence_SMB, canvas_S2, image_size_S, max(more, 0), max(-more, 0))


def _like_shapes(aspect_N: np.ndarray, window: int) -> np.ndarray:
    """The order that sorts every window of so many images by aspect ratio."""
    return np.lexsort((aspect_N, np.arange(len(aspect_N)) // window))


def _largest(
    heights_N: np.ndarray, widths_N: np.ndarray, order_SG: np.ndarray, image_size_S: np.ndarray, mode: str
) -> np.ndarray:
    """int32 (S, 2): height and width that hold all images of a global batch, a part of the steps at a time: all at
    once would take a gigabyte for 10 million images.
    """
    largest_S2 = np.empty((len(order_SG), 2), np.int32)
    for start in range(0, len(order_SG), STEPS_AT_ONCE):
        steps = slice(start, start + STEPS_AT_ONCE)
        rows = order_SG[steps]
        size_SG2 = resized(heights_N[rows], widths_N[rows], image_size_S[steps, None], mode)
        largest_S2[steps] = size_SG2.max(axis=1)
    return largest_S2


def steps_per_epoch(images: int, global_batch_size: int, last_batch: str) -> int:
    """Steps of every epoch that has so many images, known before any is planned."""
    whole = images // global_batch_size
    return max(whole, 1) if last_batch == "drop" or not images % global_batch_size else whole + 1


def plan_evaluation(
    heights_N: np.ndarray,
    widths_N: np.ndarray,
    rows_N: np.ndarray,
    config: DatasetConfig,
    *,
    batch_size: int,
    divisor: int,
    rank: int,
    world: int,
    epoch: int = 0,
) -> Assignment:
    """Rank `rank`'s share of an evaluation in which every image appears exactly once over all ranks.

    An image's canvas depends on the image alone, and only equal canvases share a batch, so batch-mates cannot change
    a prediction. Batches go round the ranks in turn; ranks may have different numbers of them.
    """
    canvas_N2 = round_up(resized(heights_N, widths_N, config.image_size, config.resize), divisor)
    order = np.lexsort((np.arange(len(rows_N)), canvas_N2[:, 1], canvas_N2[:, 0]))
    new_canvas = np.any(np.diff(canvas_N2[order], axis=0, prepend=-1) != 0, axis=1)
    group_start = np.flatnonzero(new_canvas)[np.cumsum(new_canvas) - 1] if len(order) else order
    starts = np.flatnonzero((np.arange(len(order)) - group_start) % batch_size == 0)
    number = np.arange(len(starts))[rank::world]
    ends = np.append(starts[1:], len(order))
    picked = [order[starts[i] : ends[i]] for i in number]
    rows = rows_N[np.concatenate(picked)] if picked else np.empty(0, np.int64)
    return Assignment(
        keys=np.stack([np.full_like(number, epoch), number, np.zeros_like(number)], axis=1).astype(np.int32),
        canvas=canvas_N2[order[starts[number]]].astype(np.int32),
        image_size=np.full(len(number), config.image_size, np.int32),
        offsets=np.cumsum([0, *map(len, picked)]),
        rows=rows,
        occurrence=np.zeros(len(rows), np.int32),
    )
