"""One example's bytes to arrays of a fixed size: PNG and JPEG decoding, packed validity, and the canvas.

The canvas is the fixed (height, width) that batches need. An image of another size is brought to it without changing
its aspect ratio: rescaled so that it covers the canvas and cut to it, or, where it may not be rescaled, cut where it is
larger and padded with invalid pixels where it is smaller. Always centred: random cropping is the view's.
"""
import functools
import io
from collections.abc import Sequence
from typing import Literal

import numpy as np

Fit = Literal['resize', 'cover', 'crop']
Size = tuple[int, int]


def decode_image(data: bytes, channels: int) -> np.ndarray:
    """Decodes a PNG or JPEG to (H, W, channels), uint8 or, from a 16-bit PNG, uint16.

    8-bit grey, colour, palette and CMYK are converted to what `channels` asks for (1 grey, 3 RGB, 4 RGBA). EXIF
    orientation is not applied, as in the usual loaders of ImageNet.

    Raises:
      ValueError: not an image, a damaged one, or one that cannot give this many channels.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.format == 'PNG' and data[24] == 16:  # IHDR: bit depth, then colour type
                return _png16(data, picture, channels)
            mode = {1: 'L', 3: 'RGB', 4: 'RGBA'}.get(channels)
            if mode is None:
                raise ValueError(f'{picture.format} of mode {picture.mode} where {channels} channels are expected')
            array = np.asarray(picture if picture.mode == mode else picture.convert(mode))
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:  # Pillow's words for a damaged file
        raise ValueError(f'{len(data)} bytes are not a readable image ({e})') from e
    return array.reshape(*array.shape[:2], channels)


def _png16(data: bytes, picture, channels: int) -> np.ndarray:
    from PIL import Image

    found = {0: 1, 2: 3, 4: 2, 6: 4}[data[25]]
    if found != channels or found == 2:
        raise ValueError(f'a 16-bit PNG of {found} channels where {channels} are expected')
    if found == 1:
        return np.asarray(picture, np.uint16)[..., None]
    # Pillow has no 16-bit colour mode: it silently keeps one byte of every sample. Reading the big-endian samples
    # once as big- and once as little-endian gives both bytes.
    halves = []
    for order in 'BL':
        with Image.open(io.BytesIO(data)) as half:
            half.tile = [tile._replace(args=f'{half.mode};16{order}') for tile in half.tile]
            halves.append(np.asarray(half, np.uint16))
    return halves[0] << 8 | halves[1]


def decode_label_map(data: bytes) -> np.ndarray:
    """Decodes a PNG of labels to (H, W), uint8 or uint16: grey values as they are written, or indices of a palette.

    Raises:
      ValueError: not an image, a damaged one, or one of several channels.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode not in ('1', 'L', 'P', 'I;16'):
                raise ValueError(f'a label map of mode {picture.mode}: expected one channel, or a palette')
            array = np.asarray(picture)
            if picture.format == 'PNG' and picture.mode == 'L' and data[24] < 8:    # Pillow spreads 2 and 4 bits to 8
                array = array // (255 // (2 ** data[24] - 1))
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f'{len(data)} bytes are not a readable image ({e})') from e
    return array.astype(np.uint16 if array.dtype.itemsize == 2 else np.uint8)


def unpack_valid(packed: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """np.packbits of a flattened (H, W, V) mask back to bool (H, W, V).

    Raises:
      ValueError: the number of bytes does not fit the shape.
    """
    count = int(np.prod(shape))
    if packed.size != (count + 7) // 8:
        raise ValueError(f'validity mask of {packed.size} bytes where {shape} needs {(count + 7) // 8}')
    return np.unpackbits(packed, count=count).reshape(shape).view(bool)


def rescale(size: Size, canvas: Size, fit: Fit) -> float:
    """The factor by which an image of `size` is rescaled to be put on the canvas; 1 = pixels stay as they are.

    'resize': reduced as far as it still covers the canvas, never enlarged. 'cover': reduced or enlarged until it just
    covers the canvas. 'crop': never rescaled, for images whose scale carries meaning (metres per pixel).
    """
    cover = max(canvas[0] / size[0], canvas[1] / size[1])
    return {'resize': min(1.0, cover), 'cover': cover, 'crop': 1.0}[fit]


def needs_padding(size: Size, canvas: Size, fit: Fit) -> bool:
    """Whether an image of `size` leaves a part of the canvas uncovered, which `valid` must then mark."""
    return rescale(size, canvas, fit) == 1 and (size[0] < canvas[0] or size[1] < canvas[1])


def to_canvas(image: np.ndarray, valid: np.ndarray | None, label_map: np.ndarray | None, *, canvas: Size, fit: Fit,
              periods: Sequence[float | None]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Brings an example to the canvas; see `rescale` for `fit`.

    Resampling is bilinear with antialiasing (a triangle filter as wide as the reduction). Only valid pixels enter the
    average. Phase channels are averaged as unit vectors, so a wrap does not become a ramp; they come back in
    [-period / 2, period / 2) where the dtype has a sign, in [0, period) where it has none. `valid` and `label_map` take
    the nearest pixel. Padding is 0 and invalid.

    Args:
      image: (H, W, C).
      valid: (H, W, V) bool with V in {1, C}, or None = all valid.
      label_map: (H, W) or None.
      periods: per channel the value per cycle of a phase, None for a linear channel.
    Returns:
      The same three at canvas size, dtypes kept. `valid` is (h, w, 1) where it was None and the image needed padding.
    """
    size = image.shape[:2]
    if size == canvas:
        return image, valid, label_map
    scale = rescale(size, canvas, fit)
    if scale != 1:
        spans = tuple(_span(n, out / scale) for n, out in zip(size, canvas))
        nearest = np.ix_(*(_nearest(*span, out) for span, out in zip(spans, canvas)))
        if valid is None and image.dtype == np.uint8 and image.shape[2] in (1, 3) and not any(periods):
            image = _resample_pillow(image, canvas, spans)
        else:
            image = _resample(image, valid, canvas, spans, periods)
        return (image, valid if valid is None else valid[nearest],
                label_map if label_map is None else label_map[nearest])
    if valid is None and needs_padding(size, canvas, fit):
        valid = np.ones((*size, 1), bool)
    return tuple(x if x is None else _crop_or_pad(x, canvas) for x in (image, valid, label_map))


def _span(size: int, length: float) -> tuple[float, float]:
    """The centred interval of this length in [0, size], robust to rounding."""
    start = max(0.0, (size - length) / 2)
    return start, size - start


def _nearest(start: float, stop: float, out: int) -> np.ndarray:
    return np.floor(start + (np.arange(out) + 0.5) * ((stop - start) / out)).astype(int)


def _resample_pillow(image: np.ndarray, canvas: Size, spans) -> np.ndarray:
    from PIL import Image

    (top, bottom), (left, right) = spans
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    picture = picture.resize(canvas[::-1], Image.Resampling.BILINEAR, box=(left, top, right, bottom))
    return np.asarray(picture).reshape(*canvas, image.shape[2])


@functools.lru_cache(64)
def _taps(size: int, span: tuple[float, float], out: int) -> tuple[np.ndarray, np.ndarray]:
    """Which input samples (out, n) enter each output sample, and the weights of a triangle filter (out, n)."""
    step = (span[1] - span[0]) / out
    reach = max(step, 1)
    centre = (span[0] + (np.arange(out) + 0.5) * step)[:, None]
    index = np.floor(centre - reach).astype(int) + np.arange(int(2 * reach) + 2)
    weight = np.maximum(0, 1 - np.abs(index + 0.5 - centre) / reach) * ((index >= 0) & (index < size))
    return np.clip(index, 0, size - 1), weight / weight.sum(1, keepdims=True)


def _average(x: np.ndarray, taps) -> np.ndarray:
    """Weighted averages along both axes of (H, W, C). Not a matrix product: BLAS starts threads of its own."""
    for axis, (index, weight) in enumerate(taps):
        weight = weight.astype(x.dtype).reshape(weight.shape[0], -1, *[1] * (2 - axis))
        x = sum(weight[:, k] * np.take(x, index[:, k], axis) for k in range(index.shape[1]))
    return x


def _resample(image: np.ndarray, valid: np.ndarray | None, canvas: Size, spans, periods) -> np.ndarray:
    dtype = image.dtype
    compute = np.result_type(dtype, np.float32)  # float64 for int32, which float32 cannot hold
    average = functools.partial(_average, taps=[_taps(n, s, out) for n, s, out in zip(image.shape, spans, canvas)])
    x = image.astype(compute)
    wrapped = [channel for channel, period in enumerate(periods) if period]
    period = np.array([periods[channel] for channel in wrapped], compute)
    angle = x[..., wrapped] * (2 * np.pi / period)
    if valid is None:
        out, cosine, sine = average(x), average(np.cos(angle)), average(np.sin(angle))
    else:
        inside = valid if valid.shape[2] == 1 else valid[..., wrapped]
        weight = average(valid.astype(compute))
        out = average(np.where(valid, x, 0)) / np.where(weight > 0, weight, 1)
        cosine, sine = (average(np.where(inside, f(angle), 0)) for f in (np.cos, np.sin))
    out[..., wrapped] = np.arctan2(sine, cosine) * (period / (2 * np.pi))
    if dtype.kind in 'iu':
        out = np.rint(out)
    low = 0 if dtype.kind == 'u' else -period / 2
    out[..., wrapped] = (out[..., wrapped] - low) % period + low  # after rounding, which can reach the far end
    return out.astype(dtype)


def _crop_or_pad(x: np.ndarray, canvas: Size) -> np.ndarray:
    if x.shape[:2] == canvas:
        return x
    out = np.zeros((*canvas, *x.shape[2:]), x.dtype)
    source, target = [], []
    for n, size in zip(x.shape[:2], canvas):
        length = min(n, size)
        source.append(slice((n - length) // 2, (n - length) // 2 + length))
        target.append(slice((size - length) // 2, (size - length) // 2 + length))
    out[tuple(target)] = x[tuple(source)]
    return out
