"""The options of a view, checked against the data's channels and size."""
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssl_jax import config
from ssl_jax.data.source import Channel
from ssl_jax.errors import UserError
from ssl_jax.views.options import Blur, Crop, Cutout, Elastic, Jitter, Noise, Phase, Rotation, Solarise, Speckle, check
from ssl_jax.views.phases import Phases
from ssl_jax.views.warp import Method, central_box

OPTIONS = (Crop, Rotation, Elastic, Phase, Jitter, Blur, Solarise, Speckle, Noise, Cutout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Without options it resizes, crops the centre and normalises.

    The order is: crop, flips, quarter turns, rotation and elastic deformation (one warp); jitter; grey; blur; solarise;
    speckle; noise and the phases' plane; normalisation; cutout.

    *Phases* (`Channel.kind`) are interpolated and blurred as sine and cosine, so that a wrap stays sharp; colour
    operations and speckle leave them alone.

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
    elastic: Elastic | Mapping[str, Any] | None = None
    phase: Phase | Mapping[str, Any] | None = None
    interpolation: Method = 'bicubic'
    antialias: bool = True
    jitter: Jitter | Mapping[str, Any] | None = None
    grey: float = 0.0
    blur: Blur | Mapping[str, Any] | None = None
    solarise: Solarise | Mapping[str, Any] | None = None
    speckle: Speckle | Mapping[str, Any] | None = None
    noise: Noise | Mapping[str, Any] | None = None
    cutout: Cutout | Mapping[str, Any] | None = None
    resize: int | None = None
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
        if self.mixes and not self.rgb:
            listed = ', '.join(f'{c.name} ({c.kind}, unit {c.unit!r})' for c in self.channels)
            raise UserError(f'config.view: grey, saturation and hue need three linear channels of one unit: {listed}')
        if not self.phases.linear and (self.jitter or self.solarise or self.speckle):
            raise UserError('config.view: jitter, solarise and speckle leave phases alone, and there are no other '
                            'channels')
        if self.phase and not self.phases.wrapped:
            raise UserError(f'config.view.phase: none of {", ".join(c.name for c in self.channels)} is a phase')
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
    def mixes(self) -> bool:
        """Whether some operation makes one channel out of several."""
        return bool(self.grey or (self.jitter and (self.jitter.saturation or self.jitter.hue)))

    def denormalise(self, image):
        """(..., C) back in raw units."""
        return image * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)
