"""Galaxy10 DECaLS to records: 17,736 galaxies of ten shapes, 256 x 256 pixels in the bands g, r and z as colours.

    python -m data_prep.galaxy10 --input=Galaxy10_DECals.h5 --output=DIR               # --download fetches it (2.5 GB)
    python -m data_prep.galaxy10 --input=FOLDER --output=DIR                           # of the Hugging Face data set

The HDF5 file holds `images`, `ans`, `ra`, `dec`, `redshift` and `pxscale`; its SHA-256 is checked (`--no_checksum`
takes any file of this layout). Compressed images are unpacked once, to a scratch folder in OUTPUT (3.5 GB). The file
has no split: `--test_fraction` and `--val_fraction` are drawn at random, stratified by class. Galaxies at one position
(to 0.0001 degrees) are one group, so that one that is listed twice stays in one split. An example also has the scalars
`ra`, `dec` (degrees), `redshift` (NaN where unknown) and `pxscale` (arcsec).

The parquet files `train-*.parquet`, `test-*.parquet` (in FOLDER or FOLDER/data) come with a split; `--val_fraction` is
drawn out of train, and encoded images are copied as they are.
"""
import argparse
import contextlib
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from data_prep import convert, galaxy10_hdf5, galaxy10_parquet, subsets
from data_prep.convert import Dataset
from data_prep.galaxy10_hdf5 import CLASSES
from data_prep.scratch import scratch_folder
from data_prep.shards import PARTIAL
from ssl_jax.data.download import fetch
from ssl_jax.errors import UserError

URL = 'https://zenodo.org/records/10845026/files/Galaxy10_DECals.h5'
SHA256 = '19aefc477c41bb7f77ff07599a6b82a038dc042f889a111b0d4d98bb755c1571'


def report(dataset: Dataset) -> str:
    """A table of the examples per class beside the published counts, and a warning where they differ."""
    found = np.bincount([item.label for items in dataset.items.values() for item in items], minlength=len(CLASSES))
    lines = [f'{"class":<27}{"here":>7}{"published":>11}']
    for k, (name, count) in enumerate(CLASSES.items()):
        lines.append(f'{k} {name:<25}{found[k]:>7}{count:>11}' + ('' if found[k] == count else '   differs'))
    if found.tolist() != list(CLASSES.values()):
        lines.append(f'warning: {found.sum()} examples, {sum(CLASSES.values())} were published: not the whole data set')
    return '\n'.join(lines)


def check_sha256(path: str | os.PathLike, expected: str) -> None:
    """Raises UserError unless the file has this SHA-256; shows its progress."""
    from tqdm import tqdm
    digest, size = hashlib.sha256(), os.path.getsize(path)
    with open(path, 'rb') as file, tqdm(total=size, unit='B', unit_scale=True, desc='checking', leave=False) as bar:
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != expected:
        raise UserError(f'{path} has SHA-256 {digest.hexdigest()}, expected {expected}: it is damaged or another file '
                        '(--no_checksum takes it all the same)')


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', required=True, help='Galaxy10_DECals.h5, or a folder of parquet files')
    parser.add_argument('--download', action='store_true', help=f'{URL} to --input, if it is not there')
    parser.add_argument('--no_checksum', action='store_true', help='take another HDF5 file than the published one')
    parser.add_argument('--test_fraction', type=float, default=0.1, help='of the HDF5 file (default: 0.1)')
    parser.add_argument('--val_fraction', type=float, default=0.0)
    parser.add_argument('--seed', type=int, default=0, help='of the random split')
    subsets.add_flags(parser)
    convert.add_flags(parser)
    a = parser.parse_args(arguments)
    drawn = dict(val_fraction=a.val_fraction, seed=a.seed, on_error=a.on_error,
                 provenance=subsets.provenance('data_prep.galaxy10', a, 'download', 'no_checksum'))
    with contextlib.ExitStack() as stack:
        if os.path.isdir(a.input):
            dataset = galaxy10_parquet.describe(a.input, **drawn)
        else:
            if a.download:
                fetch(URL, a.input, SHA256)
            elif not a.no_checksum:
                check_sha256(a.input, SHA256)
            scratch = stack.enter_context(scratch_folder(pathlib.Path(a.output, PARTIAL)))
            dataset = galaxy10_hdf5.describe(a.input, test_fraction=a.test_fraction, scratch=scratch,
                                             workers=a.workers, **drawn)
        print(report(dataset))
        subsets.check_flags(a, dataset)
        convert.convert(dataset, a.output, **convert.options(a))
    subsets.write_asked(a)


if __name__ == '__main__':
    convert.run(main)
