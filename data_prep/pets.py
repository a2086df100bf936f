"""Oxford-IIIT Pets to records: 37 breeds of cats and dogs, each image with its trimap.

    python -m data_prep.pets --input=FOLDER --output=DIR --val_fraction=0.1       # the official trainval and test
    python -m data_prep.pets --input=FOLDER --output=DIR --split=random --size=128 --resample=nearest   # as SimMIM-Pets

FOLDER holds `images` and `annotations`, each as a folder or an archive (images.tar.gz); `--download` fetches those that
are missing (0.8 GB). Of the annotations, trimaps/NAME.png, trainval.txt and test.txt are read.

A record has the image, the breed as `label`, `species` (1 cat, 2 dog) and `breed` (its number within the species) as
the lists give them, and the trimap as `label_map`, counted from 0: 0 foreground (the pet), 1 background, 2 boundary.
Images are copied as they are; a few are GIFs or PNGs in spite of their name, of which GIFs become PNGs.

`--size=N` distorts image and trimap to N x N and stores pixels, instead of their varying size: antialiased, or with
`--resample=nearest` as the original fine-tuning did. Without it, `--compression=zstd:1` shrinks the label maps well.

`--split=random` takes trainval and test together and draws `--train_size` and `--test_size` of them; the rest is val.
The permutation is that of torch.randperm with a generator of this seed, so that torch's random_split of the same sizes
makes the same splits.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep import convert
from data_prep.archives import Source, open_source
from data_prep.convert import ChannelSpec, Dataset, Item
from data_prep.pictures import check_whole, size_of, storable
from data_prep.problems import OnError, Problems
from data_prep.shards import PARTIAL
from data_prep.splits import stratified
from ssl_jax.data.decode import decode_image, decode_label_map
from ssl_jax.data.download import fetch
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

URL = 'https://thor.robots.ox.ac.uk/~vgg/data/pets/'
SUFFIXES = ('.tar.gz', '.tgz', '.tar', '.tar.xz', '.zip')


@dataclasses.dataclass(frozen=True)
class _Load:
    """Loads an item whose data are (name, place of the image, place of the trimap, species, breed)."""
    images: Source
    annotations: Source
    size: int           # 0 = as they are
    resample: str       # 'antialiased' or 'nearest'

    def __call__(self, item: Item) -> Mapping[str, Any]:
        image_place, map_place, species, breed = item.data
        try:
            data = storable(self.images.read(image_place))
            image = decode_image(data, 3) if self.size else None
            size = image.shape[:2] if self.size else size_of(data)
        except ValueError as error:
            raise UserError(f'{item.key}.jpg: {first_line(error)}') from error
        label_map = read_trimap(self.annotations.read(map_place), f'trimaps/{item.key}.png')
        if label_map.shape != size:
            raise UserError('{0}.jpg is {2} x {1} pixels, but trimaps/{0}.png {4} x {3}'.format(
                item.key, *size, *label_map.shape))
        if self.size:
            data, label_map = resize(image, label_map, self.size, self.resample)
        return {'image': data, 'label_map': label_map, 'species': np.int32(species), 'breed': np.int32(breed)}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of trainval.txt or test.txt."""
    name: str
    label: int          # from 0
    species: int
    breed: int


def read_trimap(data: bytes, name: str) -> np.ndarray:
    """(H, W) uint8: 0 foreground, 1 background, 2 boundary.

    Raises:
      UserError: damaged, or with other values than the 1, 2 and 3 of a trimap.
    """
    try:
        check_whole(data)
        trimap = decode_label_map(data)
    except ValueError as error:
        raise UserError(f'{name}: {first_line(error)}') from error
    if trimap.min() < 1 or trimap.max() > 3:
        strange = trimap[(trimap < 1) | (trimap > 3)][0]
        raise UserError(f'{name} has the value {strange}: expected 1 (pet), 2 (background) and 3 (border)')
    return (trimap - 1).astype(np.uint8)


def resize(image: np.ndarray, label_map: np.ndarray, size: int, resample: str) -> tuple[np.ndarray, np.ndarray]:
    """Distorts image (H, W, 3) and label map (H, W) to size x size.

    'antialiased' averages the image (bilinear) and takes the label under the centre of each new pixel; 'nearest' takes
    pixel floor(i * H / size) for both, which is torch's nearest.
    """
    from PIL import Image
    shift = 0 if resample == 'nearest' else 1
    rows, columns = ((2 * np.arange(size) + shift) * n // (2 * size) for n in label_map.shape)
    places = np.ix_(rows, columns)
    if resample == 'nearest':
        return image[places], label_map[places]
    picture = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture), label_map[places]


def describe(images: Source, annotations: Source, *, split: str = 'official', val_fraction: float = 0,
             train_size: int = 6000, test_size: int = 1000, seed: int = 42, size: int = 0,
             resample: str = 'antialiased', provenance: Mapping[str, Any], on_error: OnError = 'stop') -> Dataset:
    """The data set of these images and annotations; the arguments are the flags of this converter.

    Raises:
      UserError: a list is missing or malformed, or names an image that is not there.
    """
    if size < 0 or (resample == 'nearest' and not size):
        raise UserError(f'--size={size}: expected pixels, which --resample also needs')
    problems = Problems(on_error)
    places = {f.path: f.place for f in annotations.files()}
    rows = {name: _read_list(annotations, places, f'{name}.txt') for name in ('trainval', 'test')}
    classes = _classes(rows['trainval'] + rows['test'])
    if split == 'random':
        rows = _random(rows['trainval'] + rows['test'], train_size, test_size, seed)
    else:
        rows = {'train': rows['trainval'], 'test': rows['test']}

    pictures = _by_name(images, '.jpg')
    trimaps = {k.rpartition('/')[2].removesuffix('.png'): v for k, v in places.items()
               if k.endswith('.png') and k.split('/')[-2:-1] in ([], ['trimaps']) and not _hidden(k)}
    items = {name: [] for name in rows}
    for name, chosen in rows.items():
        for row in chosen:
            if row.name not in pictures:
                problems.add(f'{row.name}.jpg', 'there is no such image')
            elif row.name not in trimaps:
                problems.add(f'trimaps/{row.name}.png', 'there is no such trimap')
            else:
                places_of = pictures[row.name], trimaps[row.name]
                items[name].append(Item(row.name, label=row.label, data=(*places_of, row.species, row.breed)))
    if split == 'official' and val_fraction:
        drawn = stratified(items['train'], {'val': val_fraction}, seed=seed)
        items = {'train': drawn['train'], 'val': drawn['val'], 'test': items['test']}
    return Dataset('oxford_iiit_pet', [ChannelSpec(c) for c in ('red', 'green', 'blue')], classes, items,
                   _Load(images, annotations, size, resample), {**provenance, 'listing': _digest(images, annotations)},
                   encoding='raw' if size else 'jpeg',
                   problems=problems.found)


def randperm(n: int, seed: int) -> list[int]:
    """The permutation that torch.randperm draws with a CPU generator of this seed: a Fisher-Yates shuffle from the
    front, steered by the plain outputs of the Mersenne twister.
    """
    raw = np.random.RandomState(seed).randint(0, 1 << 32, n, np.uint32).tolist()
    order = list(range(n))
    for i in range(n - 1):
        k = i + raw[i] % (n - i)
        order[i], order[k] = order[k], order[i]
    return order


def _random(rows: Sequence[Row], train_size: int, test_size: int, seed: int) -> dict[str, list[Row]]:
    if train_size < 1 or test_size < 1 or train_size + test_size > len(rows):
        raise UserError(f'--train_size={train_size} --test_size={test_size}: there are {len(rows)} images')
    shuffled = [rows[i] for i in randperm(len(rows), seed)]
    ends = train_size, train_size + test_size
    drawn = {'train': shuffled[:ends[0]], 'val': shuffled[ends[1]:], 'test': shuffled[ends[0]:ends[1]]}
    return {k: v for k, v in drawn.items() if v}


def _read_list(source: Source, places: Mapping[str, Any], name: str) -> list[Row]:
    found = [path for path in places if path.rpartition('/')[2] == name]
    if len(found) != 1:
        raise UserError(f'{source_name(source)}: {len(found)} files are named {name}, expected one')
    rows = []
    try:
        lines = source.read(places[found[0]]).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f'{name} is not a text file ({first_line(error)})') from error
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith('#'):
            continue
        if len(words) != 4 or not all(w.isdigit() for w in words[1:]) or '_' not in words[0] or int(words[1]) < 1:
            raise UserError(f'{name}, line {number}: {line!r}, expected <breed>_<number> <class> <species> <breed>')
        rows.append(Row(words[0], *(int(w) - k for w, k in zip(words[1:], (1, 0, 0)))))
        if rows[-1].species not in (1, 2):
            raise UserError(f'{name}, line {number}: species {rows[-1].species}, expected 1 (cat) or 2 (dog)')
    if not rows:
        raise UserError(f'{name} lists no image')
    return rows


def _classes(rows: Sequence[Row]) -> list[str]:
    """Breeds by label: their names are those of the images, less the number."""
    names, seen = {}, set()
    for row in rows:
        breed = row.name.rpartition('_')[0]
        if names.setdefault(row.label, breed) != breed:
            raise UserError(f'{row.name} has class {row.label + 1}, which is that of {names[row.label]}')
        if row.name in seen:
            raise UserError(f'{row.name} is listed twice in trainval.txt and test.txt')
        seen.add(row.name)
    if set(names) != set(range(len(names))):
        missing = min(set(range(len(names))) - set(names)) + 1
        raise UserError(f'class {missing} has no image in trainval.txt and test.txt, others up to {max(names) + 1} do')
    return [names[label] for label in range(len(names))]


def _by_name(source: Source, suffix: str) -> dict[str, Any]:
    return {f.path.rpartition('/')[2].removesuffix(suffix): f.place for f in source.files()
            if f.path.endswith(suffix) and not _hidden(f.path)}


def _hidden(path: str) -> bool:
    """macOS left a file ._NAME.png beside many trimaps."""
    return path.rpartition('/')[2].startswith('.') or '__MACOSX' in path


def source_name(source: Source) -> str:
    return getattr(source, 'name', None) or getattr(source, 'path', None) or source.root


def _digest(*sources: Source) -> str:
    listing = [(f.path, f.size) for source in sources for f in source.files()]
    return hashlib.blake2b(repr(listing).encode(), digest_size=16).hexdigest()


def find(root: pathlib.Path, name: str) -> pathlib.Path:
    """The folder or archive `name` in `root`.

    Raises:
      UserError: there is none.
    """
    for path in (root / name, *(root / f'{name}{suffix}' for suffix in SUFFIXES)):
        if path.exists():
            return path
    raise UserError(f'{root} holds neither a folder {name} nor {name}.tar.gz: --download fetches it')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', required=True, help='folder with images and annotations, unpacked or not')
    parser.add_argument('--download', action='store_true', help='fetch what is missing in --input (0.8 GB)')
    parser.add_argument('--split', choices=('official', 'random'), default='official')
    parser.add_argument('--val_fraction', type=float, default=0.0, help='of trainval, with the official split')
    parser.add_argument('--train_size', type=int, default=6000, help='of the random split')
    parser.add_argument('--test_size', type=int, default=1000, help='of the random split')
    parser.add_argument('--seed', type=int, default=42, help='of the random split, or of --val_fraction')
    parser.add_argument('--size', type=int, default=0, help='store images and label maps of N x N pixels')
    parser.add_argument('--resample', choices=('antialiased', 'nearest'), default='antialiased', help='for --size')
    convert.add_flags(parser)
    a = parser.parse_args()
    options, root, download = convert.options(a), pathlib.Path(a.input), vars(a).pop('download')
    if download:
        for name in ('images', 'annotations'):
            if not any((root / f'{name}{suffix}').exists() for suffix in ('', *SUFFIXES)):
                fetch(f'{URL}{name}.tar.gz', root / f'{name}.tar.gz')
    with contextlib.ExitStack() as stack:
        images, annotations = (stack.enter_context(open_source(str(find(root, name)), pathlib.Path(a.output, PARTIAL)))
                               for name in ('images', 'annotations'))
        dataset = describe(
            images, annotations, split=a.split, val_fraction=a.val_fraction, train_size=a.train_size,
            test_size=a.test_size, seed=a.seed, size=a.size, resample=a.resample, on_error=options['on_error'],
            provenance=convert.provenance('data_prep.pets', a))
        convert.convert(dataset, a.output, **options)


if __name__ == '__main__':
    convert.run(main)
