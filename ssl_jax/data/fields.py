"""Which fields a batch holds, and of what shape and dtype."""
from collections.abc import Sequence

import numpy as np

from ssl_jax.data import decode
from ssl_jax.data.source import Manifest
from ssl_jax.errors import UserError, nearest

BATCHED = ('image', 'label', 'label_map')   # the field kinds that reach a batch unasked; 'valid' comes with 'image'

Spec = dict[str, tuple[tuple[int, ...], np.dtype]]


def batched(manifest: Manifest, fields: Sequence[str] | None, *, root: str, canvas: tuple[int, int],
            fit: decode.Fit) -> Spec:
    """Shape and dtype of the wanted fields of one example; None are those of the kinds in BATCHED.

    Raises:
      UserError: a field that the data set at `root` does not have, or that cannot be batched.
    """
    known = manifest.fields
    if fields is None:
        fields = [k for k, f in known.items() if f.kind in BATCHED]
    spec: Spec = {}
    for name in fields:
        if name not in known:
            raise UserError(f'field {name!r} is not in {root}{nearest(name, known)}')
        field = known[name]
        if field.kind == 'image':
            spec[name] = (*canvas, field.shape[2]), np.dtype(field.dtype)
            if 'valid' in known or _pads(manifest, canvas, fit):
                spec['valid'] = (*canvas, known['valid'].shape[2] if 'valid' in known else 1), np.dtype(bool)
        elif field.kind == 'label_map':
            spec[name] = canvas, np.dtype(np.int32)
        elif field.kind in ('text', 'valid') or None in field.shape:
            raise UserError(f'field {name!r} of {root} ({field.kind}, shape {field.shape}) cannot be batched')
        elif field.kind == 'label':
            spec[name] = field.shape, np.dtype('int32' if np.dtype(field.dtype).kind in 'iu' else 'float32')
        else:
            spec[name] = field.shape, np.dtype(field.dtype)
    return spec


def _pads(manifest: Manifest, canvas: tuple[int, int], fit: decode.Fit) -> bool:
    """Whether `valid` must be there to mark padding: for all examples, so that batches have one structure."""
    if manifest.image_size is None:
        return fit != 'cover'
    return decode.needs_padding(manifest.image_size, canvas, fit)
