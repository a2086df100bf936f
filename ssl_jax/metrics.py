"""Where numbers, pictures and arrays go (JSONL, TensorBoard, W&B when asked), and the meter of the progress line."""
import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.errors import UserError


class Writer:
    """Writes to WORKDIR: metrics.jsonl, images/<tag>/<step>*.png, arrays/<tag>-<step>.npz and tensorboard/.

    Only the first process does.

    Args:
      start: the step a run continues from. What an interrupted run logged beyond it is dropped, as it will come again.
      config: what W&B stores with the run.
      wandb: arguments of `wandb.init` (needs the extra `wandb`), or None.
    """

    def __init__(self, workdir: str, *, start: int, active: bool = True, config: Mapping[str, Any] | None = None,
                 wandb: Mapping[str, Any] | None = None):
        self._folder, self._active = pathlib.Path(workdir), active
        path = self._folder / 'metrics.jsonl'
        # Every process reads it: they must agree on which evaluations are still to be done.
        lines = _lines(path) if path.exists() else []
        self._done = [line for line in lines if line['step'] <= start]
        if not active:
            return
        if lines:
            write_atomic(path, ''.join(json.dumps(line) + '\n' for line in self._done))
        self._jsonl = path.open('a', buffering=1)
        self._tensorboard = _TensorBoard(self._folder / 'tensorboard', start)
        self._wandb = _start_wandb(wandb, workdir, config) if wandb is not None else None

    def evaluated(self, step: int, tag: str) -> dict[str, float]:
        """What the evaluator `tag` wrote at `step` before the run was interrupted; empty if it had not finished."""
        return {k: v for line in self._done if line['step'] == step for k, v in line.items() if k.startswith(f'{tag}/')}

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One JSON line: 'step' and name -> number. Non-finite numbers become null, which JSON has."""
        if not self._active:
            return
        values = {k: float(v) for k, v in values.items()}
        line = {'step': step} | {k: v if np.isfinite(v) else None for k, v in values.items()}
        with _naming(self._jsonl.name):
            self._jsonl.write(json.dumps(line) + '\n')
        self._tensorboard.scalars(step, values)
        if self._wandb:
            self._wandb.log(values, step=step)

    def images(self, step: int, tag: str, images: Mapping[str, np.ndarray]) -> None:
        """(H, W, 3) or (H, W) uint8 arrays as PNG files and TensorBoard images."""
        if not self._active or not images:
            return
        save_images(self._folder, step, tag, images)
        for name, image in images.items():
            rgb = image if image.ndim == 3 else np.repeat(image[..., None], 3, -1)
            self._tensorboard.image(step, f'{tag}/{name}', rgb)
        if self._wandb:
            import wandb
            self._wandb.log({f'{tag}/{name}': wandb.Image(image) for name, image in images.items()}, step=step)

    def arrays(self, step: int, tag: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Curves, confusion matrices and predictions, for reports; see `save_arrays`."""
        if self._active:
            save_arrays(self._folder, step, tag, arrays)

    def close(self) -> None:
        if self._active:
            with _naming(self._jsonl.name):
                self._jsonl.close()
            self._tensorboard.close()
            if self._wandb:
                self._wandb.finish()


class _TensorBoard:
    """An event file in `folder`, in which TensorBoard hides what earlier ones have beyond the step `start`.

    Not SummaryWriter: its thread dies of a full disk, and the run then waits for it for ever.
    """

    def __init__(self, folder: pathlib.Path, start: int):
        from tensorboardX.event_file_writer import EventsWriter
        folder.mkdir(exist_ok=True)
        self._folder, self._flushed = folder, time.monotonic()
        with _naming(folder):
            self._file = EventsWriter(str(folder / 'events'), f'.{os.getpid()}')
        if start:
            from tensorboardX.proto.event_pb2 import SessionLog
            self._write(start + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary
        self._write(step, summary=Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in values.items()]))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        from tensorboardX import summary
        self._write(step, summary=summary.image(name, image, dataformats='HWC'))

    def _write(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event
        with _naming(self._folder):
            self._file.write_event(Event(wall_time=time.time(), step=step, **what))
            if time.monotonic() - self._flushed > 60:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        with _naming(self._folder):
            self._file.close()


def save_images(workdir: str | os.PathLike, step: int, tag: str, images: Mapping[str, np.ndarray]) -> None:
    """(H, W, 3) or (H, W) uint8 arrays as WORKDIR/images/<tag>/<step>_<name>.png."""
    from PIL import Image
    folder = pathlib.Path(workdir, 'images', tag)
    for name, image in images.items():
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f'{step:08d}_{name.replace("/", "_")}.png'
        with _naming(path):
            Image.fromarray(image).save(path)


def save_arrays(workdir: str | os.PathLike, step: int, tag: str, arrays: Mapping[str, Any]) -> None:
    """Arrays of any shape as WORKDIR/arrays/<tag>-<step>.npz, and records as .json, where there are any."""
    if not arrays:
        return
    path = pathlib.Path(workdir, 'arrays', f'{tag}-{step:08d}.npz')
    path.parent.mkdir(parents=True, exist_ok=True)
    records = {name: value for name, value in arrays.items() if isinstance(value, Mapping)}
    if records:
        write_atomic(path.with_suffix('.json'), json.dumps(records) + '\n')
        arrays = {name: value for name, value in arrays.items() if name not in records}
    temporary = path.with_suffix('.tmp')
    with _naming(temporary), temporary.open('wb') as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)


def sort_values(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, np.ndarray], dict[str, Any]]:
    """An evaluator's results as numbers, pictures (uint8, (H, W, 3) or (H, W)), and other arrays and records."""
    numbers, pictures, arrays = {}, {}, {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            arrays[name] = value
        elif np.ndim(value) == 0:
            numbers[name] = float(value)
        elif value.dtype == np.uint8 and (value.ndim == 2 or value.ndim == 3 and value.shape[2] == 3):
            pictures[name] = value
        else:
            arrays[name] = value
    return numbers, pictures, arrays


def write_atomic(path: pathlib.Path, text: str) -> None:
    """The whole text or, whatever happens, what was there before."""
    temporary = path.with_suffix('.tmp')
    with _naming(temporary):
        temporary.write_text(text)
    os.replace(temporary, path)


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """Failures to open name a file, failures to write, as of a full disk, do not: this does."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise


def _lines(path: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a log; the last one of a killed run may be cut short, and is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _start_wandb(arguments: Mapping[str, Any], workdir: str, config: Mapping[str, Any] | None):
    try:
        import wandb
    except ImportError as error:
        raise UserError("config.wandb is set but wandb is not installed: pip install 'ssl_jax[wandb]'") from error
    return wandb.init(dir=workdir, config=config, resume='allow', **arguments)


class Meter:
    """Images per second, share of the time spent waiting for data, MFU and time left, between two calls of `read`.

    Args:
      flops_per_step: of the model alone (forward and backward, nothing recomputed).
      peak_flops: per second, of all devices together; None where it is not known.
    """

    def __init__(self, *, step: int, total_steps: int, batch: int, flops_per_step: float, peak_flops: float | None):
        self._step, self._total, self._batch = step, total_steps, batch
        self._flops, self._peak = flops_per_step, peak_flops
        self._since = time.perf_counter()
        self._waited = self._paused = 0.0

    def waited(self, seconds: float) -> None:
        """Time in which the loop had nothing to do but wait for the next batch."""
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """Time of evaluation and compilation: not counted as training."""
        self._paused += seconds

    def read(self, step: int) -> dict[str, float]:
        """Rates since the last call, none if that was at `step` too; call it when the device has finished `step`."""
        now, steps = time.perf_counter(), step - self._step
        elapsed = max(now - self._since - self._paused, 1e-9)
        per_step = elapsed / max(steps, 1)
        rates = {'images_per_s': self._batch / per_step, 'data_wait_percent': 100 * self._waited / elapsed,
                 'eta_s': per_step * (self._total - step), 'gflops_per_s': self._flops / per_step / 1e9}
        if self._peak:
            rates['mfu_percent'] = 100 * self._flops / per_step / self._peak
        self._since, self._step, self._waited, self._paused = now, step, 0.0, 0.0
        return rates if steps else {}


class Progress:
    """One line that is rewritten on a terminal, and one line per report in a log file."""

    def __init__(self, *, active: bool = True):
        self._active, self._rewrite = active, sys.stderr.isatty()
        self._alarms: set[str] = set()   # of the last report

    def report(self, step: int, total: int, metrics: Mapping[str, float], alarms: Sequence[str] = ()) -> None:
        """The line of this step, behind it the alarms, which also stay as lines of their own where they are new."""
        if not self._active:
            return
        parts = [f'step {step}/{total}', f'loss {metrics["loss"]:.4f}', f'lr {metrics["lr"]:.2e}']
        if 'images_per_s' in metrics:
            parts += [f'{metrics["images_per_s"]:,.0f} images/s', f'data wait {metrics["data_wait_percent"]:.0f}%']
        if 'mfu_percent' in metrics:
            parts.append(f'MFU {metrics["mfu_percent"]:.1f}%')
        if 'eta_s' in metrics:
            parts.append(f'ETA {duration(metrics["eta_s"])}')
        for alarm in alarms:
            name = alarm.partition(' ')[0]
            if name not in self._alarms:
                self.say(f'ALARM at step {step}: {alarm}')
            parts.append(f'ALARM {name}')
        self._alarms = {alarm.partition(' ')[0] for alarm in alarms}
        text = '  '.join(parts)
        start, end = ('\r\x1b[K', '') if self._rewrite else ('', '\n')
        print(start + text, end=end, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._active:
            print(f'\r\x1b[K{text}' if self._rewrite else text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """'1d 02:03:04'."""
    days, rest = divmod(int(seconds), 86400)
    clock = f'{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}'
    return f'{days}d {clock}' if days else clock


def table(results: Mapping[str, float]) -> str:
    """Evaluation results '<tag>/<metric>' as text, each beside its baseline '<tag>/random/<metric>' and the difference
    '<tag>/gain/<metric>', where it was measured.

    The ends of an interval, '<name>_low' and '<name>_high', stand in the line of their metric.
    """
    def cell(name: str) -> str:
        if name not in results:
            return ''
        low, high = results.get(f'{name}_low'), results.get(f'{name}_high')
        return f'{results[name]:.4g}' + ('' if low is None or high is None else f' [{low:.3f}, {high:.3f}]')

    ends = {f'{name}_{end}' for name in results for end in ('low', 'high')}
    names = [n for n in results if not n.partition('/')[2].startswith(('random/', 'gain/')) and n not in ends]
    rows = [('metric', 'trained', 'random weights', 'gain')]
    rows += [(n, cell(n), *(cell(f'/{beside}/'.join(n.partition('/')[::2])) for beside in ('random', 'gain')))
             for n in names]
    if not any(row[3] for row in rows[1:]):
        rows = [row[:3] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, tuple('-' * w for w in widths))
    return '\n'.join('  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)
