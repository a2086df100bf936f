"""Elastic sources against published values, closed forms, limits, and numerical strain."""
import numpy as np
import pytest

from data_prep import deformation
from data_prep.deformation import line_of_sight, mogi, okada, sheet, to_phase, wrap

# Okada 1985, table 2 (length 3, width 2): case -> (x, y, depth, dip), then strike-slip, dip-slip, tensile.
CHECKLIST = {
    2: ((2, 3, 4, 70), (-8.689e-3, -4.298e-3, -2.747e-3), (-4.682e-3, -3.527e-2, -3.564e-2),
        (-2.660e-4, 1.056e-2, 3.214e-3)),
    3: ((0, 0, 4, 90), (0, 5.253e-3, 0), (0, 0, 0), (1.223e-2, 0, -1.606e-2)),
    4: ((0, 0, 4, -90), (0, -1.303e-3, 0), (0, 0, 0), (3.507e-3, 0, -7.740e-3)),
}


@pytest.mark.parametrize('case', CHECKLIST)
def test_okada_reproduces_the_published_check_list(case):
    (x, y, depth, dip), *expected = CHECKLIST[case]
    for slip, values in zip(('strike_slip', 'dip_slip', 'opening'), expected):
        found = okada(x, y, depth=depth, dip=dip, length=3, width=2, **{slip: 1.0})
        np.testing.assert_allclose(np.array(found, float), values, rtol=5e-4, atol=1e-12)      # printed with 4 digits


def test_mogi_peak_and_volume():
    depth, volume = 3000.0, 2e6
    r = np.linspace(0, 2e6, 2_000_001)
    east, north, up = mogi(r, np.zeros_like(r), depth=depth, volume=volume)
    assert up[0] == pytest.approx(0.75 * volume / (np.pi * depth ** 2))
    assert np.argmax(east) == pytest.approx(depth / np.sqrt(2), abs=1)
    np.testing.assert_allclose(east / up, r / depth)
    assert not north.any()
    # The uplifted volume is 2 (1 - poisson) times the source's; the tail beyond the grid is r_max^-1 of it.
    assert np.trapezoid(2 * np.pi * r * up, r) == pytest.approx(2 * 0.75 * volume, rel=3e-3)


@pytest.mark.parametrize('dip', [0, 35, 90])
def test_a_small_opening_sheet_is_a_point_dislocation(dip):
    """Far away only the potency (opening times area) counts, however it is cut up."""
    x, y = np.meshgrid(np.linspace(-5e3, 5e3, 7), np.linspace(-5e3, 5e3, 7))
    whole = sheet(x, y, depth=4000, dip=dip, strike=30, length=40, width=40, opening=1.0)
    slit = sheet(x, y, depth=4000, dip=dip, strike=30, length=20, width=20, opening=4.0)
    for a, b in zip(whole, slit):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(whole[2]).max())


def test_three_orthogonal_cracks_are_a_mogi_source():
    """Equal opening of three perpendicular cracks is a centre of dilatation (Okada 1985, section on point sources)."""
    x, y = np.meshgrid(np.linspace(-9e3, 9e3, 9), np.linspace(-9e3, 9e3, 9))
    side, opening = 30.0, 1.0
    cracks = [(0, 0), (0, 90), (90, 90)]
    total = np.sum([sheet(x, y, depth=4000, dip=dip, strike=strike, length=side, width=side, opening=opening)
                    for strike, dip in cracks], 0)
    potency = side * side * opening
    # Isotropic moment (3 lambda + 2 mu) * potency = 5 mu * potency at poisson 0.25; a sphere's is 3 mu * dV.
    expected = mogi(x, y, depth=4000, volume=5 / 3 * potency)
    np.testing.assert_allclose(total, np.array(expected), rtol=1e-3, atol=1e-4 * np.abs(expected[2]).max())


def test_no_jump_where_formulas_are_singular():
    """On the plane, in line with edges and above corners the displacement is the limit from the side."""
    args = dict(depth=2000.0, dip=90, length=1000.0, width=500.0, opening=1.0, strike_slip=0.4, dip_slip=-0.3)
    for x, y in ((0, 0), (500, 0), (1000, 0), (-300, 0), (0, 800)):
        at, near = (np.array(okada(x + e, y + e, **args), float) for e in (0.0, 1e-4))
        assert np.isfinite(at).all()
        np.testing.assert_allclose(at, near, atol=1e-6)


def test_dip_approaches_vertical_continuously():
    x, y = np.meshgrid(np.linspace(-3e3, 3e3, 6), np.linspace(-3e3, 3e3, 6))
    args = dict(depth=2000.0, length=1000.0, width=500.0, opening=1.0, strike_slip=0.4, dip_slip=-0.3)
    for off, tolerance in ((0.03, 1e-3), (0.003, 1e-4), (1e-5, 1e-6)):
        for a, b in zip(okada(x, y, dip=90, **args), okada(x, y, dip=90 - off, **args)):
            np.testing.assert_allclose(a, b, atol=tolerance)


def test_sheet_is_centred_and_turns_with_its_strike():
    x, y = np.meshgrid(np.linspace(-4e3, 4e3, 9), np.linspace(-4e3, 4e3, 9))
    sill = sheet(x, y, depth=2000, dip=0, strike=0, length=900, width=900, opening=1.0)
    assert sill[2].argmax() == 40 and sill[2].max() > 0
    np.testing.assert_allclose(sill[2], sill[2][::-1, ::-1], atol=1e-12)
    north = sheet(x, y, depth=2000, dip=60, strike=0, length=900, width=500, opening=1.0)
    east = sheet(y, -x, depth=2000, dip=60, strike=90, length=900, width=500, opening=1.0)   # everything turned by 90
    np.testing.assert_allclose(east[2], north[2], atol=1e-12)
    np.testing.assert_allclose(east[0], north[1], atol=1e-12)
    np.testing.assert_allclose(east[1], -north[0], atol=1e-12)
    # A dyke that strikes north pushes the ground apart to the east and west.
    dyke = sheet(np.array([-3e3, 3e3]), np.zeros(2), depth=1500, dip=90, strike=0, length=2000, width=1000, opening=1.0)
    assert dyke[0][0] < 0 < dyke[0][1]
    with pytest.raises(ValueError, match='reaches the surface'):
        sheet(x, y, depth=100, dip=90, strike=0, length=900, width=900, opening=1.0)


def test_line_of_sight_looks_right():
    for ascending, east in ((True, -1), (False, 1)):    # an ascending satellite passes in the west
        sight = line_of_sight(ascending=ascending)
        assert np.linalg.norm(sight) == pytest.approx(1)
        assert np.sign(sight[0]) == east and sight[1] < 0 < sight[2]
        assert sight[2] == pytest.approx(np.cos(np.radians(39)))


def test_phase_of_uplift_and_wrapping():
    sight = line_of_sight(ascending=True, incidence=0)
    half = deformation.WAVELENGTH / 2
    assert to_phase((0, 0, np.array(half)), sight) == pytest.approx(-2 * np.pi)     # half a wavelength is a fringe
    phase = np.array([np.pi, -np.pi, 3 * np.pi, 0, 7.0, -7.0])
    wrapped = wrap(phase)
    assert (wrapped > -np.pi).all() and (wrapped <= np.pi).all()
    np.testing.assert_allclose(np.exp(1j * wrapped), np.exp(1j * phase), atol=1e-12)
    assert wrapped[0] == wrapped[1] == np.pi
