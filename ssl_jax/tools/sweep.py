"""Runs a programme of experiments, each as a process of its own, and makes a table of what they measure.

    python -m ssl_jax.tools.sweep --config=configs/cifar10/label_sweep.py --workdir=DIR [-n 2]
    python -m ssl_jax.tools.sweep --config=configs/digits.py --workdir=DIR --grid=optim.lr=1e-3,2e-3 --grid=seed=0,1
        --list        the jobs, and how far each of them is
        --table       the table of those that are finished
        --commands    prints shell commands in an order that works, and runs nothing
        --slurm       prints a script that submits job arrays, and runs nothing

FILE.py has `get_sweep(arg) -> Sweep`; what follows a colon, as in FILE.py:tiny, is its argument. A file with
`get_config()` alone makes a sweep with --grid. --set=KEY=VALUE replaces a value in all jobs that have this key.

Every job is a run in DIR/<job>, with its config in job.py and what it prints in log.txt. The same command goes on where
it was: finished jobs stay, unfinished ones continue from their checkpoints. A job whose config has changed since it
began is refused; --overwrite removes its folder, and those of the jobs that start from it. The table is in
DIR/table.md, table.csv and, where it has a figure, table.png. Where CUDA_VISIBLE_DEVICES lists devices, the N jobs at a
time share them out.
"""
import argparse
import ast
import dataclasses
import json
import pathlib
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ssl_jax import config as configs
from ssl_jax.errors import UserError, nearest
from ssl_jax.tools import sweep_run
from ssl_jax.tools.sweep_jobs import Job, Sweep, grid, keys, load, options, replace
from ssl_jax.tools.sweep_table import RESULTS, Axes, Estimate, Table, estimate, mean

__all__ = ['Axes', 'Estimate', 'Job', 'Sweep', 'Table', 'estimate', 'grid', 'load', 'mean', 'options']


def read(argument: str, *, settings: Mapping[str, Any], values: Mapping[str, Sequence[Any]]) -> Sweep:
    """The sweep of --config, --set and --grid.

    Raises:
      UserError: the file makes no sweep, or no job has a key.
    """
    path, _, rest = argument.partition(':')
    module = load(path)
    if hasattr(module, 'get_sweep') and not values:
        sweep = module.get_sweep(rest)
    elif hasattr(module, 'get_config') and values:
        sweep = Sweep(grid(module.get_config(rest) if rest else module.get_config(), values))
    else:
        raise UserError(f'--config={path}: expected a file with get_sweep(), or one with get_config() and --grid')
    jobs = [dataclasses.replace(job, config=configs.plain(job.config)) for job in sweep.jobs]
    for key, value in settings.items():
        if not any([replace(job.config, key, value) for job in jobs]):
            known = {k for job in jobs for k in keys(job.config)}
            raise UserError(f'--set={key}: no job has this key{nearest(key, known)}')
    return dataclasses.replace(sweep, jobs=jobs)


def progress(sweep: Sweep, folder: pathlib.Path) -> str:
    """A line per job: its name, how far it is, and what it needs."""
    lines, width = [], max(len(job.name) for job in sweep.jobs)
    for job in sweep.jobs:
        log, state = folder / job.name / 'metrics.jsonl', 'not begun'
        if (folder / job.name / RESULTS).exists():
            state = 'finished'
        elif log.exists():
            # The last line may be half-written.
            steps = [json.loads(line)['step'] for line in log.read_text().splitlines()[:-1]]
            state = f'step {max(steps, default=0)}'
        needs = f'after {", ".join(job.needs)}' if job.needs else ''
        lines.append(f'{job.name:<{width}}  {state:<12}{needs}'.rstrip())
    return '\n'.join(lines)


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f'{text!r}: expected key=value')
    return key, _literal(value)


def _values(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition('=')
    if not equals or not values:
        raise argparse.ArgumentTypeError(f'{text!r}: expected key=value,value')
    try:
        return key, list(ast.literal_eval(f'({values},)'))
    except (ValueError, SyntaxError):   # words without quotes
        return key, [_literal(value) for value in values.split(',')]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _terminate(*_: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 where a job failed, 2 after one line on what the user can mend, 130 if interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', required=True, help='FILE.py[:argument]')
    parser.add_argument('--workdir', required=True, help='folder of the runs and the table')
    parser.add_argument('-n', type=int, default=1, help='jobs at a time (default: 1)')
    parser.add_argument('--set', action='append', type=_setting, default=[], help='KEY=VALUE in all jobs that have KEY')
    parser.add_argument('--grid', action='append', type=_values, default=[], help='KEY=VALUE,VALUE,...')
    parser.add_argument('--overwrite', action='store_true', help='start jobs anew whose config has changed')
    only = parser.add_mutually_exclusive_group()
    for name in ('list', 'table', 'commands', 'slurm'):
        only.add_argument(f'--{name}', action='store_true')
    a = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    folder = pathlib.Path(a.workdir).expanduser().resolve()
    try:
        if a.n < 1:
            raise UserError(f'-n {a.n}: expected at least 1')
        sweep, failed = read(a.config, settings=dict(a.set), values=dict(a.grid)), []
        if a.list:
            print(progress(sweep, folder))
        elif a.commands or a.slurm:
            print((sweep_run.commands if a.commands else sweep_run.slurm)(sweep, folder), end='')
        else:
            if not a.table:
                failed = sweep_run.run(sweep, folder, parallel=a.n, overwrite=a.overwrite)
            table = sweep.tabulate(folder)
            folder.mkdir(parents=True, exist_ok=True)
            paths = table.write(folder)
            print(f'\n{table.to_markdown()}\n{", ".join(map(str, paths))}')
        return 1 if failed else 0
    except (UserError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted: the same command goes on from here', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
