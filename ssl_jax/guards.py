"""Guards of the loop: a request to end early, on which all processes agree, and a step that hangs."""
import contextlib
import faulthandler
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ssl_jax.errors import UserError
from ssl_jax.sharding import AXES, Layout

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether a process has been sent SIGTERM or SIGINT (Ctrl-C); a second one does what the first usually does.

    Every step takes `flag` and returns whether it is set anywhere, so that all processes learn of it at the same step,
    whichever of them got the signal, at the cost of one value in the step's collectives.
    """

    def __init__(self, layout: Layout):
        self.name: str | None = None   # of the signal
        sharding = NamedSharding(layout.mesh, PartitionSpec(AXES))
        values = np.zeros(layout.mesh.size, bool), np.ones(layout.mesh.size, bool)
        with jax.transfer_guard('allow'):
            self._flags = [jax.make_array_from_callback(v.shape, sharding, v.__getitem__) for v in values]

    @property
    def flag(self) -> jax.Array:
        """(devices,) bool, one value for each."""
        return self._flags[self.name is not None]

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Notes the signals instead of ending the process. Python hears of signals in its main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        former = {number: signal.getsignal(number) for number in SIGNALS}

        def restore():
            for number, handler in former.items():
                # None: not set from Python, which then cannot set it again
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

        def ask(number, frame):
            restore()
            self.name = signal.Signals(number).name
            print(f'{self.name}: ends after this step and a checkpoint; another one ends it at once', file=sys.stderr,
                  flush=True)

        for number in SIGNALS:
            signal.signal(number, ask)
        try:
            yield
        finally:
            restore()


class Watchdog:
    """Prints the stacks of all threads, to standard error, when a step takes too long; the step goes on.

    Args:
      patience: '10min', '90s', '2h', or None for none.
    """

    def __init__(self, patience: str | None):
        self._seconds = None if patience is None else seconds(patience, where='watchdog')
        self._since = -float('inf')

    def step(self, *, first: bool = False) -> None:
        """A step begins; the first one is compiled, and may take six times as long."""
        # Each call of faulthandler ends a thread and starts another one.
        if self._seconds is not None and time.monotonic() - self._since > self._seconds / 20:
            faulthandler.dump_traceback_later(self._seconds * (6 if first else 1), file=sys.__stderr__)
            self._since = time.monotonic() if not first else -float('inf')

    def rest(self) -> None:
        """What comes now may take long."""
        if self._seconds is not None:
            faulthandler.cancel_dump_traceback_later()
            self._since = -float('inf')


def seconds(text: str, *, where: str) -> float:
    """'10min' is 600.

    Raises:
      UserError: it is not of this form.
    """
    match = re.fullmatch(r'(\d+(?:\.\d+)?) ?(s|min|h)', text)
    if not match or not float(match[1]):
        raise UserError(f"config.{where}={text!r}: expected a time such as '90s', '10min' or '2h'")
    return float(match[1]) * {'s': 1, 'min': 60, 'h': 3600}[match[2]]
