"""The options of a view, checked against the data's channels and size."""
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssl_jax import config
from ssl_jax.data.source import Channel
from ssl_jax.errors import UserError
from ssl_jax.views import curves
from ssl_jax.views.curves import Curve
from ssl_jax.views.distribution import Distribution
from ssl_jax.views.options import (
    Blur,
    Crop,
    Cutout,
    Elastic,
    Erasing,
    Jitter,
    Noise,
    Phase,
    RandAugment,
    Rotation,
    Solarise,
    Speckle,
    Transform,
    check,
)
from ssl_jax.views.phases import Phases
from ssl_jax.views.warp import Method, central_box

OPTIONS = (Crop, Rotation, Elastic, Phase, RandAugment, Jitter, Blur, Solarise, Speckle, Noise, Cutout, Erasing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Without options it resizes, crops the centre and normalises.

    The order is: transforms of channels; crop, flips, quarter turns, rotation and elastic deformation (one warp);
    randaugment; jitter; grey; blur; solarise; speckle; noise and the phases' plane; normalisation; cutout; erasing.

    *Transforms* work on pixels as they are stored, and whatever follows on their results: on a logarithm, say. Only the
    sine and cosine of a phase are taken at the end, so that it is warped, blurred and shifted like any other phase.

    *Phases* (`Channel.kind`) are interpolated and blurred as sine and cosine, so that a wrap stays sharp; colour
    operations and speckle leave them alone.

    *Invalid pixels* never contribute. An output value is the weighted mean of the valid pixels under the kernel; it is
    valid where these carry at least half of the kernel's weight (normalised convolution, Knutsson and Westin 1993).
    Invalid output is 0 after normalisation. Where colours are mixed (grey, saturation, hue, randaugment), a pixel with
    an invalid channel is invalid.

    *Units*: geometry works on raw values. For colour operations unsigned integers are divided by their largest value.
    These, and channels that the manifest knows to lie in [0, 1] (as floats, or transformed), are clamped to that range
    as in torchvision.
    Other values are not: there brightness and contrast are plain blends, hue and solarise are refused.

    Args:
      size: (height, width) of the view, an int for a square, None for the canvas.
      hflip, vflip, quarter_turns, grey: probabilities. A quarter turn is by 90, 180 or 270 degrees, drawn evenly.
      antialias: stretch the kernel when shrinking, as Pillow does; otherwise sample as torch's interpolate does.
      resize: shorter side to which the canvas is resized before the central crop; None for the smallest that covers
        `size`. For evaluation, and for training where no random crop is made.
      transforms: by channel; see `Transform`: `dict(dem=dict(clip=(1, 99), log=1.0), phase=dict(sincos=True))`.
      mean, std: per channel of the view, after transforms, in place of those over the valid pixels of the train split.
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
    elastic: Elastic | Mapping[str, Any] | None = None
    phase: Phase | Mapping[str, Any] | None = None
    randaugment: RandAugment | Mapping[str, Any] | None = None
    interpolation: Method = 'bicubic'
    antialias: bool = True
    jitter: Jitter | Mapping[str, Any] | None = None
    grey: float = 0.0
    blur: Blur | Mapping[str, Any] | None = None
    solarise: Solarise | Mapping[str, Any] | None = None
    speckle: Speckle | Mapping[str, Any] | None = None
    noise: Noise | Mapping[str, Any] | None = None
    cutout: Cutout | Mapping[str, Any] | None = None
    erasing: Erasing | Mapping[str, Any] | None = None
    resize: int | None = None
    transforms: Mapping[str, Transform | Mapping[str, Any]] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int]
    channels: tuple[Channel, ...]

    def __post_init__(self):
        size = self.image_size if self.size is None else self.size
        object.__setattr__(self, 'size', (size, size) if isinstance(size, int) else tuple(size))
        for option in OPTIONS:
            name = option.__name__.lower()
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, config.bind(option, value, where=f'view.{name}')())
        for name in ('hflip', 'vflip', 'quarter_turns', 'grey'):
            check(name, getattr(self, name))
        object.__setattr__(self, 'transforms', curves.bind(self.transforms or {}, self.channels))
        for place, name in enumerate(('mean', 'std')):
            values = getattr(self, name)
            if values is None:
                values = tuple(m[place] if self._normalises(i) else (0.0, 1.0)[place]
                               for m, i in zip(self.moments, self.phases.sources))
            if len(values) != len(self.outputs):
                raise UserError(f'config.view.{name} has {len(values)} values for {len(self.outputs)} channels')
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
        if self.mixes and not self.rgb:
            listed = ', '.join(f'{c.name} ({c.kind}, unit {c.unit!r})' for c in self.channels)
            raise UserError('config.view: grey, saturation, hue and the colours of randaugment need three linear '
                            f'channels of one unit: {listed}')
        if not self.phases.linear and (self.jitter or self.solarise or self.speckle):
            raise UserError('config.view: jitter, solarise and speckle leave phases alone, and there are no other '
                            'channels')
        if self.phase and not self.phases.wrapped:
            raise UserError(f'config.view.phase: none of {", ".join(c.name for c in self.channels)} is a phase')
        for name, std in zip(self.outputs, self.std):
            if not 0 < std < float('inf'):
                raise UserError(f'channel {name!r} has standard deviation {std}, expected a positive number: '
                                'drop a constant channel, or set config.view.std')

    @functools.cached_property
    def phases(self) -> Phases:
        return Phases(self.channels, [i for i, c in enumerate(self.channels)
                                      if c.name in self.transforms and self.transforms[c.name].sincos])

    @functools.cached_property
    def curves(self) -> dict[int, Curve]:
        """By place among the channels, for the linear ones whose values are transformed."""
        return {i: Curve(c, self.transforms[c.name]) for i, c in enumerate(self.channels)
                if c.name in self.transforms and self.transforms[c.name].curved}

    @functools.cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of the channels that the view makes."""
        return tuple(c.name + end for i, c in enumerate(self.channels)
                     for end in (('_sin', '_cos') if i in self.phases.pairs else ('',)))

    @functools.cached_property
    def moments(self) -> tuple[tuple[float, float], ...]:
        """(mean, standard deviation) of `outputs` over the valid pixels of the train split, before normalisation."""
        moments = []
        for i, c in enumerate(self.channels):
            if i in self.phases.pairs:
                of = Distribution(c).moments
                moments += [of(lambda x, c=c: 2 * np.pi / c.period * x, f) for f in (np.sin, np.cos)]
            else:
                moments.append(self.curves[i].moments if i in self.curves else (c.mean, c.std))
        return tuple(moments)

    @property
    def deviations(self) -> np.ndarray:
        """(channels,) the standard deviations that noise is measured in: of curves' values, or of raw ones."""
        found = np.asarray([c.std for c in self.channels], np.float32)
        for k, i in enumerate(self.phases.sources):
            if i not in self.phases.pairs:
                found[i] = self.std[k] if self._normalises(i) else self.moments[k][1]
        return found

    def _normalises(self, place: int) -> bool:
        name = self.channels[place].name
        return name not in self.transforms or self.transforms[name].normalise

    @property
    def rgb(self) -> bool:
        """Whether the channels are three linear ones of one unit, transformed alike."""
        alike = len({self.transforms[c.name] if c.name in self.transforms else None for c in self.channels}) == 1
        return alike and len(self.channels) == self.phases.linear == 3 and len({c.unit for c in self.channels}) == 1

    @property
    def mixes(self) -> bool:
        """Whether some operation makes one channel out of several."""
        colours = self.randaugment and self.randaugment.ops == 'all'
        return bool(self.grey or colours or (self.jitter and (self.jitter.saturation or self.jitter.hue)))

    def denormalise(self, image):
        """(..., outputs) as (..., C) in raw units, but for what was clipped."""
        image = image * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)
        if not self.transforms:
            return image
        image, raw = np.asarray(image), []
        for i in range(len(self.channels)):
            parts = [image[..., k] for k in np.flatnonzero(self.phases.sources == i)]
            if len(parts) == 2:
                raw.append(self.phases.angles(*parts, i))
            else:
                raw.append(self.curves[i].inverse(parts[0]) if i in self.curves else parts[0])
        return np.stack(raw, -1)
