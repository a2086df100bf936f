"""Folders of images to records: PNG, JPEG, TIFF or BMP in class folders, on disk, in a zip or a tar (also gz, bz2, xz).

    python -m data_prep.image_folder --input=cifar10.tar.xz --output=DIR --val_fraction=0.1
    python -m data_prep.image_folder --input=FOLDER --output=DIR --channels=phase.png,coherence.png,dem.png \
        --kinds=phase:256,linear,linear --nodata=127,0,

Paths are `<split>/<class>/x.jpg`, with splits train, val (or valid, validation) and test; or `<class>/x.jpg`, split at
random by `--val_fraction` and `--test_fraction`, stratified by class, by whole groups where `--group_regex` finds
one in the path; or split as `--split_file` says. Where train is given and val is not, `--val_fraction` takes it out of
train. Images that lie in no class folder, or `--unlabelled`, make an unlabelled data set; deeper folders belong to the
class that they are in.

An image is one file of 1 to 4 channels, 8 or 16 bits; PNG and JPEG bytes are copied as they are (`--decode` stores
pixels instead). With `--channels`, it is a folder that holds one single-channel file per channel.
"""
import argparse
import collections
import dataclasses
import hashlib
import io
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep import convert
from data_prep.archives import File, Source, open_source
from data_prep.convert import ChannelSpec, Dataset, Item
from data_prep.pictures import check_whole
from data_prep.shards import PARTIAL
from data_prep.splits import from_file, stratified
from ssl_jax.data.decode import decode_image
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

SUFFIXES = {'.png': 'png', '.jpg': 'jpeg', '.jpeg': 'jpeg', '.tif': 'raw', '.tiff': 'raw', '.bmp': 'raw'}
SPLITS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}
CHANNELS = {'L': ('grey',), 'RGB': ('red', 'green', 'blue'), 'RGBA': ('red', 'green', 'blue', 'alpha')}
# What a picture's mode is stored as. 16-bit colour reads as 8-bit in Pillow, so it is told apart by the decoder.
_MODES = {'1': 'L', 'L': 'L', 'I;16': 'L', 'I;16B': 'L', 'F': 'L', 'P': 'RGB', 'RGB': 'RGB', 'CMYK': 'RGB',
          'YCbCr': 'RGB', 'LA': 'RGBA', 'PA': 'RGBA', 'RGBA': 'RGBA'}


@dataclasses.dataclass(frozen=True)
class _Load:
    """Loads an item whose data are the places of its files."""
    source: Source
    mode: str | None            # of single files; None = a stack of single-channel files
    convertible: bool           # colour may be turned to grey, and alpha dropped: asked for by --mode
    decode: bool

    def __call__(self, item: Item) -> Mapping[str, Any]:
        planes = []
        for name, place in item.data:
            data = self.source.read(place)
            try:
                mode = check_whole(data)
                if not self.convertible:
                    self._check_mode(name, mode or picture_mode(data))
                if not self.decode:
                    return {'image': data}
                planes.append(read_pixels(data, len(CHANNELS[self.mode or 'L'])))
            except ValueError as error:
                raise UserError(f'{name}: {first_line(error)}') from error
        if len({(p.shape, p.dtype) for p in planes}) > 1:
            found = ', '.join(f'{name} {p.dtype} {p.shape[:2]}' for (name, _), p in zip(item.data, planes))
            raise UserError(f'the channels of {item.key!r} differ: {found}')
        return {'image': np.concatenate(planes, -1)}

    def _check_mode(self, name: str, mode: str) -> None:
        if self.mode is None and mode != 'L':
            raise UserError(f'{name} has {len(CHANNELS[mode])} channels, expected one per file')
        if self.mode and len(CHANNELS[mode]) > len(CHANNELS[self.mode]):
            raise UserError(f'{name} is {mode} where others are {self.mode}: --mode={mode} keeps all channels, '
                            f'--mode={self.mode} drops some')


def picture_mode(data: bytes) -> str:
    """'L', 'RGB' or 'RGBA', from the header of an image file.

    Raises:
      ValueError: not an image, or of another mode.
    """
    from PIL import Image
    try:
        with Image.open(io.BytesIO(data)) as picture:
            mode = picture.mode
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:    # Pillow's words for a damaged file
        raise ValueError(f'{len(data)} bytes are not a readable image') from error
    if mode not in _MODES:
        raise ValueError(f'an image of mode {mode}, expected one of {", ".join(_MODES)}')
    return _MODES[mode]


def read_pixels(data: bytes, channels: int) -> np.ndarray:
    """The pixels of an image file, (H, W, channels): uint8, uint16, or float32 from a TIFF.

    Raises:
      ValueError: damaged, or it cannot give this many channels.
    """
    from PIL import Image
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode not in ('F', 'I;16', 'I;16B') or picture.format in ('PNG', 'JPEG'):
                return decode_image(data, channels)
            pixels = np.asarray(picture)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f'{len(data)} bytes are not a readable image ({first_line(error)})') from error
    if channels != 1:
        raise ValueError(f'one channel of {pixels.dtype} where {channels} are expected')
    return pixels[..., None].astype(pixels.dtype.newbyteorder('='))


def describe(source: Source, *, name: str, channels: Sequence[str] = (), kinds: str = '', nodata: str = '',
             mode: str | None = None, decode: bool = False, unlabelled: bool = False, val_fraction: float = 0,
             test_fraction: float = 0, seed: int = 0, split_file: str = '', group_regex: str = '',
             provenance: Mapping[str, Any]) -> Dataset:
    """The data set of an image folder or archive; the arguments are the flags of this converter.

    Raises:
      UserError: no images, or images in places that don't fit together.
    """
    files = [f for f in source.files() if not any(p.startswith(('.', '__MACOSX')) for p in f.path.split('/'))]
    examples = _stacks(files, channels) if channels else _singles(files)
    others = len(files) - sum(map(len, examples.values()))
    if others:
        print(f'{others} of {len(files)} files are no images and are left out')
    examples = _without_common_folder(examples)
    labels = _labels(examples, unlabelled)
    classes = sorted({c for _, c in labels.values() if c is not None})
    items = {}
    for key, parts in examples.items():
        split, label = labels[key]
        item = Item(key, _group(key, group_regex), None if label is None else classes.index(label),
                    tuple((f.path, f.place) for f in parts))
        items.setdefault(split, []).append(item)
    items = _split(items, {'val': val_fraction, 'test': test_fraction}, seed, split_file)

    encodings = {SUFFIXES[pathlib.PurePath(f.path).suffix.lower()] for parts in examples.values() for f in parts}
    raw = decode or bool(channels) or 'raw' in encodings
    if channels:
        names, found = [pathlib.PurePath(c).stem for c in channels], None
    else:
        found = mode or _widest_mode(source, [parts[0] for parts in examples.values()])
        names = CHANNELS[found]
    digest = hashlib.blake2b(repr([(f.path, f.size) for f in files]).encode(), digest_size=16).hexdigest()
    return Dataset(name, _channels(names, kinds, nodata), classes, items, _Load(source, found, mode is not None, raw),
                   {**provenance, 'files': len(files), 'listing': digest},
                   encoding='raw' if raw else 'png' if encodings == {'png'} else 'jpeg')


def _singles(files: Sequence[File]) -> dict[str, list[File]]:
    found = {f.path: [f] for f in files if pathlib.PurePath(f.path).suffix.lower() in SUFFIXES}
    if not found:
        raise UserError(f'none of the {len(files)} files is an image ({", ".join(SUFFIXES)})')
    return found


def _stacks(files: Sequence[File], channels: Sequence[str]) -> dict[str, list[File]]:
    folders = collections.defaultdict(dict)
    for file in files:
        folder, _, name = file.path.rpartition('/')
        if name in channels:
            folders[folder][name] = file
    if not folders:
        raise UserError(f'no folder holds a file {channels[0]!r}: --channels names the files that make one image')
    for folder, found in folders.items():
        missing = [c for c in channels if c not in found]
        if missing:
            raise UserError(f'{folder}/{missing[0]} is missing: every image needs {", ".join(channels)}')
    return {folder: [found[c] for c in channels] for folder, found in folders.items()}


def _without_common_folder(examples: Mapping[str, list[File]]) -> dict[str, list[File]]:
    """Archives often hold all in one folder of their own, which is no class."""
    while True:
        tops = {key.split('/')[0] for key in examples}
        if len(tops) > 1 or tops & set(SPLITS) or any('/' not in key for key in examples):
            return dict(examples)
        examples = {key.partition('/')[2]: files for key, files in examples.items()}


def _labels(examples: Mapping[str, list[File]], unlabelled: bool) -> dict[str, tuple[str | None, str | None]]:
    """key -> (split, class), either None where the path doesn't tell."""
    paths = {key: key.split('/') for key in examples}
    tops = {path[0] for path in paths.values()}
    given = tops <= set(SPLITS) and 'train' in tops
    if not given and 'train' in tops:
        strange = sorted(tops - set(SPLITS))
        raise UserError(f'{strange[0]!r} lies beside train: expected the splits {", ".join(SPLITS)} only')
    labels = {}
    for key, path in paths.items():
        split, rest = (SPLITS[path[0]], path[1:]) if given else (None, path)
        labels[key] = split, rest[0] if len(rest) > 1 and not unlabelled else None
    bare = [key for key, (_, label) in labels.items() if label is None]
    if bare and len(bare) < len(labels):
        raise UserError(f'{bare[0]} lies in no class folder, others do: --unlabelled takes all without labels')
    return labels


def _group(key: str, regex: str) -> str:
    if not regex:
        return ''
    match = re.search(regex, key)
    if not match:
        raise UserError(f'--group_regex={regex!r} finds nothing in {key!r}')
    return match.group(1 if match.re.groups else 0)


def _split(items: Mapping[str | None, list[Item]], fractions: Mapping[str, float], seed: int,
           split_file: str) -> dict[str, list[Item]]:
    if split_file:
        if any(fractions.values()) or 'train' in items:
            other = 'the folders tell the splits' if 'train' in items else '--val_fraction or --test_fraction is given'
            raise UserError(f'--split_file={split_file}: {other} already')
        return from_file(items[None], split_file)
    fractions = {s: f for s, f in fractions.items() if f}
    for split in fractions:
        if split in items:
            raise UserError(f'--{split}_fraction={fractions[split]}: there is a split {split!r} already')
    source = 'train' if 'train' in items else None
    drawn = stratified(items[source], fractions, seed=seed)
    return {s: drawn.get(s) or items[s] for s in ('train', 'val', 'test') if s in drawn or s in items}


def _widest_mode(source: Source, files: Sequence[File], sample: int = 32) -> str:
    modes = set()
    for k in range(min(sample, len(files))):
        file = files[k * len(files) // min(sample, len(files))]
        try:
            data = source.read(file.place)
            modes.add(check_whole(data) or picture_mode(data))
        except (ValueError, UserError) as error:    # loading meets it again, and stops there or skips it
            damage = f'{file.path}: {first_line(error)}'
    if not modes:
        raise UserError(damage)
    return max(modes, key=lambda mode: len(CHANNELS[mode]))


def _channels(names: Sequence[str], kinds: str, nodata: str) -> list[ChannelSpec]:
    """From --kinds=phase:256,linear and --nodata=127,0/255: per channel, or one for all."""
    def per_channel(flag: str, text: str) -> list[str]:
        values = text.split(',') if text else ['']
        values = values * len(names) if len(values) == 1 else values
        if len(values) != len(names):
            raise UserError(f'--{flag}={text}: {len(values)} values for {len(names)} channels ({", ".join(names)})')
        return values

    channels = []
    for name, kind, invalid in zip(names, per_channel('kinds', kinds), per_channel('nodata', nodata)):
        kind, _, period = kind.partition(':')
        try:
            channels.append(ChannelSpec(name, kind or 'linear', float(period) if period else None,
                                        nodata=tuple(float(v) for v in invalid.split('/')) if invalid else None))
        except ValueError:
            raise UserError(f'channel {name!r}: kind {kind}:{period} or no data {invalid} is not a number') from None
    return channels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', required=True, help='folder, zip or tar')
    parser.add_argument('--name', default='', help="of the data set (default: the input's)")
    parser.add_argument('--channels', default='', help='files that make one image: phase.png,coherence.png,dem.png')
    parser.add_argument('--kinds', default='', help='per channel linear or phase:VALUE_OF_ONE_CYCLE')
    parser.add_argument('--nodata', default='', help='per channel the values without data: 127,,0/255')
    parser.add_argument('--mode', choices=sorted(CHANNELS), help='what images are converted to (default: they agree)')
    parser.add_argument('--decode', action='store_true', help='store pixels instead of PNG or JPEG bytes')
    parser.add_argument('--unlabelled', action='store_true', help='folders are not classes')
    parser.add_argument('--val_fraction', type=float, default=0.0)
    parser.add_argument('--test_fraction', type=float, default=0.0)
    parser.add_argument('--seed', type=int, default=0, help='of the random split')
    parser.add_argument('--split_file', default='', help='JSON {split: [path]}, or CSV with lines path,split')
    parser.add_argument('--group_regex', default='', help='finds the group in the path: splits do not share groups')
    convert.add_flags(parser)
    a = parser.parse_args()
    with open_source(a.input, pathlib.Path(a.output, PARTIAL)) as source:
        dataset = describe(
            source, name=a.name or pathlib.Path(a.input).resolve().name.split('.')[0], kinds=a.kinds, nodata=a.nodata,
            channels=a.channels.split(',') if a.channels else (), mode=a.mode, decode=a.decode, seed=a.seed,
            unlabelled=a.unlabelled, val_fraction=a.val_fraction, test_fraction=a.test_fraction,
            split_file=a.split_file, group_regex=a.group_regex,
            provenance=convert.provenance('data_prep.image_folder', a))
        convert.convert(dataset, a.output, **convert.options(a))


if __name__ == '__main__':
    convert.run(main)
