"""A run's encoder with its trained weights, and what it makes of a data set. No tool of its own."""
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ssl_jax import config as configs
from ssl_jax.checkpoint import find, restore_weights
from ssl_jax.data.pipeline import Data
from ssl_jax.errors import UserError
from ssl_jax.evals.features import ByIdentity, predict
from ssl_jax.experiment import Experiment, objective_context
from ssl_jax.sharding import Layout
from ssl_jax.step import Objective, View


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A run's objective with trained weights, and the data that it is to embed."""
    layout: Layout
    data: Data
    view: View
    objective: Objective
    params: Any
    aux: Any
    batch: int      # of all devices together
    folder: pathlib.Path


def load(run: str, *, data: str | None = None, checkpoint: str | None = None) -> Encoder:
    """The encoder of a run, its weights on all devices; see `embed.embed`."""
    path = pathlib.Path(run, 'config.json')
    if not path.is_file():
        raise UserError(f'{run}: expected the folder of a run, with config.json')
    if checkpoint in (None, 'best', 'last'):
        folder = find(run, checkpoint)
    else:
        folder = find(str(pathlib.Path(run, 'checkpoints', checkpoint)))
    experiment = configs.bind(Experiment, json.loads(path.read_text()), where='')()
    own = configs.bind(Data, experiment.data, where='data')()
    # All of the data, whatever part of it the run trained on; nothing is left out, as places must keep their meaning.
    spec = dict(experiment.data, limit=None, subset=None, balance=None, planned=None, on_error='stop')
    if data is not None:
        spec |= dict(root=data)
        own = own.or_planned() if own.exists() or own.planned else configs.bind(Data, spec, where='data')()
        spec |= dict(canvas=own.image_size)
    wanted = configs.bind(Data, spec, where='data')()

    # The objective is the run's, with its classes; the view is that of the data to be embedded.
    trained = configs.build('views', experiment.view, where='view', image_size=own.image_size, channels=own.channels)
    view = configs.build('views', experiment.view, where='view', image_size=wanted.image_size, channels=wanted.channels)
    if len(view.outputs) != len(trained.outputs):
        raise UserError(f'--data={data} has {len(view.outputs)} channels, expected the {len(trained.outputs)} of the '
                        f'run: {", ".join(c.name for c in own.channels)}')
    objective = configs.build('objectives', experiment.objective, where='objective',
                              **objective_context(experiment, own, trained))
    # Nothing but weights has to fit: each device takes them whole, however the run was laid out.
    layout = Layout()
    tree = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
    tree = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout.shardings(tree))
    params, aux = restore_weights(folder, *tree)
    batch = -(-experiment.batch // layout.batch_parts) * layout.batch_parts
    return Encoder(layout, wanted, view, objective, params, aux, batch, folder)


def describe(run: str, encoder: Encoder, tokens: Sequence[str]) -> dict[str, Any]:
    """What tells these embeddings from others, and where they come from."""
    manifest = encoder.data.manifest
    examples = json.dumps(dataclasses.asdict(manifest), sort_keys=True)
    # Orbax writes its time into this file: a run that was repeated in the same folder has other weights.
    weights = (encoder.folder / '_CHECKPOINT_METADATA').read_bytes()
    return {'run': str(pathlib.Path(run).absolute()), 'checkpoint': str(encoder.folder), 'data': encoder.data.root,
            'classes': list(manifest.classes), 'tokens': list(tokens),
            'weights': hashlib.sha256(weights).hexdigest()[:16],
            'examples': hashlib.sha256(examples.encode()).hexdigest()[:16]}


def features(encoder: Encoder, split: str, rows: np.ndarray, batch: int,
             tokens: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Tokens of these rows, batch by batch, without those behind the end; see `Data.rows`."""
    waiting = None
    for host in encoder.data.rows(split, rows, batch=batch, fields=('image',)):
        ready, waiting = waiting, _predict(encoder, encoder.layout.put(host), tokens)
        # One batch behind, so that the device has work while the host reads and writes.
        if ready is not None:
            yield _local(ready)
    if waiting is not None:
        yield _local(waiting)


def token_shapes(encoder: Encoder, tokens: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Of the tokens of one example.

    Raises:
      UserError: the objective predicts no such tokens.
    """
    host = {k: v for k, v in encoder.data.abstract(encoder.batch).items() if k in ('image', 'valid', 'index')}
    found = jax.eval_shape(lambda batch: _predict(encoder, batch, tokens), host)
    return {token: found[token].shape[1:] for token in tokens}


def _predict(encoder: Encoder, batch: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, jax.Array]:
    return predict(encoder.params, encoder.aux, batch, objective=ByIdentity(encoder.objective),
                   view=ByIdentity(encoder.view), parts=tuple(tokens), sharding=encoder.layout.batch)


def _local(rows: dict[str, Any]) -> dict[str, np.ndarray]:
    """This process's rows, without padding."""
    found = {}
    for name, x in rows.items():
        shards = {s.index[0].start or 0: s for s in x.addressable_shards}
        found[name] = np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])
    real = found.pop('weight') > 0
    found.pop('index')
    return {k: v[real] for k, v in found.items()}
