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
    """Gaussian of uniform sigma, in pixels of the view; `kernel` is its width, None for all of it."""
    sigma: Range = (0.1, 2.0)
    kernel: int | None = None
    probability: float = 1.0

    def __post_init__(self):
        check('blur.probability', self.probability)
        check('blur.sigma', self.sigma, 1e-3, 1e3)
        if self.kernel is not None and (self.kernel < 1 or self.kernel % 2 == 0):
            raise UserError(f'config.view.blur.kernel={self.kernel!r}: expected an odd number of pixels')


@dataclasses.dataclass(frozen=True)
class Solarise:
    """Inverts what reaches `threshold`, in values scaled to [0, 1]."""
    threshold: float = 0.5
    probability: float = 1.0

    def __post_init__(self):
        check('solarise.probability', self.probability)
        check('solarise.threshold', self.threshold)


def check(name: str, value: float | Range, low: float = 0.0, high: float = 1.0) -> None:
    """Raises a UserError unless a number, or an increasing pair, lies in [low, high]."""
    first, last = value if isinstance(value, tuple) else (value, value)
    if not low <= first <= last <= high:
        expected = 'an increasing pair' if isinstance(value, tuple) else 'a number'
        raise UserError(f'config.view.{name}={value!r}: expected {expected} in [{low:g}, {high:g}]')
