"""An encoder from one run, or from a file of weights, into another run."""
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ssl_jax.checkpoint import difference, find, flatten, metadata, read
from ssl_jax.errors import UserError
from ssl_jax.models import posemb
from ssl_jax.sharding import path_name
from ssl_jax.step import TrainState
from ssl_jax.weights import adopt
from ssl_jax.weights.layouts import state_path


def graft(state: TrainState, init_from: str | Mapping[str, Any],
          encoder: Mapping[str, Any] | None = None) -> TrainState:
    """`state` with its encoder replaced by another run's or a file's, running statistics of normalisation included.

    Args:
      state: concrete arrays, whose shardings and dtypes the grafted leaves take.
      init_from: a run or checkpoint folder; or dict(path=, which=, source=, target=), where a path of None changes
        nothing. `which` see `find`. The subtrees are the encoder's if not said otherwise: 'params/encoder' together
        with what of it is frozen, 'aux/encoder'. The statistics that belong to 'params/encoder' are
        'aux/stats/encoder', those of 'aux/teacher/encoder' are 'aux/teacher_stats/encoder'. Learned positions of
        another square grid are resized, and relative ones that all blocks share become those of every block where this
        run has them so; see `posemb.refit_relative`.
        Or a file of weights or its URL, see `weights.read`, with what else `weights.fit.adopt` takes: layout, ignore,
        channels, pos_resize. A table of what became of each of its names is printed.
      encoder: this run's `config.objective.encoder`, which a file's must agree with.
    Raises:
      UserError: no such subtree, or a path of it that is missing, left over or of another shape.
    """
    spec = dict(path=init_from) if isinstance(init_from, str) else dict(init_from)
    if isinstance(spec.get('path'), str) and adopt.holds_weights(spec['path']):
        return _graft_file(state, spec, encoder)
    unknown = [k for k in spec if k not in ('path', 'which', 'source', 'target')]
    if unknown or 'path' not in spec or spec.get('which') not in (None, 'best', 'last'):
        raise UserError(f'config.init_from={init_from!r}: expected a folder or dict(path=, which=, source=, target=), '
                        "which='best' or 'last'")
    if spec['path'] is None:
        return state
    folder = find(spec['path'], spec.get('which')) / 'state'
    saved, own = flatten(metadata(folder)), flatten(state)
    source, there = _subtree(saved, spec, 'source', f'{folder}')
    target, wanted = _subtree(own, spec, 'target', 'this run')
    if _EACH in wanted and _SHARED in there:
        there[_EACH] = there.pop(_SHARED)
    refits = _refits({k: saved[p] for k, p in there.items()}, {k: own[p] for k, p in wanted.items()})
    other = difference({k: own[wanted[k]] if k in refits else saved[p] for k, p in there.items()},
                       {k: own[p] for k, p in wanted.items()})
    if other:
        raise UserError(f'config.init_from={spec["path"]!r}: {source} does not fit {target}: {other}')

    item: dict = {}
    for name, path in wanted.items():
        *parents, last = there[name].split('/')
        node = item
        for parent in parents:
            node = node.setdefault(parent, {})
        shape, sharding = own[path].shape, own[path].sharding
        if name in refits:   # read whole by every device
            shape = saved[there[name]].shape
            sharding = (NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding)
                        else sharding)
        node[last] = jax.ShapeDtypeStruct(shape, own[path].dtype, sharding=sharding)
    restored = flatten(read(folder, item))
    grafted = {path: restored[there[name]] for name, path in wanted.items()}
    for name, refit in refits.items():
        path = wanted[name]
        grafted[path] = jax.jit(refit, out_shardings=own[path].sharding)(grafted[path])
    return jax.tree.map_with_path(lambda path, leaf: grafted.get(path_name(path), leaf), state)


def _graft_file(state: TrainState, spec: Mapping[str, Any], encoder: Mapping[str, Any] | None) -> TrainState:
    """`graft` from a file of weights."""
    imported = adopt.load_spec(spec)
    saved, own = {state_path(path): path for path in imported.tree}, flatten(state)
    source, there = _subtree(saved, spec, 'source', spec['path'])
    target, wanted = _subtree(own, spec, 'target', 'this run')
    arrays, report = adopt.adopt(imported, {name: saved[path] for name, path in there.items()},
                                 {name: tuple(own[path].shape) for name, path in wanted.items()}, spec, encoder)
    if jax.process_index() == 0:
        print(f'{source} of {spec["path"]} ({imported.words}) as {target}:\n{report}', flush=True)
    grafted = {}
    for name, path in wanted.items():
        values = np.asarray(arrays[name], own[path].dtype)
        grafted[path] = jax.make_array_from_callback(values.shape, own[path].sharding, values.__getitem__)
    return jax.tree.map_with_path(lambda path, leaf: grafted.get(path_name(path), leaf), state)


# Names within an encoder: relative positions that its blocks share, and those of each.
_SHARED, _EACH = 'rel_pos_table', 'blocks/attn/rel_pos_table'


def _refits(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """What makes this run's positions of saved ones that are of another shape, by name."""
    refits = {}
    for name in {_SHARED, _EACH, 'pos_embed'} & saved.keys() & own.keys():
        shape = tuple(own[name].shape)
        if tuple(saved[name].shape) == shape or saved[name].shape[-1] != shape[-1]:
            continue
        refits[name] = (functools.partial(posemb.refit, shape=shape, class_token='cls_token' in own)
                        if name == 'pos_embed' else functools.partial(posemb.refit_relative, shape=shape))
        jax.eval_shape(refits[name], jax.ShapeDtypeStruct(saved[name].shape, own[name].dtype))
    return refits


def _subtree(paths: Mapping[str, Any], spec: Mapping[str, str], side: str, owner: str) -> tuple[str, dict[str, str]]:
    """The subtree as `spec` says, else the encoder: its name, and the full path of each of its leaves by name within.

    Names of running statistics begin with 'stats/'.
    """
    usual = [spec[side].strip('/')] if side in spec else ['params/encoder', 'aux/encoder']
    found = [prefix for prefix in usual if any(p.startswith(prefix + '/') for p in paths)]
    if not found:
        raise UserError(f'config.init_from: {owner} has no {" or ".join(usual)}')
    above, _, part = found[0].rpartition('/')
    own = above in ('params', 'aux', 'aux/average')   # these go with the run's own running statistics
    stats = f'{"aux/stats" if own else above + "_stats"}/{part}'
    leaves = {p.removeprefix(prefix + '/'): p for prefix in found for p in paths if p.startswith(prefix + '/')}
    leaves |= {f'stats/{p.removeprefix(stats + "/")}': p for p in paths if p.startswith(stats + '/')}
    return ' with '.join(found), leaves
