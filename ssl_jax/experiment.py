"""A config as objects: everything that shapes can tell is built and checked before any array is allocated."""
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ssl_jax import config as configs
from ssl_jax import flops
from ssl_jax.checkpoint import Checkpoint, find, restore_weights
from ssl_jax.config import Duration
from ssl_jax.data.pipeline import Data
from ssl_jax.data.source import Channel
from ssl_jax.errors import UserError
from ssl_jax.monitors import Health
from ssl_jax.optim import Optim
from ssl_jax.profiling import Profile
from ssl_jax.sharding import Layout
from ssl_jax.step import TrainState, count_damaged, make_train_step, skip_nonfinite


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The top level of a config file.

    Args:
      batch: global, over all devices and accumulation parts.
      duration: of the run: '800ep', '5000'.
      precision: of the forward and backward pass; parameters, moments and losses are float32 in both.
      accumulate: parts that a batch goes through in, one after another, before the update.
      init_from: a run, checkpoint or file of weights whose encoder this run starts from; see `graft.graft`.
      evals: evaluator specs by tag.
      health: when a collapse raises an alarm, and whether it ends the run; see `monitors.Health`.
      log_every: steps between lines of the metrics log.
      watchdog: a step that takes longer has the stacks of all threads printed; None: never. See `guards.Watchdog`.
      on_nonfinite: at a loss or gradient that is not finite, whose batch is stored in any case: 'stop' ends the run,
        'skip' leaves the state as it was, 'rollback' goes back to the newest checkpoint and on behind that batch; see
        `failures.Failures`.
      resume: 'same' refuses a checkpoint of another config or data set than this one, 'any' goes on from it; see
        `origin`.
      profile: steps of which a trace is written, with a summary; see `profiling.Profile`.
      wandb: arguments of `wandb.init`; None logs to files only.
    """
    objective: Mapping[str, Any]
    view: Mapping[str, Any]
    data: Mapping[str, Any]
    optim: Mapping[str, Any]
    batch: int
    duration: Duration
    seed: int = 0
    precision: Literal['bf16', 'f32'] = 'bf16'
    accumulate: int = 1
    init_from: str | Mapping[str, Any] | None = None
    evals: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    checkpoint: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mesh: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    health: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    log_every: int = 50
    watchdog: str | None = '10min'
    on_nonfinite: Literal['stop', 'skip', 'rollback'] = 'stop'
    resume: Literal['same', 'any'] = 'same'
    profile: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    wandb: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """A config as objects: every mistake that shapes can show has been found, and nothing is allocated yet."""
    experiment: Experiment
    layout: Layout
    data: Data
    view: Any
    objective: Any
    optim: Optim
    tx: Any
    schedules: Mapping[str, Any]
    evals: Mapping[str, Any]
    checkpoint: Checkpoint
    health: Health
    profile: Profile
    state: TrainState          # shapes with their shardings
    batch: Mapping[str, Any]   # shapes of a host batch, all processes together
    steps_per_epoch: int
    total_steps: int
    flops_per_step: float

    def every(self, duration: Duration | None, where: str) -> int:
        """A period in steps; None is the whole run."""
        if duration is None:
            return self.total_steps
        return max(1, configs.steps(duration, where=where, steps_per_epoch=self.steps_per_epoch,
                                    total_steps=self.total_steps))

    @property
    def shardings(self) -> TrainState:
        """Where each leaf of the state lives."""
        return jax.tree.map(lambda x: x.sharding, self.state)

    @property
    def position(self) -> dict[str, int]:
        """What gives a step its place in the data."""
        return dict(seed=self.experiment.seed, batch=self.experiment.batch, records=self.data.records)

    def jit_step(self) -> Callable[[TrainState, Mapping[str, jax.Array], jax.Array], tuple]:
        """The compiled step of the loop: (state, which it donates; global batch; flags) -> (state, metrics, any flag).

        flags: (devices,) bool, see `guards.StopRequest`.
        """
        step = make_train_step(self.objective, self.view, self.tx, accumulate=self.experiment.accumulate)
        if self.experiment.on_nonfinite == 'skip':
            step = skip_nonfinite(step)
        if self.data.on_error == 'skip':
            step = count_damaged(step)
        return jax.jit(lambda state, batch, flags: (*step(state, batch, jax.random.key(self.experiment.seed)),
                                                    flags.any()),
                       donate_argnums=0, out_shardings=(self.shardings, None, self.layout.replicated))

    def init(self) -> TrainState:
        """A fresh state, made in place on the devices that hold it."""
        return jax.jit(functools.partial(_init, self.objective, self.tx, self.experiment.seed),
                       out_shardings=self.shardings)()


def _init(objective, tx, seed):
    params, aux = objective.init(jax.random.key(seed))
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), aux=aux)


def assemble(config: Mapping[str, Any], workdir: str, *, need_data: bool = True,
             devices: Sequence[Any] | None = None) -> Run:
    """Builds everything that `config` names; see `Run`.

    Args:
      need_data: else the shapes in `config.data.planned` do where the data set is not there.
      devices: for which to lay it out, also such as are only described; None: those of this machine.
    Raises:
      UserError: whatever does not fit, in one line.
    """
    experiment = configs.bind(Experiment, config, where='')()
    layout = configs.bind(Layout, experiment.mesh, where='mesh')().over(devices)
    _check_batch(experiment, layout)

    optim = configs.bind(Optim, experiment.optim, where='optim')()
    checkpoint = configs.bind(Checkpoint, experiment.checkpoint, where='checkpoint')()
    health = configs.bind(Health, experiment.health, where='health')()
    profile = configs.bind(Profile, experiment.profile, where='profile')()

    data = configs.bind(Data, experiment.data, where='data')()
    data = data if need_data else data.or_planned()
    view = configs.build('views', experiment.view, where='view', image_size=data.image_size, channels=data.channels)
    context = objective_context(experiment, data, view)
    objective = configs.build('objectives', experiment.objective, where='objective', **context)
    total_steps, steps_per_epoch = context['total_steps'], context['steps_per_epoch']

    key = jax.eval_shape(lambda: jax.random.key(0))
    params, _ = jax.eval_shape(objective.init, key)
    tx, schedules = optim.make(params, batch=experiment.batch, steps_per_epoch=steps_per_epoch, total_steps=total_steps)

    state = jax.eval_shape(functools.partial(_init, objective, tx, experiment.seed))
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state,
                         layout.shardings(state))

    evals = {tag: configs.build('evals', spec, where=f'evals.{tag}', data=data, layout=layout, batch=experiment.batch,
                                workdir=workdir, tag=tag, restore=restore)
             for tag, spec in experiment.evals.items() if data.exists()}

    if checkpoint.best is not None:
        _check_best(checkpoint.best, experiment.evals, evals)

    batch = data.abstract(experiment.batch)
    plain = configs.build('objectives', flops.without_remat(experiment.objective), where='objective', **context)
    grad = jax.grad(lambda p, a, b, k: plain.loss(p, a, b, step=jnp.zeros((), jnp.int32), key=k)[0])
    flops_per_step = flops.count(grad, state.params, state.aux, jax.eval_shape(view.train, batch, key), key)

    run = Run(experiment=experiment, layout=layout, data=data, view=view, objective=objective, optim=optim, tx=tx,
              schedules=schedules, evals=evals, checkpoint=checkpoint, health=health, profile=profile, state=state,
              batch=batch, steps_per_epoch=steps_per_epoch, total_steps=total_steps, flops_per_step=flops_per_step)
    run.every(run.checkpoint.every, 'checkpoint.every')
    run.every(run.health.after, 'health.after')
    for tag, evaluator in evals.items():
        run.every(evaluator.every, f'evals.{tag}.every')
    return run


def objective_context(experiment: Experiment, data: Data, view: Any) -> dict[str, Any]:
    """What the constructor of an objective may ask for; see `config.build`."""
    steps_per_epoch = data.steps_per_epoch(experiment.batch)
    return dict(image_size=view.size, channels=len(view.outputs), classes=len(data.classes),
                class_counts=lambda: data.class_counts,
                dtype={'bf16': 'bfloat16', 'f32': 'float32'}[experiment.precision], steps_per_epoch=steps_per_epoch,
                total_steps=configs.steps(experiment.duration, where='duration', steps_per_epoch=steps_per_epoch))


def restore(path: str, image_size: tuple[int, int], channels: tuple[Channel, ...],
            layout: Layout) -> tuple[Any, Any, TrainState]:
    """Objective, view and trained weights of another run, to be shown the images of this one.

    Args:
      path: its folder, or one of its checkpoints; of a folder the best state if it kept one.
      image_size, channels: of the images, which must be such as that run was trained on.
      layout: where the weights go.
    Raises:
      UserError: no such run, or it takes other images.
    """
    folder = find(path)
    config = folder.parent.parent / 'config.json'
    if not config.is_file():
        raise UserError(f'{path}: expected a run folder, or a checkpoint in one, with {config}')
    experiment = configs.bind(Experiment, json.loads(config.read_text()), where='')()
    data = configs.bind(Data, experiment.data, where='data')().or_planned()
    theirs, ours = [c.name for c in data.channels], [c.name for c in channels]
    if (data.image_size, theirs) != (image_size, ours):
        raise UserError(f'{path} takes images of {data.image_size} with channels {", ".join(theirs)}: expected those '
                        f'of this run, {image_size} with {", ".join(ours)}')
    with jax.transfer_guard('allow'):   # as the constants of constructors are moved
        view = configs.build('views', experiment.view, where='view', image_size=image_size, channels=data.channels)
        objective = configs.build('objectives', experiment.objective, where='objective',
                                  **objective_context(experiment, data, view))
        tree = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
        tree = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree,
                            layout.shardings(tree))
        params, aux = restore_weights(folder, *tree)
    return objective, view, TrainState(step=None, params=params, opt_state=None, aux=aux)


def _check_best(best: str, specs: Mapping[str, Any], evals: Mapping[str, Any]) -> None:
    tag, _, metric = best.partition('/')
    if tag not in specs or not metric:
        raise UserError(f"config.checkpoint.best={best!r}: expected '<tag>/<metric>' of one of config.evals: "
                        f'{", ".join(specs) or "there is none"}')
    if tag in evals and evals[tag].scored in ('test', None):
        raise UserError(f'config.checkpoint.best={best!r}: config.evals.{tag} scores split {evals[tag].scored!r}, '
                        "expected an evaluator of another split than 'test', which must not choose")


def _check_batch(experiment: Experiment, layout: Layout) -> None:
    parts = layout.batch_parts * experiment.accumulate
    if experiment.accumulate < 1 or experiment.batch < 1 or experiment.batch % parts:
        raise UserError(f'config.batch={experiment.batch}: expected a multiple of {layout.batch_parts} devices '
                        f'x config.accumulate={experiment.accumulate}')
    if experiment.log_every < 1:
        raise UserError(f'config.log_every={experiment.log_every}: expected at least 1')
