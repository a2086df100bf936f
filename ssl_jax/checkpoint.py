"""Save and restore whole runs (state and data position as one item); graft an encoder from one run into another."""
import contextlib
import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from ssl_jax.config import Duration
from ssl_jax.errors import UserError, nearest
from ssl_jax.models import posemb
from ssl_jax.sharding import path_name
from ssl_jax.step import TrainState
from ssl_jax.weights import adopt
from ssl_jax.weights.layouts import state_path

Tree = Any


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The schema of `config.checkpoint`.

    Args:
      every: a checkpoint after each such stretch, and always after the last step.
      keep: so many of the newest stay on disk.
      best: '<tag>/<metric>' of an evaluator on another split than 'test': the state that did best by it is kept too, in
        WORKDIR/best, and what the run reports at its end is of that state.
    """
    every: Duration = '10%'
    keep: int = 1
    best: str | None = None


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by their path: {'params/encoder/norm/scale': ...}."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _shape(leaf: Any) -> str:
    return f'{tuple(leaf.shape)} {jax.numpy.dtype(leaf.dtype).name}'


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first path on which two flat trees disagree, in words; None if they agree."""
    for path, leaf in wanted.items():
        if path not in found:
            return f'it lacks {path} {_shape(leaf)}{nearest(path, found)}'
        if _shape(found[path]) != _shape(leaf):
            return f'{path} is {_shape(found[path])} there, and {_shape(leaf)} in this run'
    extra = [p for p in found if p not in wanted]
    return f'it holds {extra[0]} {_shape(found[extra[0]])}, which this run has not' if extra else None


class Checkpoints:
    """The checkpoints of a run: WORKDIR/<folder>/<step>/{state,data}. Saving is asynchronous and atomic.

    Args:
      position: what must be equal for the data position to keep its meaning (global batch, seed, records of the split).
    """

    def __init__(self, workdir: str, *, keep: int, position: Mapping[str, Any], folder: str = 'checkpoints'):
        self.folder, self.position = pathlib.Path(workdir).absolute() / folder, dict(position)
        self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, create=True))

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; half-written ones are not seen."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, **values: float) -> None:
        """Starts writing; the state may be donated to the next step at once.

        Args:
          values: to be kept with it, see `values`.
        Raises:
          UserError: there is no room on the disk, or the previous save failed; the checkpoints before it are intact.
        """
        # Asked before: a write that fails half-way does so in a dozen background threads, each with its traceback.
        need = sum(x.nbytes for x in jax.tree.leaves(state)) // jax.process_count() + 2 ** 20
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise UserError(f'checkpoint {self.folder / str(step)} needs {need / 2 ** 20:,.1f} MiB and the disk has '
                            f'{free / 2 ** 20:,.1f} left: make room and run the same command again')
        with _named(self.folder):
            self._manager.save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                # The data position is a pure function of the step: this is all there is to restore of the pipeline.
                data=ocp.args.JsonSave({'next_step': step} | self.position | values)))

    def restore(self, abstract: TrainState) -> TrainState:
        """The newest checkpoint into `abstract`, whose leaves carry the shardings wanted.

        Raises:
          UserError: it was made by another model, or its data position means something else in this run.
        """
        step = self.latest()
        where = self.folder / str(step)
        difference = _difference(flatten(_metadata(where / 'state')), flatten(abstract))
        if difference:
            raise UserError(f'checkpoint {where} is of another model: {difference}')
        position = self.values()
        for name, value in self.position.items():
            if position[name] != value:
                raise UserError(f'checkpoint {where} was made with {name}={position[name]!r}, '
                                f'this run has {value!r}: use the same, or another --workdir')
        with _named(where):
            return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state

    def values(self) -> dict[str, Any]:
        """What the newest checkpoint keeps besides the state."""
        with _named(self.folder):
            return self._manager.restore(self.latest(), args=ocp.args.Composite(data=ocp.args.JsonRestore())).data

    def wait(self) -> None:
        """Until the save under way is complete."""
        with _named(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way."""
        with _named(self.folder):
            self._manager.wait_until_finished()
            self._manager.close()


@contextlib.contextmanager
def _named(where: pathlib.Path):
    """Failures of the disk and unreadable files as one line naming the checkpoint."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = ' '.join(str(error).split())[:300]
        raise UserError(f'checkpoint {where}: {type(error).__name__}: {reason}') from error


def _metadata(state_folder: pathlib.Path) -> Tree:
    """Shapes and dtypes of a saved state, read from its index alone."""
    if not state_folder.is_dir():
        raise UserError(f'{state_folder} does not exist: expected a checkpoint')
    with _named(state_folder), contextlib.closing(ocp.PyTreeCheckpointer()) as reader:
        return reader.metadata(state_folder).item_metadata.tree


def find(path: str, which: str | None = None) -> pathlib.Path:
    """A checkpoint of a run folder, or of a folder of checkpoints, or the checkpoint that `path` itself names.

    Args:
      which: of a run, the 'best' or the 'last' one; None: the best if it kept one.
    Raises:
      UserError: there is none.
    """
    folder = pathlib.Path(path).expanduser().absolute()
    if (folder / 'state').is_dir():
        return folder
    folders = {None: ('best', 'checkpoints', '.'), 'best': ('best',), 'last': ('checkpoints',)}[which]
    for name in folders:
        steps = [p for p in (folder / name).glob('*') if p.name.isdigit() and (p / 'state').is_dir()]
        if steps:
            return max(steps, key=lambda p: int(p.name))
    raise UserError(f'no {which + " " if which else ""}checkpoint in {path}: expected a run folder, or a '
                    'checkpoints/<step> of one')


def restore_weights(checkpoint: pathlib.Path, params: Tree, aux: Tree) -> tuple[Tree, Tree]:
    """(params, aux) of a checkpoint, without its moments and data position.

    Args:
      checkpoint: see `find`.
      params, aux: shapes with the shardings wanted.
    Raises:
      UserError: it was made by another model, or cannot be read.
    """
    item, folder = {'params': params, 'aux': aux}, checkpoint / 'state'
    saved = {k: v for k, v in flatten(_metadata(folder)).items() if k.startswith(('params/', 'aux/'))}
    difference = _difference(saved, flatten(item))
    if difference:
        raise UserError(f'checkpoint {checkpoint} is of another model: {difference}')
    restored = _read(folder, item)
    return restored['params'], restored['aux']


def _read(folder: pathlib.Path, item: Tree) -> Tree:
    """What `item` names of a saved state, with its dtypes and shardings."""
    with _named(folder), contextlib.closing(ocp.PyTreeCheckpointer()) as reader:
        return reader.restore(folder, args=ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True))


def arrays(path: str) -> dict[str, np.ndarray]:
    """What a checkpoint has learned, in host memory: {'params/encoder/norm/scale': ..., 'aux/...': ...}.

    Args:
      path: see `find`.
    Raises:
      UserError: there is none, or it cannot be read.
    """
    folder = find(path) / 'state'
    item = {part: tree for part, tree in _metadata(folder).items() if part in ('params', 'aux')}
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    with _named(folder), contextlib.closing(ocp.PyTreeCheckpointer()) as reader:
        return flatten(reader.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=on_host,
                                                                          partial_restore=True)))


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
    saved, own = flatten(_metadata(folder)), flatten(state)
    source, there = _subtree(saved, spec, 'source', f'{folder}')
    target, wanted = _subtree(own, spec, 'target', 'this run')
    if _EACH in wanted and _SHARED in there:
        there[_EACH] = there.pop(_SHARED)
    refits = _refits({k: saved[p] for k, p in there.items()}, {k: own[p] for k, p in wanted.items()})
    difference = _difference({k: own[wanted[k]] if k in refits else saved[p] for k, p in there.items()},
                             {k: own[p] for k, p in wanted.items()})
    if difference:
        raise UserError(f'config.init_from={spec["path"]!r}: {source} does not fit {target}: {difference}')

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
    restored = flatten(_read(folder, item))
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
