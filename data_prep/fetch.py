"""Downloads files so that what is there is whole: resumed after a cut, checked, and renamed to its name at the end.

    python -m data_prep.fetch --urls=FILE --output=FOLDER                  # 4 at a time; run it again to go on

FILE has one file per line: its URL, then optionally the name to save it under (default: the end of the URL's path) and
its SHA-256 in hexadecimal; `#` begins a comment. `http://` and `https://` need nothing else; `gs://` and `s3://` go
through fsspec. A Dropbox link is asked for the file, not for the page that shows it.

What an interrupted run got is kept, and the next one goes on from there; see `ssl_jax.data.download`.
"""
import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import threading
import urllib.parse
from collections.abc import Sequence
from typing import Any

from data_prep.convert import run
from ssl_jax.data import transfer
from ssl_jax.data.download import fetch
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of a list of downloads."""
    url: str
    name: str
    sha256: str | None = None


def fetch_all(entries: Sequence[Entry], folder: str | os.PathLike, *, threads: int = 4, quiet: bool = False,
              **options: Any) -> list[pathlib.Path]:
    """Downloads all entries to a folder, `threads` at a time; `options` are those of `fetch`.

    A failure doesn't keep the others from coming.

    Raises:
      UserError: at the end, telling the first failure and how many there are.
    """
    if threads < 1:
        raise UserError(f'threads={threads}: expected at least 1')
    folder, stop, failed, paths = pathlib.Path(folder), threading.Event(), [], []
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    try:
        jobs = [pool.submit(fetch, e.url, folder / e.name, e.sha256, quiet=quiet, stop=stop, **options)
                for e in entries]
        for n, (entry, job) in enumerate(zip(entries, jobs), 1):
            try:
                paths.append(job.result())
                outcome = f'{paths[-1].stat().st_size / 1e6:.1f} MB'
            except UserError as error:
                failed.append(error)
                outcome = f'failed: {error}'
            if not quiet:
                print(f'{n}/{len(entries)} {entry.name}: {outcome}', flush=True)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    if failed:
        raise UserError(f'{len(failed)} of {len(entries)} downloads failed; first: {failed[0]}')
    return paths


def read_list(path: str | os.PathLike) -> list[Entry]:
    """The entries of a list of downloads.

    Raises:
      UserError: naming the line that is no entry, or repeats a name.
    """
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not a text file ({first_line(error)})') from error
    entries, names = [], {}
    for number, line in enumerate(lines, 1):
        where = f'{path}:{number}'
        words = re.sub(r'(^|\s)#.*', '', line).split()      # a '#' within a URL begins no comment
        if not words:
            continue
        url, rest = words[0], words[1:]
        sha256 = rest.pop() if rest and re.fullmatch('[0-9a-fA-F]{64}', rest[-1]) else None
        name = rest.pop() if rest else urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition('/')[2]
        if rest:
            raise UserError(f'{where}: expected URL [NAME] [SHA256], found {len(words)} words: {line.strip()!r}')
        try:
            transfer.scheme(url)
        except UserError as error:
            raise UserError(f'{where}: {error}') from error
        if not re.fullmatch(r'[^/\\\0]+', name) or name in ('.', '..'):
            raise UserError(f'{where}: {name!r} is no file name; it may stand after the URL')
        if name in names:
            raise UserError(f'{where}: the name {name!r} is that of line {names[name]}, too; another may stand after '
                            'the URL')
        names[name] = number
        entries.append(Entry(url, name, sha256))
    if not entries:
        raise UserError(f'{path} lists no URL')
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--urls', required=True, help='list of downloads: per line URL [NAME] [SHA256]')
    parser.add_argument('--output', required=True, help='folder to save to')
    parser.add_argument('--threads', type=int, default=4, help='downloads at a time')
    given = parser.parse_args()
    fetch_all(read_list(given.urls), given.output, threads=given.threads)


if __name__ == '__main__':
    run(main)
