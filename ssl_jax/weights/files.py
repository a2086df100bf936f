"""Reads weights from files of any of the usual formats, from our own runs, and from the web; numpy only."""
import hashlib
import mmap
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssl_jax.data import npy
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError, nearest
from ssl_jax.weights import safetensors_files, torch_files
from ssl_jax.weights.archives import Archive
from ssl_jax.weights.torch_pickles import Placeholder

# What a folder is read as, where it holds such a file.
_HUGGING_FACE = ('model.safetensors.index.json', 'model.safetensors', 'pytorch_model.bin')


def read(source: str | os.PathLike, *, section: str | None = None, sha256: str | None = None) -> dict[str, np.ndarray]:
    """All arrays in a file of weights, by name.

    Nested containers are flattened with '/' between the levels; dots within names stay: 'model/blocks.0.norm1.bias',
    'optimizer/state/0/exp_avg'. Arrays are read-only, with the memory of the file mapped where the format allows (it
    must stay as it is while they are used); those that share a storage share memory. What is no array (settings,
    counts) is left to `read_tree`.

    Args:
      source: a .pth, .pt, .bin or .pth.tar of torch.save, a .safetensors or its index of shards, an .npz, a run or
        checkpoint folder of ours ('params/...' and 'aux/...'), a folder with model.safetensors, or the URL of a file,
        which is downloaded once into ~/.cache/ssl_jax.
      section: only what is below 'section/', named from there: 'model', 'state_dict', 'teacher'.
      sha256: of the file, hexadecimal.
    Raises:
      UserError: it isn't to be had, damaged, of another format or with another digest; it names a function or class
        that is not admitted; it holds no array, or no such section.
    """
    found = flatten(read_tree(source, sha256=sha256), str(source))
    if not found:
        raise UserError(f'{source} holds no arrays')
    if section is None:
        return found
    prefix = section.strip('/') + '/'
    below = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    if not below:
        sections = {name.partition('/')[0] for name in found if '/' in name}
        raise UserError(f'{source} has no section {section!r}{nearest(section, sections)}')
    return below


def read_tree(source: str | os.PathLike, *, sha256: str | None = None) -> Any:
    """What a file of weights holds, nested as it is: arrays as `read` gives them, plain values, `Placeholder`s.

    Args, Raises: as `read`.
    """
    text = os.fspath(source)
    if re.match('[a-z][a-z0-9+.-]*://', text):
        from ssl_jax.data.download import fetch
        name = pathlib.PurePosixPath(re.sub('[?#].*', '', text)).name or 'weights'
        folder = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'ssl_jax' / 'weights'
        path = fetch(text, folder / hashlib.sha256(text.encode()).hexdigest()[:16] / name, sha256)
        sha256 = None
    else:
        path = pathlib.Path(text).expanduser()
    if path.is_dir():
        inside = [path / name for name in _HUGGING_FACE if (path / name).is_file()]
        if not inside:
            return _checkpoint(path)
        path = inside[0]
    try:
        return _load(path, sha256)
    except UserError as error:
        raise UserError(f'{source}: {error}') from error
    except OSError as error:
        raise UserError(f'cannot read {source} ({error.strerror or first_line(error)})') from error


def flatten(tree: Any, where: str = 'the tree') -> dict[str, np.ndarray]:
    """The arrays of nested containers by the path to them, with '/' between levels.

    Raises:
      UserError: two have the same path.
    """
    found: dict[str, np.ndarray] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, np.ndarray):
            if path in found:
                raise UserError(f'{where} holds two arrays of the name {path!r}')
            found[path] = value
            return
        if isinstance(value, Placeholder):
            if id(value) in visited:
                return
            visited[id(value)] = value
            value = {'arguments': value.arguments, 'state': value.state, 'items': value.items,
                     'elements': value.elements}
        inner = (value.items() if isinstance(value, Mapping) else
                 enumerate(value) if isinstance(value, (list, tuple)) else ())
        for key, item in inner:
            visit(f'{path}/{key}' if path else str(key), item)

    visited: dict[int, Placeholder] = {}
    visit('', tree)
    return found


def _load(path: pathlib.Path, sha256: str | None) -> Any:
    mapped = _map(path)
    buffer = memoryview(mapped)
    if sha256 is not None and hashlib.sha256(buffer).hexdigest() != sha256.lower():
        raise UserError(f'its SHA-256 is {hashlib.sha256(buffer).hexdigest()}, expected {sha256.lower()}')
    start = bytes(buffer[:64])
    if start.lstrip()[:1] == b'{':
        return safetensors_files.load_shards(path, bytes(buffer[:safetensors_files.HEADER + 1]), _shard)
    if start[8:9] == b'{' and not any(start[5:8]) or path.suffix == '.safetensors':
        return safetensors_files.load(buffer)
    if start.startswith(b'PK'):
        archive = Archive(mapped, buffer)
        if archive.members and all(name.endswith('.npy') for name in archive.members):
            return _arrays(archive)
    elif start.startswith(b'version https://git-lfs'):
        raise UserError('it is the pointer of Git LFS, not the file itself: git lfs pull')
    return torch_files.load_from(mapped, buffer)


def _shard(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return safetensors_files.load(memoryview(_map(path)))
    except UserError as error:
        raise UserError(f'its shard {path.name!r}: {error}') from error


def _map(path: pathlib.Path) -> mmap.mmap:
    if not path.exists():
        raise UserError('there is no such file')
    if not path.is_file():
        raise UserError('it is no file')
    if not path.stat().st_size:
        raise UserError('it is empty')
    with open(path, 'rb') as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _arrays(archive: Archive) -> dict[str, np.ndarray]:
    """The arrays of an .npz, those that are not compressed over the memory of the file."""
    return {name.removesuffix('.npy'): npy.read(content, name)
            for name, content in archive.views(archive.members).items()}


def _checkpoint(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Parameters and what goes with them of a run: {'params/encoder/norm/scale': ...}."""
    from ssl_jax import checkpoint
    return checkpoint.arrays(str(path))
