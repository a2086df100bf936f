"""Synthetic volcanic landscapes, and what an interferogram of them shows besides deformation: atmosphere and noise."""
import dataclasses

import numpy as np

from data_prep.deformation import WAVELENGTH, wrap

SCALE_HEIGHT = 2000.0        # m, e-folding height of water vapour
DELAY_PER_VAPOUR = 6.5e-3    # m of zenith delay per kg/m^2 of water vapour (Bevis et al. 1992: about 1 / 0.15)
LOOKS = 32                   # independent samples averaged per pixel


@dataclasses.dataclass(frozen=True)
class Terrain:
    """Height in m (0 at sea), vegetation cover in [0, 1] and water, each (height, width); (row, column) of a summit."""
    dem: np.ndarray
    vegetation: np.ndarray
    water: np.ndarray
    summit: tuple[float, float]


def power_law(rng: np.random.Generator, shape: tuple[int, int], slope: float, bend: float = np.inf) -> np.ndarray:
    """A random field of zero mean and unit variance whose two-dimensional power spectrum falls as wavenumber^-slope.

    Beyond the wavenumber `bend` (cycles per pixel) the slope is steeper by one. The field is cut out of a periodic one
    1.5 times as large, so that its opposite edges don't match. float32 (height, width).
    """
    padded = [-(-n * 3 // 2) for n in shape]
    noise = np.fft.rfft2(rng.standard_normal(padded, np.float32))
    wavenumber = np.hypot(np.fft.fftfreq(padded[0])[:, None], np.fft.rfftfreq(padded[1]))
    wavenumber[0, 0] = 1
    gain = wavenumber ** (-slope / 2) / np.sqrt(1 + wavenumber / bend)
    gain[0, 0] = 0
    field = np.fft.irfft2(noise * gain, padded)[:shape[0], :shape[1]]
    return ((field - field.mean()) / field.std()).astype(np.float32)


def terrain(rng: np.random.Generator, shape: tuple[int, int], spacing: float) -> Terrain:
    """Shield volcanoes with calderas and lava flows on a fractal base: a coast, a highland with lakes, or neither.

    Args:
      spacing: metres per pixel.
    """
    rows, columns = np.mgrid[:shape[0], :shape[1]].astype(np.float32)
    extent = min(shape) * spacing
    dem, bare = rng.uniform(60, 180) * power_law(rng, shape, 3.6), np.full(shape, -np.inf)
    for number in range(1 + rng.poisson(extent / 60e3)):
        spread = 0.12 if number == 0 else 0.45
        row, column = (n * (0.5 + rng.uniform(-spread, spread)) for n in shape)
        cone, flows = _volcano(rng, rows - row, columns - column, spacing, extent)
        dem, bare = dem + cone, np.maximum(bare, flows)
        if number == 0:
            summit = (row, column)
    kind = rng.choice(['coast', 'highland', 'land'], p=[0.5, 0.2, 0.3])
    shore = np.quantile(dem, rng.uniform(0, {'coast': 0.6, 'highland': 0.06, 'land': 0}[kind]))
    water = dem < shore
    raised = {'coast': 0, 'highland': rng.uniform(1000, 3500), 'land': rng.uniform(0, 400)}[kind]
    dem = np.maximum(dem - shore, 0) + raised

    patches = 3 * power_law(rng, shape, 2.8) + rng.normal(0, 1.5)
    vegetation = 0.5 + 0.5 * np.tanh(1.2 * (patches - 8 * np.maximum(bare, 0)))
    vegetation = np.clip(vegetation + 0.12 * power_law(rng, shape, 1.5) * (0.3 + vegetation), 0, 1)
    return Terrain(dem.astype(np.float32), vegetation.astype(np.float32), water, summit)


def _volcano(rng, dy, dx, spacing, extent) -> tuple[np.ndarray, np.ndarray]:
    """Height of one cone above its base, and how bare its ground is (> 0: fresh lava)."""
    scale = rng.uniform(0.12, 0.3) * min(extent, 40e3)
    peak = scale * rng.uniform(0.18, 0.4)
    stretch, turn = rng.uniform(0.75, 1.3), rng.uniform(0, np.pi)
    along, across = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    distance = np.hypot(along / stretch, across * stretch) * spacing
    # Ridges and flows: noise that varies quickly around the cone and slowly down its slope.
    polar = power_law(rng, (512, 512), 2.4)[:, ::8]
    around = ((np.arctan2(dy, dx) / (2 * np.pi) + 0.5) * 511).astype(int)
    texture = polar[np.minimum(around, 511 - around) * 2, np.minimum(distance / scale * 12, 63).astype(int)]
    rim = scale * rng.uniform(0.12, 0.35)
    cone = peak * np.exp(-distance / scale) * (1 + 0.03 * texture)
    floor = peak * np.exp(-rim / scale) - rng.uniform(0.05, 0.25) * peak
    cone = np.where(distance < rim, np.minimum(cone, floor), cone)
    reach = rng.uniform(0.8, 2.5) * scale
    return cone, np.where(distance < rim * 1.3, 1.0, texture - 0.6 - 1.5 * distance / reach)


def coherence(ground: Terrain, spacing: float, days: float, gain: float) -> np.ndarray:
    """Expected coherence of a pair `days` apart: decay in time, fast under vegetation; loss on slopes; none on water.

    The decay is the exponential one of Zebker and Villasenor 1992, and a remainder that stays. `gain` stands for what
    acts on the whole pair (perpendicular baseline, season, moisture).
    """
    steepness = np.hypot(*np.gradient(ground.dem, spacing))
    bare, green = 0.97 * np.exp(-days / 500), 0.35 * np.exp(-days / 12) + 0.03
    expected = (bare + (green - bare) * ground.vegetation) * np.clip(1 - 0.7 * steepness, 0.2, 1)
    return np.where(ground.water, 0.0, gain * expected)


def decorrelate(rng: np.random.Generator, phase: np.ndarray, expected: np.ndarray,
                looks: int = LOOKS) -> tuple[np.ndarray, np.ndarray]:
    """What `looks` samples of coherence `expected` yield: noisy wrapped phase, and estimated coherence in [0, 1].

    Draws the 2x2 sample covariance of circular Gaussian signals from its exact distribution, a complex Wishart
    (Goodman 1963), by its Bartlett factor, so that phase noise and coherence estimate belong together. The bias
    1 / looks of the squared coherence is taken off.
    """
    first = np.sqrt(rng.standard_gamma(looks, phase.shape))
    second = np.sqrt(rng.standard_gamma(looks - 1, phase.shape))
    cross = (rng.standard_normal(phase.shape) + 1j * rng.standard_normal(phase.shape)) * np.sqrt(0.5)
    rest = np.sqrt(1 - expected ** 2)
    mixed = expected * first + rest * cross
    power = np.abs(mixed) ** 2
    squared = power / (power + (rest * second) ** 2)
    estimate = np.sqrt(np.maximum(squared * looks - 1, 0) / (looks - 1))
    return wrap(phase + np.angle(mixed)).astype(np.float32), estimate.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Weather:
    """The atmosphere of one acquisition: one-way delay along the line of sight, m, and its reanalysis fields."""
    delay: np.ndarray
    vapour: np.ndarray           # total column water vapour, kg/m^2
    pressure: np.ndarray         # surface pressure, Pa
    temperature: np.ndarray      # vertical integral of temperature, K kg/m^2
    turbulence: float            # standard deviation of the turbulent delay, m


def weather(rng: np.random.Generator, ground: Terrain, smooth: np.ndarray, *, spacing: float, vapour: float,
            incidence: float) -> Weather:
    """Stratified delay (the water vapour above the ground, so it follows the topography) and turbulent delay.

    Turbulence has the two-dimensional spectrum k^-8/3, and k^-11/3 below about 2 km (Hanssen 2001, ch. 4: -5/3 and -8/3
    in one dimension), hence a standard deviation that grows as the cube root of the frame's extent.

    Args:
      smooth: heights as a reanalysis sees them (`low_pass`).
      vapour: water vapour above sea level on this date, kg/m^2.
    """
    extent = np.sqrt(ground.dem.size) * spacing
    turbulence = 3.5e-3 * rng.lognormal(0, 0.5) * (extent / 10e3) ** (1 / 3)
    slant = 1 / np.cos(np.radians(incidence))
    delay = slant * DELAY_PER_VAPOUR * vapour * np.exp(-ground.dem / SCALE_HEIGHT)
    delay = delay + turbulence * power_law(rng, ground.dem.shape, 8 / 3, bend=spacing / 2000)
    pressure = 101325 * (1 - 2.25577e-5 * smooth) ** 5.25588 + rng.normal(0, 400)      # standard atmosphere
    temperature = pressure / 9.80665 * (252 + rng.normal(0, 2))                        # column mass * mean temperature
    fields = delay, vapour * np.exp(-smooth / SCALE_HEIGHT), pressure, temperature
    return Weather(*(f.astype(np.float32) for f in fields), turbulence)


def low_pass(field: np.ndarray, pixels: float) -> np.ndarray:
    """`field` blurred by a Gaussian of standard deviation `pixels`, mirrored at its edges."""
    mirrored = np.pad(field, [(0, n) for n in field.shape], 'symmetric')
    across = np.hypot(np.fft.fftfreq(mirrored.shape[0])[:, None], np.fft.rfftfreq(mirrored.shape[1]))
    blurred = np.fft.irfft2(np.fft.rfft2(mirrored) * np.exp(-2 * (np.pi * pixels * across) ** 2), mirrored.shape)
    return blurred[:field.shape[0], :field.shape[1]]


def delay_phase(primary: Weather, secondary: Weather) -> np.ndarray:
    """The atmosphere's share of the unwrapped phase, rad: a longer path at the secondary is positive."""
    return 4 * np.pi / WAVELENGTH * (secondary.delay - primary.delay)
