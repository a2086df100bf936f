"""Measures how fast this machine does what a run needs.

    python -m ssl_jax.tools.bench data --config=configs/quickstart.py
    python -m ssl_jax.tools.bench data --root=DIR --batch=256 --threads=1,2,4 --workers=0,2
    python -m ssl_jax.tools.bench step --config=configs/cifar10/dino.py --set=batch=64 --set=objective.encoder.depth=4

`data`: examples and megabytes per second of reading records in random order, of decoding them (both in one thread), and
of the whole input pipeline with every combination of threads and workers. All are measured in turns, several times
over, so that a busy moment of the machine hits each alike. What was read lately comes from memory, not from the disk.

`step`: the time of a train step on random images of the config's shapes, and the share of making views, of the loss and
its gradient, and of the update; and the share of the encoder among the multiply-adds. Several configs are measured in
turns. The parts are programs of their own, so that they need not add up to the whole.
"""
import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import config as configs
from ssl_jax import flops
from ssl_jax.data import stream
from ssl_jax.data.pipeline import Data
from ssl_jax.errors import UserError, exit_status
from ssl_jax.experiment import Run, assemble
from ssl_jax.step import make_train_step

DECODED = 64   # examples held in memory for the decoding measurement


Step = Callable[[], tuple[int, int]]   # does a piece of work and returns (examples, bytes)


@dataclasses.dataclass
class Case:
    """Something to measure.

    Args:
      start: makes it ready; what it enters on the stack is undone after every round, so that nothing that works in the
        background disturbs the next case.
      buffered: steps that may be ready before the clock starts, and are not counted.
    """
    name: str
    start: Callable[[contextlib.ExitStack], Step]
    buffered: int = 0
    start_ups: list[float] = dataclasses.field(default_factory=list)             # seconds to the first step
    rates: list[tuple[float, float]] = dataclasses.field(default_factory=list)   # (examples / s, MB / s) per round

    def measure(self, seconds: float) -> None:
        with contextlib.ExitStack() as stack:
            began = time.perf_counter()
            step = self.start(stack)
            step()
            self.start_ups.append(time.perf_counter() - began)
            for _ in range(self.buffered):
                step()
            examples = size = 0
            began = time.perf_counter()
            while (passed := time.perf_counter() - began) < seconds or not examples:
                n, k = step()
                examples, size = examples + n, size + k
            self.rates.append((examples / passed, size / passed / 1e6))


def data_cases(data: Data, batch: int, threads: Sequence[int], workers: Sequence[int]) -> list[Case]:
    """Reading, decoding, and the pipeline in all settings."""
    source, load = data.source(data.split), data.load(data.split, data.fields)
    order = itertools.cycle(np.random.default_rng(0).permutation(len(source)).tolist())
    held = itertools.cycle([source[i] for i in itertools.islice(order, DECODED)])

    def pipeline(setting, stack):
        iterator = setting.train(seed=0, batch=batch)
        stack.callback(iterator.close)
        return lambda: (batch, _size(next(iterator)))

    cases = [Case('read', lambda stack: lambda: (1, _size(source[next(order)]))),
             Case('decode', lambda stack: lambda: (1, _size(load.decode(next(held)))))]
    for w, t in itertools.product(workers, threads):
        setting = dataclasses.replace(data, threads=t, workers=w)
        buffered = w * (data.prefetch + stream.BUFFER + 1) or (data.prefetch if t else 0)
        cases.append(Case(f'pipeline, {w} workers, {t} threads', functools.partial(pipeline, setting), buffered))
    return cases


def _size(value) -> int:
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return value.nbytes if hasattr(value, 'nbytes') else len(value) if isinstance(value, (bytes, str)) else 0


def measure(cases: Sequence[Case], *, rounds: int, seconds: float) -> None:
    for _ in range(rounds):
        for case in cases:
            case.measure(seconds)


def table(cases: Sequence[Case]) -> str:
    """Median and range over the rounds, one line per case."""
    rows = [('', 'examples/s', 'range', 'MB/s', 'start-up')]
    for case in cases:
        rates = sorted(r for r, _ in case.rates)
        rows.append((case.name, f'{statistics.median(rates):.0f}', f'{rates[0]:.0f}-{rates[-1]:.0f}',
                     f'{statistics.median(m for _, m in case.rates):.1f}',
                     f'{statistics.median(case.start_ups):.2f} s'))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join('  '.join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]).rstrip()
                     for row in rows)


def bench_data(arguments: argparse.Namespace) -> None:
    spec, batch = {}, 256
    if arguments.config:
        config = _load_config(arguments.config)
        spec, batch = configs.plain(config.data), config.batch
    spec |= {k: v for k in ('root', 'split', 'canvas') if (v := getattr(arguments, k)) is not None}
    if 'root' not in spec:
        raise UserError('bench data: --config or --root is missing')
    data, batch = configs.bind(Data, spec, where='data')(), arguments.batch or batch
    cases = data_cases(data, batch, arguments.threads, arguments.workers)
    measure(cases, rounds=arguments.rounds, seconds=arguments.seconds)
    shapes = ', '.join(f'{k} {v.dtype}{list(v.shape[1:])}' for k, v in data.abstract(1).items())
    print(f'{data.root}, split {data.split!r}: {data.records} examples of {shapes}; batch {batch}')
    print(table(cases))


def step_cases(run: Run) -> list[Case]:
    """The whole train step of an assembled run, and its parts."""
    rng = np.random.default_rng(0)
    draw = {'u': lambda x: rng.integers(0, 2 if x.dtype == bool else 200, x.shape), 'f': lambda x: rng.random(x.shape)}
    host = {k: draw.get(x.dtype.kind, draw['u'])(x).astype(x.dtype) for k, x in run.batch.items()}
    host |= {'position': np.arange(run.experiment.batch, dtype=np.uint32), 'label': 0 * host['label']}
    batch, key, b = run.layout.put(host), jax.random.key(0), run.experiment.batch
    state = run.init()
    full = make_train_step(run.objective, run.view, run.tx, accumulate=run.experiment.accumulate)
    gradient = jax.grad(run.objective.loss, has_aux=True)
    view = jax.jit(run.view.train)
    viewed = view(batch, key)
    loss = jax.jit(lambda s, v, k: gradient(s.params, s.aux, v, step=s.step, key=k))
    calls = {'step': (jax.jit(full), (state, batch, key)), 'views': (view, (batch, key)),
             'loss and gradient': (loss, (state, viewed, key))}

    def once(function, arguments):
        jax.block_until_ready(function(*arguments))
        return b, _size(host)

    return [Case(name, lambda stack, call=call: functools.partial(once, *call)) for name, call in calls.items()]


def bench_step(arguments: argparse.Namespace) -> None:
    rows = [('', 'step', 'images/s', 'views', 'loss and gradient', 'update', 'encoder', 'GFLOP/image', 'GFLOP/s')]
    runs = []
    for path in arguments.config:
        config = _load_config(path)
        config.update_from_flattened_dict(dict(arguments.set))
        run = assemble(config, '', need_data=False)
        runs.append((path, run, step_cases(run)))
    for _ in range(arguments.rounds):
        for *_, cases in runs:
            for case in cases:
                case.measure(arguments.seconds)
    for path, run, cases in runs:
        b = run.experiment.batch
        seconds = {c.name: b / statistics.median(r for r, _ in c.rates) for c in cases}
        share = {k: s / seconds['step'] for k, s in seconds.items()}
        grad = jax.grad(lambda p, a, v, k, o=run.objective: o.loss(p, a, v, step=jnp.zeros((), jnp.int32), key=k)[0])
        key = jax.eval_shape(lambda: jax.random.key(0))
        arrays = run.state.params, run.state.aux, jax.eval_shape(run.view.train, run.batch, key), key
        whole, encoder = flops.count(grad, *arrays), flops.count(grad, *arrays, scope='encoder')
        update = max(0.0, 1 - share['views'] - share['loss and gradient'])
        rows.append((path, f'{1e3 * seconds["step"]:.0f} ms', f'{b / seconds["step"]:.0f}', f'{share["views"]:.0%}',
                     f'{share["loss and gradient"]:.0%}', f'{update:.0%}', f'{encoder / whole:.0%}',
                     f'{whole / b / 1e9:.3g}', f'{whole / seconds["step"] / 1e9:.1f}'))
    print(f'{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}; views, loss and gradient and '
          'update as shares of the time, encoder as a share of the multiply-adds of loss and gradient')
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print('  '.join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]).rstrip())


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f'{text!r}: expected key=value')
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _load_config(path: str):
    """The config that a file's get_config() returns; 'file.py:argument' passes it the argument."""
    path, _, argument = path.partition(':')
    if not pathlib.Path(path).is_file():
        raise UserError(f'--config={path}: no such file')
    spec = importlib.util.spec_from_file_location('bench_config', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(','))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parts = parser.add_subparsers(required=True)
    data = parts.add_parser('data', help='reading, decoding and batching')
    data.set_defaults(run=bench_data)
    data.add_argument('--config', help='an experiment, for its data and batch')
    data.add_argument('--root', help='a data set as in config.data.root')
    data.add_argument('--split')
    data.add_argument('--canvas', type=int)
    data.add_argument('--batch', type=int, help="default: the config's, else 256")
    data.add_argument('--threads', type=_numbers, default=(0, 1, 2, 4), help='settings to try (default 0,1,2,4)')
    data.add_argument('--workers', type=_numbers, default=(0,), help='settings to try (default 0)')
    data.add_argument('--rounds', type=int, default=3)
    data.add_argument('--seconds', type=float, default=2.0, help='per setting and round')
    step = parts.add_parser('step', help='a train step and its parts')
    step.set_defaults(run=bench_step)
    step.add_argument('--config', action='append', required=True, help='an experiment; may be given several times')
    step.add_argument('--set', action='append', type=_setting, default=[], help='key=value in all configs')
    step.add_argument('--rounds', type=int, default=3)
    step.add_argument('--seconds', type=float, default=5.0, help='per part and round')
    arguments = parser.parse_args(argv)
    return exit_status(lambda: arguments.run(arguments))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
