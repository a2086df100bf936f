"""Any N-D arrays to records: Zarr 2 and 3, HDF5, netCDF, npy, npz, FITS and GeoTIFF, local or by an fsspec URL.

    python -m data_prep.arrays --input=cube.zarr --channels=phase:phase:6.2832,coherence,dem --output=DIR \
        --examples=primary,secondary --valid=valid_date_pair --time=primary --val_from=2019-06-01 --gap_days=30
    python -m data_prep.arrays --input=galaxies.h5 --channels=images --dims=example,y,x,channel --label=ans --output=DIR
    python -m data_prep.arrays --input='scenes/*.tif' --channels=red,nir --tile=256 --stride=128 --min_valid=0.5 \
        --val_fraction=0.2 --block=0.5 --buffer=0.1 --output=DIR
    python -m data_prep.arrays --config=my_data.py --output=DIR

Which arrays are channels is named by --channels (one array: it is found). Their dimensions are those that the file
names, or those of --dims, and their order doesn't matter: --examples count examples, --channel is stacked as channels,
--y and --x span the image, which --tile cuts. An array without the example dimensions is the same in every example.

Pixels are invalid where they are NaN, or no data as their file says (_FillValue, missing_value, the nodata of a band,
BLANK); scale_factor and add_offset, BSCALE and BZERO are applied. --nodata and more are given per channel:
VARIABLE[:KIND[:PERIOD]][:nodata=A/B][:unit=U][:name=A/B]. Images keep their dtype; wider ones are stored as float32.

A config file has a get_config() that returns a ConfigDict of these flags; the command line overrides it.
"""
import argparse
import importlib.util
import inspect
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep import convert, splits
from data_prep.arrays_describe import describe
from data_prep.shards import PARTIAL
from ssl_jax.data.source import first_line
from ssl_jax.errors import UserError, nearest

_HELP = {
    'input': 'files, folders, globs or URLs, comma-separated',
    'channels': 'variables, in order: VARIABLE[:KIND[:PERIOD]][:nodata=A/B][:unit=U][:name=A/B],...',
    'examples': 'dimensions that count examples',
    'channel': 'dimension that is stacked as channels',
    'y': 'dimension that runs down',
    'x': 'dimension that runs across',
    'dims': "names of dimensions where the file has none: 'example,y,x,channel', or 'images:n,y,x;dem:y,x'",
    'tile': 'side of square tiles in pixels (default: whole rasters)',
    'stride': 'between tiles (default: that of the tile)',
    'min_valid': 'share of valid pixels that an example must have',
    'valid': 'variable that is 0 where there is no example, or no pixel',
    'label': 'variable or column; several are multi-hot',
    'classes': 'names (default: the values)',
    'label_map': 'variable with the class of each pixel',
    'label_map_from': 'file or folder that holds it (default: the input)',
    'majority': 'the label is the most frequent class in the label map',
    'group': "variables or columns, or 'file', that splits don't share (random splits: default file, of several)",
    'time': 'variable or column with dates',
    'time_from': 'first date to take',
    'time_to': 'last date to take',
    'latitude': 'variable or column',
    'longitude': 'variable or column',
    'table': 'CSV with columns for --label, --group, --time, --split',
    'key': 'its column that names examples or files (default: rows in order)',
    'split': 'variable or column with the split of an example',
    'dtype': 'of the image',
    'name': 'of the data set',
}
# Overlapping tiles of two blocks lie at least sqrt(2) * buffer apart along one axis, where the blocks meet at a corner.
_CLEAR = math.sqrt(0.5)


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='', help='Python file with get_config(): defaults of these flags')
    for name, parameter in inspect.signature(describe).parameters.items():
        if name not in _HELP:
            continue
        default = '' if parameter.default in (parameter.empty, ()) else parameter.default
        kind = {'action': 'store_true'} if default is False else {'type': type(default)}
        parser.add_argument(f'--{name}', default=default, help=_HELP[name], **kind)
    splits.add_flags(parser)
    convert.add_flags(parser)
    return parser


def read_config(path: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a config file gives.

    Args:
      known: flag -> default.
    Raises:
      UserError: no such file, a key that is no flag, or a value of another type.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f'--config={path}: there is no such file')
    spec = importlib.util.spec_from_file_location('arrays_config', path)
    if spec is None:
        raise UserError(f'--config={path}: expected a Python file (.py)')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = dict(module.get_config()) if hasattr(module, 'get_config') else None
    except Exception as error:      # whatever the user's file raises
        raise UserError(f'--config={path}: {type(error).__name__}: {first_line(error)}') from error
    if config is None:
        raise UserError(f'--config={path} has no get_config()')
    for key, value in config.items():
        if key not in known:
            raise UserError(f'--config={path}: {key!r} is no flag{nearest(key, known)}')
        default = known[key]
        if isinstance(default, str) and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            config[key] = ','.join(value)
        elif not (isinstance(value, type(default)) or (isinstance(default, float) and type(value) is int)):
            raise UserError(f'--config={path}: {key}={value!r}, expected a {type(default).__name__}')
    return config


def divide(arguments: argparse.Namespace, items: Sequence[Any], *, side: float, **known: Any) -> Mapping[str, list]:
    """`splits.split`, but no random split of tiles that overlap."""
    a = arguments
    drawn = a.val_fraction or a.test_fraction
    if drawn and a.block and side and a.buffer < side * _CLEAR:
        raise UserError(f'--buffer={a.buffer:g}: tiles of two blocks could overlap, expected at least '
                        f'{side * _CLEAR:.3g}')
    if drawn and not a.block and 0 < a.stride < a.tile and not all(item.group for item in items):
        raise UserError(f'--stride={a.stride} of --tile={a.tile}: tiles overlap, so a random split would share pixels: '
                        '--block draws by place, --group by what belongs together')
    return splits.split(items, a, **known)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = flags()
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument('--config', default='')
    path = first.parse_known_args(arguments)[0].config
    if path:
        known = {k: v for k, v in vars(parser.parse_args(['--output='])).items() if k not in ('config', 'output')}
        parser.set_defaults(**read_config(path, known))
    a = parser.parse_args(arguments)
    if not a.input:
        raise UserError('--input is missing: files, folders, globs or URLs')
    at_random = (a.val_fraction or a.test_fraction) and not a.block
    described = {k: v for k, v in vars(a).items() if k in inspect.signature(describe).parameters}
    provenance = convert.provenance('data_prep.arrays', a)
    described['group'] = a.group or 'auto' * bool(at_random)
    dataset = describe(**described, scratch=pathlib.Path(a.output, PARTIAL), provenance=provenance,
                       divide=lambda items, **known: divide(a, items, **known))
    convert.convert(dataset, a.output, **convert.options(a))


if __name__ == '__main__':
    convert.run(main)
