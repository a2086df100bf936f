"""What ends a run with one line: a mistake that the user can mend, or a request to stop."""
import difflib
import sys
from collections.abc import Callable, Iterable
from typing import Any

# Exit statuses of `main`.
MISTAKE = 2    # the same command would fail again
STOPPED = 75   # the same command continues; EX_TEMPFAIL of sysexits.h


class UserError(Exception):
    """Bad input. The message is one line naming the thing, its value and what was expected."""


class Stopped(Exception):
    """A run that was asked to end before its last step, and has saved. The message is one line."""


def nearest(name: str, options: Iterable[str]) -> str:
    """A ' (did you mean ...?)' clause for a misspelt `name`, or all `options` where none is close."""
    options = sorted(map(str, options))
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.6)
    if close:
        return f' (did you mean {close[0]!r}?)'
    return f' (there are: {", ".join(options)})' if options else ''


def exit_status(work: Callable[[], Any]) -> int:
    """Does the work of a command: 0, or MISTAKE after one line on what the user can mend."""
    try:
        work()
    except (UserError, OSError) as error:   # an OSError names the file, and what is wrong with it or its disk
        print(f'error: {error}', file=sys.stderr)
        return MISTAKE
    return 0
