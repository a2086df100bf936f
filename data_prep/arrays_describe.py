"""From a description of array files to a data set: which arrays are channels, what counts examples, what is known."""
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_prep.arrays_channels import channel_specs, choose_dtype, find_roles, parse_dims
from data_prep.arrays_inputs import find_inputs, label_maps, short_names, stem
from data_prep.arrays_known import Asked, Known
from data_prep.arrays_labels import Table
from data_prep.arrays_list import Listing
from data_prep.arrays_load import Load, forget
from data_prep.arrays_pixels import Plan
from data_prep.arrays_valid import valid_shares
from data_prep.convert import Dataset
from data_prep.problems import Problems
from ssl_jax.errors import UserError

Names = str | Sequence[str]
def describe(input: Names, *, channels: Names = (), examples: Names = (), channel: str = '', y: str = '', x: str = '',
             dims: str = '', tile: int = 0, stride: int = 0, min_valid: float = 0.0, valid: str = '',
             label: Names = (), classes: Names = (), label_map: str = '', label_map_from: str = '',
             majority: bool = False, group: Names = (), time: str = '', time_from: str = '', time_to: str = '',
             latitude: str = '', longitude: str = '', table: str = '', key: str = '', split: str = '',
             dtype: str = '', name: str = '', workers: int = 1, on_error: str = 'stop',
             scratch: pathlib.Path | None = None, provenance: Mapping[str, Any] | None = None,
             divide: Callable[..., Mapping[str, Sequence[Any]]] | None = None,
             say: Callable[[str], None] = print) -> Dataset:
    """What is to be converted; reads no pixels, but where `min_valid` needs them. Names come as 'a,b' or ('a', 'b').

    Args:
      input: files, folders, globs or fsspec URLs.
      channels: VARIABLE[:KIND[:PERIOD]][:nodata=A/B][:unit=U][:name=A/B], in order; () = the only array, all bands.
        `nodata` are stored values and replaces those that the file declares; nodata=none takes every number as valid.
      examples: dimensions that count examples; a variable without them is the same in all. Default: 'example', or the
        one that is left.
      channel, y, x: dimensions; defaults: channel(s) or band(s); y, lat, latitude, ...; x, lon, longitude, ...
      dims: names for dimensions that have none: 'example,y,x,channel', of one variable 'dem:y,x;images:n,y,x'.
      tile, stride: pixels; 0 = whole rasters, and a stride as of the tile. The last tile of a side is moved inside.
      min_valid: share of the pixels of an example that must be valid in all channels, or it is left out.
      valid: variable that is 0 where there is nothing: no example (one along the example dimensions alone), no pixel.
      label: variable, or column of the table; several, or one with a dimension of its own, are a multi-hot label.
      classes: names, in order; default: the values, sorted.
      label_map: variable of classes per pixel; in the file at `label_map_from`, or in the one of the same name in that
        folder, resampled to the nearest pixel. Without data: 255.
      majority: the label is the most frequent class in the label map.
      group: variables or columns, or 'file', that splits must not share; 'auto' = the file, if there are several.
      time, latitude, longitude: variables or columns that tell when and where an example is; the place is found in the
        coordinates y and x, and in georeferences, by itself.
      time_from, time_to: take examples between two dates, both included.
      table, key: a CSV, and its column that names examples or files; '' = a row per example, in order.
      split: variable or column that says which split an example belongs to.
      dtype: of the image; default: the smallest that holds all channels, float32 at most.
      workers: processes that look for valid pixels.
      scratch: folder for what has to be unpacked.
      divide: items to splits, where `split` doesn't say; called with (items, times=, positions=, wrap=, left_out=) of
        `data_prep.splits.split`, and side=, that of a tile in the unit of the positions. None = all are train.
    Raises:
      UserError: an argument or a file is bad, naming it.
    """
    asked = Asked(_names(label), _names(group), time, split, latitude, longitude)
    _check(tile, stride, min_valid, majority and not label_map, label_map_from and not label_map, key and not table,
           bool(latitude) != bool(longitude))
    forget()
    problems = Problems(on_error)
    paths = find_inputs(_names(input))
    names = short_names(paths)
    if asked.group == ('auto',):
        asked = dataclasses.replace(asked, group=('file',) if len(paths) > 1 else ())
    rows = Table.read(table, key) if table else None
    columns = rows.columns if rows else {}
    plan = Plan((), tile=tile, stride=stride or tile, valid=valid, label_map=label_map, majority=majority,
                dims=parse_dims(dims), scratch=scratch)
    plan = find_roles(paths, plan, _names(channels), _names(examples), channel, y, x, {valid, label_map, *asked},
                      problems)
    plan = dataclasses.replace(plan, maps=label_maps(paths, names, label_map_from) if label_map_from else ())
    places = (latitude, longitude) if latitude not in columns else ('', '')
    wanted = [n for n in asked if n not in columns and n not in (latitude, longitude, 'file')]
    listing = Listing(plan, paths, names, dict.fromkeys(wanted), rows, time, places)
    for i, short in enumerate(names):
        try:
            listing.visit(i)
        except UserError as error:
            if on_error == 'stop':
                raise
            problems.add(short, str(error).removeprefix(f'{paths[i]}: '))
    if not listing.files:
        raise UserError(f'none of the {len(paths)} files can be read: {problems.found[0][1]}')
    plan = choose_dtype(plan, listing.variables, dtype, not listing.cell_valid, say)
    known = Known(listing, rows, asked, problems)
    known.limit(time_from, time_to)
    if min_valid:
        shares = valid_shares(plan, [(paths[f.found.file], plan.maps[f.found.file] if plan.maps else '', f.found.cell,
                                      f.found.tile) for f in known.facts], workers)
        say(f'{(shares < min_valid).sum()} of {len(shares)} examples have a share of valid pixels below {min_valid:g} '
            'and are left out')
        known.keep(shares >= min_valid)
    items, class_list = known.items(_names(classes)) if known.facts else ([], [])
    if not items:
        raise UserError('no example is left' + ''.join(f': {key}: {reason}' for key, reason in problems.found[:1]))
    if split:
        parts = known.parts(items)
    elif divide:
        parts = divide(items, times=[e.time for e in items] if time else None, **known.where(),
                       left_out=[key for key, _ in problems.found])
    else:
        parts = {'train': items}
    listed = hashlib.blake2b(repr([(n, _size(p)) for n, p in zip(names, paths)]).encode(), digest_size=16).hexdigest()
    source = {**(provenance or {'converter': 'data_prep.arrays'}), 'files': len(paths), 'listing': listed}
    title = name or _title(paths[0] if len(paths) == 1 else _names(input)[0])
    return Dataset(title, channel_specs(plan, listing.opened(listing.found[0])), class_list, parts,
                   Load(plan), source, problems=problems.found)


def _names(value: Names) -> tuple[str, ...]:
    return tuple(v.strip() for v in (value.split(',') if isinstance(value, str) else value) if v.strip())


def _check(tile: int, stride: int, min_valid: float, no_map: Any, no_map_name: Any, no_table: Any,
           half: bool) -> None:
    for flag, value in (('tile', tile), ('stride', stride)):
        if value < 0:
            raise UserError(f'--{flag}={value}: expected a number of pixels')
    if stride and not tile:
        raise UserError(f'--stride={stride} needs --tile')
    if not 0 <= min_valid <= 1:
        raise UserError(f'--min_valid={min_valid}: expected a share between 0 and 1')
    if no_map or no_map_name:
        raise UserError(f'--{"majority" if no_map else "label_map_from"} needs --label_map, the variable with classes')
    if no_table:
        raise UserError('--key needs --table, the CSV with this column')
    if half:
        raise UserError('--latitude and --longitude: expected both')


def _title(path: str) -> str:
    """The name of a file, or of the folder that a glob is in."""
    parts = [p for p in path.split('/') if p and not set(p) & set('*?[')]
    return stem(parts[-1]) if parts else 'arrays'


def _size(path: str) -> int:
    return os.path.getsize(path) if '://' not in path and os.path.isfile(path) else 0
