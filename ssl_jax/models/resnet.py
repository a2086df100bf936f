"""Residual networks (He et al. 2016, arXiv:1512.03385) in torchvision's form and names."""
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax.errors import UserError
from ssl_jax.models.heads import BatchNorm
from ssl_jax.partition import conv_general_dilated

# Blocks per stage, and whether they are bottlenecks (He et al., table 1).
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
STAGES = ('layer1', 'layer2', 'layer3', 'layer4')


class ResNet(nnx.Module):
    """Image (B, H, W, C) -> feature maps of four stages, the last with 1/32 ('small': 1/8) of the image's sides.

    Convolutions pad symmetrically; the stride of a bottleneck is on its 3x3 convolution, as in torchvision. Batch
    normalisation keeps running statistics, see `Net`.

    Args:
      stem: 'imagenet' is a 7x7 convolution with stride 2 and 3x3 max-pooling with stride 2; 'small', for images of some
        32 pixels, a 3x3 convolution with stride 1 (Chen et al. 2020, SimCLR, arXiv:2002.05709, appendix B.9).
      width: channels of the stem; stages have 1, 2, 4 and 8 times as many, bottlenecks put out four times that.
      zero_init_residual: the last normalisation of each block starts with scale 0 (Goyal et al. 2017,
        arXiv:1706.02677, section 5.1).
      bn_groups: parts of the batch that are normalised each by itself, see `BatchNorm`.
      image_size: (H, W) for which `grid` holds; images may have any size.
      dtype: of convolutions and feature maps; parameters and normalisation are float32.
    Raises:
      UserError: a width or number of groups below 1.
    """

    def __init__(self, *, depth: Literal[18, 34, 50, 101, 152], stem: Literal['imagenet', 'small'] = 'imagenet',
                 width: int = 64, zero_init_residual: bool = True, bn_groups: int = 1, image_size: tuple[int, int],
                 channels: int, dtype: Literal['float32', 'bfloat16'] = 'float32', rngs: nnx.Rngs):
        if min(width, bn_groups) < 1:
            raise UserError(f'resnet width={width}, bn_groups={bn_groups}: expected positive numbers')
        counts, bottleneck = DEPTHS[depth]
        self.channels, self.stem, self.width = channels, stem, width * 8 * (4 if bottleneck else 1)
        side, stride = (7, 2) if stem == 'imagenet' else (3, 1)
        self.conv1 = convolution(channels, width, side, stride, dtype, rngs=rngs)
        self.bn1 = BatchNorm(width, groups=bn_groups)
        rows = width
        for i, (name, count) in enumerate(zip(STAGES, counts)):
            stage = Stage(count, rows, width * 2 ** i, 1 if i == 0 else 2, bottleneck=bottleneck,
                          zero_init=zero_init_residual, groups=bn_groups, dtype=dtype, rngs=rngs)
            setattr(self, name, stage)
            rows = stage.width
        reduction = 32 if stem == 'imagenet' else 8
        self.grid = tuple(-(-n // reduction) for n in image_size)

    @property
    def layer_count(self) -> int:
        """How many `layers` the features can be asked for."""
        return len(STAGES)

    @jax.named_scope('encoder')
    def maps(self, image: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        """The feature maps (B, h, w, D), in the compute dtype, of 'stem', 'layer1', ..., 'layer4'.

        Raises:
          UserError: an image with another number of channels.
        """
        if image.shape[-1] != self.channels:
            raise UserError(f'resnet got images with {image.shape[-1]} channels: expected channels={self.channels}')
        x = jax.nn.relu(self.bn1(self.conv1(image), train=train))
        if self.stem == 'imagenet':
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        out = {'stem': x}
        for name in STAGES:
            x = out[name] = getattr(self, name)(x, train=train)
        return out

    def features(self, image: jax.Array, *, layers: tuple[int, ...] = (), key: jax.Array | None = None,
                 train: bool = False) -> dict[str, Any]:
        """{'cls': mean (B, D), 'patches': positions row by row (B, N, D)} of the last feature map, float32.

        Args:
          layers: stages, counted from 0; with any, 'layers' are the feature maps (B, h, w, C) of each of them, in the
            compute dtype.
          key: there for encoders that draw random numbers; this one does not.
        Raises:
          UserError: there are not so many stages.
        """
        if any(not 0 <= layer < len(STAGES) for layer in layers):
            raise UserError(f'resnet layers={tuple(layers)}: expected numbers from 0 to {len(STAGES) - 1}')
        maps = self.maps(image, train=train)
        x = maps['layer4'].astype(jnp.float32)
        x = x.reshape(len(x), -1, self.width)
        out = {'cls': x.mean(1), 'patches': x}
        return out | ({'layers': tuple(maps[STAGES[layer]] for layer in layers)} if layers else {})

    def pooled(self, image: jax.Array, pool: Literal['cls', 'mean', 'all'], *, key: jax.Array | None = None,
               train: bool = False) -> jax.Array:
        """One vector per image (B, D) float32: the mean of the last feature map, whatever `pool`."""
        return self.features(image, key=key, train=train)['cls']


class Stage(nnx.Module):
    """Blocks '0', '1', ...; the first takes the stride and the change of width."""

    def __init__(self, count: int, rows: int, width: int, stride: int, *, bottleneck: bool, zero_init: bool,
                 groups: int, dtype: Any, rngs: nnx.Rngs):
        self.count = count
        for i in range(count):
            block = Block(rows, width, stride if i == 0 else 1, bottleneck=bottleneck, zero_init=zero_init,
                          groups=groups, dtype=dtype, rngs=rngs)
            setattr(self, str(i), block)
            rows = block.width
        self.width = rows

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for i in range(self.count):
            x = getattr(self, str(i))(x, train=train)
        return x


class Block(nnx.Module):
    """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1, added to the input (He et al., figure 5)."""

    def __init__(self, rows: int, width: int, stride: int, *, bottleneck: bool, zero_init: bool, groups: int,
                 dtype: Any, rngs: nnx.Rngs):
        self.width = width * 4 if bottleneck else width
        layers = ((width, 1, 1), (width, 3, stride), (self.width, 1, 1)) if bottleneck else (
            (width, 3, stride), (width, 3, 1))
        self.depth, before = len(layers), rows
        for i, (columns, side, step) in enumerate(layers, start=1):
            setattr(self, f'conv{i}', convolution(before, columns, side, step, dtype, rngs=rngs))
            setattr(self, f'bn{i}', BatchNorm(columns, scale=float(not zero_init or i < self.depth), groups=groups))
            before = columns
        same = stride == 1 and rows == self.width
        self.downsample = None if same else Projection(rows, self.width, stride, groups=groups, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shortcut = x if self.downsample is None else self.downsample(x, train=train)
        for i in range(1, self.depth + 1):
            x = getattr(self, f'bn{i}')(getattr(self, f'conv{i}')(x), train=train)
            x = jax.nn.relu(x if i < self.depth else x + shortcut)
        return x


class Projection(nnx.Module):
    """The shortcut of a block that changes shape: 1x1 convolution and normalisation (He et al., section 3.3, B)."""

    def __init__(self, rows: int, columns: int, stride: int, *, groups: int, dtype: Any, rngs: nnx.Rngs):
        self.conv = convolution(rows, columns, 1, stride, dtype, rngs=rngs)
        self.bn = BatchNorm(columns, groups=groups)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.bn(self.conv(x), train=train)


def convolution(rows: int, columns: int, side: int, stride: int, dtype: Any, *, rngs: nnx.Rngs) -> nnx.Conv:
    """Without bias, normal with variance 2 / (side^2 * columns) (He et al. 2015, arXiv:1502.01852, equation 14)."""
    pad = side // 2
    return nnx.Conv(rows, columns, (side, side), strides=stride, padding=((pad, pad), (pad, pad)), use_bias=False,
                    kernel_init=nnx.initializers.variance_scaling(2.0, 'fan_out', 'normal'), dtype=dtype,
                    conv_general_dilated=conv_general_dilated, rngs=rngs)


build = ResNet
