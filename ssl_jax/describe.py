"""--dry_run: what a run would be, from shapes alone; and its first augmented batch where the data is there."""
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from PIL import Image

from ssl_jax import flops, pictures
from ssl_jax.experiment import Run, assemble

Tree = Any


def describe(config: Mapping[str, Any], workdir: str) -> None:
    """Prints parameters, shardings, memory, schedules and FLOPs; allocates no parameter.

    Draws WORKDIR/views.png, the first augmented batch, if the data set is on this machine.
    """
    run = assemble(config, workdir, need_data=False)
    print('\n'.join(text(run)))
    if run.data.exists():
        path = pathlib.Path(workdir, 'views.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        _draw(run, path)
        print(f'first augmented batch: {path}')
    else:
        print(f'config.data.root={run.data.root}: not there, so nothing is drawn')


def text(run: Run) -> list[str]:
    """The dry run's report, line by line."""
    experiment, split = run.experiment, run.data.split
    records = run.data.manifest.split(split).records
    images = run.batch['image'].shape
    lines = [
        f'data        {run.data.root}, split {split}: {records:,} records of {images[1]}x{images[2]}x{images[3]} '
        f'{run.batch["image"].dtype}',
        f'run         {run.total_steps:,} steps of {experiment.batch:,} images, {run.steps_per_epoch:,} steps per '
        f'epoch, {run.total_steps / run.steps_per_epoch:,.4g} epochs',
        f'devices     {jax.device_count()} x {jax.devices()[0].device_kind}, mesh '
        + ' x '.join(f'{axis} {size}' for axis, size in run.layout.mesh.shape.items()),
        f'optimiser   {experiment.optim["name"]}: '
        + '; '.join(f'{count:,} parameters at {group}' for group, count in run.optim.groups(run.state.params)),
        '', parameter_overview.get_parameter_overview(run.state.params, include_stats='sharding'), '',
        'memory per device']
    activations = _activation_bytes(run)
    sizes = {'parameters': _device_bytes(run.state.params), 'gradients': _device_bytes(run.state.params),
             'optimiser': _device_bytes(run.state.opt_state), 'aux': _device_bytes(run.state.aux),
             'batch': sum(math.prod(x.shape) * x.dtype.itemsize for x in run.batch.values()) // run.layout.batch_parts,
             'activations': activations}
    lines += [f'  {name:<12}{size / 2 ** 20:12,.1f} MiB' for name, size in sizes.items()]
    lines += [f'  {"sum":<12}{sum(sizes.values()) / 2 ** 20:12,.1f} MiB  (activations: what the backward pass keeps of '
              'the forward pass; temporaries of the compiler come on top)', '']

    steps = sorted({0, 1, *(round(f * (run.total_steps - 1)) for f in (0.05, 0.1, 0.25, 0.5, 0.75, 1))})
    steps = [s for s in steps if s < run.total_steps]
    lines.append('schedules   ' + ''.join(f'{"step " + str(s):>14}' for s in steps))
    lines += [f'  {name:<10}' + ''.join(f'{float(schedule(s)):14.4g}' for s in steps)
              for name, schedule in run.schedules.items()]

    per_image = run.flops_per_step / experiment.batch
    total = run.flops_per_step * run.total_steps
    lines += ['', f'FLOPs       {per_image / 1e9:,.4g} GFLOP per image (forward and backward), '
                  f'{run.flops_per_step / 1e9:,.4g} GFLOP per step, {total / 1e12:,.4g} TFLOP in all']
    peak = flops.peak_flops(jax.devices()[0])
    if peak:
        hours = total / (peak * jax.device_count()) / 3600
        lines.append(f'            {hours:,.1f} hours at the full peak of {peak / 1e12:,.0f} TFLOP/s per device')
    return lines


def _device_bytes(tree: Tree) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _activation_bytes(run: Run) -> int:
    """Arrays over the batch that the forward pass leaves for the backward pass, per device."""
    key = jax.eval_shape(lambda: jax.random.key(0))

    def residuals(params, aux, batch, key):
        loss = lambda p: run.objective.loss(p, aux, batch, step=jnp.zeros((), jnp.int32), key=key)[0]
        return jax.vjp(loss, params)[1]

    def kept(images):
        batch = {k: jax.ShapeDtypeStruct((images, *x.shape[1:]), x.dtype) for k, x in run.batch.items()}
        viewed = jax.eval_shape(run.view.train, batch, key)
        return jax.tree.leaves(jax.eval_shape(residuals, run.state.params, run.state.aux, viewed, key))

    part = run.experiment.batch // run.experiment.accumulate
    # Weights are kept too, but they are counted already: activations are what grows with the batch.
    growing = [x for x, twice in zip(kept(part), kept(2 * part), strict=True) if x.shape != twice.shape]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in growing) // run.layout.batch_parts


def _draw(run: Run, path: pathlib.Path, count: int = 6) -> None:
    """The first `count` examples of the first batch, as read and as each encoder's input, channel by channel."""
    iterator = run.data.train(seed=run.experiment.seed, batch=run.experiment.batch, start=0)
    host = {k: v[:count] for k, v in next(iterator).items()}
    iterator.close()
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(run.experiment.seed), 0))   # as the train step does
    viewed = jax.device_get(jax.jit(run.view.train)(host, key))
    before = host['image'].astype(np.float32)
    shown = [('read', before, host.get('valid'))]
    if 'image' in viewed:
        shown.append(('view', viewed['image'], viewed.get('valid')))
    for name in ('views', 'global', 'local'):
        shown += [(f'{name.removesuffix("s")} {i + 1}', x, None) for i, x in enumerate(viewed.get(name, ()))]
    channels = run.data.channels
    rows, names = [], []
    for title, images, valid in shown:
        if title != 'read':
            # What is invalid stays so through the way back, which may have fewer channels.
            images = np.asarray(run.view.denormalise(images if valid is None else np.where(valid, images, np.nan)))
            valid = np.isfinite(images)
        valid = np.ones(images.shape, bool) if valid is None else np.broadcast_to(valid, images.shape)
        if pictures.is_rgb(channels):
            low, high = np.percentile(before, (0, 100))
            rows.append([pictures.paint_rgb(x, low, high, v.all(-1)) for x, v in zip(images, valid)])
            names.append(title)
            continue
        for c, channel in enumerate(channels):
            span = pictures.limits(before[..., c], channel)
            rows.append([pictures.paint(x[..., c], channel, *span, v[..., c]) for x, v in zip(images, valid)])
            names.append(f'{title} {channel.name}')
    Image.fromarray(pictures.sheet(rows, names)).save(path)
