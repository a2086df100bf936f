"""One random view of one example: what every view is built from."""
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import config
from ssl_jax.data.source import Channel
from ssl_jax.errors import UserError
from ssl_jax.views import ops
from ssl_jax.views.options import Blur, Crop, Jitter, Rotation, Solarise, check
from ssl_jax.views.phases import Phases
from ssl_jax.views.warp import Method, Warp, central_box, random_box, warp, warp_nearest

Example = Mapping[str, jax.Array]

# The single random numbers of a view: whether an operation applies, and how.
CHOICES = ('crop', 'hflip', 'vflip', 'quarter_turns', 'turns', 'rotation', 'degrees', 'jitter', 'grey', 'blur', 'sigma',
           'solarise')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """A recipe for views of one size. Without options it resizes, crops the centre and normalises.

    The order is: crop, flips, quarter turns and rotation (one warp); jitter; grey; blur; solarise; normalisation.

    *Phases* (`Channel.kind`) are interpolated and blurred as sine and cosine, so that a wrap stays sharp; colour
    operations leave them alone.

    *Invalid pixels* never contribute. An output value is the weighted mean of the valid pixels under the kernel; it is
    valid where these carry at least half of the kernel's weight (normalised convolution, Knutsson and Westin 1993).
    Invalid output is 0 after normalisation. Where colours are mixed (grey, saturation, hue), a pixel with an invalid
    channel is invalid.

    *Units*: geometry works on raw values. For colour operations unsigned integers are divided by their largest value.
    These, and float channels that the manifest knows to lie in [0, 1], are clamped to that range as in torchvision.
    Other values are not: there brightness and contrast are plain blends, hue and solarise are refused.

    Args:
      size: (height, width) of the view, an int for a square, None for the canvas.
      hflip, vflip, quarter_turns, grey: probabilities. A quarter turn is by 90, 180 or 270 degrees, drawn evenly.
      antialias: stretch the kernel when shrinking, as Pillow does; otherwise sample as torch's interpolate does.
      resize: shorter side to which the canvas is resized before the central crop; None for the smallest that covers
        `size`. For evaluation, and for training where no random crop is made.
      mean, std: per channel in raw units, in place of the manifest's.
      image_size: (height, width) of the canvas.
    Raises:
      UserError: a value out of range, or an operation that makes no sense for these channels.
    """
    size: tuple[int, int] | int | None = None
    crop: Crop | Mapping[str, Any] | None = None
    hflip: float = 0.0
    vflip: float = 0.0
    quarter_turns: float = 0.0
    rotation: Rotation | Mapping[str, Any] | None = None
    interpolation: Method = 'bicubic'
    antialias: bool = True
    jitter: Jitter | Mapping[str, Any] | None = None
    grey: float = 0.0
    blur: Blur | Mapping[str, Any] | None = None
    solarise: Solarise | Mapping[str, Any] | None = None
    resize: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int]
    channels: tuple[Channel, ...]

    def __post_init__(self):
        size = self.image_size if self.size is None else self.size
        object.__setattr__(self, 'size', (size, size) if isinstance(size, int) else tuple(size))
        for option in (Crop, Rotation, Jitter, Blur, Solarise):
            name = option.__name__.lower()
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, config.bind(option, value, where=f'view.{name}')())
        for name in ('hflip', 'vflip', 'quarter_turns', 'grey'):
            check(name, getattr(self, name))
        for name in ('mean', 'std'):
            given = getattr(self, name)
            values = tuple(getattr(c, name) for c in self.channels) if given is None else given
            if len(values) != len(self.channels):
                raise UserError(f'config.view.{name} has {len(values)} values for {len(self.channels)} channels')
            object.__setattr__(self, name, values)
        self._check()

    def _check(self):
        if min(self.size) < 1:
            raise UserError(f'config.view.size={self.size}: expected at least 1 pixel')
        try:
            central_box(self.image_size, self.size, self.resize)
        except ValueError as e:
            raise UserError(f'config.view.resize={self.resize}: {e}') from e
        if self.quarter_turns and self.size[0] != self.size[1]:
            raise UserError(f'config.view.quarter_turns={self.quarter_turns} needs a square view, not {self.size}')
        if self._mixes and not self.rgb:
            listed = ', '.join(f'{c.name} ({c.kind}, unit {c.unit!r})' for c in self.channels)
            raise UserError(f'config.view: grey, saturation and hue need three linear channels of one unit: {listed}')
        if not self.phases.linear and (self.jitter or self.solarise):
            raise UserError('config.view: jitter and solarise leave phases alone, and there are no other channels')
        for c, std in zip(self.channels, self.std):
            if not 0 < std < float('inf'):
                raise UserError(f'channel {c.name!r} has standard deviation {std}, expected a positive number: '
                                'drop a constant channel, or set config.view.std')

    @functools.cached_property
    def phases(self) -> Phases:
        return Phases(self.channels)

    @property
    def rgb(self) -> bool:
        """Whether the channels are three linear ones of one unit."""
        return len(self.channels) == self.phases.linear == 3 and len({c.unit for c in self.channels}) == 1

    @property
    def _mixes(self) -> bool:
        """Whether some operation makes one channel out of several."""
        return bool(self.grey or (self.jitter and (self.jitter.saturation or self.jitter.hue)))

    def random(self, example: Example, key: jax.Array) -> dict[str, jax.Array]:
        """An augmented view of one example.

        Args:
          example: 'image' (H, W, C) of any dtype; optionally 'valid' (H, W, 1 or C) bool, 'label_map' (H, W); other
            fields are passed on.
        Returns:
          'image' (h, w, C) float32, normalised; 'valid' (h, w, 1 or C) if it was there or the rotation's border is
          'zero'; 'label_map' (h, w) of nearest pixels, 0 outside the canvas.
        """
        noise = self._noise(key)
        x, valid, out = self._warped(example, self._geometry(example['image'].shape[:2], noise), self.rotation)
        unit, clamp = self._unit(example['image'].dtype)
        if self.jitter:
            x = self._on_linear(x, lambda x: self._jittered(x, valid, noise, clamp), unit)
        if self.grey:
            x = self._on_linear(x, lambda x: jnp.where(noise['grey'] < self.grey, ops.grey(x), x))
        if self.blur:
            x = self._blurred(x, valid, noise)
        if self.solarise:
            inverted = noise['solarise'] < self.solarise.probability
            x = self._on_linear(x, lambda x: jnp.where(inverted, ops.solarise(x, self.solarise.threshold), x), unit)
        return out | self._normalised(x, valid)

    def central(self, example: Example) -> dict[str, jax.Array]:
        """The deterministic view of one example: resized, centre-cropped and normalised. See `random`."""
        x, valid, out = self._warped(example, self._central(example['image'].shape[:2]), None, beyond=True)
        return out | self._normalised(x, valid)

    def denormalise(self, image):
        """(..., C) back in raw units."""
        return image * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)

    def _central(self, source: tuple[int, int]) -> Warp | None:
        """None where the view is the canvas itself."""
        box = central_box(source, self.size, self.resize)
        return None if box == (0, 0, *source) and source == self.size else Warp(*box)

    def _noise(self, key: jax.Array) -> dict[str, jax.Array]:
        """All random numbers of a view, uniform in [0, 1): every option has its own, whichever others are on.

        One draw, because every call of the generator is a program of its own to compile.
        """
        noise = jax.random.uniform(key, (22 + 4 + 4 * len(self.channels) + len(CHOICES),))
        box, order, factors, choices = jnp.split(noise, np.cumsum([22, 4, 4 * len(self.channels)]))
        return {'box': box, 'order': order, 'factors': factors.reshape(4, -1)} | dict(zip(CHOICES, choices))

    def _geometry(self, source: tuple[int, int], noise: Mapping[str, jax.Array]) -> Warp | None:
        geometry = self._central(source)
        if not (self.crop or self.hflip or self.vflip or self.quarter_turns or self.rotation):
            return geometry
        box = (0, 0, *source) if geometry is None else geometry[:4]
        if self.crop:
            drawn = random_box(noise['box'], source, self.crop.scale, self.crop.ratio)
            box = [jnp.where(noise['crop'] < self.crop.probability, d, b) for d, b in zip(drawn, box)]
        geometry = Warp(*box, flip_rows=noise['vflip'] < self.vflip, flip_columns=noise['hflip'] < self.hflip)
        if self.quarter_turns:
            turns = 1 + jnp.floor(3 * noise['turns']).astype(jnp.int32)
            geometry = geometry.turned(jnp.where(noise['quarter_turns'] < self.quarter_turns, turns, 0))
        if self.rotation:
            degrees = self.rotation.degrees * (2 * noise['degrees'] - 1)
            rotated = noise['rotation'] < self.rotation.probability
            geometry = geometry._replace(degrees=jnp.where(rotated, degrees, 0.0))
        return geometry

    def _warped(self, example: Example, geometry: Warp | None, rotation: Rotation | None, *, beyond: bool = False):
        """The encoded image, its validity or None, and the other fields."""
        out = dict(example)
        image, valid = out.pop('image'), out.pop('valid', None)
        if image.shape[-1] != len(self.channels):
            raise UserError(f'images have {image.shape[-1]} channels, the manifest names {len(self.channels)}')
        if valid is not None and self._mixes:
            valid = jnp.broadcast_to(valid.all(-1, keepdims=True), valid.shape)
        x = self.phases.encode(image)
        if geometry is None:
            return x, valid, out
        turning = dict(reach=rotation.degrees, border=rotation.border) if rotation else {}
        if valid is None and rotation and rotation.border == 'zero':
            valid = jnp.ones((*image.shape[:2], 1), bool)
        move = functools.partial(warp, geometry=geometry, size=self.size, method=self.interpolation,
                                 antialias=self.antialias, beyond=beyond, **turning)
        x, share = self._averaged(move, x, valid)
        if valid is not None:
            valid = share >= 0.5
            x = jnp.where(self.phases.spread(valid), x, 0)
        if 'label_map' in out:
            out['label_map'] = warp_nearest(out['label_map'], geometry, self.size, **turning)
        unit, clamp = self._unit(image.dtype)
        if clamp:   # bicubic interpolation overshoots at edges
            x = self._on_linear(x, lambda x: jnp.clip(x, 0, unit))
        return x, valid, out

    def _averaged(self, linear: Callable[[jax.Array], jax.Array], x: jax.Array, valid: jax.Array | None):
        """A linear filter of the valid pixels alone, and the share of its weight that they carry (h, w, 1 or C)."""
        if valid is None:
            return linear(x), None
        count = x.shape[-1]
        x = jnp.where(self.phases.spread(valid), x, 0)
        parts = linear(jnp.concatenate([x, valid.astype(jnp.float32)], -1))
        share = parts[..., count:]
        return parts[..., :count] / self.phases.spread(jnp.where(share > 0, share, 1)), share

    def _unit(self, dtype) -> tuple[float, bool]:
        """What the linear channels are divided by for colour operations, and whether they lie in [0, 1] then."""
        if jnp.issubdtype(dtype, jnp.unsignedinteger):
            return float(jnp.iinfo(dtype).max), True
        outside = [c for c in self.channels if c.kind == 'linear' and not 0 <= c.minimum <= c.maximum <= 1]
        if outside and (self.solarise or (self.jitter and self.jitter.hue)):
            c = outside[0]
            raise UserError('config.view: hue and solarise need unsigned integers or values in [0, 1], '
                            f'channel {c.name!r} is {jnp.dtype(dtype)} in [{c.minimum}, {c.maximum}]')
        return 1.0, not outside

    def _on_linear(self, x: jax.Array, function: Callable[[jax.Array], jax.Array], unit: float = 1.0) -> jax.Array:
        count = self.phases.linear
        return jnp.concatenate([function(x[..., :count] / unit) * unit, x[..., count:]], -1)

    def _jittered(self, x: jax.Array, valid: jax.Array | None, noise: Mapping[str, jax.Array],
                  clamp: bool) -> jax.Array:
        low, high = np.asarray(self.jitter.ranges, np.float32).T[..., None]
        neutral = np.asarray([1, 1, 1, 0], np.float32)[:len(low), None]
        factors = low + (high - low) * noise['factors'][:len(low), :1 if self.rgb else x.shape[-1]]
        factors = jnp.where(noise['jitter'] < self.jitter.probability, factors, neutral)
        if valid is not None:
            valid = self.phases.spread(valid)[..., :self.phases.linear]
        order = jnp.argsort(noise['order'][:len(low)])
        return ops.jitter(x, order, factors, rgb=self.rgb, valid=valid, clamp=clamp)

    def _blurred(self, x: jax.Array, valid: jax.Array | None, noise: Mapping[str, jax.Array]) -> jax.Array:
        low, high = self.blur.sigma
        soften = functools.partial(ops.blur, sigma=low + (high - low) * noise['sigma'], kernel=self.blur.kernel)
        return jnp.where(noise['blur'] < self.blur.probability, self._averaged(soften, x, valid)[0], x)

    def _normalised(self, x: jax.Array, valid: jax.Array | None) -> dict[str, jax.Array]:
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        image = ops.normalise(self.phases.decode(x), mean, std)
        return {'image': image} if valid is None else {'image': jnp.where(valid, image, 0), 'valid': valid}
