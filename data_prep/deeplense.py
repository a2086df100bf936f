r"""DeepLense to records: simulated and real strong lenses in the bands g, r and i, and what looks like them.

    python -m data_prep.deeplense --input=FOLDER --indices=indices.pkl --output=DIR       # 32 x 32 from the centre
    python -m data_prep.deeplense statistics --input=FOLDER --indices=indices.pkl         # of the three splits
    python -m data_prep.deeplense leaks --indices=indices.pkl --fractions=train_indices_300.pkl,...

FOLDER holds `lenses/<n>.npy` and `nonlenses/<n>.npy`, arrays (3, H, W) of raw flux. The index file is a pickled
{'train', 'val', 'test'} -> {'lenses', 'nonlenses'} -> file names; it is read without running anything. A name may occur
in both classes, so that keys are 'lenses/123'. Labels: lens 0, nonlens 1.

Subsets of 300, 600 and 1200 labelled images are drawn from this train split (`config.data.subset`). Those that go with
the original (`train_indices_300.pkl`, ...) were drawn from an older one, and `leaks` shows how much of them lies in val
and test of the newer. A flipped bit in the flux of an npy file goes unseen: the format has no checksum.
"""
import argparse
import dataclasses
import hashlib
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep import convert, subsets
from data_prep.convert import ChannelSpec, Dataset, Item
from data_prep.problems import OnError, Problems
from ssl_jax.data import npy
from ssl_jax.errors import UserError
from ssl_jax.weights import pickles

FOLDERS = ('lenses', 'nonlenses')       # in the order of their labels
CLASSES = ('lens', 'nonlens')
SPLITS = ('train', 'val', 'test')
BANDS = ('g', 'r', 'i')
LABEL_COUNTS = (300, 600, 1200)

Names = Mapping[str, Sequence[str]]     # folder -> file names


def read_indices(path: str | os.PathLike) -> dict[str, Names]:
    """The file names of each split, by folder.

    Raises:
      UserError: not such a pickle.
    """
    content = pickles.load(pathlib.Path(path).read_bytes(), str(path))
    if type(content) is not dict or set(content) != set(SPLITS):
        raise UserError(f'{path} is no index of {", ".join(SPLITS)}: it holds {_shown(content)}')
    return {split: _names(content[split], f'{path}, {split}') for split in SPLITS}


def read_fraction(path: str | os.PathLike) -> Names:
    """The file names of a subset of labelled images, by folder.

    Raises:
      UserError: not such a pickle.
    """
    return _names(pickles.load(pathlib.Path(path).read_bytes(), str(path)), str(path))


def _names(content: Any, where: str) -> Names:
    if type(content) is not dict or set(content) != set(FOLDERS):
        raise UserError(f'{where} does not list {" and ".join(FOLDERS)}: it holds {_shown(content)}')
    found = {}
    for folder in FOLDERS:
        values = content[folder].tolist() if isinstance(content[folder], np.ndarray) else content[folder]
        if not isinstance(values, (list, tuple)):
            raise UserError(f'{where}, {folder}: expected a sequence of names, found {_shown(values)}')
        found[folder] = values = [v.decode('latin1') if isinstance(v, bytes) else v for v in values]
        for value in values:
            if type(value) is not str or not re.fullmatch(r'[\w-][\w.-]*\.npy', value, re.ASCII):
                raise UserError(f'{where}, {folder}: {str(value)[:80]!r} is no name of an npy file')
    return found


def _shown(content: Any) -> str:
    names = ', '.join(map(str, content)) if type(content) is dict else ''
    return f'{type(content).__name__} {names[:80]}'.strip()


def describe(input: str | os.PathLike, indices: str | os.PathLike, *, crop: int = 32, on_error: OnError = 'stop',
             provenance: Mapping[str, Any]) -> Dataset:
    """The data set of the files that the index lists.

    Args:
      input: folder of `lenses` and `nonlenses`.
      crop: side of the square that is cut from the centre; 0 = the whole image.
    Raises:
      UserError: the index is bad, lists a file twice, or one that isn't there.
    """
    if crop < 0:
        raise UserError(f'crop={crop}: expected a number of pixels, or 0 for the whole image')
    root, problems = pathlib.Path(input), Problems(on_error)
    listed, there = read_indices(indices), {}
    for folder in FOLDERS:
        if not (root / folder).is_dir():
            raise UserError(f'input {root} has no folder {folder!r}: expected {" and ".join(FOLDERS)}')
        there[folder] = {name for name in os.listdir(root / folder) if name.endswith('.npy')}
    items, seen = {split: [] for split in SPLITS}, {}
    for split in SPLITS:
        for label, folder in enumerate(FOLDERS):
            for name in listed[split][folder]:
                key = f'{folder}/{name.removesuffix(".npy")}'
                if key in seen:
                    problems.add(f'{folder}/{name}', f'{indices} lists it in {seen[key]} and again in {split}')
                elif name not in there[folder]:
                    problems.add(f'{folder}/{name}', f'{indices} lists it in {split}, but {root} does not have it')
                else:
                    items[split].append(Item(key, label=label, data=f'{folder}/{name}'))
                seen.setdefault(key, split)
    unused = sum(map(len, there.values())) - sum(map(len, items.values()))
    if unused:
        print(f'{unused} files of {root} are in no split of {indices} and are left out')
    digest = hashlib.sha256(pathlib.Path(indices).read_bytes()).hexdigest()
    return Dataset('deeplense', [ChannelSpec(band, unit='flux') for band in BANDS], CLASSES, items,
                   Load(str(root), crop), {**provenance, 'indices_sha256': digest}, always_valid=True,
                   problems=problems.found)


@dataclasses.dataclass(frozen=True)
class Load:
    """Loads the image of an item: (crop, crop, 3) float32."""
    root: str
    crop: int

    def __call__(self, item: Item) -> dict[str, np.ndarray]:
        path = pathlib.Path(self.root, item.data)
        image = npy.read(path.read_bytes(), str(path))
        if image.ndim != 3 or image.shape[0] != len(BANDS) or min(image.shape[1:]) < max(self.crop, 1):
            raise UserError(f'{path} has shape {image.shape}, expected ({len(BANDS)}, H, W) for {", ".join(BANDS)} '
                            f'with at least {max(self.crop, 1)} pixels a side')
        if self.crop:
            top, left = (round((n - self.crop) / 2) for n in image.shape[1:])
            image = image[:, top:top + self.crop, left:left + self.crop]
        with np.errstate(over='ignore'):    # what float32 cannot hold becomes infinite, which is refused
            return {'image': np.ascontiguousarray(image.transpose(1, 2, 0), np.float32)}


def statistics(dataset: Dataset, split: str) -> dict[str, np.ndarray]:
    """Mean and standard deviation (n - 1) per channel: 'mean' and 'std' over images of each image's own, as DeepLense
    normalises, and 'pooled_mean' and 'pooled_std' over all pixels, as the manifest has them."""
    means, variances, pixels = [], [], []
    for item in dataset.items[split]:
        image = dataset.load(item)['image'].reshape(-1, len(BANDS)).astype(np.float64)
        means.append(image.mean(0))
        variances.append(image.var(0))
        pixels.append(len(image))
    means, variances, pixels = np.array(means), np.array(variances), np.array(pixels)[:, None]
    mean = (means * pixels).sum(0) / pixels.sum()
    square = ((variances + means ** 2) * pixels).sum(0) / pixels.sum()
    return {'mean': means.mean(0), 'std': np.sqrt(variances * pixels / np.maximum(pixels - 1, 1)).mean(0),
            'pooled_mean': mean, 'pooled_std': np.sqrt(np.maximum(square - mean ** 2, 0))}


def overlaps(indices: Mapping[str, Names], fraction: Names) -> dict[str, list[int]]:
    """Split -> per folder, how many names of a fraction lie in it; 'none' counts those that no split has."""
    found = {split: [len(set(fraction[f]) & set(indices[split][f])) for f in FOLDERS] for split in SPLITS}
    found['none'] = [len(set(fraction[f]).difference(*(indices[s][f] for s in SPLITS))) for f in FOLDERS]
    return found


def _leaks(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser('deeplense leaks', description='How many names of each fraction are where.')
    parser.add_argument('--indices', required=True, help='index file of the splits')
    parser.add_argument('--fractions', required=True, help='index files of labelled subsets, comma-separated')
    a = parser.parse_args(arguments)
    indices = read_indices(a.indices)
    columns = [(folder, split) for split in (*SPLITS, 'none') for folder in FOLDERS]
    print(f'{"":<28}' + ''.join(f'{f"{split} {folder}":>17}' for folder, split in columns))
    for path in a.fractions.split(','):
        found = overlaps(indices, read_fraction(path))
        print(f'{pathlib.Path(path).name:<28}'
              + ''.join(f'{found[split][FOLDERS.index(folder)]:>17}' for folder, split in columns))
        lenses, nonlenses = found['test']
        if lenses + nonlenses:
            print(f'  leak: {lenses} + {nonlenses} images of the test split')


def _statistics(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser('deeplense statistics', description='Mean and std per channel of every split.')
    _add_input(parser)
    a = parser.parse_args(arguments)
    dataset = describe(a.input, a.indices, crop=a.crop, provenance={})
    for split in dataset.items:
        for name, values in statistics(dataset, split).items():
            print(f'{split:<6}{name:<12}' + '  '.join(f'{band} {v:.8f}' for band, v in zip(BANDS, values)))


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--input', required=True, help='folder of lenses/ and nonlenses/')
    parser.add_argument('--indices', required=True, help='index file of the splits')
    parser.add_argument('--crop', type=int, default=32, help='side of the centre crop, 0 = whole (default: 32)')


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {'leaks': _leaks, 'statistics': _statistics}
    if arguments and arguments[0] in commands:
        commands[arguments[0]](arguments[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_input(parser)
    subsets.add_flags(parser, LABEL_COUNTS)
    convert.add_flags(parser)
    a = parser.parse_args(arguments)
    dataset = describe(a.input, a.indices, crop=a.crop, on_error=a.on_error,
                       provenance=subsets.provenance('data_prep.deeplense', a))
    subsets.check_flags(a, dataset)
    convert.convert(dataset, a.output, **convert.options(a))
    subsets.write_asked(a)


if __name__ == '__main__':
    convert.run(main)
