"""Downloads a file so that what is there is whole: resumed after a cut, checked, and renamed to its name at the end.

What has come of a file is in NAME.part, and in NAME.part.json what the server said of it. A second try goes on after
the last byte (Range, If-Range) if the file is still the same there, by its ETag or date, and starts anew if it is not,
if the server gives neither (unless there is a SHA-256 to judge the result by), or if it knows no ranges.
"""
import contextlib
import dataclasses
import fcntl
import hashlib
import http.client
import json
import os
import pathlib
import re
import shutil
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any, BinaryIO

from ssl_jax.data import transfer
from ssl_jax.data.source import write_atomic
from ssl_jax.data.transfer import Interrupted
from ssl_jax.errors import UserError

BLOCK = 1 << 20


def fetch(url: str, path: str | os.PathLike, sha256: str | None = None, *, quiet: bool = False, tries: int = 6,
          wait: float = 1.0, stop: threading.Event | None = None) -> pathlib.Path:
    """Downloads `url` to the file `path`, or goes on where an interrupted call stopped; a file that is there is kept.

    Args:
      sha256: of the whole file, hexadecimal; also checked for a file that is there.
      quiet: no progress bar.
      tries: failures in a row, without a byte that had not come before, after which it gives up.
      wait: seconds before the second try; doubled for each further one, up to a minute.
      stop: ends the download soon after it is set, with UserError; what has come is kept.
    Returns:
      `path`.
    Raises:
      UserError: the file isn't to be had, or is another than `sha256` says. One that is there is never changed.
    """
    from tqdm import tqdm
    transfer.scheme(url)
    path, url, stop = pathlib.Path(path), _direct(url), stop or threading.Event()
    if sha256 is not None and not re.fullmatch('[0-9a-fA-F]{64}', sha256):
        raise UserError(f'{path.name}: sha256 {sha256!r} is not 64 hexadecimal digits')
    if path.exists():
        _check_digest(path, path.name, sha256, 'move it away to download it again')
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    with _own(part) as file:
        if path.exists():           # another process finished it meanwhile
            _check_digest(path, path.name, sha256, 'move it away to download it again')
            return path
        failures, farthest = 0, part.stat().st_size
        with tqdm(desc=path.name, unit='B', unit_scale=True, leave=False, disable=quiet or None) as bar:
            while True:
                try:
                    _receive(url, file, part, sha256, bar, stop)
                    break
                except Interrupted as error:
                    size = part.stat().st_size
                    failures = 1 if size > farthest else failures + 1
                    farthest = max(size, farthest)
                    if failures >= tries:
                        raise UserError(f'{path.name}: {url} failed {failures} times in a row ({error}); what has come '
                                        f'({size} bytes) is kept, run it again to go on') from error
                    stop.wait(max(error.delay, min(60, wait * 2 ** (failures - 1))))
        os.fsync(file.fileno())
        try:
            _check_digest(part, path.name, sha256, f'{url} is another file, or was damaged on the way')
        except UserError:
            _forget(part)
            raise
        os.replace(part, path)
        _forget(part)
    return path


def _direct(url: str) -> str:
    """The URL of the file itself, where a Dropbox link would give a page."""
    parts = urllib.parse.urlsplit(url)
    if parts.hostname not in ('www.dropbox.com', 'dropbox.com'):
        return url
    query = [(k, v) for k, v in urllib.parse.parse_qsl(parts.query, keep_blank_values=True) if k not in ('dl', 'raw')]
    return urllib.parse.urlunsplit(parts._replace(query=urllib.parse.urlencode([*query, ('dl', '1')])))


def _check_digest(path: pathlib.Path, name: str, sha256: str | None, advice: str) -> None:
    if sha256 is None:
        return
    with open(path, 'rb') as file:
        found = hashlib.file_digest(file, 'sha256').hexdigest()
    if found != sha256.lower():
        raise UserError(f'{name} has SHA-256 {found}, expected {sha256.lower()}: {advice}')


@contextlib.contextmanager
def _own(part: pathlib.Path) -> Iterator[BinaryIO]:
    with open(part, 'ab', 0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'another download is writing to {part}') from None
        try:
            yield file
        finally:
            if os.fstat(file.fileno()).st_size == 0:
                _forget(part)


def _forget(part: pathlib.Path) -> None:
    part.unlink(missing_ok=True)
    _state(part).unlink(missing_ok=True)


def _state(part: pathlib.Path) -> pathlib.Path:
    return part.with_name(f'{part.name}.json')


def _remembered(part: pathlib.Path, url: str) -> transfer.Known | None:
    """What is known of the file that `part` begins, or None if it is to be begun anew."""
    try:
        known = transfer.Known(**json.loads(_state(part).read_text()))
    except (FileNotFoundError, ValueError, TypeError):      # killed before it was written: nothing can be trusted
        return None
    return known if known.url == url else None


def _receive(url: str, file: BinaryIO, part: pathlib.Path, sha256: str | None, bar: Any, stop: threading.Event) -> None:
    """Appends to `part` what is missing of it, or writes it from the beginning."""
    have, known = part.stat().st_size, _remembered(part, url)
    if have and known and known.total == have:
        return
    resumable = have and known and (known.validator or sha256)
    with contextlib.ExitStack() as stack:
        answer = transfer.ask(stack, url, have, known) if resumable else None
        answer = answer or transfer.ask(stack, url, 0, None)
        total = answer.known.total
        if total is None and not (answer.delimited or sha256):
            raise UserError(f'{part.stem}: {url} tells no length, so that a cut would pass unseen: give its SHA-256')
        if not answer.start:
            file.truncate(0)
        write_atomic(_state(part), json.dumps(dataclasses.asdict(answer.known)).encode())
        if total is not None and shutil.disk_usage(part.parent).free < total - answer.start:
            raise UserError(f'{part.stem}: {(total - answer.start) / 1e9:.3g} GB are to come, '
                            f'{part.parent} has {shutil.disk_usage(part.parent).free / 1e9:.3g} GB free')
        bar.reset(total)
        bar.update(answer.start)
        size = answer.start
        for block in _blocks(answer):
            if stop.is_set():
                raise UserError(f'{part.stem}: stopped; run it again to go on')
            size += len(block)
            try:
                written = file.write(block)
            except OSError as error:
                raise UserError(f'cannot write {part} ({error.strerror})') from error
            if written < len(block):
                raise UserError(f'cannot write {part} (is the disk full?)')
            bar.update(len(block))
    if total is not None and size < total:
        raise Interrupted(f'cut after {size} of {total} bytes')
    if total is not None and size > total:
        file.truncate(0)
        raise Interrupted(f'{size} bytes came instead of {total}')


def _blocks(answer: transfer.Answer) -> Iterator[bytes]:
    try:
        while block := answer.read(BLOCK):
            yield block
    except (OSError, http.client.HTTPException) as error:
        raise Interrupted(transfer.reason(error)) from error
