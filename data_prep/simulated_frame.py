"""One simulated frame: which interferograms it has, what the radar sees in each, and how an expert would annotate it."""
import dataclasses
from typing import Any

import numpy as np

from data_prep import deformation, scene
from data_prep.hephaestus_minicubes import ATMOSPHERE
from data_prep.minicube_samples import DATE_SPLITS
from ssl_jax.errors import UserError

ACTIVITIES = {'Mogi': 1, 'Dyke': 2, 'Sill': 3, 'Spheroid': 4, 'Earthquake': 5, 'Unidentified': 6}
INTENSITIES = {'None': 0, 'Low': 1, 'Medium': 2, 'High': 3}
SPACING = 100.0                 # metres per pixel
INCIDENCE = 39.0                # degrees
ARCHIVE = np.datetime64('2014-10-07'), np.datetime64('2021-11-20')
REPEAT = 12                     # days between acquisitions
SHARES = {'train': 0.52, 'val': 0.14, 'test': 0.34}                         # of the primary dates, as published
GROUP_LENGTHS = {1: 277, 2: 697, 3: 1800, 4: 2353, 5: 123, 6: 116}          # published frequencies
SOURCES = {'Sill': 0.55, 'Dyke': 0.22, 'Mogi': 0.18, 'Earthquake': 0.05}
VISIBLE = np.pi / 2             # rad of deformation from which a pixel belongs to the mask
SMALLEST = 12                   # pixels: a smaller mask counts as no deformation


@dataclasses.dataclass(frozen=True)
class Group:
    """A primary acquisition and its secondaries, as indices of dates; `onset`: the first secondary that sees a deformation."""
    primary: int
    secondaries: tuple[int, ...]
    onset: int | None


def draw_groups(rng: np.random.Generator, index: int, primaries: int, share: float) -> tuple[np.ndarray, list[Group]]:
    """The acquisition dates of frame `index`, and its groups in order: `primaries` of them, a `share` of which deforms."""
    dates = np.arange(ARCHIVE[0] + rng.integers(REPEAT), ARCHIVE[1], REPEAT)
    longest, frequencies = max(GROUP_LENGTHS), np.array(list(GROUP_LENGTHS.values()))
    counts = {split: max(1, round(primaries * portion)) for split, portion in SHARES.items()}
    counts['train'] += primaries - sum(counts.values())
    groups = []
    for (split, n), turn in zip(counts.items(), (0, 1 / 3, 2 / 3)):
        first, last = (np.datetime64(f'{d[:4]}-{d[4:6]}-{d[6:]}') for d in DATE_SPLITS[split])
        room = np.flatnonzero((dates[:-longest] >= first) & (dates[:-longest] <= last))
        if n > len(room):
            raise UserError(f'primaries={primaries}: a frame has only {len(room)} acquisitions for the {n} of split {split}')
        # The golden ratio spreads the rounding over frames: the share is kept, and frame 0 has a positive in every split.
        positives = int(n * share + 1 - 1e-9 - (index * 0.618034 + (turn if index else 0)) % 1)
        for rank, primary in enumerate(rng.permutation(room)[:n]):
            length = int(rng.choice(list(GROUP_LENGTHS), p=frequencies / frequencies.sum()))
            onset = int(length > 1 and rng.random() < 0.25)
            following = tuple(range(int(primary) + 1, int(primary) + 1 + length))
            groups.append(Group(int(primary), following, onset if rank < positives else None))
    return dates, sorted(groups, key=lambda g: g.primary)


def draw_swath(rng: np.random.Generator, shape: tuple[int, int], ascending: bool) -> np.ndarray:
    """True where the frame was imaged: half of the frames lose a strip along the tilted flight direction."""
    rows, columns = np.mgrid[:shape[0], :shape[1]]
    if rng.random() < 0.5:
        return np.ones(shape, bool)
    across = columns + (1 if ascending else -1) * np.tan(np.radians(12)) * rows
    edge = rng.uniform(0.02, 0.15)
    return across > np.quantile(across, edge) if rng.random() < 0.5 else across < np.quantile(across, 1 - edge)


@dataclasses.dataclass(frozen=True)
class Frame:
    """What stays the same in all interferograms of a frame; frames of even index are ascending."""
    seed: int
    index: int
    ground: scene.Terrain
    climate: float               # mean water vapour over sea level, kg/m^2
    swath: np.ndarray

    def interferograms(self, group: Group, dates: np.ndarray) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
        """Rasters and annotation of every interferogram of a group."""
        rng = np.random.default_rng([self.seed, 2, self.index, group.primary])
        smooth = scene.low_pass(self.ground.dem, 12e3 / SPACING)
        primary = self._weather(group.primary, dates, smooth)
        activity, unit = ('', 0.0) if group.onset is None else self._source(rng)
        time_constant = rng.uniform(8, 50)
        found = []
        for position, acquisition in enumerate(group.secondaries):
            moved = 0.0
            if group.onset is not None and position >= group.onset:
                steps = position - group.onset + 1
                course = lambda n: 1 - np.exp(-n * REPEAT / time_constant)
                moved = unit * (1.0 if activity == 'Earthquake' else course(steps) / course(1))
            secondary = self._weather(acquisition, dates, smooth)
            days = (acquisition - group.primary) * REPEAT
            fields, annotation = self._interferogram(rng, primary, secondary, days, activity, moved)
            found.append((fields, {'primary_date': _compact(dates[group.primary]),
                                   'secondary_date': _compact(dates[acquisition])} | annotation))
        return found

    def _weather(self, acquisition: int, dates: np.ndarray, smooth: np.ndarray) -> scene.Weather:
        rng = np.random.default_rng([self.seed, 3, self.index, acquisition])
        season = (dates[acquisition] - dates[acquisition].astype('M8[Y]')).astype(int) / 365.25
        vapour = max(2.0, self.climate * (1 + 0.25 * np.cos(2 * np.pi * season)) + rng.normal(0, 2.0))
        return scene.weather(rng, self.ground, smooth, spacing=SPACING, vapour=vapour, incidence=INCIDENCE)

    def _source(self, rng: np.random.Generator) -> tuple[str, np.ndarray]:
        """The kind of a random source near the summit, and the phase of its first interferogram, rad."""
        activity = str(rng.choice(list(SOURCES), p=list(SOURCES.values())))
        rows, columns = np.mgrid[:self.ground.dem.shape[0], :self.ground.dem.shape[1]]
        extent = min(rows.shape) * SPACING
        firm = scene.low_pass((1 - self.ground.vegetation) * ~self.ground.water * self.swath, 4)
        places = np.array(self.ground.summit) + rng.normal(0, 0.12, (4, 2)) * rows.shape
        places = np.clip(places, 0.12 * np.array(rows.shape), 0.88 * np.array(rows.shape)).astype(int)
        row, column = max(places, key=lambda at: firm[tuple(at)])       # where an interferogram would show it best
        x, y = (columns - column) * SPACING, (row - rows) * SPACING

        depth = rng.uniform(700, np.clip(0.1 * extent, 1000, 5000))
        at = dict(strike=rng.uniform(0, 360), depth=depth)
        match activity:
            case 'Mogi':
                moved = deformation.mogi(x, y, depth=depth, volume=1e6)
            case 'Sill':
                length, width = depth * rng.uniform(0.8, 2.2, 2)
                moved = deformation.sheet(x, y, **at, dip=0, length=length, width=width, opening=1)
            case 'Dyke':
                length, width = depth * rng.uniform(1.5, 4), depth * rng.uniform(0.8, 1.5)
                moved = deformation.sheet(x, y, **at, dip=rng.uniform(75, 90), length=length, width=width, opening=1)
            case 'Earthquake':
                slip = dict(zip(('strike_slip', 'dip_slip'), rng.normal(size=2)))
                moved = deformation.sheet(x, y, **at, dip=rng.uniform(45, 90), length=3 * depth, width=depth, **slip)
        phase = deformation.to_phase(moved, deformation.line_of_sight(ascending=self.index % 2 == 0, incidence=INCIDENCE))
        # Peaks as in the published intensity levels, but no steeper than a wrapped phase can show.
        peak = np.exp(rng.uniform(np.log(4), np.log(35)))
        steepest = max(np.abs(g).max() for g in np.gradient(phase / np.abs(phase).max()))
        sign = -1 if activity != 'Earthquake' and rng.random() < 0.08 else 1
        return activity, (sign * min(peak, 1.5 / steepest) / np.abs(phase).max() * phase).astype(np.float32)

    def _interferogram(self, rng, primary: scene.Weather, secondary: scene.Weather, days: int, activity: str,
                       moved: np.ndarray | float) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        shape, ground = self.ground.dem.shape, self.ground
        rows, columns = np.mgrid[:shape[0], :shape[1]].astype(np.float32)
        moved = np.broadcast_to(np.float32(moved), shape)
        fault = rng.choice(['', 'corrupted', 'processing_error', 'no_info'], p=[0.95, 0.015, 0.025, 0.01])
        tilt = rng.normal(0, 4.0 if rng.random() < 0.01 else 0.4, 2)
        ramp = tilt[0] * (rows / shape[0] - 0.5) + tilt[1] * (columns / shape[1] - 0.5)
        atmosphere = scene.delay_phase(primary, secondary)
        phase = moved + atmosphere + ramp + rng.uniform(-np.pi, np.pi)
        expected = scene.coherence(ground, SPACING, days, rng.uniform(0.8, 1.0))
        for slope in np.gradient(moved):      # what averaging over a pixel leaves of a phase ramp across it
            expected = expected * np.abs(np.sinc(slope / (2 * np.pi)))
        cut = int(shape[0] * rng.uniform(0.3, 0.7))
        if fault == 'processing_error':       # a burst that was not aligned
            phase[cut:] += 0.4 * (rows[cut:] - cut)
        elif fault:
            expected[cut if fault == 'corrupted' else 0:] *= 0.03
        phase, estimate = scene.decorrelate(rng, phase, expected)
        usable = self.swath & ~ground.water
        low = estimate[usable].mean() < 0.3 if usable.any() else True

        mask = (np.abs(moved) >= VISIBLE) & usable
        if mask.sum() < SMALLEST:
            mask, activity = np.zeros(shape, bool), ''
        cycles = np.abs(moved[mask]).max() / (2 * np.pi) if activity else 0
        quake = activity == 'Earthquake'
        intensity = 'None' if quake or not activity else 'Low' if cycles < 1.5 else 'Medium' if cycles < 3 else 'High'
        rebound = activity and not quake and moved.flat[np.abs(moved).argmax()] > 0
        stratified = np.ptp(atmosphere[usable]) > 2 * np.pi if usable.any() else False
        turbulent = np.hypot(primary.turbulence, secondary.turbulence) * 4 * np.pi / deformation.WAVELENGTH > 1
        image = {'insar_difference': np.where(self.swath, phase, np.nan),
                 'insar_coherence': np.where(self.swath, 255 * estimate, np.nan),
                 'deformation_mask': mask * (2 if quake else 1),
                 'activity_type_mask': mask * ACTIVITIES.get(activity, 0),
                 'intensity_level_mask': mask * INTENSITIES[intensity]}
        for date, weather in (('primary', primary), ('secondary', secondary)):
            for name, field in zip(ATMOSPHERE, (weather.vapour, weather.pressure, weather.temperature)):
                image[f'{date}_date_{name}'] = field
        kind = {'Earthquake': 'An earthquake'}.get(activity, f'A {activity.lower()}-type')
        annotation = {
            'corrupted': int(fault == 'corrupted'), 'processing_error': 2 * int(fault == 'processing_error'),
            'glacier_fringes': 0, 'orbital_fringes': int(np.abs(tilt).max() > 2 * np.pi),
            'atmospheric_fringes': int(stratified) + 2 * int(turbulent), 'low_coherence': int(low),
            'no_info': int(fault == 'no_info'), 'image_artifacts': 0,
            'label': ['Earthquake'] if quake else ['Deformation'] if activity else ['Non_Deformation'],
            'activity_type': [activity] if activity else [], 'intensity_level': [intensity] if activity else [],
            'phase': 'None' if quake else 'Rebound' if rebound else 'Unrest' if activity else 'Rest', 'confidence': 0.8,
            'segmentation_mask': [_outline(mask)] if activity else [], 'is_crowd': 0,
            'caption': ('Turbulent mixing can be detected. ' if turbulent else '') + (
                f'{kind} deformation pattern of {intensity.lower()} intensity can be detected.' if activity else
                'No deformation activity can be detected.')}
        return image, annotation


def _compact(date: np.datetime64) -> str:
    return str(date).replace('-', '')


def _outline(mask: np.ndarray, corners: int = 24) -> list[float]:
    """A polygon [x0, y0, x1, y1, ...] around a mask, in pixels of the 2022 images (0.3 of ours)."""
    y, x = (n.astype(float) for n in np.nonzero(mask))
    cy, cx = y.mean(), x.mean()
    sector = ((np.arctan2(y - cy, x - cx) / (2 * np.pi) + 0.5) * corners).astype(int) % corners
    reach = np.zeros(corners)
    np.maximum.at(reach, sector, np.hypot(y - cy, x - cx))
    angle = ((np.arange(corners) + 0.5) / corners - 0.5) * 2 * np.pi
    points = np.stack([cx + reach * np.cos(angle), cy + reach * np.sin(angle)], 1)
    return (0.3 * points).round(2).ravel().tolist()
