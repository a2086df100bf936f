"""Data sets that need no download: made on first use, kept in the user's cache folder."""
import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from ssl_jax.data.source import MANIFEST
from ssl_jax.errors import UserError, nearest


def cache_folder() -> pathlib.Path:
    """SSL_JAX_CACHE, else ssl_jax in the user's cache (XDG_CACHE_HOME or ~/.cache)."""
    own = os.environ.get('SSL_JAX_CACHE')
    if own:
        return pathlib.Path(own).expanduser()
    return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'ssl_jax'


def folder(name: str) -> pathlib.Path:
    """The folder of the embedded data set of this name, made if it is not there.

    Whoever comes second waits for the first. A killed attempt leaves nothing that could be taken for a data set.

    Raises:
      UserError: no such data set, or the cache folder cannot be written to.
    """
    if name not in _MAKERS:
        raise UserError(f'embedded:{name} is unknown{nearest(name, _MAKERS)}')
    version, make = _MAKERS[name]
    target = cache_folder() / f'{name}-v{version}'
    if (target / MANIFEST).is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / f'.{target.name}.lock'):
            if not (target / MANIFEST).is_file():
                _build(target, make)
    except OSError as error:
        raise UserError(f'embedded:{name} cannot be made in {target.parent} ({error}): '
                        'set SSL_JAX_CACHE to a folder with space') from error
    return target


def _build(target: pathlib.Path, make: Callable[[pathlib.Path, pathlib.Path], None]) -> None:
    for left in target.parent.glob(f'.{target.name}.build.*'):   # of a killed attempt; nobody else builds now
        shutil.rmtree(left, ignore_errors=True)
    began = time.monotonic()
    print(f'embedded data set: making {target}, once', file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=f'.{target.name}.build.', dir=target.parent) as scratch:
        made = pathlib.Path(scratch, 'made')
        make(pathlib.Path(scratch), made)
        os.rename(made, target)
    print(f'embedded data set: {target} took {time.monotonic() - began:.0f} s', file=sys.stderr, flush=True)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds an exclusive lock that the system drops with the process, however it ends."""
    import fcntl
    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _minicubes(scratch: pathlib.Path, out: pathlib.Path) -> None:
    """Simulated Hephaestus Minicubes as Zarr stores, then converted as the published ones are."""
    stores = scratch / 'minicubes'
    _command('data_prep.simulate_minicubes', f'--output={stores}', *SIMULATION)
    _command('data_prep.hephaestus_minicubes', f'--input={stores}', f'--output={out}', *CONVERSION)


def _digits(scratch: pathlib.Path, out: pathlib.Path) -> None:
    """The handwritten digits of scikit-learn."""
    _command('data_prep.digits', f'--output={out}', '--workers=1')


def _command(module: str, *arguments: str) -> None:
    # A process of its own: the workers of a converter import the script that started them again, and that script would
    # ask for this data set and wait for the lock.
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(p or os.getcwd() for p in sys.path)}
    done = subprocess.run([sys.executable, '-m', module, *arguments], env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f'python -m {module} {" ".join(arguments)} failed with exit code {done.returncode}')


SIMULATION = ('--frames=24', '--primaries=14', '--height=96', '--width=96', f'--workers={os.cpu_count()}')
CONVERSION = ('--crop=64',)
# A new version for every change of what is made, so that nobody goes on with the former one.
_MAKERS = {'minicubes': (1, _minicubes), 'digits': (1, _digits)}
