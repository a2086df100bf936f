"""The one exception for what a user can mend: `main` prints it as a single line and exits with 2."""
import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line naming the thing, its value and what was expected."""


def nearest(name: str, options: Iterable[str]) -> str:
    """A ' (did you mean ...?)' clause for a misspelt `name`, or all `options` where none is close."""
    options = sorted(map(str, options))
    close = difflib.get_close_matches(str(name), options, n=1, cutoff=0.6)
    if close:
        return f' (did you mean {close[0]!r}?)'
    return f' (there are: {", ".join(options)})' if options else ''
