"""A run's encoder from a file of weights: what `config.init_from` says of it."""
import os
import pathlib
import re
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np

from ssl_jax.errors import UserError, nearest
from ssl_jax.models import posemb
from ssl_jax.weights.convert import Imported, load, table
from ssl_jax.weights.fit import Channels, check, fit

KEYS = ('path', 'source', 'target', 'layout', 'ignore', 'channels', 'pos_resize')
SUFFIXES = ('.pth', '.pt', '.tar', '.bin', '.safetensors', '.npz')
CHOICES = {'channels': typing.get_args(Channels), 'pos_resize': typing.get_args(posemb.Rule)}


def holds_weights(path: str | os.PathLike) -> bool:
    """Whether a path is a file, a folder of Hugging Face with one, or a URL, and no run or checkpoint."""
    if re.match('[a-z][a-z0-9+.-]*://', str(path)):
        return True
    place = pathlib.Path(path).expanduser()
    if not place.is_dir():
        return place.is_file() or place.suffix in SUFFIXES
    return any((place / name).is_file() for name in (
        'model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin'))


def load_spec(spec: Mapping[str, Any]) -> Imported:
    """The file that `config.init_from` names.

    Raises:
      UserError: an unknown key or value of the spec, and whatever `convert.load` refuses.
    """
    for key in spec:
        if key not in KEYS:
            raise UserError(f'config.init_from.{key} is unknown for a file{nearest(key, KEYS)}')
    for key, known in CHOICES.items():
        if spec.get(key) not in (None, *known):
            raise UserError(f'config.init_from.{key}={spec[key]!r}: expected {" or ".join(map(repr, known))}')
    ignore = spec.get('ignore', ())
    return load(spec['path'], layout=spec.get('layout'), ignore=(ignore,) if isinstance(ignore, str) else tuple(ignore))


def adopt(imported: Imported, part: Mapping[str, str], wanted: Mapping[str, tuple[int, ...]], spec: Mapping[str, Any],
          encoder: Mapping[str, Any] | None) -> tuple[dict[str, np.ndarray], str]:
    """The arrays that a part of a run takes from a file, and a table that says where they are from.

    Args:
      part: what there is to take, such as an encoder: path in the file's tree, by name within the part.
      wanted: shapes by name within the part.
      spec: `config.init_from`. `ignore`: names in the file that are left out, names within the encoder ('cls_token'),
        and options of the encoder that may differ; `channels`, see `fit.adapt_channels`; `pos_resize`: the rule for
        positions of another grid, in place of that of the file's authors.
      encoder: `config.objective.encoder`.
    Raises:
      UserError: the file does not fit; what to set so that it does.
    """
    where = f'config.init_from={spec["path"]!r}'
    ignore = spec.get('ignore', ())
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    warnings = []
    try:
        if encoder is not None and imported.encoder is not None and {'patch_embed/kernel', 'conv1/kernel'} & {*wanted}:
            warnings = check(imported.encoder, encoder, ignore)
        rule = spec.get('pos_resize') or (imported.layout.pos_resize if imported.layout else 'torch')
        fitted = fit({name: imported.tree[path] for name, path in part.items()}, wanted, pos_resize=rule,
                     channels=spec.get('channels'), ignore=ignore, headed='head/fc_norm/scale' in imported.tree)
    except UserError as error:
        raise UserError(f'{where}: {error}') from error
    taken = {*part.values()}
    found = [row._replace(ours='', words='no part of what was asked for') if row.ours and row.ours not in taken else row
             for row in imported.found]
    notes = {part[name] if name in part else name: words for name, words in fitted.notes.items()}
    return fitted.tree, '\n'.join([table(imported._replace(found=found), notes), *(f'note: {w}' for w in warnings)])
