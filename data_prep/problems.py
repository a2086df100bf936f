"""Bad input: it stops a conversion, or is left out and listed, as the user asked with --on_error."""
from typing import Literal

from ssl_jax.errors import UserError

OnError = Literal['stop', 'skip']


class Problems:
    """What is wrong with the input, found while a converter lists its items.

    Args:
      on_error: 'stop' raises the first problem; 'skip' keeps them all, and the caller leaves the examples out.
    Raises:
      UserError: another `on_error`.
    """

    def __init__(self, on_error: OnError):
        check_on_error(on_error)
        self.on_error = on_error
        self._found: list[tuple[str, str]] = []

    def add(self, key: str, reason: str) -> None:
        """Records that the example, file or row `key` is bad; `reason` says why, in one line.

        Raises:
          UserError: '<key>: <reason>', under 'stop'.
        """
        if self.on_error == 'stop':
            raise UserError(f'{key}: {reason}')
        self._found.append((key, reason))

    @property
    def found(self) -> tuple[tuple[str, str], ...]:
        """(key, reason) of all problems so far, for `Dataset.problems`."""
        return tuple(self._found)


def check_on_error(on_error: str) -> None:
    """Raises UserError unless `on_error` is 'stop' or 'skip'."""
    if on_error not in ('stop', 'skip'):
        raise UserError(f'on_error={on_error!r}: expected stop or skip')
