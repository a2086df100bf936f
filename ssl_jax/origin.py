"""What a checkpoint was made from, so that a run does not silently go on from that of another one.

Compared is what decides the numbers: the config and the data set (`Data.identity`). Free to change are the layout of
devices and whatever speeds up, watches, measures or saves a run; where the data set lies; and what becomes of failures.
"""
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

# Keys of the config that may be others than the checkpoint's.
FREE = frozenset({'mesh', 'accumulate', 'evals', 'checkpoint', 'health', 'log_every', 'watchdog', 'profile', 'wandb',
                  'on_nonfinite', 'resume'})
FREE_DATA = frozenset({'root', 'threads', 'workers', 'prefetch', 'planned', 'on_error'})
FREE_MODEL = frozenset({'remat', 'unroll'})   # at any depth of the objective
_POSITION = frozenset({'batch', 'seed'})      # see `Run.position`


def origin(experiment: Any, data: Any, optim: Any) -> dict[str, Any]:
    """Every value that counts, defaults included, by its name: {'config.optim.lr': 0.001, 'manifest.examples': ...}.

    Args:
      experiment, data, optim: the dataclasses that a config, config.data and config.optim become.
    """
    config = {k: v for k, v in _fields(experiment).items() if k not in FREE | _POSITION}
    config['data'] = {k: v for k, v in _fields(data).items() if k not in FREE_DATA}
    config['optim'] = _fields(optim)
    config['objective'] = _without(config['objective'], FREE_MODEL)
    flat = _flat(json.loads(json.dumps(config)), 'config')
    return flat | {f'manifest.{k}': v for k, v in data.identity.items()}


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value there, value here) of every value that is not the same."""
    names = [*ours, *(k for k in theirs if k not in ours)]
    found = [(k, _shown(theirs, k), _shown(ours, k)) for k in names
             if k not in theirs or k not in ours or theirs[k] != ours[k]]
    return sorted(found, key=lambda f: f[0].startswith('manifest.'))   # a name of the config says more than a digest


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _without(spec: Any, names: frozenset[str]) -> Any:
    return {k: _without(v, names) for k, v in spec.items() if k not in names} if isinstance(spec, Mapping) else spec


def _flat(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f'{name}.{key}').items()}


def _shown(values: Mapping[str, Any], name: str) -> str:
    text = repr(values[name]) if name in values else 'nothing'
    return text if len(text) <= 80 else text[:77] + '...'
