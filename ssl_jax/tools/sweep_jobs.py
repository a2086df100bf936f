"""What a sweep consists of: jobs, what they wait for, and how their results become a table."""
import dataclasses
import graphlib
import importlib.util
import itertools
import os
import pathlib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ssl_jax import config as configs
from ssl_jax.errors import UserError, nearest
from ssl_jax.tools.sweep_table import Table, Tabulate, collect, listing

JOB = 'job:'    # before a job's name, in place of a run folder


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Args:
      name: of its folder.
      config: as from `get_config`; 'job:<name>' as `init_from`, or as its `path`, is the run of that job.
      after: jobs that must be finished before; the one in `init_from` need not be named.
    """
    name: str
    config: Mapping[str, Any]
    after: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """All jobs that must be finished before."""
        path = self._source
        found = (path.removeprefix(JOB),) if path is not None and path.startswith(JOB) else ()
        return tuple(dict.fromkeys((*self.after, *found)))

    def resolved(self, folder: pathlib.Path) -> dict[str, Any]:
        """The config, with the run of a job in `folder` for 'job:<name>'."""
        config, path = configs.plain(self.config), self._source
        if path is not None and path.startswith(JOB):
            place, source = str(folder / path.removeprefix(JOB)), config['init_from']
            config['init_from'] = source | {'path': place} if isinstance(source, Mapping) else place
        return config

    @property
    def _source(self) -> str | None:
        source = self.config['init_from'] if 'init_from' in self.config else None
        return source['path'] if isinstance(source, Mapping) else source


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Jobs, and how to make a table of their results.

    Args:
      table: takes {job: {metric: number}} of those that are finished, see `sweep_table.collect`; None: all numbers.
    Raises:
      UserError: a name that is no folder's or occurs twice, a job that needs one that is not there, or itself.
    """
    jobs: Sequence[Job]
    table: Tabulate | None = None

    def __post_init__(self):
        names = [job.name for job in self.jobs]
        for job in self.jobs:
            if not re.fullmatch(r'\w[\w.=+-]*', job.name, re.ASCII) or names.count(job.name) > 1:
                raise UserError(f'job {job.name!r}: expected a name of letters, digits, _ . = + and - that occurs once')
            for name in job.needs:
                if name not in names:
                    raise UserError(f'job {job.name!r} needs job {name!r}, which is not there{nearest(name, names)}')
        try:
            self.order().prepare()
        except graphlib.CycleError as error:
            raise UserError(f'jobs wait for each other: {", ".join(error.args[1])}') from error

    def order(self) -> graphlib.TopologicalSorter:
        """Names of jobs, each after those that it needs."""
        return graphlib.TopologicalSorter({job.name: job.needs for job in self.jobs})

    def stages(self) -> list[list[Job]]:
        """Jobs that need only those of earlier stages."""
        order, stages = self.order(), []
        order.prepare()
        while order.is_active():
            ready = order.get_ready()
            stages.append([job for job in self.jobs if job.name in ready])
            order.done(*ready)
        return stages

    def tabulate(self, folder: pathlib.Path) -> Table:
        """The table of what is finished in `folder`."""
        results = {job.name: collect(folder / job.name) for job in self.jobs}
        results = {name: found for name, found in results.items() if found is not None}
        return self.table(results) if self.table else listing(results, [job.name for job in self.jobs])


def grid(base: Mapping[str, Any], values: Mapping[str, Sequence[Any]], *, prefix: str = '') -> list[Job]:
    """A job for every combination of values: {'optim.lr': [1e-3, 2e-3], 'seed': [0, 1]}, named 'lr=0.001_seed=0', ....

    Raises:
      UserError: `base` has no such key.
    """
    jobs, ends = [], [key.rpartition('.')[2] for key in values]
    labels = [end if ends.count(end) == 1 else key for key, end in zip(values, ends)]
    for chosen in itertools.product(*values.values()):
        config = configs.plain(base)
        for key, value in zip(values, chosen):
            if not replace(config, key, value):
                raise UserError(f'{key} is not a key of the config{nearest(key, keys(config))}')
        words = (f'{label}={value}' for label, value in zip(labels, chosen))
        jobs.append(Job(prefix + '_'.join(re.sub(r'[^\w.=+-]+', '-', word).strip('-') for word in words), config))
    return jobs


def replace(config: dict[str, Any], key: str, value: Any) -> bool:
    """Sets 'a.b.c' in nested dicts, in place; False where there is no such key."""
    *parents, last = key.split('.')
    for parent in parents:
        config = config[parent] if isinstance(config, dict) and parent in config else {}
    if not isinstance(config, dict) or last not in config:
        return False
    config[last] = value
    return True


def keys(config: Mapping[str, Any], prefix: str = '') -> Iterator[str]:
    """All keys of nested dicts, with dots."""
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from keys(value, f'{prefix}{key}.')


def options(argument: str, **defaults: bool | int | str | tuple) -> types.SimpleNamespace:
    """What `get_sweep` is asked for: 'tiny,root=DIR,seeds=3,counts=100+300' as attributes.

    Args:
      defaults: of the type that is wanted; tuples are of numbers, and of words that may stand for one.
    Raises:
      UserError: an unknown word, or no such value.
    """
    found = dict(defaults)
    for part in filter(None, argument.split(',')):
        name, equals, text = part.partition('=')
        if name not in defaults:
            raise UserError(f'argument {part!r} of the sweep is unknown{nearest(name, defaults)}')
        try:
            found[name] = _value(text if equals else None, defaults[name])
        except ValueError as expected:
            raise UserError(f'argument {part!r} of the sweep: expected {name}{expected}') from expected
    return types.SimpleNamespace(**found)


def _value(text: str | None, default: bool | int | str | tuple) -> bool | int | str | tuple:
    """The text behind a name, None where there is none, as the type of the default.

    Raises:
      ValueError: with what was expected.
    """
    if isinstance(default, bool):
        if text is not None:
            raise ValueError
        return True
    if isinstance(default, str):
        if not text:
            raise ValueError('=<text>')
        return text
    if isinstance(default, int):
        if text is None or not text.isdecimal():
            raise ValueError('=<number>')
        return int(text)
    parts = (text or '').split('+')
    if not all(part.isdecimal() or part in default for part in parts):
        raise ValueError('=' + '+'.join(map(str, default)))
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def load(path: str | os.PathLike) -> types.ModuleType:
    """The module in a file of experiments.

    Raises:
      UserError: there is none.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f'--config={path}: no such file; the experiments are in configs/')
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
