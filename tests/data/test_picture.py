"""Composed pictures, through the loader: every box lies around its pixels, wherever these went."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_det.config import AugmentConfig, DatasetConfig, TrainJobConfig
from ray_det.data.collate import Shard, from_table, load, to_table
from ray_det.data.image import MEAN_PIXEL, LoadSpec
from ray_det.data.plan import EpochPlan, plan_epoch
from ray_det.data.prepare import prepare
from ray_det.types import MicroBatch, UserError
from tests.data.painted import classes, paint, regions
from tests.data.test_collate import same

SIZES = [(96, 128), (128, 96), (150, 200), (120, 120), (61, 130), (240, 170)] * 3
PLAIN = AugmentConfig(brightness=0, contrast=0, saturation=0, min_visible=0, close_mosaic=0)
ALL = PLAIN.model_copy(update={"mosaic": 0.5, "mixup": 0.5, "copy_paste": 0.5, "iou_crop": 0.5})


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return paint(tmp_path_factory.mktemp("painted"), SIZES)


def plan_of(manifest, epoch: int = 0, resize: str = "longest", size: int = 3) -> EpochPlan:
    config = DatasetConfig.model_validate({"image_size": 160, "resize": resize, "window": 2})
    rows = manifest.trainable_rows()
    heights, widths = (manifest.table[name].to_numpy()[rows] for name in ("height", "width"))
    shape: dict[str, Any] = {"micro_batches": 2, "micro_batch_size": size, "divisor": 32, "seed": 7, "epoch": epoch}
    return plan_epoch(heights, widths, rows, config, **shape)


def spec_of(resize: str = "longest", augment: AugmentConfig = PLAIN, **changes: Any) -> LoadSpec:
    return LoadSpec(resize, "mean", 7, augment.model_copy(update=changes))


def batches(manifest, spec: LoadSpec, epochs: int = 2) -> list[MicroBatch]:
    plans = [plan_of(manifest, epoch, spec.resize) for epoch in range(epochs)]
    return [batch for plan in plans for batch in load(Shard(manifest, plan.assign(0, 1), spec))]


def pictures(batches: list[MicroBatch]):
    """(pixels, boxes, labels) of each; it is checked that they are on the canvas as they must be."""
    for batch in batches:
        parts = (batch.pixels_BHW3, batch.sizes_B2, batch.boxes_N4, batch.labels_N)
        for pixels, (h, w), boxes, labels in zip(*parts, strict=True):
            assert (pixels[h:] == MEAN_PIXEL).all() and (pixels[:h, w:] == MEAN_PIXEL).all()
            assert boxes.dtype == np.float32 and boxes.shape == (len(labels), 4) and labels.dtype == np.int64
            assert (boxes >= 0).all() and (boxes <= [w, h, w, h]).all()
            assert ((boxes[:, 2:] - boxes[:, :2]) >= 0.1).all()
            yield pixels, boxes, labels


def thin(boxes: np.ndarray) -> int:
    return int((boxes[:, 2:] - boxes[:, :2] < 2).any(axis=1).sum())


def unmatched(pixels, boxes, labels, tolerance=1.5) -> tuple[int, int]:
    """Boxes that lie around no region of their class, and regions of 4 x 4 and more that have no box around them."""
    found = regions(classes(pixels))
    lost, hidden = 0, 0
    for label in {*labels.tolist(), *found}:
        around = found.get(label, np.empty((0, 4)))
        away = np.abs(boxes[labels == label][:, None] - around[None]).max(-1, initial=0)
        large = (around[:, 2:] - around[:, :2] >= 4).all(axis=1)
        lost += int((away.min(1, initial=1e9) > tolerance).sum())
        hidden += int(((away.min(0, initial=1e9) > tolerance) & large).sum())
    return lost, hidden


@pytest.mark.parametrize("resize", ["longest", "square"])
def test_boxes_of_a_mosaic_are_around_their_pixels_and_none_is_missing(manifest, resize):
    boxes_seen, several = 0, 0
    for pixels, boxes, labels in pictures(batches(manifest, spec_of(resize, mosaic=1))):
        assert not thin(boxes)
        if len(set(labels.tolist())) < len(labels):
            continue  # an image is in it twice, and its boxes may touch
        large = (boxes[:, 2:] - boxes[:, :2] >= 4).all(axis=1)  # of a thinner one perhaps no pixel is bright enough
        assert unmatched(pixels, boxes[large], labels[large])[0] == 0
        assert unmatched(pixels, boxes, labels)[1] == 0
        boxes_seen, several = boxes_seen + len(boxes), several + (len(boxes) > 2)
    assert boxes_seen > 100 and several > 20


def test_a_mosaic_fills_most_of_its_canvas(manifest):
    loaded = batches(manifest, spec_of(mosaic=1))
    shares = [batch.sizes_B2.prod(1) / np.prod(batch.pixels_BHW3.shape[1:3]) for batch in loaded]
    assert np.mean(shares) > 0.85 and np.min(shares) > 0.3


def test_boxes_of_an_iou_crop_are_around_their_pixels(manifest):
    whole, cropped = (batches(manifest, spec_of(iou_crop=p, scale=(1.0, 1.0))) for p in (0, 1))
    hidden = 0
    for pixels, boxes, labels in pictures(cropped):
        assert not thin(boxes)
        hidden += unmatched(pixels, boxes, labels)[1]
        large = (boxes[:, 2:] - boxes[:, :2] >= 4).all(axis=1)
        assert unmatched(pixels, boxes[large], labels[large])[0] == 0 and len(boxes)
    assert hidden > 3, "what has its centre outside is no target"
    areas = [[np.prod(b[:, 2:] - b[:, :2], axis=1).max() for _, b, _ in pictures(x)] for x in (whole, cropped)]
    assert 0.2 < np.mean(np.array(areas[1]) > 1.1 * np.array(areas[0])) < 1, "crops enlarge"


def test_without_a_crop_a_box_whose_centre_is_out_of_the_image_stays(manifest, tmp_path):
    """No crop is one of those that are drawn."""
    document = json.loads(Path(manifest.source).read_text())
    for annotation in document["annotations"]:
        x, y, _, h = annotation["bbox"]
        annotation["bbox"] = [-x - 60, y, 2 * x + 60, h]
    (tmp_path / "out.json").write_text(json.dumps(document))
    out, _ = prepare(str(tmp_path / "out.json"), manifest.root, tmp_path / "cache")
    plain, cropped = (
        [(boxes, labels) for _, boxes, labels in pictures(batches(out, spec_of(iou_crop=p, iou_crop_scale=(1.0, 1.0))))]
        for p in (0, 1)
    )
    assert sum(len(labels) for _, labels in plain) > 50
    for (boxes, labels), (others, same_labels) in zip(plain, cropped, strict=True):
        assert np.array_equal(labels, same_labels) and np.allclose(boxes, others, atol=1e-3)


def test_pasted_boxes_are_whole_and_those_below_are_seen(manifest):
    more = alone = 0
    plain = batches(manifest, spec_of(), epochs=4)
    composed = batches(manifest, spec_of(copy_paste=1), epochs=4)
    for (_, before, old), (pixels, boxes, labels) in zip(pictures(plain), pictures(composed), strict=True):
        assert np.array_equal(boxes[: len(before)], before) and np.array_equal(labels[: len(old)], old)
        pasted, names = boxes[len(before) :], labels[len(before) :]
        if len(pasted) == 1 and names[0] not in old:
            assert unmatched(pixels, pasted, names)[0] == 0
            alone += 1
        seen = classes(pixels)
        left = seen.copy()
        for box, label in zip(boxes, labels.tolist(), strict=True):
            (x0, y0), (x1, y1) = np.ceil(box[:2]).astype(int), np.floor(box[2:]).astype(int)
            assert min(x1 - x0, y1 - y0) < 8 or np.mean(seen[y0:y1, x0:x1] == label) > 0.6
            around = left[max(y0 - 3, 0) : y1 + 3, max(x0 - 3, 0) : x1 + 3]
            around[around == label] = -1
        large = [r for found in regions(left).values() for r in found if min(r[2:] - r[:2]) >= 4]
        assert not large, "without a box"
        more += len(pasted)
    assert more > 30 and alone > 20


def test_mixup_shows_both_images_and_all_boxes(tmp_path):
    manifest = paint(tmp_path, [(160, 160)] * 15, tallest=0.4)
    spec = spec_of(mixup=1, scale=(1.0, 1.0))
    plain = batches(manifest, spec_of(scale=(1.0, 1.0)))
    alone = 0
    for (_, before, _), (pixels, boxes, labels) in zip(pictures(plain), pictures(batches(manifest, spec)), strict=True):
        assert len(boxes) == 4 and np.array_equal(boxes[:2], before)
        found = regions(classes(pixels, brightness=35))  # near a half of 255, by half at the edge
        for i, (box, label) in enumerate(zip(boxes, labels.tolist(), strict=True)):
            others = np.delete(boxes, i, axis=0)
            apart = (others[:, :2] >= box[2:] + 2).any(1) | (others[:, 2:] <= box[:2] - 2).any(1)
            if apart.all():
                assert np.abs(found[label] - box).max(1).min() <= 1.5
                (x0, y0), (x1, y1) = np.round(box.reshape(2, 2)).astype(int)
                assert 0.25 * 255 < np.median(pixels[y0:y1, x0:x1].max(-1)) < 0.75 * 255
                alone += 1
    assert alone > 30


def test_min_visible_holds_for_mosaics(manifest):
    """With 1.0 only boxes that nothing is cut off remain, at the scale that their image has there."""
    cut, whole = (
        sum(len(b) for _, b, _ in pictures(batches(manifest, spec_of(mosaic=1, min_visible=share)))) for share in (0, 1)
    )
    assert 0 < whole < 0.8 * cut


def test_what_is_composed_depends_on_seed_epoch_and_image_alone(manifest):
    """Not on world size, start, batch-mates, or how many are loaded at once."""
    plan, spec = plan_of(manifest, epoch=3), spec_of(augment=ALL)
    alone = {(b.step, b.index): b for b in load(Shard(manifest, plan.assign(0, 1), spec))}
    for rank in range(2):
        work = Shard(manifest, plan.assign(rank, 2, start_step=1), spec)
        for i in reversed(range(len(work.assignment))):
            (batch,) = load(work, i, i + 1)
            same(batch, alone[batch.step, batch.index])
    again = load(Shard(manifest, replace(plan, epoch=4).assign(0, 1), spec))
    assert not any(np.array_equal(b.pixels_BHW3, alone[b.step, b.index].pixels_BHW3) for b in again)


@pytest.mark.parametrize("kind", ["mosaic", "mixup", "copy_paste"])
def test_a_block_in_which_no_image_meets_another_is_as_its_part_of_a_larger_one(manifest, kind):
    spec, work = spec_of(augment=PLAIN.model_copy(update={kind: 0.3})), plan_of(manifest, size=1).assign(0, 1)
    plain, composed = (load(Shard(manifest, work, one)) for one in (spec_of(), spec))
    alone = [load(Shard(manifest, work, spec), i, i + 1)[0] for i in range(len(work))]
    for one, other in zip(alone, composed, strict=True):
        same(one, other)
    met = [not np.array_equal(a.pixels_BHW3, b.pixels_BHW3) for a, b in zip(plain, alone, strict=True)]
    assert 0 < np.mean(met) < 1


def test_what_is_off_changes_nothing(manifest):
    """Images that meet no other look as they do where meeting is off."""
    plain, composed = (batches(manifest, spec) for spec in (spec_of(), spec_of(mosaic=0.3, copy_paste=0.2)))
    equal = [np.array_equal(p, q) for a, b in zip(plain, composed, strict=True)
             for p, q in zip(a.pixels_BHW3, b.pixels_BHW3, strict=True)]  # fmt: skip
    assert 0.4 < np.mean(equal) < 0.9  # 0.56, and where nothing could be pasted


def test_a_second_occurrence_is_drawn_anew_and_the_first_is_not(manifest):
    part = plan_of(manifest).assign(0, 1)
    for augment in (PLAIN, ALL):
        first, again, third = (
            load(Shard(manifest, replace(part, occurrence=np.full_like(part.occurrence, k)), spec_of(augment=augment)))
            for k in (0, 1, 2)
        )
        for a, b, c in zip(first, again, third, strict=True):
            for p, q, r in zip(a.pixels_BHW3, b.pixels_BHW3, c.pixels_BHW3, strict=True):
                assert not np.array_equal(p, q) and not np.array_equal(q, r)
    for a, b in zip(
        load(Shard(manifest, part, spec_of())), load(Shard(manifest, part, spec_of(mosaic=0))), strict=True
    ):
        same(a, b)


def test_scaled_decoding_shows_the_same_composition(tmp_path):
    from PIL import Image

    manifest = paint(tmp_path, [(481, 639), (640, 400), (700, 900), (333, 680)] * 2)
    for name in manifest.table["uri"].to_pylist():  # JPEGs, by content
        Image.open(tmp_path / "images" / name).save(tmp_path / "images" / name, format="jpeg", quality=97)
    spec = spec_of(augment=ALL, mosaic=1)
    plain, scaled = (batches(manifest, replace(spec, scaled_decode=on), epochs=1) for on in (False, True))
    differ = 0
    for a, b in zip(plain, scaled, strict=True):
        assert np.array_equal(a.sizes_B2, b.sizes_B2)
        for old, new, p, q in zip(a.pixels_BHW3, b.pixels_BHW3, a.boxes_N4, b.boxes_N4, strict=True):
            differ += not np.array_equal(old, new)
            assert np.abs(old.astype(int) - new).mean() < 6 and np.abs(p - q).max() <= 1.5
    assert differ


@pytest.fixture
def broken(tmp_path: Path):
    """-> (the manifest whole, one in which an image is none any more, that image's id)."""
    whole = paint(tmp_path / "whole", SIZES)
    spoilt = paint(tmp_path / "spoilt", SIZES)
    (tmp_path / "spoilt" / "images" / "4.png").write_bytes(b"not an image")
    return whole, spoilt, 5


@pytest.mark.parametrize("kind", ["mosaic", "mixup", "copy_paste"])
def test_a_partner_that_cannot_be_decoded_is_left_out_and_listed(broken, kind):
    whole, spoilt, bad = broken
    spec = spec_of(augment=PLAIN.model_copy(update={kind: 1}))
    with pytest.raises(UserError, match=rf"^image {bad}: cannot decode image .*4\.png"):
        batches(spoilt, spec)
    spec, listed = replace(spec, skip_bad=True), 0
    for before, after in zip(batches(whole, spec), batches(spoilt, spec), strict=True):
        if not after.skipped_B and not after.skipped_partners:
            same(before, after)
        assert all(image_id == bad and "4.png" in why for image_id, why in after.skipped_partners)
        own = [i for i, why in enumerate(after.skipped_B) if why]
        assert all(after.image_ids_B[i] == bad for i in own)
        listed += len(after.skipped_partners)
        if after.skipped_partners and not own:
            assert sum(map(len, after.labels_N)) <= sum(map(len, before.labels_N))
            if kind == "mosaic":
                assert np.array_equal(before.sizes_B2, after.sizes_B2), "its tile is blank"
        (back,) = from_table(to_table([after]))
        same(after, back)
        assert back.skipped_partners == after.skipped_partners
    list(pictures(batches(spoilt, spec)))
    assert listed >= 2


def test_the_last_epochs_are_without():
    config = ALL.model_copy(update={"close_mosaic": 2})
    assert [config.at(epoch, 5).mosaic for epoch in range(5)] == [0.5, 0.5, 0.5, 0, 0]
    closed = config.at(3, 5)
    assert not closed.partners and not closed.iou_crop and closed.flip == config.flip
    assert AugmentConfig(mixup=0.1).partners and not AugmentConfig(iou_crop=1).partners


def test_a_run_that_would_never_compose_is_refused():
    TrainJobConfig.model_validate({"augment": {"close_mosaic": 30}})
    with pytest.raises(ValueError, match=r"augment\.close_mosaic 24 leaves none of train\.epochs 24"):
        TrainJobConfig.model_validate({"augment": {"mosaic": 0.5, "close_mosaic": 24}})
    with pytest.raises(ValueError, match=r"iou_crop_aspect: 2\.0 > 1\.0"):
        AugmentConfig(iou_crop_aspect=(2, 1))
