"""Our criteria against the library's: the same matches, losses and gradients of all that a network puts out."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ray_det.config import ModelConfig
from ray_det.models import criterion
from ray_det.models.build import build_detector
from ray_det.models.criterion import without_syncs
from ray_det.models.matching import MatchCosts, match, overlap
from ray_det.models.transformers_adapter import ExactCriterion
from tests.models.zoo import BACKBONE, CLASSES, DETR, FAMILIES, RESNET, RT_DETR, batch
