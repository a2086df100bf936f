"""What a view may do to an image, each as a mapping in the config: `crop=dict(scale=(0.2, 1.0))`."""
import dataclasses
from typing import Literal

from ssl_jax.errors import UserError
from ssl_jax.views.warp import Border

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Transform:
    """What a channel's values become before anything else: clipped, then at most one of the others.

    Args:
      clip: to a pair of percentiles of the train split: (1, 99), or (0, 99) for the upper end alone.
      log: natural logarithm, of the value plus this number where it is one; values below the train split's smallest
        count as that.
      asinh: the inverse hyperbolic sine of the value over this one: linear well below it, logarithmic above, for both
        signs (Lupton et al. 1999).
      scale: the pair of values that become 0 and 1.
      sincos: a phase becomes two channels, its sine and cosine.
      normalise: to mean 0 and standard deviation 1. False leaves the values as they are then; 0 still stands for what
        is invalid, cut out or hidden.
    """
    clip: Range | None = None
    log: bool | float = False
    asinh: float | None = None
    scale: Range | None = None
    sincos: bool = False
    normalise: bool = True

    @property
    def rescales(self) -> bool:
        """Whether values are in other units than before."""
        return self.log is not False or self.asinh is not None or self.scale is not None

    @property
    def curved(self) -> bool:
        """Whether it changes the values of a linear channel, before normalisation."""
        return self.rescales or self.clip is not None


@dataclasses.dataclass(frozen=True)
class Crop:
    """A box of random area (as a share of the canvas) and width/height, resized to the view's size."""
    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    probability: float = 1.0

    def __post_init__(self):
        check('crop.probability', self.probability)
        check('crop.scale', self.scale, 1e-6)
        check('crop.ratio', self.ratio, 1e-3, 1e3)


@dataclasses.dataclass(frozen=True)
class Rotation:
    """By a uniform angle in [-degrees, degrees].

    What comes in from outside the canvas is invalid (border 'zero') or the canvas's mirror image ('reflect').
    """
    degrees: float = 180.0
    border: Border = 'zero'
    probability: float = 1.0

    def __post_init__(self):
        check('rotation.probability', self.probability)
        check('rotation.degrees', self.degrees, 1e-6, 180)


@dataclasses.dataclass(frozen=True)
class Elastic:
    """A smooth random displacement: the knots of a cubic B-spline, every `smoothness` pixels of the view, move by up to
    `amplitude` pixels along each axis.

    What comes in from outside the canvas is the same as in a rotation; without one, the canvas's mirror image.
    """
    amplitude: float = 4.0
    smoothness: float = 32.0
    probability: float = 1.0

    def __post_init__(self):
        check('elastic.probability', self.probability)
        check('elastic.smoothness', self.smoothness, 2, 1e4)
        # The spline's slope reaches 2 amplitude / smoothness; at 1 the picture would fold over itself.
        check('elastic.amplitude', self.amplitude, 1e-6, self.smoothness / 2)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A random plane added to every phase channel and wrapped: a constant in [-offset, offset] cycles (0.5 for all of
    them), and a ramp of [-ramp, ramp] cycles from edge to edge of the view along each axis.

    What interferograms are known up to: the reference point's phase, and errors of the orbit.
    """
    offset: float = 0.0
    ramp: float = 0.0
    probability: float = 1.0

    def __post_init__(self):
        check('phase.probability', self.probability)
        check('phase.offset', self.offset, 0, 0.5)
        check('phase.ramp', self.ramp, 0, 1e3)


@dataclasses.dataclass(frozen=True)
class Jitter:
    """Brightness, contrast, saturation (factors in [1 - x, 1 + x]) and hue (shift in [-x, x] turns) in random order.

    RGB channels share one draw; otherwise every channel has its own brightness and contrast, and phases have none.
    """
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    probability: float = 1.0

    def __post_init__(self):
        check('jitter.probability', self.probability)
        for name in ('brightness', 'contrast', 'saturation'):
            check(f'jitter.{name}', getattr(self, name), 0, 100)
        check('jitter.hue', self.hue, 0, 0.5)

    @property
    def ranges(self) -> list[Range]:
        """Of the factors, in the order of `ops.jitter`; without trailing operations that are off."""
        ranges = [(max(0.0, 1 - x), 1 + x) for x in (self.brightness, self.contrast, self.saturation)]
        return [*ranges, (-self.hue, self.hue)][:4 if self.hue else 3 if self.saturation else 2]


@dataclasses.dataclass(frozen=True)
class Blur:
    """Gaussian of uniform sigma, in pixels of the view; `kernel` is its width, None for all of it.

    A pair of ranges gives the blur from row to row and that from column to column their own sigmas.
    """
    sigma: Range | tuple[Range, Range] = (0.1, 2.0)
    kernel: int | None = None
    probability: float = 1.0

    def __post_init__(self):
        check('blur.probability', self.probability)
        for limits in self.ranges:
            check('blur.sigma', limits, 1e-3, 1e3)
        if self.kernel is not None and (self.kernel < 1 or self.kernel % 2 == 0):
            raise UserError(f'config.view.blur.kernel={self.kernel!r}: expected an odd number of pixels')

    @property
    def ranges(self) -> tuple[Range, ...]:
        """Of sigma: one, or that of rows and that of columns."""
        return self.sigma if isinstance(self.sigma[0], tuple) else (self.sigma,)


@dataclasses.dataclass(frozen=True)
class Solarise:
    """Inverts what reaches `threshold`, in values scaled to [0, 1]."""
    threshold: float = 0.5
    probability: float = 1.0

    def __post_init__(self):
        check('solarise.probability', self.probability)
        check('solarise.threshold', self.threshold)


@dataclasses.dataclass(frozen=True)
class Speckle:
    """Every value of a linear channel times a factor of its own, normal about 1 with a uniform sigma.

    One factor for a whole channel is `Jitter.brightness`.
    """
    sigma: Range = (0.05, 0.2)
    probability: float = 1.0

    def __post_init__(self):
        check('speckle.probability', self.probability)
        check('speckle.sigma', self.sigma, 0, 100)


@dataclasses.dataclass(frozen=True)
class Noise:
    """Normal noise of uniform sigma, in standard deviations of the channel (the view's `std`); phases are wrapped."""
    sigma: Range = (0.0, 0.2)
    probability: float = 1.0

    def __post_init__(self):
        check('noise.probability', self.probability)
        check('noise.sigma', self.sigma, 0, 100)


@dataclasses.dataclass(frozen=True)
class Cutout:
    """`count` rectangles at random places, cut off at the edges, become the mean: 0 after normalisation.

    Height and width are uniform in `size`, shares of the view's. Unlike invalid pixels, the cut ones count as data.
    """
    count: int = 1
    size: Range = (0.1, 0.3)
    probability: float = 1.0

    def __post_init__(self):
        check('cutout.probability', self.probability)
        check('cutout.size', self.size)
        check('cutout.count', self.count, 1, 1000)


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """`n` operations in a row, each drawn from all and made with `probability`, of a strength `magnitude` on a scale to
    10, drawn anew each time with deviation `std`: timm's 'rand-m9-mstd0.5-inc1' (Cubuk et al. 2020, arXiv:1909.13719).

    Colours: autocontrast, equalise, invert, posterise, solarise, solarise-add, saturation, contrast, brightness,
    sharpness; they need three channels in [0, 1]. Geometry: rotation, shears, translations, for any channels; what
    comes in from outside is invalid.
    Unlike in timm, geometry comes after colours, its operations in one resampling, and values are not rounded to 8 bits
    between operations.
    """
    n: int = 2
    magnitude: float = 9.0
    std: float = 0.5
    probability: float = 0.5
    ops: Literal['all', 'geometric'] = 'all'

    def __post_init__(self):
        check('randaugment.n', self.n, 1, 100)
        check('randaugment.magnitude', self.magnitude, 0, 10)
        check('randaugment.std', self.std, 0, 10)
        check('randaugment.probability', self.probability)


@dataclasses.dataclass(frozen=True)
class Erasing:
    """One rectangle of random area (as a share of the view) and width/height, wholly inside, becomes normal noise of
    deviation 1 after normalisation (Zhong et al. 2020, arXiv:1708.04896, algorithm 1; 'pixel' mode of timm).

    Unlike invalid pixels, the erased ones count as data.
    """
    area: Range = (0.02, 1 / 3)
    ratio: Range = (0.3, 1 / 0.3)
    probability: float = 0.25

    def __post_init__(self):
        check('erasing.probability', self.probability)
        check('erasing.area', self.area, 1e-6)
        check('erasing.ratio', self.ratio, 1e-3, 1e3)


def check(name: str, value: float | Range, low: float = 0.0, high: float = 1.0) -> None:
    """Raises a UserError unless a number, or an increasing pair, lies in [low, high]."""
    first, last = value if isinstance(value, tuple) else (value, value)
    if not low <= first <= last <= high:
        expected = 'an increasing pair' if isinstance(value, tuple) else 'a number'
        raise UserError(f'config.view.{name}={value!r}: expected {expected} in [{low:g}, {high:g}]')
