"""A folder for what a conversion unpacks, beside its unfinished shards; gone when it is left, or with the next run."""
import contextlib
import fcntl
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def scratch_folder(parent: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder in `parent`, which is made for it, and removed with it if nothing else is there.

    Those that killed runs left in `parent` are removed first.
    """
    made = not parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob('scratch.*'):
        with open(left / 'lock', 'w') as lock, contextlib.suppress(BlockingIOError):    # it is in use
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    try:
        # A conversion that is finished has removed all of `parent`, and with it this folder.
        with tempfile.TemporaryDirectory(prefix='scratch.', dir=parent, ignore_cleanup_errors=True) as folder:
            with open(pathlib.Path(folder, 'lock'), 'w') as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield pathlib.Path(folder)
    finally:
        if made and parent.is_dir() and not any(parent.iterdir()):      # it would pass for unfinished work
            parent.rmdir()
