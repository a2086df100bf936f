"""Runs of ours around weights of others, and weights out of runs of ours."""
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.weights.convert import Imported
from ssl_jax.weights.encoders import Encoder, resolved
from ssl_jax.weights.fit import Channels, fit

IMAGENET = {'mean': (123.675, 116.28, 103.53), 'std': (58.395, 57.12, 57.375)}   # in grey levels from 0 to 255


def config_of(imported: Imported, *, data: str | None = None, image_size: tuple[int, int] | None = None,
              channel_names: Sequence[str] = (), imagenet: bool = False) -> dict[str, Any]:
    """The config of a run that holds imported weights, to be evaluated or started from.

    MAE's and SimMIM's decoders are kept. An encoder without them gets what an objective needs beside it, untrained: for
    a ViT SimMIM's mask token and linear decoder, for a ResNet small heads of SimSiam.

    Args:
      data: root of the data set; None: one is planned that fits.
      imagenet: images are normalised by ImageNet's statistics and not by the data set's own.
    Raises:
      UserError: the file does not tell the image size, or the heads.
    """
    encoder = imported.encoder
    size = image_size or encoder.image_size or ((224, 224) if encoder.spec['name'] == 'resnet' else None)
    if size is None:
        raise UserError('the file does not tell the size of its images: expected --image_size')
    if encoder.unknown:
        raise UserError(f'the file does not tell the encoder\'s {", ".join(encoder.unknown)}: expected --heads')
    objective: dict[str, Any] = dict(name='simsiam', encoder=encoder.spec, projector=(8,), predictor=())
    if 'decoder/embed/kernel' in imported.tree:
        objective = dict(name='mae', encoder=encoder.spec, decoder=_decoder(imported.tree))
    elif encoder.spec['name'] == 'vit':
        objective = dict(name='simmim', encoder=encoder.spec, mask_unit=encoder.spec['patch'])
    names = tuple(channel_names) or (('red', 'green', 'blue') if encoder.channels == 3 else tuple(
        f'channel {i}' for i in range(encoder.channels)))
    planned = dict(records=1, image_size=size, channels=names)
    where = dict(root=data, canvas=size) if data else dict(root='not given', planned=planned)
    view = dict(name='single', **(IMAGENET if imagenet else {}))
    evals = dict(knn=dict(name='knn'), probe=dict(name='linear_probe')) if data and _labelled(data) else {}
    return dict(objective=objective, view=view, data=where, evals=evals, batch=64, duration='1', precision='f32',
                optim=dict(name='sgd', lr=0.0))


def build(imported: Imported, config: Mapping[str, Any], folder: str, *, channels: Channels | None = None,
          pos_resize: str | None = None) -> dict[str, str]:
    """Writes a run folder, config.json and a checkpoint at step 0, and returns what was changed; see `fit`.

    Raises:
      UserError: the folder holds a run already, or the weights do not fit.
    """
    import jax

    from ssl_jax.checkpoint import Checkpoints, flatten
    from ssl_jax.config import plain
    from ssl_jax.experiment import assemble
    from ssl_jax.metrics import write_atomic
    from ssl_jax.weights.layouts import state_path

    place = pathlib.Path(folder)
    if (place / 'config.json').exists():
        raise UserError(f'{folder} holds a run already: choose another folder')
    run = assemble(config, folder, need_data=False)
    with jax.set_mesh(run.layout.mesh):
        state = run.init()
        own = flatten(state)
        arrays, notes = {}, {}
        heads = ('encoder/', 'stats/encoder/')
        inside = {p: p.replace('encoder/', '', 1) for p in imported.tree if p.startswith(heads)}
        wanted = {p.partition('/')[2].replace('encoder/', '', 1): p for p in own
                  if p.startswith(('params/encoder/', 'aux/stats/encoder/'))}
        rule = pos_resize or (imported.layout.pos_resize if imported.layout else 'torch')
        fitted = fit({name: imported.tree[p] for p, name in inside.items()},
                     {name: tuple(own[p].shape) for name, p in wanted.items()}, channels=channels, pos_resize=rule,
                     headed='head/fc_norm/scale' in imported.tree)
        arrays |= {wanted[name]: x for name, x in fitted.tree.items()}
        notes |= {f'encoder/{name}': words for name, words in fitted.notes.items()}
        for path, x in imported.tree.items():
            target = state_path(path)
            fits = target in own and tuple(own[target].shape) == tuple(np.shape(x))
            if path.startswith(('decoder/', 'mask_token')) and fits:
                arrays[target] = x
            elif path not in inside:
                notes[path] = 'not in this run'
        state = jax.tree.unflatten(jax.tree.structure(state), [
            jax.device_put(np.asarray(arrays[p], x.dtype), x.sharding) if p in arrays else x for p, x in own.items()])
        place.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(folder, keep=1, position=run.position)
        checkpoints.save(0, state)
        checkpoints.close()
    write_atomic(place / 'config.json', json.dumps(plain(config), indent=2) + '\n')
    return notes


def with_heads(encoder: Encoder, heads: int | None) -> Encoder:
    """The encoder with this many heads of attention, which a file may not tell."""
    if heads is None or encoder.spec['name'] != 'vit':
        return encoder
    spec = dict(encoder.spec)
    if 'size' in spec:   # of other heads than the preset's
        full = resolved(spec)
        spec = {k: v for k, v in spec.items() if k != 'size'} | {k: full[k] for k in ('width', 'depth', 'mlp_ratio')}
    return encoder._replace(spec=spec | {'heads': heads}, unknown=(), unsure=())


def _decoder(tree: Mapping[str, np.ndarray]) -> dict[str, Any]:
    width, depth = tree['decoder/embed/kernel'].shape[1], len(tree['decoder/blocks/attn/qkv/kernel'])
    ratio = tree['decoder/blocks/mlp/fc1/kernel'].shape[2] / width
    # 16 heads in all of MAE's models; where a width does not allow it, some that it does.
    heads = next(n for n in (16, 8, 4, 3, 2, 1) if width % n == 0)
    return dict(width=width, depth=depth, heads=heads) | ({} if ratio == 4 else {'mlp_ratio': ratio})


def _labelled(root: str) -> bool:
    from ssl_jax.data.pipeline import Data
    return bool(Data(root=root).classes)
