"""Subsets of a split by name: files `subsets/<name>.json` of a data set, for training with few labels."""
import json
import pathlib

import numpy as np

from ssl_jax.data.source import Manifest
from ssl_jax.errors import UserError, nearest

FOLDER = 'subsets'


def rows(root: pathlib.Path, name: str, split: str, manifest: Manifest) -> np.ndarray:
    """The rows of `split` that the subset `name` lists, ascending, int64.

    Raises:
      UserError: there is no such subset, it is damaged, or one of another split or data set.
    """
    path = root / FOLDER / f'{name}.json'
    try:
        content = json.loads(path.read_text())
        found = np.asarray(content['rows'])
        of = content['split'], content['fingerprint']
    except FileNotFoundError:
        names = sorted(p.stem for p in path.parent.glob('*.json'))
        raise UserError(f'subset {name!r} of {root}: there is no {path}{nearest(name, names)}') from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path} is damaged: {type(error).__name__}: {error}') from error
    if of != (split, manifest.source.get('fingerprint')):
        raise UserError(f'{path} is a subset of another split or conversion than {split!r} of {root}: write it again')
    count = manifest.split(split).records
    if (found.ndim != 1 or not found.size or found.dtype.kind != 'i' or (np.diff(found) <= 0).any()
            or not 0 <= found[0] <= found[-1] < count):
        raise UserError(f'{path} is damaged: expected ascending rows between 0 and {count - 1}')
    return found
