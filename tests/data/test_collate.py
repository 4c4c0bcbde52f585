"""Micro-batches: planned canvas, mean padding, the same whoever loads them, unharmed by Arrow."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_det.config import AugmentConfig, DatasetConfig
from ray_det.data.augment import shrink_of, whole
from ray_det.data.collate import Shard, from_table, load, pad_to_canvas, to_table
from ray_det.data.decode import decode, decode_for
from ray_det.data.image import MEAN_PIXEL, LoadSpec
from ray_det.data.plan import plan_epoch, plan_evaluation
from ray_det.data.prepare import prepare
from ray_det.types import UserError

TRAIN = LoadSpec("longest", "mean", seed=5, augment=AugmentConfig())
EVAL = replace(TRAIN, augment=None)
CONFIG = DatasetConfig(image_size=128)


@pytest.fixture(scope="module")
def manifest(small_coco, tmp_path_factory):
    return prepare(str(small_coco["train"]), None, tmp_path_factory.mktemp("cache"))[0]


def plan_of(manifest, epoch=0):
    rows = manifest.trainable_rows()
    return plan_epoch(
        manifest.table["height"].to_numpy()[rows],
        manifest.table["width"].to_numpy()[rows],
        rows,
        CONFIG,
        micro_batches=2,
        micro_batch_size=3,
        divisor=32,
        seed=5,
        epoch=epoch,
    )


def same(a, b):
    arrays = ("pixels_BHW3", "sizes_B2", "orig_sizes_B2", "image_ids_B")
    assert (a.epoch, a.step, a.index, a.skipped_B) == (b.epoch, b.step, b.index, b.skipped_B)
    assert all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)
    assert all(np.array_equal(x, y) for x, y in zip(a.boxes_N4, b.boxes_N4, strict=True))
    assert all(np.array_equal(x, y) for x, y in zip(a.labels_N, b.labels_N, strict=True))


def test_images_lie_top_left_on_the_planned_canvas_filled_with_the_mean(manifest):
    plan = plan_of(manifest)
    for batch in load(Shard(manifest, plan.assign(0, 1), TRAIN)):
        assert batch.pixels_BHW3.shape[1:3] == tuple(plan.canvas_S2[batch.step])
        for pixels, (h, w), boxes in zip(batch.pixels_BHW3, batch.sizes_B2, batch.boxes_N4, strict=True):
            assert (pixels[h:] == MEAN_PIXEL).all() and (pixels[:h, w:] == MEAN_PIXEL).all()
            assert (boxes >= 0).all() and (boxes <= [w, h, w, h]).all()
            assert ((boxes[:, 2:] - boxes[:, :2]) > 0).all()


def test_zero_padding_is_black(manifest):
    padded = []
    for batch in load(Shard(manifest, plan_of(manifest).assign(0, 1), replace(EVAL, padding="zero"))):
        for pixels, (h, w) in zip(batch.pixels_BHW3, batch.sizes_B2, strict=True):
            padded += [pixels[h:].ravel(), pixels[:h, w:].ravel()]
    assert np.concatenate(padded).size > 1000 and not np.concatenate(padded).any()


def test_a_micro_batch_is_the_same_at_any_world_size_and_start(manifest):
    plan = plan_of(manifest)
    alone = {(b.step, b.index): b for b in load(Shard(manifest, plan.assign(0, 1), TRAIN))}
    for rank in range(2):
        for batch in load(Shard(manifest, plan.assign(rank, 2, start_step=1), TRAIN)):
            same(batch, alone.pop((batch.step, batch.index)))
    assert sorted(alone) == [(0, 0), (0, 1)]


def test_augmentation_changes_with_the_epoch_not_with_the_call(manifest):
    first, again = (load(Shard(manifest, plan_of(manifest).assign(0, 1), TRAIN), 0, 1)[0] for _ in range(2))
    same(first, again)
    plan = plan_of(manifest)
    later = replace(plan, epoch=1).assign(0, 1)
    assert not np.array_equal(first.pixels_BHW3, load(Shard(manifest, later, TRAIN), 0, 1)[0].pixels_BHW3)


def test_evaluation_shows_the_whole_image_and_its_boxes(manifest):
    table = manifest.table
    rows = np.flatnonzero(table["readable"].to_numpy())
    h, w = table["height"].to_numpy()[rows], table["width"].to_numpy()[rows]
    plan = plan_evaluation(h, w, rows, CONFIG, batch_size=4, divisor=32, rank=0, world=1)
    for batch in load(Shard(manifest, plan, EVAL)):
        for i, image_id in enumerate(batch.image_ids_B):
            record = table.slice(table["image_id"].to_pylist().index(image_id), 1).to_pylist()[0]
            assert tuple(batch.orig_sizes_B2[i]) == (record["height"], record["width"])
            assert batch.sizes_B2[i].max() == 128
            wanted = np.array(record["boxes"]).reshape(-1, 4)[np.array(record["box_ok"], bool)]
            scale = batch.sizes_B2[i][::-1] / np.array([record["width"], record["height"]])
            assert np.allclose(batch.boxes_N4[i][:, :2], wanted[:, :2] * scale, atol=1e-3)
            assert np.allclose(batch.boxes_N4[i][:, 2:], (wanted[:, :2] + wanted[:, 2:]) * scale, atol=1e-3)


def test_arrow_gives_back_what_it_got(manifest):
    batches = load(Shard(manifest, plan_of(manifest).assign(0, 1), TRAIN))
    table = to_table(batches)
    pixels = table["pixels"].chunk(0).buffers()[2]
    assert pixels.address == batches[0].pixels_BHW3.__array_interface__["data"][0], "pixels were copied"
    for batch, back in zip(batches, from_table(table), strict=True):
        same(batch, back)
    for batch, back in zip(batches[1:], from_table(to_table(batches[1:])), strict=True):
        same(batch, back)


def test_a_changed_image_is_an_error_that_names_it(manifest, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"not an image")
    with pytest.raises(UserError, match="cannot decode image .*x.png"):
        decode(path.read_bytes(), str(path))
    grown = manifest.table.set_column(
        manifest.table.schema.get_field_index("height"),
        manifest.table.schema.field("height"),
        [manifest.table["height"].to_numpy() + 1],
    )
    with pytest.raises(UserError, match="prepare it again"):
        load(Shard(replace(manifest, table=grown), plan_of(manifest).assign(0, 1), TRAIN), 0, 1)


@pytest.fixture
def broken(manifest, tmp_path):
    """The manifest with its images in a folder where one of the first batch is no image any more; -> (it, its row)."""
    shutil.copytree(manifest.root, tmp_path / "images")
    rows = plan_of(manifest).assign(0, 1).rows
    row = int(next(r for r in rows[:3] if np.sum(rows == r) == 1))  # the last batch is filled up with others again
    (tmp_path / "images" / manifest.table["uri"][row].as_py()).write_bytes(b"not an image")
    return replace(manifest, root=str(tmp_path / "images")), row


@pytest.mark.parametrize("spec", [TRAIN, replace(EVAL, padding="zero")])
def test_a_skipped_image_is_blank_and_nothing_else_changes(manifest, broken, spec):
    """Nothing of its batch-mates, of the canvas, or of what comes through Arrow."""
    work = plan_of(manifest).assign(0, 1)
    with pytest.raises(UserError, match=r"^image \d+: cannot decode image .*/images/train_.*: "):
        load(Shard(broken[0], work, spec))
    before = load(Shard(manifest, work, spec))
    after = load(Shard(broken[0], work, replace(spec, skip_bad=True)))
    for a, b in zip(before[1:], after[1:], strict=True):
        same(a, b)
    a, b = before[0], after[0]
    i = next(i for i, why in enumerate(b.skipped_B) if why)
    assert b.skipped_B[i].startswith(f"image {b.image_ids_B[i]}: cannot decode") and b.skipped_B.count("") == 2
    assert (b.pixels_BHW3[i] == (MEAN_PIXEL if spec.padding == "mean" else 0)).all()
    assert b.boxes_N4[i].shape == (0, 4) and b.labels_N[i].shape == (0,)
    assert b.sizes_B2[i].max() == 128
    for name in ("orig_sizes_B2", "image_ids_B"):
        assert np.array_equal(getattr(a, name), getattr(b, name))
    for j in {0, 1, 2} - {i}:
        for name in ("pixels_BHW3", "sizes_B2", "boxes_N4", "labels_N"):
            assert np.array_equal(getattr(a, name)[j], getattr(b, name)[j])
    for batch, back in zip(after, from_table(to_table(after)), strict=True):
        same(batch, back)


def test_an_image_of_another_size_is_skipped_too(manifest, broken):
    moved, row = broken
    Image.new("RGB", (9, 9)).save(path := moved.uri(row))
    batch = load(Shard(moved, plan_of(manifest).assign(0, 1), replace(TRAIN, skip_bad=True)), 0, 1)[0]
    assert f"{path} is (9, 9) (h, w), the manifest says" in "".join(batch.skipped_B)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_link_out_of_the_root_is_never_followed(manifest, broken, tmp_path, skip_bad):
    """Also where the manifest was given, so that no preflight saw it."""
    moved, row = broken
    path = Path(moved.uri(row))
    path.rename(tmp_path / "secret.jpg")
    path.symlink_to("../secret.jpg")
    with pytest.raises(
        UserError, match=rf"{path.name} is refused: it is a symbolic link that leaves {tmp_path}/images"
    ):
        load(Shard(moved, plan_of(manifest).assign(0, 1), replace(TRAIN, skip_bad=skip_bad)))


@pytest.fixture
def photos(tmp_path):
    """Large, smooth JPEGs with one bright rectangle each, which is their box."""
    images, annotations = [], []
    for i, (height, width) in enumerate([(481, 639), (640, 400), (1000, 700), (333, 1281)]):
        x, y, w, h = width // 5, height // 4, width // 2, height // 3
        picture = np.full((height, width, 3), 40, np.uint8)
        picture[y : y + h, x : x + w] = 220
        Image.fromarray(picture).save(tmp_path / f"{i}.jpg", quality=95)
        images.append({"id": i + 1, "file_name": f"{i}.jpg", "height": height, "width": width})
        annotations.append({"id": i + 1, "image_id": i + 1, "category_id": 1, "bbox": [x, y, w, h], "area": w * h})
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}
    (tmp_path / "photos.json").write_text(json.dumps(document))
    return prepare(str(tmp_path / "photos.json"), str(tmp_path), tmp_path / "cache")[0]


@pytest.mark.parametrize("spec", [EVAL, replace(TRAIN, augment=AugmentConfig(brightness=0, contrast=0, saturation=0))])
def test_scaled_decoding_shows_the_same_picture_and_boxes_where_they_are(photos, spec):
    """On the same canvas, with the same random numbers; the box is found again by its pixels."""
    work = Shard(photos, plan_of(photos).assign(0, 1), spec)
    plain, scaled = load(work), load(replace(work, spec=replace(spec, scaled_decode=True)))
    differ = 0
    for a, b in zip(plain, scaled, strict=True):
        assert np.array_equal(a.sizes_B2, b.sizes_B2) and np.array_equal(a.image_ids_B, b.image_ids_B)
        for old, new, boxes_a, boxes_b in zip(a.pixels_BHW3, b.pixels_BHW3, a.boxes_N4, b.boxes_N4, strict=True):
            differ += not np.array_equal(old, new)
            assert np.abs(old.astype(int) - new).mean() < 4
            assert np.abs(boxes_a - boxes_b).max() < 1
            ys, xs = np.nonzero(new[..., 0] > 170)  # the mean colour, which pads, is darker
            found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert np.abs(found - boxes_b[0]).max() <= 1.5
    assert differ


def test_scaled_decoding_does_not_hide_another_size(photos):
    """Half of 1281 is half of 1282, rounded up."""
    index = photos.table.schema.get_field_index("width")
    widths = photos.table["width"].to_numpy() + (photos.table["width"].to_numpy() == 1281)
    wrong = replace(photos, table=photos.table.set_column(index, photos.table.schema.field("width"), [widths]))
    with pytest.raises(UserError, match=r"is \(333, 1281\) \(h, w\), the manifest says \(333, 1282\)"):
        load(Shard(wrong, plan_of(photos).assign(0, 1), replace(EVAL, scaled_decode=True)))


def test_prediction_from_a_file_sees_what_evaluation_sees(photos):
    table = photos.table
    sizes = table["height"].to_numpy(), table["width"].to_numpy()
    plan = plan_evaluation(*sizes, np.arange(4), CONFIG, batch_size=1, divisor=32, rank=0, world=1)
    for batch in load(Shard(photos, plan, replace(EVAL, scaled_decode=True))):
        row = table["image_id"].to_pylist().index(int(batch.image_ids_B[0]))
        fit = (int(batch.sizes_B2[0, 0]), int(batch.sizes_B2[0, 1]))
        data = photos.place(row).read()
        pixels, size = decode_for(data, "x", lambda size, fit=fit: shrink_of(whole(size, fit)))
        assert size == tuple(batch.orig_sizes_B2[0]) and pixels.shape[0] < size[0]
        canvas = np.empty_like(batch.pixels_BHW3[0])
        pad_to_canvas(pixels, size, fit, "mean", canvas)
        assert np.array_equal(canvas, batch.pixels_BHW3[0])
