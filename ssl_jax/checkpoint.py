"""Save and restore whole runs: state and data position as one item."""
import contextlib
import dataclasses
import logging
import pathlib
import re
import shutil
import sys
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from ssl_jax import integrity
from ssl_jax.config import Duration
from ssl_jax.errors import UserError, nearest
from ssl_jax.origin import differences
from ssl_jax.sharding import path_name
from ssl_jax.step import TrainState

Tree = Any


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The schema of `config.checkpoint`.

    Args:
      every: a checkpoint after each such stretch, and always after the last step.
      keep: so many of the newest stay on disk; with 1 there is none to fall back to where it is damaged.
      best: '<tag>/<metric>' of an evaluator on another split than 'test': the state that did best by it is kept too, in
        WORKDIR/best, and what the run reports at its end is of that state.
    """
    every: Duration = '10%'
    keep: int = 2
    best: str | None = None


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by their path: {'params/encoder/norm/scale': ...}."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _shape(leaf: Any) -> str:
    return f'{tuple(leaf.shape)} {jax.numpy.dtype(leaf.dtype).name}'


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first path on which two flat trees disagree, in words; None if they agree."""
    for path, leaf in wanted.items():
        if path not in found:
            return f'it lacks {path} {_shape(leaf)}{nearest(path, found)}'
        if _shape(found[path]) != _shape(leaf):
            return f'{path} is {_shape(found[path])} there, and {_shape(leaf)} in this run'
    extra = [p for p in found if p not in wanted]
    return f'it holds {extra[0]} {_shape(found[extra[0]])}, which this run has not' if extra else None


class Checkpoints:
    """The checkpoints of a run: WORKDIR/<folder>/<step>/{state,data,checksums.json}. Saving is asynchronous and atomic.

    Args:
      keep: so many of the newest stay, besides those that `save` is told not to count.
      position: what must be equal for the data position to keep its meaning (global batch, seed, records of the split).
      origin: what they are made from, see `origin.origin`; None: not known.
    """

    def __init__(self, workdir: str, *, keep: int, position: Mapping[str, Any], origin: Mapping[str, Any] | None = None,
                 folder: str = 'checkpoints'):
        self.folder, self.position, self.origin = pathlib.Path(workdir).absolute() / folder, dict(position), origin
        self._uncounted: set[int] = set()
        self._sound: set[int] = set()   # written here, or looked at
        self._recorder = integrity.Recorder()
        self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
            preservation_policy=_Keep(keep, self._uncounted), cleanup_tmp_directories=True, create=True))

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; half-written ones are not seen."""
        return self._manager.latest_step()

    def recover(self, *, required: bool = True) -> int | None:
        """Step of the newest checkpoint that is intact, the same on all processes, which must call it together.

        Damaged ones are moved to WORKDIR/damaged, and named.

        Args:
          required: if there are some, one has to be intact.
        Raises:
          UserError: all of them were damaged.
        """
        found = -1   # none
        if jax.process_index() == 0:
            for step in sorted(self._manager.all_steps(), reverse=True):
                where = self.folder / str(step)
                reason = integrity.damage(where)
                if reason is None:
                    found = step
                    break
                place = integrity.move_aside(where, self.folder.parent / 'damaged')
                print(f'checkpoint {where} is damaged ({reason}): it is now {place}', file=sys.stderr, flush=True)
                found = -2
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        self._manager.reload()
        if found == -2 and required:
            raise UserError(f'no checkpoint in {self.folder} is intact: put one back from a copy, or run the same '
                            'command again to begin anew')
        if found >= 0:
            self._sound.add(found)
            self._uncounted |= {found} if self.values(found).get(_UNCOUNTED) else set()
        return None if found < 0 else found

    def save(self, step: int, state: TrainState, *, counts: bool = True, **values: Any) -> None:
        """Starts writing; the state may be donated to the next step at once.

        Args:
          counts: towards those that are kept; else it is deleted with the next save, and no other one for its sake.
          values: to be kept with it, see `values`.
        Raises:
          UserError: there is no room on the disk, or the previous save failed; the checkpoints before it are intact.
        """
        self.wait()
        # Asked before: a write that fails half-way does so in a dozen background threads, each with its traceback.
        need = sum(x.nbytes for x in jax.tree.leaves(state)) // jax.process_count() + 2 ** 20
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise UserError(f'checkpoint {self.folder / str(step)} needs {need / 2 ** 20:,.1f} MiB and the disk has '
                            f'{free / 2 ** 20:,.1f} left: make room and run the same command again')
        self._sound.add(step)
        self._uncounted |= set() if counts else {step}
        more = values | ({} if counts else {_UNCOUNTED: True}) | ({} if self.origin is None else {_ORIGIN: self.origin})
        with self._saving():
            self._manager.save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                # The data position is a pure function of the step: this is all there is to restore of the pipeline.
                data=ocp.args.JsonSave({'next_step': step} | self.position | more)))
        if jax.process_index() == 0:
            self._recorder.start(self.folder / str(step))

    def restore(self, abstract: TrainState, *, step: int | None = None,
                resume: Literal['same', 'any'] = 'same') -> TrainState:
        """A checkpoint into `abstract`, whose leaves carry the shardings wanted.

        Args:
          step: of it; None: the newest.
          resume: whether it has to be of this config and data set, see `differences`.
        Raises:
          UserError: it was made by another model, or may not be gone on from, or is damaged.
        """
        step = self.latest() if step is None else step
        where = self.folder / str(step)
        if step not in self._sound:
            integrity.check(where)
        other = difference(flatten(metadata(where / 'state')), flatten(abstract))
        if other:
            raise UserError(f'checkpoint {where} is of another model: {other}')
        found = self.differences(step) if resume == 'same' else []
        for name, theirs, ours in found[:1]:
            more = f' (and {len(found) - 1} more)' if len(found) > 1 else ''
            raise UserError(f'checkpoint {where} was made with {name}={theirs}, this run has {ours}{more}: use the '
                            'same, or another --workdir, or go on from it all the same with --config.resume=any')
        with _named(where):
            return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))).state

    def differences(self, step: int | None = None) -> list[tuple[str, str, str]]:
        """(name, value there, value here) of what the checkpoint was made from; as far as it is known of both."""
        values = self.values(step)
        found = differences({k: values[k] for k in self.position}, self.position)
        if self.origin is not None and _ORIGIN in values:
            found += differences(values[_ORIGIN], self.origin)
        return found

    def counted(self, most: int) -> int | None:
        """Step of the newest checkpoint up to `most` that counts."""
        return max((s for s in self._manager.all_steps() if s <= most and s not in self._uncounted), default=None)

    def values(self, step: int | None = None) -> dict[str, Any]:
        """What a checkpoint keeps besides the state; None: the newest."""
        with _named(self.folder):
            return self._manager.restore(self.latest() if step is None else step,
                                         args=ocp.args.Composite(data=ocp.args.JsonRestore())).data

    def check(self) -> None:
        """Raises UserError if the last save has failed; does not wait for it."""
        if not self._manager.is_saving_in_progress():
            with self._saving():
                self._manager.wait_until_finished()

    def wait(self) -> None:
        """Until the save under way is complete."""
        try:
            with self._saving():
                self._manager.wait_until_finished()
        finally:
            self._recorder.finish()

    def close(self) -> None:
        """Waits for the save under way."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _saving(self):
        """A save that failed as one line, which also names what is left."""
        try:
            yield
        except (OSError, ValueError) as error:
            complete = sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())
            left = f'that of step {complete[-1]} is intact' if complete else 'there is no other yet'
            raise UserError(f'checkpoint in {self.folder} could not be written ({type(error).__name__}: '
                            f'{_line(error)}); {left}: mend this and run the same command again') from error


def _tells(record: logging.LogRecord) -> bool:
    """Not so the tracebacks of a failed save from each of Orbax's threads, as `Checkpoints` says it in a line, and its
    remark that there is no file that another way of saving would have left."""
    noise = record.exc_info or str(record.msg).startswith('Metadata file does not exist')
    return not (noise and 'orbax' in pathlib.Path(record.pathname).parts)


logging.getLogger('absl').addFilter(_tells)


# Names among the values of a checkpoint.
_UNCOUNTED, _ORIGIN = 'uncounted', 'origin'


@dataclasses.dataclass
class _Keep(ocp.checkpoint_managers.PreservationPolicy):
    """The newest checkpoint, and the `keep` newest of those that count."""
    keep: int
    uncounted: set[int]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps = [c.step for c in checkpoints]
        kept = {*steps[-1:], *[s for s in steps if s not in self.uncounted][-self.keep:]}
        return [s in kept for s in steps]


@contextlib.contextmanager
def _named(where: pathlib.Path):
    """Failures of the disk and unreadable files as one line naming the checkpoint."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(f'checkpoint {where}: {type(error).__name__}: {_line(error)}') from error


def _line(error: Exception) -> str:
    text = re.sub(r" \[\w+='.*?'\](?= \[|$)", '', ' '.join(str(error).split()))   # without TensorStore's annotations
    return text if len(text) <= 250 else f'... {text[-250:]}'   # what it comes from stands at the end


def metadata(state_folder: pathlib.Path) -> Tree:
    """Shapes and dtypes of a saved state, read from its index alone.

    Raises:
      UserError: there is none, or its index is damaged.
    """
    if not state_folder.is_dir():
        raise UserError(f'{state_folder} does not exist: expected a checkpoint')
    with _named(state_folder), contextlib.closing(ocp.PyTreeCheckpointer()) as reader:
        found = reader.metadata(state_folder).item_metadata
    if found is None:
        raise UserError(f'checkpoint {state_folder} is damaged: its index cannot be read')
    return found.tree


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


def restore_state(checkpoint: pathlib.Path, abstract: TrainState) -> TrainState:
    """All of a checkpoint, into `abstract` with its shardings; leaves the folder as it is, also if a run writes to it.

    Raises:
      UserError: it was made by another model, or cannot be read.
    """
    folder = checkpoint / 'state'
    other = difference(flatten(metadata(folder)), flatten(abstract))
    if other:
        raise UserError(f'checkpoint {checkpoint} is of another model: {other}')
    return read(folder, abstract)


def restore_weights(checkpoint: pathlib.Path, params: Tree, aux: Tree) -> tuple[Tree, Tree]:
    """(params, aux) of a checkpoint, without its moments and data position.

    Args:
      checkpoint: see `find`.
      params, aux: shapes with the shardings wanted.
    Raises:
      UserError: it was made by another model, or cannot be read.
    """
    item, folder = {'params': params, 'aux': aux}, checkpoint / 'state'
    saved = {k: v for k, v in flatten(metadata(folder)).items() if k.startswith(('params/', 'aux/'))}
    other = difference(saved, flatten(item))
    if other:
        raise UserError(f'checkpoint {checkpoint} is of another model: {other}')
    restored = read(folder, item)
    return restored['params'], restored['aux']


def read(folder: pathlib.Path, item: Tree) -> Tree:
    """What `item` names of a saved state, with its dtypes and shardings."""
    integrity.check(folder.parent)
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
    integrity.check(folder.parent)
    item = {part: tree for part, tree in metadata(folder).items() if part in ('params', 'aux')}
    on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    with _named(folder), contextlib.closing(ocp.PyTreeCheckpointer()) as reader:
        return flatten(reader.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=on_host,
                                                                          partial_restore=True)))
