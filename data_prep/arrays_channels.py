"""Which arrays of a file are channels, and which of their dimensions counts examples, runs down and across."""
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.arrays_formats import Reader, Variable, dimensions, value_dtype
from data_prep.arrays_pixels import Frame, Plan, Source
from data_prep.arrays_rasters import GeotiffReader
from data_prep.arrays_readers import open_file
from data_prep.convert import ChannelSpec
from data_prep.problems import Problems
from data_prep.statistics import FLOATS, INTEGERS
from ssl_jax.errors import UserError, nearest

Y = ('y', 'lat', 'latitude', 'row', 'rows', 'height', 'northing', 'nj')
X = ('x', 'lon', 'longitude', 'column', 'columns', 'col', 'cols', 'width', 'easting', 'ni')
CHANNEL = ('channel', 'channels', 'band', 'bands')
LATITUDE = ('lat', 'latitude', 'degreesnorth', 'degreenorth', 'degreesn')
LONGITUDE = ('lon', 'longitude', 'degreeseast', 'degreeeast', 'degreese')


def parse_channel(text: str) -> Source:
    """VARIABLE[:KIND[:PERIOD]][:nodata=A/B][:unit=U][:name=A/B].

    Raises:
      UserError: of another form.
    """
    variable, *parts = text.split(':')
    given: dict[str, Any] = {}
    plain = [p for p in parts if '=' not in p]
    named = dict(p.split('=', 1) for p in parts if '=' in p)
    for name in named:
        if name not in ('nodata', 'unit', 'name'):
            raise UserError(f'channel {text!r}: unknown {name!r}{nearest(name, ("nodata", "unit", "name"))}')
    if plain and plain[0] not in ('linear', 'phase'):
        raise UserError(f'channel {text!r} is {plain[0]!r}{nearest(plain[0], ("linear", "phase"))}')
    if len(plain) > 2 or not variable:
        raise UserError(f'channel {text!r}: expected VARIABLE[:KIND[:PERIOD]][:nodata=A/B][:unit=U][:name=A/B]')
    try:
        if len(plain) == 2:
            given['period'] = float(plain[1])
        if 'nodata' in named:
            given['nodata'] = () if named['nodata'] == 'none' else tuple(float(v) for v in named['nodata'].split('/'))
    except ValueError as error:
        raise UserError(f'channel {text!r}: {error}') from None
    return Source(variable, *plain[:1], unit=named.get('unit', ''), names=tuple(
        filter(None, named.get('name', '').split('/'))), **given)


def parse_dims(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """'n,y,x' or 'images:n,y,x,c;dem:y,x': variable ('' = any) -> names."""
    found = []
    for part in filter(None, text.split(';')):
        variable, _, names = part.rpartition(':')
        dims = tuple(n.strip() for n in names.split(','))
        if not all(dims) or len(set(dims)) < len(dims):
            raise UserError(f'--dims={text}: expected different names, such as example,y,x,channel or dem:y,x')
        found.append((variable.strip(), dims))
    return tuple(sorted(found, key=lambda f: not f[0]))     # those of a variable count first


def find_roles(paths: Sequence[str], plan: Plan, channels: Sequence[str], examples: Sequence[str], channel: str, y: str,
               x: str, reserved: set[str], problems: Problems) -> Plan:
    """The plan with sources and the roles of dimensions, as the first readable file tells.

    Args:
      reserved: variables that are labels, coordinates, ...: no channels unless asked for.
    Raises:
      UserError: it doesn't tell.
    """
    reader, failed = None, None
    for path in paths:
        try:
            reader = open_file(path, plan.scratch)
            break
        except UserError as error:
            if problems.on_error == 'stop':
                raise
            failed = error
    if reader is None:
        raise UserError(f'none of the {len(paths)} files can be read: {failed}')
    sources = tuple(map(parse_channel, channels)) or _all_channels(reader, plan, reserved)
    for source in sources:
        variable = reader.variable(source.variable)
        if variable.dtype.kind not in 'biuf':
            raise UserError(f'{reader.path}: {source.variable!r} is {_dtype_name(variable)}, expected real numbers')
    found = list(dict.fromkeys(d for s in sources for d in dimensions(
        reader.path, reader.variable(s.variable), plan.dims, examples)))
    text = f'{reader.path}: the channels have the dimensions {", ".join(found)}'
    for flag, name in (('channel', channel), ('y', y), ('x', x), *(('examples', e) for e in examples)):
        if name and name not in found:
            raise UserError(f'{text}: --{flag}={name} is none of them{nearest(name, found)}')
    channel = channel or _first(found, CHANNEL, (*examples, y, x))
    y, x = y or _first(found, Y, (*examples, channel)), x or _first(found, X, (*examples, channel))
    if not y or not x:
        raise UserError(f'{text}: --{"x" if y else "y"} names the one that runs {"across" if y else "down"}')
    left = [d for d in found if d not in (channel, y, x)]
    if not examples:
        examples = left if len(left) == 1 else [d for d in left if d == 'example']
    return dataclasses.replace(plan, sources=sources, examples=tuple(examples), channel=channel, y=y, x=x)


def _first(found: Sequence[str], names: Sequence[str], taken: Sequence[str]) -> str:
    return next((d for d in found if d.lower() in names and d not in taken), '')


def _all_channels(reader: Reader, plan: Plan, reserved: set[str]) -> tuple[Source, ...]:
    """Every band of a GeoTIFF; else the only array of numbers with two dimensions or more."""
    candidates = [v for v in reader.variables.values()
                  if len(v.shape) > 1 and v.dtype.kind in 'biuf' and v.name not in reserved]
    if isinstance(reader, GeotiffReader):
        candidates = [v for v in candidates if v.name != 'mask']
        return tuple(Source(v.name) for v in candidates)
    if len(candidates) != 1:
        held = ', '.join(f'{v.name} {v.shape}' for v in list(reader.variables.values())[:20]) or 'no arrays'
        raise UserError(f'{reader.path}: --channels names the variables that are channels; it holds {held}')
    return (Source(candidates[0].name),)


def _dtype_name(variable: Variable) -> str:
    return 'text' if variable.dtype.kind == 'U' else str(variable.dtype)


def choose_dtype(plan: Plan, variables: Mapping[tuple[str, str], Variable], dtype: str, pixels_valid: bool,
                 say: Callable[[str], None]) -> Plan:
    """The plan with the dtype of the image, for all files; says where digits are lost.

    Args:
      variables: (path, name) -> variable, of every channel.
      dtype: asked for, '' = the smallest that holds all channels, float32 at most.
      pixels_valid: plan.valid, if given, is of pixels; else of examples, and loading need not look at it.
    Raises:
      UserError: an unknown dtype, or integers for floats.
    """
    allowed = INTEGERS + FLOATS
    if dtype and dtype not in allowed:
        raise UserError(f'--dtype={dtype} is unknown{nearest(dtype, allowed)}')
    found: dict[str, set[np.dtype]] = {}
    for (path, name), variable in variables.items():
        if variable.dtype.kind not in 'biuf':
            raise UserError(f'{path}: {name!r} is {_dtype_name(variable)}, expected real numbers')
        found.setdefault(name, set()).add(value_dtype(variable))
    common = np.result_type(*(t for types in found.values() for t in types)).name
    target = dtype or (common if common in allowed else 'float32')
    for name, types in found.items():
        wide = [t for t in types if t.kind == 'f' and t.itemsize > np.dtype(target).itemsize]
        if np.dtype(target).kind in 'iu' and any(t.kind == 'f' for t in types):
            raise UserError(f'--dtype={dtype}: {name!r} holds {next(t for t in types if t.kind == "f")}')
        if wide:
            say(f'{name} is {wide[0]} and is stored as {target}, with {np.finfo(target).precision} digits')
        elif np.dtype(target).kind == 'f' and any(t.kind in 'iu' and t.itemsize > 2 for t in types):
            say(f'{name} holds integers and is stored as {target}' + (', rounded' if dtype else
                                                                     ': one that it does not hold exactly stops'))
    nodata = {s.variable: s.nodata for s in plan.sources}
    some = any(v.nodata if nodata[name] is None else nodata[name] for (_, name), v in variables.items())
    valid = plan.valid if pixels_valid else ''
    masked = np.dtype(target).kind in 'iu' and bool(some or valid)
    declared = sorted({(name, v.nodata) for (_, name), v in variables.items() if v.nodata and nodata[name] is None})
    for name, values in declared:
        say(f'{name}: {", ".join(f"{v:g}" for v in values)} is no data, as its file says')
    return dataclasses.replace(plan, dtype=target, rounding=bool(dtype), masked=masked, valid=valid)


def channel_specs(plan: Plan, found: Frame) -> list[ChannelSpec]:
    """The channels of the manifest; those along the channel dimension are numbered, or named as the source says."""
    specs = []
    for source in plan.sources:
        count = found.width(source.variable)
        many = count > 1 or plan.channel in found.dims(source.variable)
        names = source.names or ([f'{source.variable}_{k}' for k in range(count)] if many else [source.variable])
        if len(names) != count:
            raise UserError(f'{found.path}: {found.told(source.variable)}: {len(names)} names for {count} channels')
        unit = source.unit or found.reader.variable(source.variable).unit
        specs += [ChannelSpec(name, source.kind, source.period, unit) for name in names]
    return specs
