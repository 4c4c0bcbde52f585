"""The sections of a configuration that say what data is trained on, and how it is drawn."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ray_det.section import PositiveInt, Section, Share
from ray_det.types import DEFAULT_LIMITS, ImageLimits

ClassName = Annotated[str, Field(min_length=1)]

SOURCES = "COCO JSON, VOC folder or list (.txt), YOLO data.yaml"
CLASSES = "names of the classes to use, after `rename`; empty: all. Images without boxes of these stay"
RENAME = 'new names of classes, {"old": "new"}; those that get one name become one class'
MaxPixels = Annotated[
    int, Field(ge=1, le=178_956_970, description="pixels of the largest image that is decoded; larger are unreadable")
]
"""Above Pillow's own guard there is no reading of anything but JPEG."""
MaxBytes = Annotated[int, Field(ge=1, description="bytes of the largest image file that is read")]


class DatasetConfig(Section):
    train: str | None = Field(default=None, description=f"data to train on: {SOURCES} or manifest")
    val: str | None = Field(default=None, description="data evaluated after every epoch, as for train")
    test: str | None = Field(default=None, description="data evaluated once, with the best checkpoint, as for train")
    images: str | None = Field(
        default=None, description="root of every `file_name` (folder or URI); default: found beside each source"
    )
    classes: tuple[str, ...] = Field(default=(), description=CLASSES)
    rename: dict[str, ClassName] = Field(default={}, description=RENAME)
    image_size: Annotated[int, Field(ge=32, le=4096)] = Field(
        default=640, description="side that images are resized to, pixels"
    )
    resize: Literal["longest", "shortest", "square"] = Field(
        default="longest", description="which side becomes image_size; square gives up the aspect ratio"
    )
    multi_scale: tuple[PositiveInt, ...] = Field(
        default=(), description="image sizes (pixels) of which each training step draws one; empty: always image_size"
    )
    padding: Literal["mean", "zero"] = Field(
        default="mean", description="what padded pixels hold: ImageNet's mean, or black"
    )
    scaled_decode: bool = Field(
        default=False,
        description="decode JPEGs at 1/2, 1/4 or 1/8 of their size where that is still as large as needed: faster, "
        "the pixels differ a little",
    )
    window: PositiveInt = Field(
        default=16,
        description="global batches per window of the plan, inside which images are sorted by aspect ratio; 1: random",
    )
    sampling: Literal["uniform", "repeat_factor", "class_balanced"] = Field(
        default="uniform",
        description="images of an epoch: every one once; those with rare classes more often, by the repeat factors of "
        "LVIS; or as many for each class",
    )
    repeat_threshold: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.001, description="share of images that have a class, below which repeat_factor repeats them"
    )
    last_batch: Literal["wrap", "drop"] = Field(
        default="wrap",
        description="an epoch's last, short global batch: filled with images from its start, or left out",
    )
    max_pixels: MaxPixels = DEFAULT_LIMITS.pixels
    max_bytes: MaxBytes = DEFAULT_LIMITS.bytes
    on_bad_image: Literal["fail", "skip"] = Field(
        default="fail",
        description="what an image does that the preflight passed and that cannot be decoded when it is loaded: end "
        "the run, or be replaced by a blank one without boxes",
    )
    max_skipped_share: Share = Field(
        default=0.01, description="share of images replaced so, of an epoch's or of all so far, above which runs end"
    )
    strict: bool = Field(
        default=False, description="refuse data in which the preflight finds any error, or an image is in two splits"
    )

    @property
    def limits(self) -> ImageLimits:
        return ImageLimits(self.max_pixels, self.max_bytes)


Factor = Annotated[float, Field(gt=0)]


class AugmentConfig(Section):
    flip: Share = Field(default=0.5, description="probability of a horizontal flip")
    scale: tuple[Factor, Factor] = Field(
        default=(0.9, 1.3), description="range of the scale jitter, x; above 1 crops, below 1 pads, the canvas stays"
    )
    min_visible: Share = Field(
        default=0.25, description="share of a box's area that a crop must leave for the box to stay"
    )
    brightness: Share = Field(default=0.2, description="largest change of brightness, share")
    contrast: Share = Field(default=0.2, description="largest change of contrast, share")
    saturation: Share = Field(default=0.2, description="largest change of saturation, share")
    mosaic: Share = Field(default=0.0, description="probability of a mosaic of four images (YOLOv4)")
    mosaic_scale: tuple[Factor, Factor] = Field(
        default=(0.5, 1.5), description="range of the scale of a mosaic's images, x their size without one"
    )
    mixup: Share = Field(default=0.0, description="probability that another image is blended in, with its boxes")
    copy_paste: Share = Field(
        default=0.0, description="probability that some boxes of another image are pasted, as rectangles: without masks"
    )
    iou_crop: Share = Field(default=0.0, description="probability of SSD's IoU crop, where there is no mosaic")
    iou_crop_scale: tuple[Factor, Annotated[float, Field(gt=0, le=1)]] = Field(
        default=(0.3, 1.0), description="range of the crop's sides, share of the image's"
    )
    iou_crop_aspect: tuple[Factor, Factor] = Field(
        default=(0.75, 1.33),
        description="range of the crop's width / height, x the canvas's: far from 1 much is padded (SSD: 0.5,2)",
    )
    close_mosaic: Annotated[int, Field(ge=0)] = Field(
        default=2, description="last epochs, in which mosaic, mixup, copy_paste and iou_crop are off"
    )

    @property
    def partners(self) -> bool:
        """Whether images may meet others on a canvas."""
        return bool(self.mosaic or self.mixup or self.copy_paste)

    def at(self, epoch: int, epochs: int) -> AugmentConfig:
        """As it is in one epoch of so many."""
        if epoch < epochs - self.close_mosaic:
            return self
        return self.model_copy(update=dict.fromkeys(("mosaic", "mixup", "copy_paste", "iou_crop"), 0.0))

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        for name in ("scale", "mosaic_scale", "iou_crop_scale", "iou_crop_aspect"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: {low} > {high}")
        return self
