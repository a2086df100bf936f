"""Paths and URLs of array files: what libraries open, and which folders are Zarr stores."""
import os
from typing import Any

from data_prep.extras import need
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError

_ZARR = ('zarr.json', '.zgroup', '.zarray', '.zmetadata')


def is_store(path: str) -> bool:
    """Whether a folder is a Zarr store."""
    if '://' in path:
        files, inside = file_system(path)
        return any(files.exists(f'{inside}/{name}') for name in _ZARR)
    return any(os.path.isfile(os.path.join(path, name)) for name in _ZARR)


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it."""
    fsspec = need('fsspec', extra='remote', what='reading from a URL')
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:      # a package for this protocol is missing; no such protocol
        raise UserError(f'{url}: {first_line(error)} (gs:// and s3:// come with ssl_jax[remote])') from error


def open_stream(path: str) -> Any:
    """A binary file of a path or URL."""
    file = openable(path)
    return open(file, 'rb') if isinstance(file, str) else file


def openable(path: str) -> Any:
    """What libraries open: the path itself, or a file object of a URL."""
    if '://' not in path:
        return path
    files, inside = file_system(path)
    return files.open(inside, 'rb')
