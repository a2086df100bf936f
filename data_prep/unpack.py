"""Unpacks archives of Zarr stores, `<name>.zarr.tar` and `<name>.zarr.zip`, each to a folder `<name>.zarr`.

    python -m data_prep.unpack --input=FOLDER --output=FOLDER [--workers=2]

A folder appears when it is complete; run the command again after an interruption, and it goes on where it stopped. The
archives stay. None of this is needed to convert Minicubes, whose archives can be read as they are.
"""
import argparse
import concurrent.futures
import fcntl
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Sequence

from data_prep import packed
from data_prep.convert import run
from data_prep.minicube_store import PACKED, frame_of
from data_prep.shards import end_with_parent
from ssl_jax.data.source import sync_folder
from ssl_jax.errors import UserError

BLOCK = 4096        # bytes that a file takes at least


def unpack(archive: str | os.PathLike, folder: str | os.PathLike) -> pathlib.Path:
    """Unpacks the store in `archive` to `folder`/<name>.zarr, or completes it; one that is there stays as it is.

    Raises:
      UserError: the archive is bad (see `packed.members`), or another process unpacks it there.
    """
    target = pathlib.Path(folder, f'{frame_of(archive)}.zarr')
    if target.exists():
        return target
    part = target.with_name(f'.{target.name}.unfinished')
    part.mkdir(parents=True, exist_ok=True)
    root = packed.index(archive).root      # refuses what is there twice
    with open(archive, 'rb') as file, open(part.with_name(f'.{target.name}.lock'), 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'another process unpacks {archive}') from None
        for member in packed.members(archive):
            if not member.name.startswith(root):
                continue        # a note beside the store
            path = part / member.name.removeprefix(root)
            # What a killed process left is whole or shorter: it is written in one go.
            if path.exists() and path.stat().st_size == member.size:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(packed.read(file, archive, member))
        os.sync()
        os.rename(part, target)
        sync_folder(target.parent)
        os.unlink(lock.name)
    return target


def unpack_all(archives: Sequence[pathlib.Path], folder: str | os.PathLike, *, workers: int = 1,
               quiet: bool = False) -> list[pathlib.Path]:
    """Unpacks archives to a folder, if it has room for all of them.

    Raises:
      UserError: it has not, or one of the archives is bad.
    """
    from tqdm import tqdm
    folder = pathlib.Path(folder)
    names = [frame_of(a) for a in archives]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise UserError(f'{twice}.zarr is in two archives')
    left = [a for a in archives if not (folder / f'{frame_of(a)}.zarr').exists()]
    folder.mkdir(parents=True, exist_ok=True)
    missing = sum(_missing(a, folder) for a in left)
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(f'{len(left)} archives need {missing / 1e9:.3g} GB, {folder} has {free / 1e9:.3g} GB free')
    with tqdm(total=len(archives), initial=len(archives) - len(left), unit='store', disable=quiet or None) as bar:
        if workers == 1:
            for archive in left:
                unpack(archive, folder)
                bar.update()
        else:
            context = multiprocessing.get_context('spawn')
            with concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent, (os.getpid(),)) as pool:
                jobs = [pool.submit(unpack, a, folder) for a in left]
                try:
                    for job in concurrent.futures.as_completed(jobs):
                        job.result()
                        bar.update()
                except concurrent.futures.BrokenExecutor as error:
                    raise UserError('a worker process died (killed for memory?): use fewer --workers') from error
                finally:
                    pool.shutdown(cancel_futures=True)
    return [folder / f'{n}.zarr' for n in names]


def _missing(archive: pathlib.Path, folder: pathlib.Path) -> int:
    """Bytes on disk that unpacking it still takes, nearly."""
    part = folder / f'.{frame_of(archive)}.zarr.unfinished'
    there = sum(-(-os.path.getsize(os.path.join(f, n)) // BLOCK) for f, _, names in os.walk(part) for n in names)
    return BLOCK * (sum(-(-m.size // BLOCK) for m in packed.members(archive)) - there)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', required=True, help=f'folder of archives ({", ".join(PACKED)}), or one archive')
    parser.add_argument('--output', required=True, help='folder to unpack to')
    parser.add_argument('--workers', type=int, default=1, help='processes')
    given = parser.parse_args(arguments)
    source = pathlib.Path(given.input)
    archives = [source] if source.is_file() else sorted(p for p in source.glob('*') if p.name.endswith(PACKED))
    if not archives or not archives[0].name.endswith(PACKED):
        raise UserError(f'{source} is neither an archive {" or ".join(PACKED)} nor a folder of such')
    if given.workers < 1:
        raise UserError(f'--workers={given.workers}: expected at least 1')
    for path in unpack_all(archives, given.output, workers=given.workers):
        print(path)


if __name__ == '__main__':
    run(main)
