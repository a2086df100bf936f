"""The files that paths, folders, globs and URLs stand for."""
import glob
import os
import posixpath
from collections.abc import Sequence

from data_prep.arrays_files import file_system, is_store
from ssl_jax.errors import UserError, nearest

SUFFIXES = ('.zarr', '.zarr.zip', '.h5', '.hdf5', '.hdf', '.he5', '.nc', '.nc4', '.cdf', '.npy', '.npz', '.fits',
            '.fit', '.fts', '.fits.gz', '.tif', '.tiff')


def find_inputs(inputs: Sequence[str]) -> list[str]:
    """The files and stores that paths, globs, folders and URLs stand for, sorted, each once.

    Raises:
      UserError: one stands for nothing.
    """
    found = []
    for text in inputs:
        here = _find_remote(text) if '://' in text else _find_local(text)
        if not here:
            raise UserError(f'input {text!r}: there is no such file, nor a folder with any of {" ".join(SUFFIXES)}')
        found += sorted(here)
    return list(dict.fromkeys(found))


def _find_local(text: str) -> list[str]:
    if not os.path.exists(text):
        return [p for match in glob.glob(text, recursive=True) for p in _find_local(match)]
    if os.path.isfile(text) or is_store(text):
        return [text]
    found = []
    for folder, folders, files in os.walk(text):
        stores = [n for n in folders if is_store(os.path.join(folder, n))]
        folders[:] = sorted(n for n in folders if n not in stores and not n.startswith('.'))
        found += [os.path.join(folder, n) for n in (*stores, *files) if n.lower().endswith(SUFFIXES) or n in stores]
    return found


def _find_remote(url: str) -> list[str]:
    files, inside = file_system(url)
    if any(c in inside for c in '*?['):
        return [p for match in files.glob(inside) for p in _find_remote(files.unstrip_protocol(match))]
    if files.isfile(inside) or is_store(url):
        return [url]
    if not files.exists(inside):
        return []
    found = set()
    for path in files.find(inside):
        parts = path.split('/')
        stores = [i for i, part in enumerate(parts[:-1]) if part.endswith('.zarr')]
        path = '/'.join(parts[:stores[0] + 1]) if stores else path
        found |= {files.unstrip_protocol(path)} if path.lower().endswith(SUFFIXES) else set()
    return list(found)


def short_names(paths: Sequence[str]) -> list[str]:
    """What tells files apart: their paths within the folder that all are in, without suffixes where still unique."""
    paths = [p.rstrip('/') for p in paths]
    common = os.path.commonprefix([p[:p.rfind('/') + 1] for p in paths]).rfind('/') + 1
    whole = [p[common:] for p in paths]
    short = [stem(p) for p in whole]
    return short if len(set(short)) == len(short) else whole


def stem(path: str) -> str:
    """A path without the suffix of its format."""
    suffix = max((s for s in SUFFIXES if path.lower().endswith(s)), key=len, default='')
    return path[:len(path) - len(suffix)] if suffix else path


def label_maps(paths: Sequence[str], names: Sequence[str], where: str) -> tuple[str, ...]:
    """The file with the label map of each input."""
    found = find_inputs([where])
    if len(found) == 1 and len(paths) == 1:
        return tuple(found)
    by_name = {stem(posixpath.basename(p.rstrip('/'))): p for p in found}
    for name in names:
        if posixpath.basename(name) not in by_name:
            raise UserError(f'--label_map_from={where} has no file {name!r}{nearest(name, by_name)[:200]}')
    return tuple(by_name[posixpath.basename(n)] for n in names)
