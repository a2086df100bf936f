"""What `diagnostics` asks an encoder for, in passes over batches. No plug-in."""
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ssl_jax.evals import patch_statistics
from ssl_jax.evals.features import ByIdentity
from ssl_jax.step import Objective, TrainState, View

IGNORED = 255   # in label maps, besides negative values


def fetched(found: Mapping[str, Any]) -> dict[str, Any]:
    """Host arrays without padding."""
    rows = dict(jax.device_get(found))
    real = rows.pop('weight') > 0
    return jax.tree.map(lambda v: v[real], rows)


def grid(objective: Objective, state: TrainState) -> tuple[int, int]:
    """Rows and columns of the encoder's patches."""
    found: list[tuple[int, int]] = []
    jax.eval_shape(lambda params, aux: found.append(objective.encoder_of(params, aux).grid), state.params, state.aux)
    return tuple(found[0])


def _features(params: Any, aux: Any, batch: Mapping[str, jax.Array], objective: ByIdentity,
              layers: bool) -> tuple[Any, dict[str, Any], jax.Array]:
    """The encoder, its features, and which patches count (B, N): at least half of their pixels have data."""
    encoder = objective.value.encoder_of(params, aux)
    found = encoder.features(batch['image'], layers=tuple(range(encoder.layer_count)) if layers else ())
    b, h, w, _ = batch['image'].shape
    if 'valid' not in batch:
        # Behind a barrier, lest the compiler works out by itself what follows from all patches being there.
        return encoder, found, jax.lax.optimization_barrier(jnp.ones(found['patches'].shape[:2], bool))
    cell = patch_statistics.patches_of((h, w), encoder.grid).ravel()
    sizes = np.bincount(cell)
    valid = batch['valid'].any(-1).reshape(b, -1).T.astype(jnp.float32)
    return encoder, found, (jax.ops.segment_sum(valid, cell, num_segments=len(sizes)) >= sizes[:, None] / 2).T


def _labels(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """'label_map' (B, H, W), -1 where a pixel has none or no data."""
    if 'label_map' not in batch:
        return {}
    label, image = batch['label_map'], batch['image']
    valid = jnp.broadcast_to(batch['valid'] if 'valid' in batch else True, image.shape).any(-1)
    return {'label_map': jnp.where((label >= 0) & (label != IGNORED) & valid, label, -1)}


def _two_views(view: View, batch: Mapping[str, jax.Array]) -> jax.Array:
    """(2, B, h, w, C): two training views of each image, of keys that are always the same."""
    batch = {k: batch[k] for k in ('image', 'valid', 'position') if k in batch}
    found = []
    for i in range(2):
        views = view.train(batch, jax.random.fold_in(jax.random.key(0), i))
        found += [views['image']] if 'image' in views else list(views['views' if 'views' in views else 'global'])
        if len(found) >= 2:
            break
    return jnp.stack(found[:2])


@functools.partial(jax.jit, static_argnames=('objective', 'view', 'replicated'))
def read(params: Any, aux: Any, batch: Mapping[str, jax.Array], *, objective: ByIdentity, view: ByIdentity,
         replicated: NamedSharding) -> dict[str, Any]:
    """What numbers need of every example."""
    seen = view.value.eval(batch)
    encoder, found, valid = _features(params, aux, seen, objective, layers=True)
    patches = found['patches'].astype(jnp.float32)
    cosine, pairs = patch_statistics.cosine_by_distance(patches, valid, encoder.grid)
    views = jax.lax.map(lambda image: {k: v for k, v in encoder.features(image).items() if k in ('cls', 'patches')},
                        _two_views(view.value, batch))
    rows = {'cls': found['cls'], 'mean': patches.mean(1), 'cls_views': views['cls'].swapaxes(0, 1),
            'mean_views': views['patches'].mean(2, dtype=jnp.float32).swapaxes(0, 1),
            'within': patch_statistics.within_variance(patches, valid),
            'middle': patch_statistics.patch_mean(patches, valid), 'cosine': cosine, 'pairs': pairs,
            'layers': [x.reshape(len(x), -1, x.shape[-1]).mean(1, dtype=jnp.float32) for x in found['layers']]}
    # Whether a label map has several labels; -1 is none.
    label = _labels(seen)['label_map'] if 'label_map' in seen else jnp.full((len(patches), 1, 1), -1)
    lowest = jnp.where(label < 0, label.max((1, 2), keepdims=True), label).min((1, 2))
    rows |= {'several': label.max((1, 2)) > lowest, 'weight': batch['weight']}
    return jax.lax.with_sharding_constraint(rows, replicated)


@functools.partial(jax.jit, static_argnames=('objective', 'view', 'replicated'))
def tokens(params: Any, aux: Any, batch: Mapping[str, jax.Array], *, objective: ByIdentity, view: ByIdentity,
           replicated: NamedSharding) -> dict[str, Any]:
    """What the probe needs of every example."""
    batch = view.value.eval(batch)
    _, found, _ = _features(params, aux, batch, objective, layers=False)
    rows = {'patches': found['patches'].astype(jnp.float32), 'weight': batch['weight']} | _labels(batch)
    return jax.lax.with_sharding_constraint(rows, replicated)


@functools.partial(jax.jit, static_argnames=('objective', 'view', 'replicated'))
def look(params: Any, aux: Any, batch: Mapping[str, jax.Array], *, objective: ByIdentity, view: ByIdentity,
         replicated: NamedSharding) -> dict[str, Any]:
    """What pictures need of an example."""
    batch = view.value.eval(batch)
    encoder, found, usable = _features(params, aux, batch, objective, layers=False)
    image = batch['image']
    rows = {'image': image, 'valid': jnp.broadcast_to(batch['valid'] if 'valid' in batch else True, image.shape),
            'usable': usable, 'patches': found['patches'].astype(jnp.float32), 'index': batch['index'],
            'weight': batch['weight']} | _labels(batch)
    if hasattr(encoder, 'attention'):
        weights = encoder.attention(image)
        from_tokens = weights[:, :, :1] if encoder.class_token else weights[:, :, encoder.prefix:]
        rows['attention'] = from_tokens[..., encoder.prefix:].mean(2) * weights.shape[-1]
    return jax.lax.with_sharding_constraint(rows, replicated)
