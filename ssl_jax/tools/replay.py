"""Runs a step again whose loss or gradient was not finite: python -m ssl_jax.tools.replay RUN [--step=N]

From the newest checkpoint up to that step, or the run's beginning, with the run's config and data on the devices that
are here. A page says whether the same happens again, in which parameters, and which example of the batch it comes from.
"""
import argparse
import functools
import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from ssl_jax.errors import UserError, exit_status

ALONE = 128   # examples that the step is run with alone: those of the most extreme values
LINES = 32    # of the table, and names of parameters
COURSE = 5    # steps before, whose losses are shown

Batch = dict[str, np.ndarray]


class Replayed(NamedTuple):
    """The run, the state before the step, and its batch."""
    run: Any
    state: Any
    step: int
    batch: Batch
    stored: Batch                # the rows of it that are stored here
    course: list[tuple[int, float, float]]   # step, loss and gradient norm of those before
    begun: int


def replay(workdir: str, step: int | None = None) -> str:
    """The page.

    Args:
      step: None for the last one that is stored.
    Raises:
      UserError: no run, no stored batch, or no way to that step.
    """
    import jax

    from ssl_jax.experiment import assemble
    path = pathlib.Path(workdir, 'config.json')
    if not path.is_file():
        raise UserError(f'{workdir}: expected the folder of a run, with config.json')
    found = stored_steps(workdir)
    if not found:
        raise UserError(f'{workdir}: there is no nonfinite_step*.npz, which a run leaves at a loss or gradient that is '
                        'not finite')
    if step is not None and step not in found:
        raise UserError(f'--step={step}: stored are the batches of {", ".join(map(str, found))}')
    run = assemble(json.loads(path.read_text()) | dict(evals={}, checkpoint={}), workdir)
    with jax.set_mesh(run.layout.mesh):
        return page(rerun(run, workdir, found[-1] if step is None else step))


def stored_steps(workdir: str) -> list[int]:
    """Those of which a batch is stored, ascending."""
    from ssl_jax.failures import stored
    paths = pathlib.Path(workdir).glob(stored(workdir, '*', '*').name)
    return sorted({int(re.match(r'nonfinite_step(\d+)', p.name)[1]) for p in paths})


def rerun(run: Any, workdir: str, step: int) -> Replayed:
    """Everything up to `step`."""
    import jax

    from ssl_jax.failures import stored
    from ssl_jax.guards import StopRequest
    state, begun = newest(run, workdir, step)
    batches = run.data.train(seed=run.experiment.seed, batch=run.experiment.batch, start=begun)
    train_step, flag, course = run.jit_step() if begun < step else None, StopRequest(run.layout).flag, []
    print(f'step {step}: from step {begun}, {step - begun} steps to run again', file=sys.stderr, flush=True)
    try:
        for k in range(begun, step):
            state, metrics, _ = train_step(state, run.layout.put(next(batches)), flag)
            loss, norm = (float(jax.device_get(metrics[name])) for name in ('loss', 'grad_norm'))
            course = [*course[1 - COURSE:], (k, loss, norm)]
            if not np.isfinite(loss + norm) and run.experiment.on_nonfinite == 'rollback':
                raise UserError(f'step {k} is not finite either, and the run went back behind it: there is no '
                                f'checkpoint from between it and step {step}; a larger config.checkpoint.keep keeps it')
        batch = dict(next(batches))
    finally:
        batches.close()
    rows: dict[str, list[np.ndarray]] = {}
    for path in sorted(pathlib.Path(workdir).glob(stored(workdir, step, '*').name)):
        with np.load(path, allow_pickle=False) as part:
            for name in part.files:
                rows.setdefault(name, []).append(part[name])
    return Replayed(run, state, step, batch, {k: np.concatenate(v) for k, v in rows.items()}, course, begun)


def newest(run: Any, workdir: str, step: int) -> tuple[Any, int]:
    """The state of the newest checkpoint from before update `step`, or of the beginning, and its own step.

    A checkpoint behind the step that was rolled back to has the state of an earlier step.
    """
    import jax

    from ssl_jax.checkpoint import restore_state
    from ssl_jax.step import at_step
    from ssl_jax.train import initial
    best: tuple[int, pathlib.Path | None] = (-1, None)
    for folder in pathlib.Path(workdir, 'checkpoints').glob('*'):
        if folder.name.isdigit():
            values, number = json.loads((folder / 'data/metadata').read_text()), int(folder.name)
            of = number if number <= step else values.get('base', number)
            best = max(best, (of, folder), key=lambda b: b[0]) if of <= step else best
    of, folder = best
    if folder is None:
        return initial(run), 0
    state = restore_state(folder, run.state)
    number = run.layout.put_replicated(np.int32(of))
    return jax.jit(at_step, out_shardings=run.shardings)(state, number), of


def page(found: Replayed) -> str:
    """What there is to say of the step, as text."""
    import jax
    run, state, step = found.run, found.state, found.step
    batch, differing = merged(found)
    inspect = inspector(run, state)
    whole, gradients = inspect(batch)
    lines = [f'step {step} on {jax.device_count()} x {jax.devices()[0].device_kind}, from step {found.begun}; '
             f'config.on_nonfinite={run.experiment.on_nonfinite!r}']
    lines += [f'  step {k}: loss {loss:.6g}, gradient norm {norm:.6g}' for k, loss, norm in found.course]
    lines += [f'> step {step}: loss {whole[0]:.6g}, gradient norm {whole[1]:.6g}, learning rate '
              f'{float(run.schedules["lr"](step)):.3g}', '']
    lines += [f'batch: {len(batch["index"])} examples, {len(found.stored["index"])} of them stored here: '
              + (f'the data set now gives others: {differing}; the stored ones are used' if differing else
                 'the data set gives the same'), '']
    parameters = counts(jax.device_get(jax.jit(nonfinite)(state.params)))
    gradients = counts(gradients)
    lines += named('parameters before the step', parameters) + named('gradients', gradients) + ['']
    rows = examples(run, state, batch)
    looked = np.argsort(-rows['extreme'], kind='stable')[:ALONE]
    alone = {int(i): inspect({k: np.repeat(v[i:i + 1], len(v), 0) for k, v in batch.items()})[0] for i in looked}
    bad = [i for i, numbers in alone.items() if not np.isfinite(numbers).all()]
    lines += table(rows, alone, bad) + ['']
    return '\n'.join(lines + verdict(whole, parameters, alone, bad, rows['key'], inspect, batch))


def merged(found: Replayed) -> tuple[Batch, str]:
    """The batch with the stored rows in their places, and in words which of them the data set now has otherwise."""
    size = found.run.experiment.batch
    place = (found.stored['position'].astype(np.int64) - found.step * size) % 2 ** 32
    batch, words = {k: v.copy() for k, v in found.batch.items()}, []
    for name, values in found.stored.items():
        if name not in batch or batch[name].shape[1:] != values.shape[1:]:
            words.append(f'no {name} like the stored one')
            continue
        same = [np.array_equal(a, b, equal_nan=a.dtype.kind == 'f') for a, b in zip(batch[name][place], values)]
        other = [int(i) for i in np.flatnonzero(~np.asarray(same))]
        if other:
            words.append(f'{name} in {len(other)} examples, such as row {found.stored["index"][other[0]]}')
        batch[name][place] = values
    batch.pop('damaged', None)
    return batch, ', '.join(words)


def inspector(run: Any, state: Any) -> Any:
    """batch -> ((loss, gradient norm), tree of numbers of values of each gradient that are not finite)."""
    import jax
    import jax.numpy as jnp
    import optax

    from ssl_jax.step import make_train_step
    # In place of the optimiser, what only looks at the gradients: augmentation and accumulation are those of the run.
    looks = optax.GradientTransformation(lambda params: (), lambda gradients, state, params: (
        jax.tree.map(jnp.zeros_like, gradients), nonfinite(gradients)))
    step = make_train_step(run.objective, run.view, looks, accumulate=run.experiment.accumulate)

    @functools.partial(jax.jit, out_shardings=run.layout.replicated)
    def inspect(state, batch):
        after, metrics = step(state.replace(opt_state=()), batch, jax.random.key(run.experiment.seed))
        return (metrics['loss'], metrics['grad_norm']), after.opt_state

    def call(batch):
        numbers, gradients = jax.device_get(inspect(state, run.layout.put(batch)))
        return np.asarray(numbers, np.float64), gradients

    return call


def nonfinite(tree: Any) -> Any:
    """The number of values of each array that are NaN or infinite."""
    import jax
    import jax.numpy as jnp
    return jax.tree.map(lambda x: (~jnp.isfinite(x)).sum(), tree)


def counts(tree: Any) -> dict[str, int]:
    """Path -> number, of those that are not 0; and how many there are in all under ''."""
    from ssl_jax.checkpoint import flatten
    flat = {k: int(v) for k, v in flatten(tree).items()}
    return {k: v for k, v in flat.items() if v} | {'': len(flat)}


def named(what: str, found: Mapping[str, int]) -> list[str]:
    names = [k for k in found if k]
    lines = [f'{what}: {len(names) or "none"} of {found[""]} arrays with NaN or infinite values']
    lines += [f'    {name} ({found[name]:,} values)' for name in names[:LINES]]
    return lines + [f'    and {len(names) - LINES} more'] * (len(names) > LINES)


def examples(run: Any, state: Any, batch: Batch) -> dict[str, Any]:
    """Per example 'key'; 'read' and 'seen' (B, 3): minimum, maximum and number of NaN or infinite values; 'extreme'.

    'read' is of the valid pixels as stored, 'seen' of what the view makes of them in this step.
    """
    import jax
    import jax.numpy as jnp

    def figures(x, use):
        x, axes = x.astype(jnp.float32), tuple(range(1, x.ndim))
        fine = jnp.isfinite(x) & use
        return jnp.stack([jnp.where(fine, x, jnp.inf).min(axes), jnp.where(fine, x, -jnp.inf).max(axes),
                          (~jnp.isfinite(x) & use).sum(axes)], -1)

    @functools.partial(jax.jit, out_shardings=run.layout.replicated)
    def look(state, batch):
        view_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(run.experiment.seed), state.step))
        images = [x for x in run.view.train(batch, view_key).values()
                  if x.ndim >= 4 and jnp.issubdtype(x.dtype, jnp.floating)]
        images = [x if x.ndim == 4 else jnp.moveaxis(x, 1, 0) for x in images]   # views in front of examples
        seen = jnp.stack([figures(x, True) for x in images])
        return (figures(batch['image'], batch['valid'] if 'valid' in batch else True),
                jnp.stack([seen[..., 0].min(0), seen[..., 1].max(0), seen[..., 2].sum(0)], -1))

    read, seen = jax.device_get(look(state, run.layout.put(batch)))
    extreme = np.where(seen[:, 2] > 0, np.inf, np.maximum(np.abs(seen[:, 0]), np.abs(seen[:, 1])))
    return {'key': run.data.keys(run.data.split, batch['index']), 'read': read, 'seen': seen, 'extreme': extreme}


def table(rows: Mapping[str, Any], alone: Mapping[int, np.ndarray], bad: Sequence[int]) -> list[str]:
    """A line per example, the suspicious ones first."""
    order = [*bad, *(i for i in alone if i not in bad)]
    width = max(len(rows['key'][i]) for i in order)
    span = lambda f: f'{f[0]:>11.4g} {f[1]:>11.4g} {int(f[2]):>6}'
    head = f'{"min":>11} {"max":>11} {"NaN":>6}'
    lines = [f'{"":{width}}  {"as read, where valid":^30}  {"after the view":^30}  {"step with it alone":^23}',
             f'{"example":{width}}  {head}  {head}  {"loss":>11} {"gradient":>11}']
    lines += [f'{rows["key"][i]:{width}}  {span(rows["read"][i])}  {span(rows["seen"][i])}  {alone[i][0]:>11.4g} '
              f'{alone[i][1]:>11.4g}' for i in order[:LINES]]
    more = len(rows['key']) - min(len(order), LINES)
    return lines + [f'and {more} more, with values that are less extreme'] * bool(more)


def verdict(whole: np.ndarray, parameters: Mapping[str, int], alone: Mapping[int, np.ndarray], bad: Sequence[int],
            keys: Sequence[str], inspect: Any, batch: Batch) -> list[str]:
    """What to make of it."""
    if len(parameters) > 1:
        return ['The parameters were not finite before this step: look at the steps before it.']
    if np.isfinite(whole).all():
        return ['The step is finite here: it is not the data alone. It may come from the devices or the precision that '
                'the run had, or from a state of which no checkpoint is left.']
    if not bad:
        return ['No example alone is not finite: the batch as a whole is, as its statistics or a sum can be.']
    fine = [i for i in alone if i not in bad]
    if not fine:
        return ['Every example alone is not finite: it is the optimisation that has diverged, not the data. A lower '
                'learning rate, longer warm-up or clip_norm may help.']
    rest = {k: v.copy() for k, v in batch.items()}
    for values in rest.values():
        values[list(bad)] = values[fine[0]]
    numbers, _ = inspect(rest)
    names = ', '.join(keys[i] for i in bad[:8]) + (f' and {len(bad) - 8} more' if len(bad) > 8 else '')
    return [f'It comes from {names}: with {keys[fine[0]]} in place of them, loss {numbers[0]:.6g} and gradient norm '
            f'{numbers[1]:.6g}.']


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', help='folder of a run')
    parser.add_argument('--step', type=int, help='which step (default: the last one that is stored)')
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    return exit_status(lambda: print(replay(arguments.run, arguments.step)))


if __name__ == '__main__':
    sys.exit(main())
