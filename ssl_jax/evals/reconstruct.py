"""Pictures of what a masked model sees and predicts, and its error on hidden patches."""
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ssl_jax import pictures
from ssl_jax.data.source import Channel
from ssl_jax.errors import UserError
from ssl_jax.evals.base import Evaluator, Values
from ssl_jax.evals.features import ByIdentity
from ssl_jax.step import Objective, TrainState, View

HIDDEN = (60, 60, 60)   # colour of hidden patches
SIDE = 160              # pixels: panels are at least this large, which leaves room for their titles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reconstruct(Evaluator):
    """For objectives that predict 'recon' and 'mask', such as `mae`.

    Results: 'mse', the mean squared error of the valid pixels of hidden patches in units of the normalised image; and a
    picture per example, 'recon/000', 'recon/001', ...: original, masked, reconstruction, and reconstruction with the
    visible patches, a row per channel (one for RGB) with one scale. Hidden patches are dark, pixels without data
    hatched.

    Args:
      count: number of pictures; always of the same examples, which cover the classes evenly.
      limit: measure the error on so many examples, evenly spaced over the split; None for all.
    """
    split: str = 'val'
    count: int = 6
    limit: int | None = 1024

    def __post_init__(self):
        self.data.manifest.split(self.split)
        if self.count < 1:
            raise UserError(f'config.evals.{self.tag}.count={self.count}: expected at least 1')

    @functools.cached_property
    def chosen(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the examples that are drawn: places in the split, and classes or -1."""
        label = self.data.manifest.fields.get('label')
        labelled = self.data.classes and label is not None and not label.shape
        rows = list(self.data.eval(self.split, batch=self.batch, fields=('label',) if labelled else (),
                                   limit=self.limit))
        real = np.concatenate([r['weight'] for r in rows]) > 0
        index = np.concatenate([r['index'] for r in rows])[real]
        classes = np.concatenate([r['label'] for r in rows])[real] if labelled else np.full(len(index), -1)
        picked = spread(classes, self.count)
        return index[picked], classes[picked]

    def measure(self, objective: Objective, view: View, state: TrainState) -> Values:
        """See the class."""
        layout, (index, classes) = self.layout, self.chosen
        block, blocks = layout.block()
        batches = self.data.eval(self.split, batch=self.batch, process_index=block, process_count=blocks,
                                 fields=('image',), limit=self.limit)
        chosen = layout.put_replicated(index.astype(np.int32))
        error = values = 0.0
        examples = {}
        for host in batches:
            out = jax.device_get(_measure(state.params, state.aux, layout.put(host), chosen, view=ByIdentity(view),
                                          objective=ByIdentity(objective), replicated=layout.replicated))
            error += out['error'].sum(dtype=np.float64)
            values += out['values'].sum(dtype=np.float64)
            examples |= {i: {k: v[i] for k, v in out['examples'].items()} for i in np.flatnonzero(out['here'])}
        raw = getattr(view, 'denormalise', lambda image: image)
        name = lambda i: f'original: {self.data.classes[classes[i]]}' if classes[i] >= 0 else 'original'
        drawn = {f'recon/{i:03d}': draw(examples[i], self.data.channels, raw, name(i)) for i in sorted(examples)}
        return {'mse': float(error / max(values, 1))} | drawn


def spread(classes: np.ndarray, n: int) -> np.ndarray:
    """Places of n examples (fewer if there are), shared evenly by the classes and evenly spaced within each."""
    pools = [np.flatnonzero(classes == c) for c in np.unique(classes)]
    quotas = np.diff(np.arange(len(pools) + 1) * n // len(pools))
    return np.sort(np.concatenate([pool[np.linspace(0, len(pool) - 1, min(quota, len(pool))).round().astype(int)]
                                   for pool, quota in zip(pools, quotas)]))


def draw(example: Mapping[str, np.ndarray], channels: Sequence[Channel], raw: Callable[[np.ndarray], np.ndarray],
         name: str) -> np.ndarray:
    """The picture of one example, (height, width, 3) uint8.

    Args:
      example: 'image' and 'recon' (H, W, C) normalised; 'hidden' (H, W, 1) and 'valid' (H, W, C) bool.
      raw: normalised image -> image in raw units.
      name: title of the first column.
    """
    # What is invalid stays so through the way back, which may have fewer channels.
    image = raw(np.where(example['valid'], example['image'], np.nan))
    recon, hidden, valid = raw(example['recon']), example['hidden'], np.isfinite(image)
    rgb = pictures.is_rgb(channels)
    rows = []
    for i, channel in enumerate(channels[:1] if rgb else channels):
        part = slice(None) if rgb else i
        shown = valid.all(-1) if rgb else valid[..., i]
        low, high = pictures.limits(image[..., part][shown], channel)

        def paint(x, valid=None, part=part, channel=channel, low=low, high=high):
            if rgb:
                return pictures.paint_rgb(x, low, high, valid)
            return pictures.paint(x[..., part], channel, low, high, valid)

        original = paint(image, shown)
        rows.append([original, np.where(hidden, np.uint8(HIDDEN), original), paint(recon),
                     paint(np.where(hidden, recon, image), shown)])
    return pictures.sheet(rows, ['' if rgb else c.name for c in channels],
                          (name, 'masked', 'reconstruction', 'with visible patches'), side=SIDE)


@functools.partial(jax.jit, static_argnames=('objective', 'view', 'replicated'))
def _measure(params: Any, aux: Any, batch: Mapping[str, jax.Array], chosen: jax.Array, *, objective: ByIdentity,
             view: ByIdentity, replicated: NamedSharding) -> dict[str, Any]:
    """Squared error and number of values per example, and those of the chosen examples that are in this batch."""
    batch = view.value.eval(batch)
    out = objective.value.predict(params, aux, batch)
    if 'recon' not in out or 'mask' not in out:
        found = ', '.join(sorted(out))
        raise UserError(f"{type(objective.value).__name__} predicts no 'recon' and 'mask', only {found}")
    image, recon = batch['image'], out['recon'].astype(jnp.float32)
    b, h, w, _ = image.shape
    patch = round((h * w / out['mask'].shape[1]) ** 0.5)
    hidden = out['mask'].reshape(b, h // patch, w // patch, 1) > 0
    hidden = hidden.repeat(patch, axis=1).repeat(patch, axis=2)
    valid = jnp.broadcast_to(batch['valid'] if 'valid' in batch else True, image.shape)
    use = hidden & valid & (batch['weight'] > 0)[:, None, None, None]
    here = (batch['index'][:, None] == chosen) & (batch['weight'] > 0)[:, None]
    row = here.argmax(0)
    examples = {'image': image, 'recon': recon, 'hidden': hidden, 'valid': valid}
    found = {'error': jnp.where(use, jnp.square(recon - image), 0).sum((1, 2, 3)),
             'values': use.sum((1, 2, 3), dtype=jnp.float32), 'here': here.any(0),
             'examples': {k: v[row] for k, v in examples.items()}}
    return jax.lax.with_sharding_constraint(found, replicated)


build = Reconstruct
