"""Interferograms in the folders of Hephaestus (2022) and of LiCSAR, as pixels of named channels.

    <anything>/<frame>/interferograms/<primary>_<secondary>/<primary>_<secondary>.geo.diff.png   or InSAR.png
                                                            <primary>_<secondary>.geo.cc.png     or Coherence.png

They are read from a folder, a zip or a tar. `wrapped_phase` recovers numbers from colours.
"""
import dataclasses
import datetime
import functools
import re
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.archives import File, Folder, Source
from data_prep.dataset import ChannelSpec
from data_prep.hephaestus_annotations import parse_date
from data_prep.pictures import check_whole
from data_prep.problems import Problems
from ssl_jax.data.decode import decode_image
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

CHANNELS = {
    'coherence': ChannelSpec('coherence'),              # grey, as the others, from 0 to 255
    'interferogram': ChannelSpec('interferogram'),      # the coloured fringes, as grey
    'red': ChannelSpec('red'), 'green': ChannelSpec('green'), 'blue': ChannelSpec('blue'),
    'phase': ChannelSpec('phase', kind='phase', period=256.0),
}
_PATH = re.compile(r'(?:.*/)?([^/]+)/interferograms/(\d{8}_\d{8})/'
                   r'(?:(?:(?P<diff>\2\.geo\.diff|InSAR)|(?P<cc>\2\.geo\.cc|Coherence))\.png)', re.ASCII)

HUES = 1 << 13      # steps that a hue is rounded to

# Wrapped phase from -pi to pi in LiCSAR's pictures: ColorBrewer's 11 colours RdYlBu, from blue to red.
_PALETTE = ((49, 54, 149), (69, 117, 180), (116, 173, 209), (171, 217, 233), (224, 243, 248), (255, 255, 191),
            (254, 224, 144), (253, 174, 97), (244, 109, 67), (215, 48, 39), (165, 0, 38))


@dataclasses.dataclass(frozen=True)
class Interferogram:
    """Where its pictures are, None where there is none."""
    frame: str
    primary: datetime.date
    secondary: datetime.date
    difference: File | None
    coherence: File | None

    @property
    def name(self) -> str:
        return f'{self.frame}/{self.primary:%Y%m%d}_{self.secondary:%Y%m%d}'


def find_interferograms(source: Source, problems: Problems | None = None) -> dict[tuple[str, str], Interferogram]:
    """All interferograms by (frame, pair), sorted. Other files are ignored.

    Raises:
      UserError: there are none, or one has two pictures of the same kind.
    """
    problems = problems or Problems('stop')
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for file in source.files():
        match = _PATH.fullmatch(file.path)
        if match:
            frame, pair = match[1], match[2]
            try:
                primary, secondary = (parse_date('date', d) for d in pair.split('_'))
                kind = 'difference' if match['diff'] else 'coherence'
                files = found.setdefault((frame, pair), {'primary': primary, 'secondary': secondary})
                if kind in files:
                    raise ValueError(f'{files[kind].path} is the {kind} picture of the same interferogram')
                files[kind] = file
            except ValueError as error:
                problems.add(file.path, str(error))
    if not found:
        raise UserError('no interferogram found, expected files <frame>/interferograms/<primary>_<secondary>/'
                        '<primary>_<secondary>.geo.diff.png or InSAR.png')
    return {key: Interferogram(key[0], **{'difference': None, 'coherence': None} | files)
            for key, files in sorted(found.items())}


def missing_picture(interferogram: Interferogram | None, channels: Sequence[str]) -> str:
    """What lacks for these channels, '' if nothing does."""
    if interferogram is None:
        return 'the interferogram has no files'
    if 'coherence' in channels and interferogram.coherence is None:
        return 'there is no .geo.cc.png or Coherence.png'
    if set(channels) - {'coherence'} and interferogram.difference is None:
        return 'there is no .geo.diff.png or InSAR.png'
    return ''


def picture_size(source: Source, file: File) -> tuple[int, int]:
    """(H, W) from the header of a PNG.

    Raises:
      UserError: it has none.
    """
    if isinstance(source, Folder):
        with open(f'{source.root}/{file.path}', 'rb') as opened:
            head = opened.read(24)
    else:
        head = source.read(file.place)[:24]
    if len(head) < 24 or not head.startswith(b'\x89PNG\r\n\x1a\n'):
        raise UserError(f'{file.path} is not a PNG')
    width, height = struct.unpack('>II', head[16:])
    return height, width


@functools.lru_cache(4)    # tiles of one interferogram follow each other, so it is decoded once
def read_interferogram(source: Source, interferogram: Interferogram,
                       channels: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray | None]:
    """The channels (H, W, C) uint8, and validity (H, W, C) bool if the phase is one of them, else None.

    Raises:
      UserError: a picture is missing or damaged, or the two differ in size.
    """
    missing = missing_picture(interferogram, channels)
    if missing:
        raise UserError(f'{interferogram.name}: {missing}')
    planes, colours = {}, None
    if 'coherence' in channels:
        planes['coherence'] = _read(source, interferogram.coherence, 1)[..., 0]
    if set(channels) - {'coherence'}:
        colours = _read(source, interferogram.difference, 3)
        planes |= dict(zip(('red', 'green', 'blue'), np.moveaxis(colours, 2, 0)))
    if 'interferogram' in channels:
        planes['interferogram'] = to_grey(colours)
    valid = None
    if 'phase' in channels:
        planes['phase'], coloured = wrapped_phase(colours)
        if not coloured.any() and colours.any():
            raise UserError(f'{interferogram.difference.path} has no colours, and so no phase')
        valid = np.stack([coloured if c == 'phase' else np.ones_like(coloured) for c in channels], -1)
    sizes = {name: planes[name].shape for name in channels}
    if len(set(sizes.values())) > 1:
        shown = ', '.join(f'{name} {w}x{h}' for name, (h, w) in sizes.items())
        raise UserError(f'{interferogram.name}: its pictures differ in size: {shown}')
    image = np.stack([planes[name] for name in channels], -1)
    for array in (image, valid):
        if array is not None:
            array.flags.writeable = False   # cached, and handed out as it is
    return image, valid


def _read(source: Source, file: File, channels: int) -> np.ndarray:
    try:
        data = source.read(file.place)
        check_whole(data)
        pixels = decode_image(data, channels)
    except ValueError as error:
        raise UserError(f'{file.path}: {first_line(error)}') from error
    if pixels.dtype != np.uint8:
        raise UserError(f'{file.path} has pixels of {pixels.dtype}, expected 8 bits')
    return pixels


def to_grey(colours: np.ndarray) -> np.ndarray:
    """Luma (H, W) uint8 of colours (H, W, 3), with the weights of ITU-R BT.601."""
    from PIL import Image
    return np.asarray(Image.fromarray(np.ascontiguousarray(colours)).convert('L'))


def wrapped_phase(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Phase (H, W) uint8, 256 to a cycle, 0 and 256 = -pi, out of LiCSAR's colours (H, W, 3); and where it is known.

    The hue alone tells it: from blue over cyan, yellow and red it goes once round the circle, and the shading by
    terrain, which changes brightness and saturation, leaves it as it is. A pixel without colour has no phase: black is
    no data. It is coarse near 0, where colours are pale, and wrong where noise or resampling has mixed them.
    """
    hue, coloured = _hue(colours)
    return _phases()[np.round(hue * HUES).astype(np.int32) % HUES], coloured


@functools.cache
def _phases() -> np.ndarray:
    """Phase (HUES,) uint8 of hues from 0 up to a cycle."""
    place = np.linspace(0, len(_PALETTE) - 1, 1025)
    hue, _ = _hue(np.stack([np.interp(place, range(len(_PALETTE)), column) for column in zip(*_PALETTE)], -1))
    fall = np.maximum.accumulate(np.mod(hue[0] - hue, 1))
    middle = (1 - fall[-1]) / 2     # of the hues beyond the palette's ends, which are mixtures of both
    below = np.mod(hue[0] - np.arange(HUES) / HUES + middle, 1) - middle
    cycles = np.interp(below, fall, np.linspace(0, 1, len(fall)))
    return (np.round(cycles * 256).astype(np.int32) % 256).astype(np.uint8)


def _hue(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hue in cycles, 0 = red, 1/3 = green; and where it is defined."""
    r, g, b = np.moveaxis(colours.astype(np.float32), -1, 0)
    x, y = 2 * r - g - b, np.sqrt(np.float32(3)) * (g - b)
    return np.arctan2(y, x) / np.float32(2 * np.pi), (x != 0) | (y != 0)
