"""Pixel operations of views: blur, colour, normalisation. Pure JAX on (H, W, C) float32 of one example.

Colour operations follow torchvision: values in [0, 1], results clamped to it. With `clamp=False` brightness, contrast
and saturation are the same blends on values of any range.
"""
import jax
import jax.numpy as jnp

from ssl_jax.views.warp import Scalar, Size, resample

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def blur(image: jax.Array, sigma: Scalar | tuple[Scalar, Scalar],
         kernel: int | tuple[int, int] | None = None) -> jax.Array:
    """Gaussian blur.

    Args:
      sigma: in pixels, one or (rows, columns).
      kernel: odd width of a Gaussian taken at whole pixels, with reflected borders (torchvision); one or (rows,
        columns). None for three extended box filters of the same variance, with repeated edges (Pillow; Gwosdek et al.
        2011). They agree for large sigma; the first has hardly any effect below 0.4.
    """
    sigmas = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    kernels = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    return resample(image, *map(_blur_weights, image.shape, sigmas, kernels))


def _blur_weights(size: int, sigma: Scalar, kernel: int | None) -> jax.Array:
    if kernel is None:
        box = box_weights(size, sigma)
        return jnp.einsum('ij,jk,kl->il', box, box, box, precision=jax.lax.Precision.HIGHEST)
    i, j = jnp.arange(size)[:, None], jnp.arange(size)
    radius = min(kernel // 2, size - 1)
    gaussian = lambda d: jnp.where(jnp.abs(d) <= radius, jnp.exp(-0.5 * jnp.square(d / sigma)), 0)
    # Every pixel but the ends has a mirror image on each side.
    mirrored = jnp.where(j > 0, gaussian(i + j), 0) + jnp.where(j < size - 1, gaussian(2 * (size - 1) - j - i), 0)
    return (gaussian(i - j) + mirrored) / gaussian(jnp.arange(-radius, radius + 1)).sum()


def box_weights(size: int, sigma: Scalar) -> jax.Array:
    """The matrix (size, size) of one of three box filters that together have the variance of a Gaussian.

    The box has a fractional radius: whole pixels, and a part of one at each end (Gwosdek et al. 2011, section 3).
    """
    i, j = jnp.arange(size)[:, None], jnp.arange(size)
    variance = jnp.square(sigma) / 3
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - jnp.square(whole + 1)))
    radius = whole + part
    box = jnp.clip(radius + 1 - jnp.abs(i - j), 0, 1)
    tail = lambda offset: jnp.clip(radius + 1 - offset, 0, 2 * radius + 1)   # what lies beyond the first and last pixel
    box = jnp.where(j == 0, tail(i), jnp.where(j == size - 1, tail(size - 1 - i), box))
    return box / (2 * radius + 1)


def grey(image: jax.Array) -> jax.Array:
    """Luma of an RGB image (ITU-R BT.601), (H, W, 1)."""
    # By channel: CPUs sum along a last axis of three at a crawl.
    red, green, blue = jnp.split(image, 3, -1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def brightness(image: jax.Array, factor: Scalar, *, clamp: bool = True) -> jax.Array:
    return _blend(image, 0.0, factor, clamp)


def contrast(image: jax.Array, factor: Scalar, *, rgb: bool = False, valid: jax.Array | None = None,
             clamp: bool = True) -> jax.Array:
    """Blends with the mean over the valid pixels (H, W, 1 or C): of the luma if it is RGB, else of each channel."""
    return _blend(image, _mean(grey(image) if rgb else image, valid), factor, clamp)


def saturation(image: jax.Array, factor: Scalar, *, clamp: bool = True) -> jax.Array:
    """Blends an RGB image with its luma."""
    return _blend(image, grey(image), factor, clamp)


def hue(image: jax.Array, shift: Scalar) -> jax.Array:
    """Turns the hue of an RGB image in [0, 1] by `shift` turns (through HSV)."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    safe = jnp.where(chroma == 0, 1, chroma)
    # Not `value == red`: the compiler may compute the two differently, and an unequal last bit gave another hue.
    sector = jnp.where((red >= green) & (red >= blue), (green - blue) / safe,
                       jnp.where(green >= blue, 2 + (blue - red) / safe, 4 + (red - green) / safe))
    k = jnp.mod(jnp.asarray([5, 3, 1]) + (sector + 6 * shift)[..., None], 6)
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def jitter(image: jax.Array, order: jax.Array, factors: jax.Array, *, rgb: bool = False,
           valid: jax.Array | None = None, clamp: bool = True) -> jax.Array:
    """Brightness, contrast and, for RGB, saturation and hue in the given order.

    Args:
      order: (K,) permutation of the first K of BRIGHTNESS, CONTRAST, SATURATION, HUE.
      factors: (K,) or (K, C) by operation, not by place in the order; the last of K = 4 is the hue shift in turns.
      valid: (H, W, 1 or C) pixels that count for the mean.
    """
    count = len(order)

    def blend(x, slot, active):
        operation, luma = order[slot], grey(x) if rgb else x
        mean = _mean(luma, valid)
        other = jnp.where(operation == BRIGHTNESS, 0, jnp.where(operation == CONTRAST, mean, luma))
        return _blend(x, other, jnp.where(active, factors[operation], 1), clamp)

    if count <= HUE:
        for slot in range(count):
            image = blend(image, slot, True)
        return image
    # Under vmap every branch of a switch runs for every example. So the dear one, hue, is run once, and those before
    # and after it are masked.
    hue_slot = jnp.argmax(order == HUE)
    for slot in range(HUE):
        image = blend(image, slot, slot < hue_slot)
    shift = factors[HUE]
    image = jnp.where(shift == 0, image, hue(image, shift))
    for slot in range(1, count):
        image = blend(image, slot, slot > hue_slot)
    return image


def solarise(image: jax.Array, threshold: Scalar) -> jax.Array:
    """Inverts the values of [0, 1] that reach the threshold."""
    return jnp.where(image >= threshold, 1 - image, image)


def plane(size: Size, offset: jax.Array, down: jax.Array, right: jax.Array) -> jax.Array:
    """(h, w, C): `offset` (C,) in the middle, rising by `down` (C,) and `right` (C,) from edge to edge."""
    y, x = ((jnp.arange(n) + 0.5) / n - 0.5 for n in size)
    return offset + down * y[:, None, None] + right * x[:, None]


def rectangles(noise: jax.Array, size: Size, sides: tuple[float, float]) -> jax.Array:
    """Which pixels (h, w) of a view lie in one of N rectangles, cut off at the edges.

    Args:
      noise: (4, N) uniform in [0, 1): heights, widths, and where the centres are.
      sides: smallest and largest height and width, as shares of the view's.
    """
    def inside(n, side, centre):
        side = sides[0] + (sides[1] - sides[0]) * side
        return jnp.abs((jnp.arange(n)[:, None] + 0.5) / n - centre) < side / 2

    rows, columns = (inside(n, noise[axis], noise[2 + axis]) for axis, n in enumerate(size))
    return (rows[:, None] & columns).any(-1)


def box(place: tuple[Scalar, Scalar, Scalar, Scalar], size: Size) -> jax.Array:
    """Which pixels (h, w) of a view lie in the box (top, left, height, width)."""
    rows, columns = ((jnp.arange(n) >= start) & (jnp.arange(n) < start + side)
                     for n, start, side in zip(size, place[:2], place[2:]))
    return rows[:, None] & columns


def normalise(image: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    return (image - mean) / std


def _mean(image: jax.Array, valid: jax.Array | None) -> jax.Array:
    if valid is None:
        return image.mean((0, 1))
    valid = jnp.broadcast_to(valid.all(-1, keepdims=True) if image.shape[-1] == 1 else valid, image.shape)
    return jnp.where(valid, image, 0).sum((0, 1)) / jnp.maximum(valid.sum((0, 1)), 1)


def _blend(image: jax.Array, other: jax.Array | float, factor: Scalar, clamp: bool) -> jax.Array:
    out = factor * image + (1 - factor) * other
    return jnp.clip(out, 0, 1) if clamp else out
