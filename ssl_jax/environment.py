"""With what a run was made: RUN/environment.json, an entry for every time it was started."""
import datetime
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

from ssl_jax.metrics import write_atomic

PACKAGES = ('ssl_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def record(workdir: str, *, step: int) -> None:
    """Appends this start to WORKDIR/environment.json; a file that is no list is begun anew.

    An entry has 'step' (that the run went on from), 'time' (UTC), 'command' (the arguments of the process), 'python',
    'versions', 'devices' ('kind', 'platform', 'count' over all processes), 'processes', and 'commit' where the package
    lies in a git checkout.
    """
    path = pathlib.Path(workdir, 'environment.json')
    try:
        starts = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        starts = []
    starts = (starts if isinstance(starts, list) else []) + [{'step': step} | describe()]
    write_atomic(path, json.dumps(starts, indent=2) + '\n')


def describe() -> dict[str, Any]:
    """This process; see `record`."""
    devices = jax.devices()
    # Not sys.argv: of `python -m package.module` it holds the file of the module, which is no command.
    found = {'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
             'command': ['python', *sys.orig_argv[1:]], 'python': platform.python_version(), 'versions': versions(),
             'devices': {'kind': devices[0].device_kind, 'platform': devices[0].platform, 'count': len(devices)},
             'processes': jax.process_count()}
    commit = _commit(pathlib.Path(__file__).parent.parent)
    return found | ({'commit': commit} if commit else {})


def versions() -> dict[str, str]:
    """Of the packages that are installed, by name."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:   # run from a folder, not installed
            continue
    return found


def _commit(folder: pathlib.Path) -> str | None:
    """Of a checkout of its own, not of whatever the package is installed below; '-dirty' if files were changed."""
    if not (folder / '.git').exists():
        return None
    try:
        command = ['git', '-C', str(folder), 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):   # no git here
        return None
    return done.stdout.strip() or None
