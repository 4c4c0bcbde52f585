"""3x3 convolutions on CPUs by Winograd's algorithm F(4x4, 3x3) (arXiv:1509.09308).

A tile of 4x4 answers takes 36 products in place of 144, as matrix products over the channels; the gradients of input
and weights likewise. The values are a direct convolution's up to rounding, which with these points of interpolation
(arXiv:1803.10986) is of about the same size: 3e-6 of the largest value. PyTorch's own CPU kernels lack the algorithm.

Shape legend: B images, H W pixels, C channels, I O channels in and out, T tiles of all images, P = 36 points of a
tile: 6x6 pixels of the input make 4x4 of the output.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

OUT, KERNEL = 4, 3
IN = OUT + KERNEL - 1
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)
MIN_CHANNELS = 96 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 64
MIN_TILES = 64
"""With less, transforming the tiles costs about what it saves (two cores with AVX2, or AVX-512)."""


def use_winograd(network: nn.Module) -> None:
    """Let the 3x3 convolutions of a network take the faster way where there is one. Weights and their names stay."""
    for module in network.modules():
        if type(module) is nn.Conv2d and suits(module):
            module.__class__ = WinogradConv2d


def suits(layer: nn.Conv2d) -> bool:
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    narrow = min(layer.in_channels, layer.out_channels)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros") and narrow >= MIN_CHANNELS


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution with stride 1 and a padding of 1; float32 on CPUs goes the faster way in eager mode."""

    def forward(self, input: Tensor) -> Tensor:
        if not self._faster(input):
            return super().forward(input)
        out = _Winograd.apply(input.permute(0, 2, 3, 1), self.weight).permute(0, 3, 1, 2)
        return out if self.bias is None else out + self.bias[:, None, None]

    def _faster(self, input: Tensor) -> bool:
        plain = input.device.type == "cpu" and input.dtype == self.weight.dtype == torch.float32
        if not plain or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        rows, columns = _grid(*input.shape[2:])
        return len(input) * rows * columns >= MIN_TILES


class _Winograd(torch.autograd.Function):
    """Three linear maps around the products; backward goes through their transposes."""

    @staticmethod
    def forward(ctx: Any, x_BHWI: Tensor, weight_OI33: Tensor) -> Tensor:
        points_TPI = _of_each(TO_POINTS, _tiles(x_BHWI, IN, 1))
        kernels_PIO = _kernels(weight_OI33)
        ctx.save_for_backward(points_TPI, kernels_PIO)
        ctx.shape = x_BHWI.shape
        return _side_by_side(_of_each(FROM_POINTS, _products(points_TPI, kernels_PIO)), x_BHWI.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHWO: Tensor) -> tuple[Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        points_TPI, kernels_PIO = ctx.saved_tensors
        grad_TPO = _of_each(FROM_POINTS.T, _tiles(grad_BHWO, OUT, 0))
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _added_up(_of_each(TO_POINTS.T, _products(grad_TPO, kernels_PIO.transpose(1, 2))), ctx.shape)
        if ctx.needs_input_grad[1]:
            kernels_grad = torch.bmm(points_TPI.permute(1, 2, 0), grad_TPO.transpose(0, 1))
            weight_grad = (KERNEL_TO_POINTS.T @ kernels_grad.flatten(1)).view(3, 3, *kernels_grad.shape[1:])
            weight_grad = weight_grad.permute(3, 2, 0, 1)
        return x_grad, weight_grad


def _of_each(matrix: Tensor, tiles: Tensor) -> Tensor:
    """A linear map of every tile's pixels or points: (N, K), (T, K, C) -> (T, N, C).

    Tile by tile, and not of all at once as (K, T * C), whose rows often lie a multiple of 4096 bytes apart and push
    each other out of the cache.
    """
    return torch.bmm(matrix.expand(len(tiles), *matrix.shape), tiles)


def _products(points_TPI: Tensor, kernels_PIO: Tensor) -> Tensor:
    """Of every point the product over the channels: (T, P, O)."""
    out = points_TPI.new_empty(*points_TPI.shape[:2], kernels_PIO.shape[2])
    torch.bmm(points_TPI.transpose(0, 1), kernels_PIO, out=out.transpose(0, 1))
    return out


def _kernels(weight_OI33: Tensor) -> Tensor:
    """The kernels, transformed: (P, I, O)."""
    outputs, inputs = weight_OI33.shape[:2]
    return (KERNEL_TO_POINTS @ weight_OI33.permute(2, 3, 1, 0).reshape(KERNEL**2, -1)).view(-1, inputs, outputs)


def _grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tiles."""
    return -(-height // OUT), -(-width // OUT)


def _tiles(x_BHWC: Tensor, side: int, before: int) -> Tensor:
    """(T, side * side, C): tiles of side x side pixels, one every 4, the first of them `before` outside the image."""
    batch, height, width, channels = x_BHWC.shape
    rows, columns = _grid(height, width)
    right, below = (tiles * OUT - size + side - OUT - before for tiles, size in ((columns, width), (rows, height)))
    padded = pad(x_BHWC, (0, 0, before, right, before, below))
    image, row, pixel, channel = padded.stride()
    shape = (batch, rows, columns, side, side, channels)
    tiles = padded.as_strided(shape, (image, row * OUT, pixel * OUT, row, pixel, channel))
    return tiles.reshape(-1, side * side, channels)


def _side_by_side(tiles: Tensor, shape: torch.Size) -> Tensor:
    """Tiles of 4x4 answers, (T, 16, O), where they lie in the image: (B, H, W, O), of `shape` but for O."""
    batch, height, width, _ = shape
    rows, columns = _grid(height, width)
    tiles = tiles.view(batch, rows, columns, OUT, OUT, -1).transpose(2, 3)
    return tiles.reshape(batch, rows * OUT, columns * OUT, -1)[:, :height, :width].contiguous()


def _added_up(tiles: Tensor, shape: torch.Size) -> Tensor:
    """The sum of the overlapping tiles of 6x6 pixels, (T, 36, C), where they lie in the image: `shape`."""
    batch, height, width, channels = shape
    rows, columns = _grid(height, width)
    tiles = tiles.view(batch, rows, columns, IN, IN, channels)
    image = tiles.new_zeros(batch, rows + 1, OUT, columns + 1, OUT, channels)
    cells = image.transpose(2, 3)  # of 4x4 pixels; a tile also reaches into the next ones
    over = IN - OUT
    cells[:, :-1, :-1] = tiles[:, :, :, :OUT, :OUT]
    cells[:, 1:, :-1, :over] += tiles[:, :, :, OUT:, :OUT]
    cells[:, :-1, 1:, :, :over] += tiles[:, :, :, :OUT, OUT:]
    cells[:, 1:, 1:, :over, :over] += tiles[:, :, :, OUT:, OUT:]
    image = image.view(batch, (rows + 1) * OUT, (columns + 1) * OUT, channels)
    return image[:, 1 : height + 1, 1 : width + 1].contiguous()


def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """(P, 36), (P, 9), (16, P): pixels and kernel to points, points to answers, of Toom's and Cook's construction.

    Polynomials are multiplied by their values at the points and at infinity; a correlation is that, transposed.
    """
    points = np.array(POINTS)
    scale = np.array([1 / np.prod([p - q for q in points if q != p]) for p in points] + [1.0])[:, None]

    def values(count: int) -> np.ndarray:
        return np.vstack([points[:, None] ** np.arange(count), np.arange(count) == count - 1])

    one_dimension = np.linalg.inv(values(IN)).T / scale, values(KERNEL) * scale, values(OUT).T
    pixels, kernel, answers = (torch.tensor(np.kron(m, m), dtype=torch.float32) for m in one_dimension)
    return pixels, kernel, answers


TO_POINTS, KERNEL_TO_POINTS, FROM_POINTS = _transforms()
