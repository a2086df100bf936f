"""The geometry of a view: one affine map from its pixels to source pixels, and the resampling that carries it out.

Arrays are (H, W, C) float32 of one example; vmap over the batch. Pixel i is centred on the coordinate i and covers
[i - 1/2, i + 1/2]. Crop, flips and quarter turns cost two small matrix products, which accelerators do at full speed;
a rotation by any angle and an elastic deformation are read by gathers from a frame that these products have made at
the output's resolution.
"""
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Scalar = Any   # a Python number or a traced scalar
Size = tuple[int, int]
Method = Literal['bilinear', 'bicubic']
Border = Literal['zero', 'reflect']

TAPS = {'bilinear': (0, 1), 'bicubic': (-1, 0, 1, 2)}


class Warp(NamedTuple):
    """Where a view's pixels come from: a box of the source, flipped, transposed, rotated, displaced."""
    top: Scalar                       # source pixels
    left: Scalar
    height: Scalar
    width: Scalar
    flip_rows: Scalar = False
    flip_columns: Scalar = False
    transpose: Scalar | None = None   # None: never; otherwise the view must be square
    degrees: Scalar = 0.0             # counter-clockwise about the centre
    displacement: jax.Array | None = None   # (2, h, w): so many pixels further down and right are shown

    def turned(self, turns: Scalar) -> 'Warp':
        """With `turns` (0 to 3) counter-clockwise quarter turns after the flips."""
        flip_rows = self.flip_rows ^ ((turns == 2) | (turns == 3))
        flip_columns = self.flip_columns ^ ((turns == 1) | (turns == 2))
        return self._replace(flip_rows=flip_rows, flip_columns=flip_columns, transpose=turns % 2 == 1)


def random_box(noise: jax.Array, source: Size, scale: tuple[float, float],
               ratio: tuple[float, float]) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Top, left, height and width (int32) of a random crop as in torchvision's RandomResizedCrop.

    Ten draws of area (uniform in `scale` of the source's) and width/height (log-uniform in `ratio`); the first that
    fits is placed uniformly. Where none fits, the largest central box of an allowed ratio.

    Args:
      noise: (22,) uniform in [0, 1): ten areas, ten ratios, the place.
    """
    height, width = source
    areas, aspects, place = jnp.split(noise, [10, 20])
    area = height * width * (scale[0] + (scale[1] - scale[0]) * areas)
    aspect = jnp.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * aspects)
    widths, heights = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = jnp.argmax(fits)

    fallback = height, width
    if width / height < ratio[0]:
        fallback = round(width / ratio[0]), width
    elif width / height > ratio[1]:
        fallback = height, round(height * ratio[1])
    h = jnp.where(fits[first], heights[first], fallback[0]).astype(jnp.int32)
    w = jnp.where(fits[first], widths[first], fallback[1]).astype(jnp.int32)
    room = jnp.stack([height - h, width - w])
    top, left = jnp.where(fits[first], jnp.floor(place * (room + 1)).astype(jnp.int32), room // 2)
    return top, left, h, w


def central_box(source: Size, size: Size, resize: int | None) -> tuple[float, float, float, float]:
    """Top, left, height and width of the source box that resizing and centre-cropping to `size` keeps.

    Args:
      resize: the shorter side after resizing, as in torchvision's Resize; None for the smallest that covers `size`.
    Raises:
      ValueError: the resized image is smaller than `size`.
    """
    if resize is None:
        factor = max(n / s for n, s in zip(size, source))
        resized = tuple(round(s * factor) for s in source)
    else:
        resized = tuple(int(resize * s / min(source)) for s in source)
    if any(r < n for r, n in zip(resized, size)):
        raise ValueError(f'an image of {source} resized to {resized} is smaller than {size}')
    step = tuple(s / r for s, r in zip(source, resized))
    start = tuple(round((r - n) / 2) * d for r, n, d in zip(resized, size, step))
    return start[0], start[1], size[0] * step[0], size[1] * step[1]


def kernel(distance: jax.Array, method: Method, a: float = -0.5) -> jax.Array:
    """Interpolation weight at a distance in pixels; 'bicubic' is Keys' cubic convolution (1981) with parameter `a`."""
    d = jnp.abs(distance)
    if method == 'bilinear':
        return jnp.maximum(1 - d, 0)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    return jnp.where(d < 1, near, jnp.where(d < 2, far, 0))


def axis_weights(centres: jax.Array, size: int, *, step: Scalar, low: Scalar, high: Scalar, method: Method,
                 antialias: bool) -> jax.Array:
    """The matrix that samples an axis of `size` pixels at `centres` (n,), using the pixels low <= i < high only.

    Args:
      step: source pixels per output pixel. With `antialias` the kernel is stretched by it when it exceeds 1 and
        renormalised where it is cut off (Pillow; a = -0.5); without, pixels beyond the ends repeat the last one
        (torch's interpolate; a = -0.75).
    Returns:
      (n, size) float32 with rows that sum to 1.
    """
    pixels = jnp.arange(size)
    if antialias:
        weights = kernel((centres[:, None] - pixels) / jnp.maximum(step, 1.0), method)
        weights = jnp.where((pixels >= low) & (pixels < high), weights, 0)
        total = weights.sum(1, keepdims=True)
        return weights / jnp.where(total == 0, 1, total)
    base = jnp.floor(centres).astype(jnp.int32)
    weights = jnp.zeros((len(centres), size))
    for tap in TAPS[method]:
        pixel = jnp.clip(base + tap, low, high - 1)
        weights += kernel(centres - (base + tap), method, -0.75)[:, None] * (pixel[:, None] == pixels)
    return weights


def resample(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """(H, W, C) through the weight matrices (h, H) and (w, W) to (h, w, C)."""
    # Accelerators would round the operands to bfloat16 or TF32 by default: visible banding in 16-bit and phase data.
    exact = jax.lax.Precision.HIGHEST
    # Channels in the middle: both products are then plain matrix products without a batch of narrow ones.
    x = jnp.einsum('hcw,pw->hcp', jnp.moveaxis(image, -1, 1), columns, precision=exact)
    return jnp.moveaxis(jnp.einsum('oh,hcp->ocp', rows, x, precision=exact), 1, -1)


def sample(image: jax.Array, rows: jax.Array, columns: jax.Array, method: Method) -> jax.Array:
    """(H, W, C) read at fractional coordinates (h, w) with zeros outside: (h, w, C)."""
    height, width, channels = image.shape
    flat = image.reshape(height * width, channels)
    row, column = jnp.floor(rows).astype(jnp.int32), jnp.floor(columns).astype(jnp.int32)
    out = jnp.zeros((*rows.shape, channels), image.dtype)
    for i in TAPS[method]:
        for j in TAPS[method]:
            r, c = row + i, column + j
            weight = kernel(rows - r, method) * kernel(columns - c, method)
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            index = jnp.clip(r, 0, height - 1) * width + jnp.clip(c, 0, width - 1)
            out += jnp.where(inside, weight, 0)[..., None] * flat[index]
    return out


def sample_nearest(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The nearest pixels' values of (H, W) of any dtype, 0 outside. See `sample`."""
    (r, c), (h, w) = ((jnp.floor(x + 0.5).astype(jnp.int32) for x in (rows, columns)), image.shape)
    inside = (r >= 0) & (r < h) & (c >= 0) & (c < w)
    return jnp.where(inside, image[jnp.clip(r, 0, h - 1), jnp.clip(c, 0, w - 1)], 0)


def spline_displacement(noise: jax.Array, size: Size, amplitude: Scalar, spacing: float) -> jax.Array:
    """The cubic B-spline (2, h, w) whose knots, `spacing` pixels apart, are uniform in [-amplitude, amplitude].

    Args:
      noise: (2, *spline_knots(size, spacing)) uniform in [0, 1).
    """
    axes = []
    for n, knots in zip(size, spline_knots(size, spacing)):
        d = np.abs(np.arange(n)[:, None] / spacing + 1 - np.arange(knots))
        axes.append(np.where(d < 1, 2 / 3 - d ** 2 + d ** 3 / 2, np.maximum(2 - d, 0) ** 3 / 6).astype(np.float32))
    return jnp.einsum('ik,akl,jl->aij', axes[0], amplitude * (2 * noise - 1), axes[1],
                      precision=jax.lax.Precision.HIGHEST)


def spline_knots(size: Size, spacing: float) -> Size:
    """How many knots a spline needs along each axis; two lie outside the view."""
    return tuple(math.floor((n - 1) / spacing) + 4 for n in size)


def rotate(image: jax.Array, degrees: Scalar, size: Size | None = None, method: Method = 'bilinear',
           displacement: jax.Array | None = None) -> jax.Array:
    """Rotates (H, W, C) counter-clockwise about its centre and keeps the middle `size`; zeros come in from outside."""
    rows, columns = _rotated(*_placed(size or image.shape[:2], displacement), degrees)
    return sample(image, rows + (image.shape[0] - 1) / 2, columns + (image.shape[1] - 1) / 2, method)


def warp(image: jax.Array, geometry: Warp, size: Size, *, method: Method = 'bicubic', antialias: bool = True,
         beyond: bool = False, reach: float = 0.0, give: float = 0.0, border: Border = 'zero') -> jax.Array:
    """Resamples (H, W, C) to (h, w, C).

    Args:
      beyond: the kernel may use pixels beyond the box, as when the image is resized first and cropped then.
      reach: the largest |degrees| that may come, known beforehand; at 0 `geometry.degrees` is not looked at. A
        rotated view shows what lies around its box.
      give: the same for the largest displacement in pixels.
      border: what lies outside the source: zeros, or its mirror image (the edge pixel not repeated).
    """
    axes = []
    gathers = bool(reach or give)
    margins = _margins(size, reach, give)
    for start, extent, flip, source, n, margin in zip(*_axes(geometry, image.shape), size, margins):
        centres = _coordinates(start, extent, flip, n, _offsets(n + 2 * margin))
        inside = (centres >= -0.5) & (centres <= source - 0.5)
        if border == 'reflect':
            centres, inside = _reflect(centres, source), True
        low, high = (0, source) if beyond or gathers else (jnp.floor(start), jnp.ceil(start + extent))
        weights = axis_weights(centres, source, step=extent / n, low=low, high=high, method=method, antialias=antialias)
        axes.append(weights * jnp.reshape(inside, (-1, 1)))
    out = resample(image, *axes)
    if geometry.transpose is not None:
        out = jnp.where(geometry.transpose, jnp.swapaxes(out, 0, 1), out)
    if not gathers:
        return out
    return rotate(out, geometry.degrees if reach else 0.0, size, method, geometry.displacement if give else None)


def warp_nearest(image: jax.Array, geometry: Warp, size: Size, *, reach: float = 0.0, give: float = 0.0,
                 border: Border = 'zero') -> jax.Array:
    """The nearest source pixel's value, for class rasters: (H, W) of any dtype to (h, w). See `warp`."""
    offsets = _placed(size, geometry.displacement if give else None)
    if reach:
        offsets = _rotated(*offsets, geometry.degrees)
    if geometry.transpose is not None:
        shape = jnp.broadcast_shapes(*(f.shape for f in offsets))
        rows, columns = (jnp.broadcast_to(f, shape) for f in offsets)
        offsets = jnp.where(geometry.transpose, columns, rows), jnp.where(geometry.transpose, rows, columns)
    index, inside = [], True
    for start, extent, flip, source, n, f in zip(*_axes(geometry, image.shape), size, offsets):
        centres = _coordinates(start, extent, flip, n, f)
        inside &= (centres >= -0.5) & (centres <= source - 0.5)
        centres = _reflect(centres, source) if border == 'reflect' else centres
        index.append(jnp.clip(jnp.floor(centres + 0.5).astype(jnp.int32), 0, source - 1))
    out = image[index[0], index[1]]
    return out if border == 'reflect' else jnp.where(inside, out, 0)


def _axes(geometry: Warp, source: tuple[int, ...]):
    starts, extents = (geometry.top, geometry.left), (geometry.height, geometry.width)
    return starts, extents, (geometry.flip_rows, geometry.flip_columns), source[:2]


def _offsets(n: int) -> jax.Array:
    """Pixel centres relative to the middle of the axis."""
    return jnp.arange(n) - (n - 1) / 2


def _placed(size: Size, displacement: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Rows and columns relative to the middle that each pixel of a view shows before it is rotated."""
    rows, columns = _offsets(size[0])[:, None], _offsets(size[1])
    return (rows, columns) if displacement is None else (rows + displacement[0], columns + displacement[1])


def _coordinates(start, extent, flip, n: int, offsets: jax.Array) -> jax.Array:
    """Source coordinates of output pixels at `offsets` from the middle of an axis of n pixels."""
    # From the middle outwards: a whole-image box gives exact integers, so that the identity map changes no bit.
    return start + (extent / 2 - 0.5) + jnp.where(flip, -1, 1) * (extent / n) * offsets


def _rotated(rows: jax.Array, columns: jax.Array, degrees: Scalar) -> tuple[jax.Array, jax.Array]:
    """Where the pixels of a picture turned counter-clockwise lay before, relative to the centre (rows point down)."""
    sin, cos = jnp.sin(jnp.deg2rad(degrees)), jnp.cos(jnp.deg2rad(degrees))
    return sin * columns + cos * rows, cos * columns - sin * rows


def _reflect(centres: jax.Array, size: int) -> jax.Array:
    last = max(size - 1, 1)
    return last - jnp.abs(jnp.mod(centres, 2 * last) - last)


def _margins(size: Size, reach: float, give: float) -> Size:
    """Pixels to add on each side so that the output, displaced and turned by that much, stays inside the frame."""
    if not (reach or give):
        return 0, 0
    margins = []
    shown = [n + 2 * give for n in size]
    for n, wide, other in zip(size, shown, shown[::-1]):
        angle = min(math.radians(reach), math.atan2(other, wide))
        extent = wide * math.cos(angle) + other * math.sin(angle)
        margins.append(math.ceil((extent - n) / 2) + 2)   # 2: the bicubic taps
    return margins[0], margins[1]
