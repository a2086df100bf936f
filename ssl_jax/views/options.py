"""What a view may do to an image, each as a mapping in the config: `crop=dict(scale=(0.2, 1.0))`."""
import dataclasses

from ssl_jax.errors import UserError
from ssl_jax.views.warp import Border

Range = tuple[float, float]


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


def check(name: str, value: float | Range, low: float = 0.0, high: float = 1.0) -> None:
    """Raises a UserError unless a number, or an increasing pair, lies in [low, high]."""
    first, last = value if isinstance(value, tuple) else (value, value)
    if not low <= first <= last <= high:
        expected = 'an increasing pair' if isinstance(value, tuple) else 'a number'
        raise UserError(f'config.view.{name}={value!r}: expected {expected} in [{low:g}, {high:g}]')
