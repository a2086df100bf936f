"""Statistics of the simulated ground, atmosphere and noise."""
import dataclasses

import numpy as np
import pytest

from data_prep import scene
from data_prep.deformation import WAVELENGTH


def spectrum(field):
    """Power by wavenumber (cycles per pixel), averaged over rings; a Hann window keeps the edges from leaking."""
    n = len(field)
    window = np.hanning(n)[:, None] * np.hanning(n)
    power = np.abs(np.fft.fft2((field - field.mean()) * window)) ** 2
    k = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.fftfreq(n)) * n
    rings = np.round(k).astype(int)
    mean = np.bincount(rings.ravel(), power.ravel()) / np.maximum(np.bincount(rings.ravel()), 1)
    return np.arange(len(mean)) / n, mean


def slope(fields, low, high):
    power = np.mean([spectrum(f)[1] for f in fields], 0)
    k = spectrum(fields[0])[0]
    chosen = (k >= low) & (k <= high)
    return np.polyfit(np.log(k[chosen]), np.log(power[chosen]), 1)[0]


@pytest.mark.parametrize('exponent', [8 / 3, 3.6])
def test_power_law_has_its_slope(exponent):
    fields = [scene.power_law(np.random.default_rng(n), (192, 192), exponent) for n in range(12)]
    assert slope(fields, 0.04, 0.35) == pytest.approx(-exponent, abs=0.12)
    for field in fields:
        assert field.mean() == pytest.approx(0, abs=1e-5) and field.std() == pytest.approx(1, abs=1e-5)


def test_turbulence_bends_towards_small_scales():
    fields = [scene.power_law(np.random.default_rng(n), (256, 256), 8 / 3, bend=0.06) for n in range(12)]
    assert slope(fields, 0.2, 0.4) - slope(fields, 0.012, 0.03) == pytest.approx(-0.6, abs=0.25)


def test_power_law_does_not_repeat_at_its_edges():
    field = scene.power_law(np.random.default_rng(0), (128, 128), 11 / 3)
    inside = np.abs(np.diff(field, axis=0)).mean()
    assert np.abs(field[0] - field[-1]).mean() > 4 * inside


@pytest.mark.parametrize('seed', range(6))
def test_terrain(seed):
    ground = scene.terrain(np.random.default_rng(seed), (96, 120), 100.0)
    assert ground.dem.shape == ground.vegetation.shape == ground.water.shape == (96, 120)
    assert ground.dem.dtype == np.float32 and np.isfinite(ground.dem).all() and ground.dem.min() >= 0
    assert 0 <= ground.vegetation.min() and ground.vegetation.max() <= 1
    assert np.ptp(ground.dem[ground.water]) == 0 if ground.water.any() else True     # water is level
    assert all(0 < s < n for s, n in zip(ground.summit, (96, 120)))


def flat(vegetation=0.0, water=False, shape=(300, 300)):
    cover = np.full(shape, vegetation, np.float32)
    return scene.Terrain(np.zeros(shape, np.float32), cover, np.full(shape, water), (0, 0))


def test_coherence_falls_with_time_vegetation_slope_and_water():
    value = lambda ground, days=12: scene.coherence(ground, 100.0, days, 1.0)[5, 5]
    assert value(flat()) > value(flat(), 48) > 0.85
    assert value(flat()) > value(flat(0.5)) > value(flat(1.0)) > value(flat(1.0), 48)
    assert value(flat(water=True)) == 0
    steep = dataclasses.replace(flat(shape=(9, 9)), dem=60 * np.mgrid[:9, :9][0].astype(np.float32))
    assert value(steep) < value(flat())


@pytest.mark.parametrize('coherence', [0.0, 0.3, 0.6, 0.9])
def test_decorrelation_follows_the_published_statistics(coherence):
    looks, shape = 32, (400, 400)
    phase, estimate = scene.decorrelate(np.random.default_rng(0), np.full(shape, 1.0), np.full(shape, coherence), looks)
    assert phase.dtype == estimate.dtype == np.float32 and np.abs(phase).max() <= np.pi + 1e-6
    spread = np.angle(np.exp(1j * (phase.astype(float) - 1.0))).std()
    if coherence == 0:
        assert spread == pytest.approx(np.pi / np.sqrt(3), rel=0.01)      # uniform
    if coherence >= 0.6:   # the Cramer-Rao bound, reached with many looks (Rodriguez and Martin 1992)
        assert spread == pytest.approx(np.sqrt(1 - coherence ** 2) / (coherence * np.sqrt(2 * looks)), rel=0.05)
    assert (estimate >= 0).all() and (estimate <= 1).all()
    root = np.sqrt((estimate.astype(float) ** 2).mean())
    assert root == pytest.approx(coherence, abs=0.02) if coherence else root < 0.2


def weather(vapour, dem, seed=0):
    ground = scene.Terrain(dem, np.zeros_like(dem), np.zeros(dem.shape, bool), (0, 0))
    smooth = scene.low_pass(dem, 3)
    return scene.weather(np.random.default_rng(seed), ground, smooth, spacing=100.0, vapour=vapour, incidence=39.0)


def test_stratified_delay_follows_topography_and_vapour():
    dem = np.broadcast_to(np.linspace(0, 3000, 64, dtype=np.float32)[:, None], (64, 64))
    dry, wet = weather(10.0, dem), weather(14.0, dem)      # the same turbulence
    phase = scene.delay_phase(dry, wet)
    expected = 4 * np.pi / WAVELENGTH * 4.0 * 6.5e-3 / np.cos(np.radians(39)) * np.exp(-dem / 2000)
    np.testing.assert_allclose(phase, expected, rtol=1e-3)
    assert scene.delay_phase(wet, dry)[0, 0] == pytest.approx(-phase[0, 0])


def test_reanalysis_fields_have_real_magnitudes():
    w = weather(25.0, np.full((32, 32), 800.0, np.float32))
    assert w.pressure.mean() == pytest.approx(92000, rel=0.02)           # the real data set: 92967
    assert w.temperature.mean() == pytest.approx(2.37e6, rel=0.03)       # 2.396e6
    assert w.vapour.mean() == pytest.approx(25 * np.exp(-0.4), rel=1e-3)
    assert w.delay.std() == pytest.approx(w.turbulence, rel=1e-3)


def test_low_pass_keeps_means_and_mirrors():
    field = np.random.default_rng(0).normal(size=(40, 30))
    np.testing.assert_allclose(scene.low_pass(np.full((40, 30), 3.0), 4), 3.0)
    assert scene.low_pass(field, 5).std() < 0.2
    ramp = np.broadcast_to(np.arange(40.0)[:, None], (40, 30))
    assert scene.low_pass(ramp, 2)[0, 0] < 4      # a periodic blur would mix in the far edge
