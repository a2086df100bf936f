"""Checksums of checkpoints: what reads them does not notice a changed byte among the values of an array."""
import json
import os
import pathlib
import sys
import threading
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from ssl_jax.errors import UserError
from ssl_jax.metrics import write_atomic

CHECKSUMS = 'checksums.json'   # {file within the checkpoint: [bytes, CRC-32]}
_CHUNK = 2 ** 22


class Recorder:
    """Writes the checksums of a checkpoint into its folder, in a thread, as soon as it is complete."""

    def __init__(self):
        self._thread, self._last_look = None, threading.Event()

    def start(self, folder: pathlib.Path) -> None:
        """Waits for the folder of a checkpoint, which appears when all of it is written."""
        self._last_look = threading.Event()
        self._thread = threading.Thread(target=_record, args=(folder, self._last_look), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Until the checksums are written; to be called when the save has ended, whether it failed or not."""
        if self._thread is not None:
            self._last_look.set()
            self._thread.join()
            self._thread = None


def _record(folder: pathlib.Path, last_look: threading.Event) -> None:
    while not folder.is_dir() and not last_look.wait(0.05):
        continue
    if not folder.is_dir():   # the save has failed
        return
    try:
        write_atomic(folder / CHECKSUMS, json.dumps(_checksums(folder)) + '\n')
    except OSError as error:
        print(f'checkpoint {folder} stays without checksums: {error}', file=sys.stderr, flush=True)


def _checksums(folder: pathlib.Path) -> dict[str, list[int]]:
    paths = sorted(p for p in folder.rglob('*') if p.is_file())
    return {p.relative_to(folder).as_posix(): [p.stat().st_size, _crc(p)] for p in paths}


def _crc(path: pathlib.Path) -> int:
    found = 0
    with path.open('rb') as file:
        while chunk := file.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return found


def damage(folder: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if nothing is. Reads all of it once.

    Where it has no checksums, as the program was killed before it had written them, it has to be readable.
    """
    return _changed(folder) if (folder / CHECKSUMS).is_file() else _unreadable(folder)


def check(folder: pathlib.Path) -> None:
    """Raises UserError if a checkpoint is not what was written, by its checksums."""
    reason = _changed(folder) if (folder / CHECKSUMS).is_file() else None
    if reason:
        raise UserError(f'checkpoint {folder} is damaged: {reason}')


def _changed(folder: pathlib.Path) -> str | None:
    try:
        listed = json.loads((folder / CHECKSUMS).read_text())
        expected = {folder / name: (size, crc) for name, (size, crc) in listed.items()}
    except (ValueError, TypeError, AttributeError):
        return f'{CHECKSUMS} is damaged'
    for path, (size, crc) in expected.items():
        name = path.relative_to(folder)
        if not path.is_file():
            return f'{name} is missing'
        if path.stat().st_size != size:
            return f'{name} has {path.stat().st_size:,} bytes, expected {size:,}'
        try:
            if _crc(path) != crc:
                return f'{name} has another content than was written'
        except OSError as error:
            return f'{name} cannot be read: {error.strerror}'
    return None


def _unreadable(folder: pathlib.Path) -> str | None:
    try:
        json.loads((folder / 'data/metadata').read_text())
        # Not a Checkpointer, which would wait for the other processes.
        handler = ocp.PyTreeCheckpointHandler()
        tree = handler.metadata(folder / 'state').tree
        handler.restore(folder / 'state', args=ocp.args.PyTreeRestore(
            item=tree, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)))
    except MemoryError:   # says nothing of the checkpoint
        raise
    except Exception as error:   # Orbax raises this very class, too
        return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
    return None


def move_aside(folder: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Moves a checkpoint into the folder `target`, where it disturbs nobody; where to."""
    target.mkdir(exist_ok=True)
    name, count = f'{folder.parent.name}-{folder.name}', 0
    while (place := target / (name + f'.{count}' * bool(count))).exists():
        count += 1
    os.replace(folder, place)
    return place
