"""Surface displacement of volcanic and tectonic sources in an elastic half-space, seen along a radar's line of sight.

Coordinates in metres on a flat surface: x east, y north, z up. Displacements in metres.
"""
import numpy as np

POISSON = 0.25                # Poisson's ratio of the crust
WAVELENGTH = 0.05546576       # m, Sentinel-1 C band (5.405 GHz)

Displacement = tuple[np.ndarray, np.ndarray, np.ndarray]      # east, north, up


def mogi(x: np.ndarray, y: np.ndarray, *, depth: float, volume: float, poisson: float = POISSON) -> Displacement:
    """Inflation of a small sphere below the origin (Mogi 1958, eq. 1; in volume change: Segall 2010, eq. 7.14).

    Args:
      x, y: offsets from the point above the source, m, any shape.
      depth: of the centre, m, positive.
      volume: change of the sphere's volume, m^3; negative for deflation.
    """
    scale = (1 - poisson) * volume / np.pi / (x * x + y * y + depth * depth) ** 1.5
    return scale * x, scale * y, scale * depth


def okada(x: np.ndarray, y: np.ndarray, *, depth: float, dip: float, length: float, width: float,
          strike_slip: float = 0.0, dip_slip: float = 0.0, opening: float = 0.0,
          poisson: float = POISSON) -> Displacement:
    """A rectangular dislocation in its own axes: the surface displacement of Okada 1985 (BSSA 75), eqs. 24-30.

    The x axis runs along the strike, y to the left of it, and the origin lies above an end of the rectangle's lower
    edge: it reaches from x = 0 to `length`, and from `depth` upwards over `width` at angle `dip`.

    Args:
      x, y: m, any shape.
      depth: of the lower edge, m.
      dip: degrees; 90 is a vertical sheet (a dyke when it opens), 0 a horizontal one (a sill).
      strike_slip, dip_slip, opening: m; positive is left-lateral, thrust, and tensile.
    Returns:
      Displacement along x, along y, and up.
    """
    sin, cos = np.sin(np.radians(dip)), np.cos(np.radians(dip))
    cos = 0.0 if abs(cos) < 1e-5 else cos      # nearer to vertical, differences of terms in 1 / cos lose all digits
    x, y = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(y, np.float64))
    p, q = y * cos + depth * sin, y * sin - depth * cos
    corners = (x, p, 1), (x, p - width, -1), (x - length, p, -1), (x - length, p - width, 1)   # eq. 24
    slip, total = (strike_slip, dip_slip, opening), [0.0, 0.0, 0.0]
    for xi, eta, sign in corners:
        for axis, value in enumerate(_okada_corner(xi, eta, q, sin, cos, slip, 1 - 2 * poisson)):
            total[axis] = total[axis] + sign * value
    return tuple(total)


def _okada_corner(xi, eta, q, sin, cos, slip, alpha) -> Displacement:
    """Okada's f(xi, eta); `alpha` is mu / (lambda + mu)."""
    r = np.sqrt(xi * xi + eta * eta + q * q)
    y, d = eta * cos + q * sin, eta * sin - q * cos
    # Where terms are singular (in line with an edge, beyond an end, on the plane): the limits of Okada's text.
    in_line = np.abs(r + eta) < 1e-9 * (1 + r)
    per_eta = np.where(in_line, 0.0, 1 / np.where(in_line, 1.0, r * (r + eta)))
    log_eta = np.where(in_line, -np.log(np.where(in_line, r - eta, 1.0)), np.log(np.where(in_line, 1.0, r + eta)))
    end_on = np.abs(r + xi) < 1e-9 * (1 + r)
    per_xi = np.where(end_on, 0.0, 1 / np.where(end_on, 1.0, r * (r + xi)))
    on_plane = np.abs(q) < 1e-9 * (1 + r)
    angle = np.where(on_plane, 0.0, np.arctan(xi * eta / np.where(on_plane, 1.0, q * r)))

    if cos:
        b = np.sqrt(xi * xi + q * q)
        middle = np.abs(xi) < 1e-9 * (1 + r)
        ratio = (eta * (b + q * cos) + b * (r + b) * sin) / np.where(middle, 1.0, xi * (r + b) * cos)
        i5 = alpha * 2 / cos * np.where(middle, 0.0, np.arctan(ratio))
        i4 = alpha / cos * (np.log(r + d) - sin * log_eta)
        i3 = alpha * (y / (cos * (r + d)) - log_eta) + sin / cos * i4
        i1 = -alpha * xi / (cos * (r + d)) - sin / cos * i5
    else:
        i5 = -alpha * xi * sin / (r + d)
        i4 = -alpha * q / (r + d)
        i3 = alpha / 2 * (eta / (r + d) + y * q / (r + d) ** 2 - log_eta)
        i1 = -alpha / 2 * xi * q / (r + d) ** 2
    i2 = -alpha * log_eta - i3

    strike, thrust, opening = (s / (2 * np.pi) for s in slip)
    ux = (-strike * (xi * q * per_eta + angle + i1 * sin)
          - thrust * (q / r - i3 * sin * cos)
          + opening * (q * q * per_eta - i3 * sin * sin))
    uy = (-strike * (y * q * per_eta + q * cos * r * per_eta + i2 * sin)
          - thrust * (y * q * per_xi + cos * angle - i1 * sin * cos)
          + opening * (-d * q * per_xi - sin * (xi * q * per_eta - angle) - i1 * sin * sin))
    uz = (-strike * (d * q * per_eta + q * sin * r * per_eta + i4 * sin)
          - thrust * (d * q * per_xi + sin * angle - i5 * sin * cos)
          + opening * (y * q * per_xi + cos * (xi * q * per_eta - angle) - i5 * sin * sin))
    return ux, uy, uz


def sheet(x: np.ndarray, y: np.ndarray, *, depth: float, dip: float, strike: float, length: float, width: float,
          **slip: float) -> Displacement:
    """`okada` for a rectangle whose *centre* lies `depth` below the origin, in geographic axes.

    Args:
      x, y: m east and north of the centre.
      strike: degrees clockwise from north; the sheet dips to the right of it.
      slip: `strike_slip`, `dip_slip`, `opening`, m.
    Raises:
      ValueError: the sheet would reach above the surface.
    """
    half = width / 2 * np.sin(np.radians(dip))
    if depth < half:
        raise ValueError(f'a sheet of width {width} m at dip {dip} reaches the surface from depth {depth} m')
    sin, cos = np.sin(np.radians(strike)), np.cos(np.radians(strike))
    along, left = x * sin + y * cos, -x * cos + y * sin
    run = width / 2 * np.cos(np.radians(dip))
    ux, uy, uz = okada(along + length / 2, left + run, depth=depth + half, dip=dip, length=length, width=width, **slip)
    return ux * sin - uy * cos, ux * cos + uy * sin, uz


def line_of_sight(*, ascending: bool, incidence: float = 39.0, inclination: float = 12.0) -> np.ndarray:
    """Unit vector (east, north, up) from the ground to a right-looking satellite (Hanssen 2001, ch. 5).

    Args:
      incidence: degrees from the vertical.
      inclination: degrees between ground track and meridian; Sentinel-1 flies at heading -12 (ascending) or 192.
    """
    heading, tilt = np.radians(-inclination if ascending else 180 + inclination), np.radians(incidence)
    return np.array([-np.sin(tilt) * np.cos(heading), np.sin(tilt) * np.sin(heading), np.cos(tilt)])


def to_phase(displacement: Displacement, sight: np.ndarray, wavelength: float = WAVELENGTH) -> np.ndarray:
    """Unwrapped interferometric phase, rad: -4 pi / wavelength per metre of motion towards the satellite.

    Such motion shortens the two-way path (Hanssen 2001, ch. 2).
    """
    return -4 * np.pi / wavelength * sum(u * s for u, s in zip(displacement, sight))


def wrap(phase: np.ndarray) -> np.ndarray:
    """Phase in (-pi, pi]."""
    return np.pi - np.mod(np.pi - phase, 2 * np.pi)
