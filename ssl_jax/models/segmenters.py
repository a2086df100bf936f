"""Heads that turn an encoder's features into class scores of every pixel."""
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ssl_jax.errors import UserError
from ssl_jax.models.heads import torch_linear
from ssl_jax.models.layers import layer_norm, unpatchify
from ssl_jax.partition import by_example, conv_general_dilated, dot_general

Size = tuple[int, int]
Shape = tuple[int, int, int]
POOLS = (1, 2, 3, 6)   # parts per side that UPerNet pools over


class LinearMap(nnx.Module):
    """Every patch token gives the scores of its own pixels.

    Args:
      patches: shape (h, w, D) of the patch tokens on their grid.
      image_size: (H, W).
    Raises:
      UserError: a grid that does not divide the image.
    """
    layers = ()

    def __init__(self, *, patches: Shape, image_size: Size, labels: int, rngs: nnx.Rngs):
        (h, w, width), (height, breadth) = patches, image_size
        if height % h or breadth % w or height // h != breadth // w:
            raise UserError(f"config.objective.head.name='linear': the encoder's grid {h} x {w} does not divide images "
                            f'of {height} x {breadth} into squares')
        self.side = height // h
        self.linear = torch_linear(width, self.side ** 2 * labels, rngs=rngs)

    def __call__(self, patches: jax.Array, layers: Sequence[jax.Array]) -> jax.Array:
        """(B, h, w, D) -> (B, H, W, labels) float32."""
        b, h, w, d = patches.shape
        return unpatchify(self.linear(patches.astype(jnp.float32).reshape(b, h * w, d)), (h, w), self.side)


class PatchMap(nnx.Module):
    """Every patch token gives one score of each label for all of its pixels.

    Trained on the label that is the most frequent in the patch, see `objectives.segment`.

    Args:
      patches, image_size: as in `LinearMap`.
    Raises:
      UserError: a grid that does not divide the image.
    """
    layers = ()

    def __init__(self, *, patches: Shape, image_size: Size, labels: int, rngs: nnx.Rngs):
        (h, w, width), (height, breadth) = patches, image_size
        if height % h or breadth % w:
            raise UserError(f"config.objective.head.name='patch': the encoder's grid {h} x {w} does not divide images "
                            f'of {height} x {breadth}')
        self.patch = height // h, breadth // w
        self.linear = torch_linear(width, labels, rngs=rngs)

    def __call__(self, patches: jax.Array, layers: Sequence[jax.Array]) -> jax.Array:
        """(B, h, w, D) -> (B, H, W, labels) float32."""
        x = self.linear(patches.astype(jnp.float32))
        return x.repeat(self.patch[0], 1).repeat(self.patch[1], 2)


class UpsampleMap(nnx.Module):
    """Convolutions that double the sides step by step up to the image's (Zheng et al. 2021, SETR, arXiv:2012.15840,
    section 3.3: progressive upsampling).

    Channels halve with every step, down to 16. Normalised over the channels of each pixel, which needs no large batch.

    Args:
      width: channels before the first step.
      patches, image_size: as in `LinearMap`.
      dtype: of the convolutions.
    """
    layers = ()

    def __init__(self, *, width: int = 256, patches: Shape, image_size: Size, labels: int, dtype: str = 'float32',
                 rngs: nnx.Rngs):
        check_width(width)
        self.image_size = image_size
        self.steps = round(math.log2(max(image_size[0] / patches[0], image_size[1] / patches[1])))
        widths = [max(width >> i, min(width, 16)) for i in range(self.steps + 1)]
        self.project = Conv(patches[2], width, 1, dtype, rngs=rngs)
        for i, (rows, columns) in enumerate(zip(widths, widths[1:])):
            setattr(self, f'step{i}', Conv(rows, columns, 3, dtype, rngs=rngs))
        self.classify = nnx.Linear(widths[-1], labels, dot_general=dot_general, rngs=rngs)

    def __call__(self, patches: jax.Array, layers: Sequence[jax.Array]) -> jax.Array:
        """(B, h, w, D) -> (B, H, W, labels) float32."""
        x = self.project(patches)
        for i in range(self.steps):
            x = getattr(self, f'step{i}')(resize(x, (2 * x.shape[1], 2 * x.shape[2])))
        return resize(self.classify(x.astype(jnp.float32)), self.image_size)


class UPerNet(nnx.Module):
    """Pyramid pooling and a feature pyramid over four of the encoder's layers (Xiao et al. 2018, arXiv:1807.10221,
    section 3.1).

    Maps of one size, as a transformer's, are brought to 4, 2, 1 and 1/2 times it (strides of 4, 8, 16 and 32 for
    patches of 16 pixels) by transposed convolutions and max-pooling, as in BEiT's code but in the head's width. Maps
    that are a pyramid already, as a residual network's, are taken as they are. Normalised as `UpsampleMap`.

    Args:
      width: channels.
      layers: four blocks or stages, counted from 0, finest first; None: at each quarter of the depth.
      maps: shapes (h, w, D) of what all blocks or stages give.
      image_size: (H, W).
      dtype: of the convolutions.
    Raises:
      UserError: a layer that is not there.
    """

    def __init__(self, *, width: int = 256, layers: tuple[int, int, int, int] | None = None, maps: Sequence[Shape],
                 image_size: Size, labels: int, dtype: str = 'float32', rngs: nnx.Rngs):
        check_width(width)
        self.image_size = image_size
        self.layers = tuple(-(-len(maps) * i // 4) - 1 for i in (1, 2, 3, 4)) if layers is None else tuple(layers)
        if any(not 0 <= i < len(maps) for i in self.layers):
            raise UserError(f'config.objective.head.layers={self.layers}: expected numbers from 0 to {len(maps) - 1}')
        used = [maps[i] for i in self.layers]
        self.flat = len({shape[:2] for shape in used}) == 1
        conv = lambda rows, side: Conv(rows, width, side, dtype, rngs=rngs)
        for i, shape in enumerate(used):
            setattr(self, f'lateral{i}', conv(shape[2], 1))
        if self.flat:
            for name in ('double0', 'double0_again', 'double1'):
                setattr(self, name, Doubling(width, dtype, rngs=rngs))
        for bins in POOLS:
            setattr(self, f'pooled{bins}', conv(width, 1))
        self.gather = conv(width * (1 + len(POOLS)), 3)
        for i in range(3):
            setattr(self, f'smooth{i}', conv(width, 3))
        self.fuse = conv(width * 4, 3)
        self.classify = nnx.Linear(width, labels, dot_general=dot_general, rngs=rngs)

    def __call__(self, patches: jax.Array, layers: Sequence[jax.Array]) -> jax.Array:
        """Four maps (B, h, w, D) in `layers` -> (B, H, W, labels) float32."""
        maps = [getattr(self, f'lateral{i}')(x) for i, x in enumerate(layers)]
        if self.flat:
            maps = [self.double0_again(self.double0(maps[0])), self.double1(maps[1]), maps[2],
                    nnx.max_pool(maps[3], (2, 2), strides=(2, 2), padding='SAME')]
        coarsest = maps[3]
        pooled = [resize(getattr(self, f'pooled{bins}')(average_pool(coarsest, bins)), coarsest.shape[1:3])
                  for bins in POOLS]
        merged = self.gather(jnp.concatenate([coarsest, *pooled], -1))
        pyramid = [merged]
        for i in (2, 1, 0):
            merged = maps[i] + resize(merged, maps[i].shape[1:3])
            pyramid.append(getattr(self, f'smooth{i}')(merged))
        x = self.fuse(jnp.concatenate([resize(x, maps[0].shape[1:3]) for x in pyramid], -1))
        return resize(self.classify(x.astype(jnp.float32)), self.image_size)


HEADS = {'linear': LinearMap, 'patch': PatchMap, 'upsample': UpsampleMap, 'upernet': UPerNet}


class Conv(nnx.Module):
    """Convolution, LayerNorm over the channels, GELU."""

    def __init__(self, rows: int, columns: int, side: int, dtype: Any, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(rows, columns, (side, side), use_bias=False, dtype=dtype,
                             conv_general_dilated=conv_general_dilated, rngs=rngs)
        self.norm = layer_norm(columns, dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(self.norm(self.conv(x)), approximate=False)


class Doubling(nnx.Module):
    """2x2 transposed convolution with stride 2, LayerNorm over the channels, GELU."""

    def __init__(self, width: int, dtype: Any, *, rngs: nnx.Rngs):
        self.conv = nnx.ConvTranspose(width, width, (2, 2), strides=(2, 2), use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(width, dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(self.norm(by_example(self.conv(by_example(x)))), approximate=False)


def resize(x: jax.Array, size: Size) -> jax.Array:
    """(B, h, w, C) to (B, *size, C), bilinear."""
    size = tuple(size)
    return x if x.shape[1:3] == size else jax.image.resize(x, (len(x), *size, x.shape[-1]), 'bilinear')


def average_pool(x: jax.Array, bins: int) -> jax.Array:
    """The means of bins x bins parts of (B, h, w, C) that overlap where they must, in the dtype of x."""
    def parts(size: int) -> jax.Array:
        weights = np.zeros((bins, size))
        for i in range(bins):
            start, stop = i * size // bins, -(-(i + 1) * size // bins)
            weights[i, start:stop] = 1 / (stop - start)
        return jnp.asarray(weights, x.dtype)
    return jnp.einsum('bhwc,ih,jw->bijc', x, parts(x.shape[1]), parts(x.shape[2]))


def check_width(width: int) -> None:
    """Raises UserError."""
    if width < 1:
        raise UserError(f'config.objective.head.width={width}: expected channels')
