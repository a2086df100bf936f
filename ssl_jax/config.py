"""Config values to Python objects: plug-ins by file name, the constructor as schema, durations."""
import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ssl_jax.errors import UserError, nearest


def plain(spec: Any) -> Any:
    """Nested ConfigDicts as plain dicts, lists as tuples, so that specs compare and hash by value."""
    if hasattr(spec, 'to_dict'):
        spec = spec.to_dict()
    if isinstance(spec, Mapping):
        return {k: plain(v) for k, v in spec.items()}
    if isinstance(spec, (list, tuple)):
        return tuple(plain(v) for v in spec)
    return spec


def plugins(kind: str) -> list[str]:
    """Names of the plug-ins of a kind: the modules of ssl_jax/<kind>/ that define `build`."""
    folder = pathlib.Path(__file__).parent / kind.replace('.', '/')
    found = [m.name for m in pkgutil.iter_modules([str(folder)])]
    return [n for n in found if hasattr(importlib.import_module(f'ssl_jax.{kind}.{n}'), 'build')]


def resolve(kind: str, spec: Mapping[str, Any], *, where: str, **context: Any) -> Callable[..., Any]:
    """The plug-in named by `spec['name']`, with the rest of `spec` checked against its signature and bound.

    `ssl_jax/<kind>/<name>.py` defines `build`, a class or a function. Its annotated parameters are the schema
    of the spec. Those of `context` that it declares are passed too (what only the run knows: image size, channels,
    compute dtype); a spec that sets one of them must agree with it.

    Args:
      where: the config path of `spec`, for messages ('objective.encoder'; '' is the config itself).
    Returns:
      A partial: call it (for NNX modules with `rngs=`) to construct.
    Raises:
      UserError: unknown name or key, ill-typed value, missing key, contradiction with the context.
    """
    spec = dict(plain(spec))
    if 'name' not in spec:
        raise UserError(f"config.{where}.name is missing: expected one of {', '.join(plugins(kind))}")
    name = spec.pop('name')
    if not isinstance(name, str) or name.startswith('_') or name not in plugins(kind):
        raise UserError(f'config.{where}.name={name!r} is unknown{nearest(name, plugins(kind))}')
    target = importlib.import_module(f'ssl_jax.{kind}.{name}').build
    return bind(target, spec, where=where, **context)


def bind(target: Callable[..., Any], spec: Mapping[str, Any], *, where: str, **context: Any) -> Callable[..., Any]:
    """`target` with the checked `spec` bound; see `resolve`."""
    spec, prefix = dict(plain(spec)), f'config.{where}.' if where else 'config.'
    # Not the class itself: the metaclass of nnx modules hides its constructor's signature.
    function = target.__init__ if inspect.isclass(target) else target
    parameters = {k: p for k, p in inspect.signature(function).parameters.items() if k not in ('self', 'rngs')}
    hints = typing.get_type_hints(function)
    for key, value in spec.items():
        if key not in parameters:
            raise UserError(f'{prefix}{key} is not a key of {target.__name__}{nearest(key, parameters)}')
        if key in hints and not matches(value, hints[key]):
            raise UserError(f'{prefix}{key}={value!r}: expected {type_name(hints[key])}')
        if key in context and value != plain(context[key]):
            raise UserError(f'{prefix}{key}={value!r}: the run needs {context[key]!r}')
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in spec and k not in context]
    if missing:
        raise UserError(f'{prefix}{missing[0]} is missing: {target.__name__} needs it')
    return functools.partial(target, **({k: v for k, v in context.items() if k in parameters} | spec))


def build(kind: str, spec: Mapping[str, Any], *, where: str, **context: Any) -> Any:
    """Constructs the plug-in that `spec` names; see `resolve`."""
    return resolve(kind, spec, where=where, **context)()


def matches(value: Any, hint: Any) -> bool:
    """Whether a config value has the annotated type; int passes for float, bool never for a number."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, a) for a in args)
    if origin is typing.Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        if len(args) == 2 and args[1] is Ellipsis:
            return all(matches(v, args[0]) for v in value)
        return len(value) == len(args) and all(map(matches, value, args))
    if origin is not None and inspect.isclass(origin):
        if issubclass(origin, Mapping):
            return isinstance(value, Mapping) and (not args or all(matches(v, args[1]) for v in value.values()))
        if issubclass(origin, Sequence):
            return isinstance(value, (list, tuple)) and all(matches(v, args[0]) for v in value)
        return True
    return isinstance(value, hint) if inspect.isclass(hint) else True


def type_name(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ' or '.join(map(type_name, args))
    if origin is typing.Literal:
        return 'one of ' + ', '.join(map(repr, args))
    if hint is type(None):
        return 'None'
    return hint.__name__ if inspect.isclass(hint) and origin is None else str(hint).replace('typing.', '')


Duration = int | str
_DURATION = re.compile(r'^(\d+(?:\.\d+)?)(ep|%)?$')


def steps(duration: Duration, *, where: str, steps_per_epoch: int, total_steps: int | None = None) -> int:
    """A duration in optimiser steps: 5000 or '5000' steps, '40ep' epochs, '10%' of the run.

    Raises:
      UserError: not of this form, or a percentage where the run's length is itself being given.
    """
    match = _DURATION.match(str(duration).strip())
    number, unit = match.groups() if match else ('', '')
    if not match or isinstance(duration, bool) or (unit == '%' and total_steps is None) or (not unit and '.' in number):
        share = " or a share of the run ('10%')" if total_steps else ''
        expected = f"a number of steps (5000), epochs ('40ep'){share}"
        raise UserError(f'config.{where}={duration!r}: expected {expected}')
    scale = {'ep': steps_per_epoch, '%': (total_steps or 0) / 100, None: 1}[unit]
    return round(float(number) * scale)
