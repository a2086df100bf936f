"""One simulated frame: its interferograms, what the radar sees in each, and how an expert would annotate it."""
import dataclasses
from typing import Any

import numpy as np

from data_prep import deformation, scene
from data_prep.minicube_samples import DATE_SPLITS
from data_prep.minicube_store import ATMOSPHERE
from ssl_jax.errors import UserError

# Codes of the masks: in the order of the 2022 data set. The published minicubes don't tell theirs.
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
    """A primary acquisition and its secondaries, as indices of dates; `onset`: the first secondary that sees motion."""
    primary: int
    secondaries: tuple[int, ...]
    onset: int | None


def draw_groups(rng: np.random.Generator, index: int, primaries: int, share: float) -> tuple[np.ndarray, list[Group]]:
    """The acquisition dates of frame `index`, and its `primaries` groups in order, a `share` of which sees a motion."""
    dates = np.arange(ARCHIVE[0] + rng.integers(REPEAT), ARCHIVE[1], REPEAT)
    longest, frequencies = max(GROUP_LENGTHS), np.array(list(GROUP_LENGTHS.values()))
    counts = {split: max(1, round(primaries * portion)) for split, portion in SHARES.items()}
    counts['train'] += primaries - sum(counts.values())
    groups = []
    for (split, n), turn in zip(counts.items(), (0, 1 / 3, 2 / 3)):
        first, last = (np.datetime64(f'{d[:4]}-{d[4:6]}-{d[6:]}') for d in DATE_SPLITS[split])
        room = np.flatnonzero((dates[:-longest] >= first) & (dates[:-longest] <= last))
        if n > len(room):
            raise UserError(f'primaries={primaries}: {n} of them in {split}, but a frame has {len(room)} dates there')
        # Steps of the golden ratio spread the rounding over frames; frame 0 rounds up, so no split lacks positives.
        positives = int(n * share + 1 - 1e-9 - (index * 0.618034 + (turn if index else 0)) % 1)
        for rank, primary in enumerate(rng.permutation(room)[:n].tolist()):
            length = int(rng.choice(list(GROUP_LENGTHS), p=frequencies / frequencies.sum()))
            onset = int(length > 1 and rng.random() < 0.25)
            secondaries = tuple(range(primary + 1, primary + 1 + length))
            groups.append(Group(primary, secondaries, onset if rank < positives else None))
    return dates, sorted(groups, key=lambda g: g.primary)


def draw_swath(rng: np.random.Generator, shape: tuple[int, int], ascending: bool) -> np.ndarray:
    """True where the frame was imaged: half of the frames lose a strip along the tilted ground track."""
    if rng.random() < 0.5:
        return np.ones(shape, bool)
    rows, columns = np.mgrid[:shape[0], :shape[1]]
    across = columns + (1 if ascending else -1) * np.tan(np.radians(12)) * rows
    edge = rng.uniform(0.02, 0.15)
    return across > np.quantile(across, edge) if rng.random() < 0.5 else across < np.quantile(across, 1 - edge)


@dataclasses.dataclass(frozen=True)
class Frame:
    """What all interferograms of a frame share. Frames of even index are ascending."""
    seed: int
    index: int
    ground: scene.Terrain
    climate: float               # mean water vapour above sea level, kg/m^2
    swath: np.ndarray            # bool (height, width)

    def interferograms(self, group: Group, dates: np.ndarray) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
        """Rasters, by name of variable, and annotation of every interferogram of a group."""
        rng = np.random.default_rng([self.seed, 2, self.index, group.primary])
        smooth = scene.low_pass(self.ground.dem, 12e3 / SPACING)
        primary = self._weather(group.primary, dates, smooth)
        activity, stage, first_motion = ('', 'Rest', 0.0) if group.onset is None else self._source(rng)
        time_constant = rng.uniform(8, 50)
        found = []
        for position, acquisition in enumerate(group.secondaries):
            steps = 0 if group.onset is None else max(0, position - group.onset + 1)
            growth = min(steps, 1) if activity == 'Earthquake' else (
                np.expm1(-steps * REPEAT / time_constant) / np.expm1(-REPEAT / time_constant))
            secondary = self._weather(acquisition, dates, smooth)
            days = (acquisition - group.primary) * REPEAT
            motion = np.broadcast_to(np.float32(growth * first_motion), self.swath.shape)
            rasters, annotation = self._interferogram(rng, primary, secondary, days, activity, stage, motion)
            names = [str(dates[a]).replace('-', '') for a in (group.primary, acquisition)]
            found.append((rasters, dict(zip(('primary_date', 'secondary_date'), names)) | annotation))
        return found

    def _weather(self, acquisition: int, dates: np.ndarray, smooth: np.ndarray) -> scene.Weather:
        """Of one date: the same in every interferogram that the acquisition takes part in."""
        rng = np.random.default_rng([self.seed, 3, self.index, acquisition])
        season = (dates[acquisition] - dates[acquisition].astype('M8[Y]')).astype(int) / 365.25
        vapour = max(2.0, self.climate * (1 + 0.25 * np.cos(2 * np.pi * season)) + rng.normal(0, 2.0))
        return scene.weather(rng, self.ground, smooth, spacing=SPACING, vapour=vapour, incidence=INCIDENCE)

    def _source(self, rng: np.random.Generator) -> tuple[str, str, np.ndarray]:
        """Activity and stage (Unrest, ...) of a random source near the summit, and what its first pair sees, rad."""
        activity = str(rng.choice(list(SOURCES), p=list(SOURCES.values())))
        shape = np.array(self.swath.shape)
        firm = scene.low_pass((1 - self.ground.vegetation) * ~self.ground.water * self.swath, 4)
        places = np.array(self.ground.summit) + rng.normal(0, min(0.12 * shape.min(), 4e3 / SPACING), (4, 2))
        places = np.clip(places, 0.12 * shape, 0.88 * shape).astype(int)
        row, column = max(places, key=lambda at: firm[tuple(at)])       # where an interferogram shows it best
        rows, columns = np.mgrid[:shape[0], :shape[1]]
        x, y = (columns - column) * SPACING, (row - rows) * SPACING

        depth = rng.uniform(700, np.clip(0.1 * shape.min() * SPACING, 1000, 5000))
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
        sight = deformation.line_of_sight(ascending=self.index % 2 == 0, incidence=INCIDENCE)
        phase = deformation.to_phase(moved, sight)
        phase /= np.abs(phase).max()
        # Peaks span the published intensity levels, but no fringe is narrower than a wrapped phase can show.
        steepest = max(np.abs(g).max() for g in np.gradient(phase))
        peak = min(np.exp(rng.uniform(np.log(4), np.log(35))), 1.5 / steepest)
        deflates = rng.random() < 0.08
        stage = 'None' if activity == 'Earthquake' else 'Rebound' if deflates else 'Unrest'
        return activity, stage, (-peak if deflates else peak) * phase

    def _interferogram(self, rng: np.random.Generator, primary: scene.Weather, secondary: scene.Weather, days: int,
                       activity: str, stage: str, motion: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        shape, ground = motion.shape, self.ground
        rows, columns = np.mgrid[:shape[0], :shape[1]].astype(np.float32)
        flaw = rng.choice(['', 'corrupted', 'processing_error', 'no_info'], p=[0.95, 0.015, 0.025, 0.01])
        tilt = rng.normal(0, 4.0 if rng.random() < 0.01 else 0.4, 2)      # what orbits leave, rad across the frame
        ramp = tilt[0] * rows / shape[0] + tilt[1] * columns / shape[1] + rng.uniform(-np.pi, np.pi)
        atmosphere = scene.delay_phase(primary, secondary)
        phase = motion + atmosphere + ramp
        expected = scene.coherence(ground, SPACING, days, rng.uniform(0.8, 1.0))
        for slope in np.gradient(motion):      # what averaging over a pixel leaves of a phase ramp across it
            expected = expected * np.abs(np.sinc(slope / (2 * np.pi)))
        cut = int(shape[0] * rng.uniform(0.3, 0.7))
        if flaw == 'processing_error':         # a burst that was not aligned
            phase[cut:] += 0.4 * (rows[cut:] - cut)
        elif flaw:
            expected[cut if flaw == 'corrupted' else 0:] *= 0.03
        phase, estimate = scene.decorrelate(rng, phase, expected)

        usable = self.swath & ~ground.water
        mask = (np.abs(motion) >= VISIBLE) & usable
        if mask.sum() < SMALLEST:
            mask, activity, stage = np.zeros(shape, bool), '', 'Rest'
        quake = activity == 'Earthquake'
        cycles = np.abs(motion[mask]).max() / (2 * np.pi) if activity else 0
        intensity = 'None' if quake or not activity else 'Low' if cycles < 1.5 else 'Medium' if cycles < 3 else 'High'
        rasters = {'insar_difference': np.where(self.swath, phase, np.nan),
                   'insar_coherence': np.where(self.swath, 255 * estimate, np.nan),
                   'deformation_mask': mask * (2 if quake else 1),
                   'activity_type_mask': mask * ACTIVITIES.get(activity, 0),
                   'intensity_level_mask': mask * INTENSITIES[intensity]}
        for date, weather in (('primary', primary), ('secondary', secondary)):
            for name, field in zip(ATMOSPHERE, (weather.vapour, weather.pressure, weather.temperature)):
                rasters[f'{date}_date_{name}'] = field

        stratified = usable.any() and np.ptp(atmosphere[usable]) > 2 * np.pi
        turbulent = np.hypot(primary.turbulence, secondary.turbulence) * 4 * np.pi / deformation.WAVELENGTH > 1
        kind = 'earthquake' if quake else f'{activity.lower()}-type deformation'
        return rasters, {
            'corrupted': int(flaw == 'corrupted'), 'processing_error': 2 * int(flaw == 'processing_error'),
            'glacier_fringes': 0, 'orbital_fringes': int(np.abs(tilt).max() > 2 * np.pi),
            'atmospheric_fringes': int(stratified) + 2 * int(turbulent),
            'low_coherence': int(not usable.any() or estimate[usable].mean() < 0.3), 'no_info': int(flaw == 'no_info'),
            'image_artifacts': 0, 'is_crowd': 0, 'confidence': 0.8,
            'label': ['Earthquake'] if quake else ['Deformation'] if activity else ['Non_Deformation'],
            'activity_type': [activity] if activity else [], 'intensity_level': [intensity] if activity else [],
            'phase': stage, 'segmentation_mask': [outline(mask)] if activity else [],
            'caption': ('Turbulent mixing can be detected. ' if turbulent else '') + (
                f'A pattern of {kind} can be detected, its intensity is {intensity.lower()}.' if activity else
                'No deformation activity can be detected.')}


def outline(mask: np.ndarray, corners: int = 24) -> list[float]:
    """A polygon [x0, y0, x1, y1, ...] around a mask, in pixels of the 2022 images (0.3 of a minicube's)."""
    y, x = (n.astype(float) for n in np.nonzero(mask))
    cy, cx = y.mean(), x.mean()
    sector = ((np.arctan2(y - cy, x - cx) / (2 * np.pi) + 0.5) * corners).astype(int) % corners
    reach = np.zeros(corners)
    np.maximum.at(reach, sector, np.hypot(y - cy, x - cx))
    angle = ((np.arange(corners) + 0.5) / corners - 0.5) * 2 * np.pi
    points = np.stack([cx + reach * np.cos(angle), cy + reach * np.sin(angle)], 1)
    return (0.3 * points).round(2).ravel().tolist()
