"""The one loop: pretraining, fine-tuning, probing and segmentation differ in what they plug in, not here."""
import contextlib
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ssl_jax import config as configs
from ssl_jax import environment, flops
from ssl_jax.best import Best
from ssl_jax.checkpoint import Checkpoints, graft
from ssl_jax.errors import Stopped, UserError
from ssl_jax.experiment import Run, assemble
from ssl_jax.guards import StopRequest, Watchdog
from ssl_jax.metrics import Meter, Progress, Writer, sort_values, table, write_atomic


def train(config: Mapping[str, Any], workdir: str) -> dict[str, float]:
    """Runs `config` in `workdir`, from its newest checkpoint if there is one.

    Returns:
      The evaluators' results after the last step, '<tag>/<metric>' -> number. With `config.checkpoint.best` they are
      those of the best state, and those of the last one are 'last/<tag>/<metric>'.
    Raises:
      Stopped: it was sent SIGTERM or SIGINT, and has saved.
    """
    run = assemble(config, workdir)
    experiment, layout, first_process = run.experiment, run.layout, jax.process_index() == 0
    progress = Progress(active=first_process)
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(layout.mesh))

        # Restore, or initialise and graft.
        checkpoints = Checkpoints(workdir, keep=run.checkpoint.keep, position=run.position)
        stack.callback(checkpoints.close)
        best = None
        if run.checkpoint.best is not None:
            best = Best(workdir, run.checkpoint.best, position=run.position)
            stack.callback(best.close)
        start = checkpoints.latest() or 0
        if start:
            state = checkpoints.restore(run.state)
            progress.say(f'continuing {workdir} from step {start} of {run.total_steps}')
        else:
            state = run.init()
            if experiment.init_from is not None:
                state = graft(state, experiment.init_from, experiment.objective.get('encoder'))

        # Only now: a run that does not fit the checkpoint leaves the folder as it was.
        if first_process:
            pathlib.Path(workdir, 'results.json').unlink(missing_ok=True)
            write_atomic(pathlib.Path(workdir, 'config.json'), json.dumps(configs.plain(config), indent=2) + '\n')
            environment.record(workdir, step=start)

        # Data from the very example where the checkpoint left off: its position is a function of the step alone.
        block, blocks = layout.block()
        iterator = run.data.train(seed=experiment.seed, batch=experiment.batch, start=start,
                                  process_index=block, process_count=blocks)
        stack.callback(iterator.close)

        writer = Writer(workdir, start=start, active=first_process, config=configs.plain(config),
                        wandb=experiment.wandb)
        stack.callback(writer.close)

        train_step = run.jit_step()
        stop, watchdog = StopRequest(layout), Watchdog(experiment.watchdog)
        stack.callback(watchdog.rest)
        save_every = run.every(run.checkpoint.every, 'checkpoint.every')
        eval_every = {tag: run.every(e.every, f'evals.{tag}.every') for tag, e in run.evals.items()}
        watch_from = run.every(run.health.after, 'health.after')
        peak = flops.peak_flops(jax.devices()[0])
        meter = Meter(step=start, total_steps=run.total_steps, batch=experiment.batch,
                      flops_per_step=run.flops_per_step, peak_flops=peak and peak * jax.device_count())
        results = {}

        def evaluate(step, final=False):
            # At the end an evaluator's own name is for the best state, where there is one.
            prefix = 'last/' if best is not None and step == run.total_steps and not final else ''
            for tag, evaluator in run.evals.items():
                if step % eval_every[tag] and step != run.total_steps:
                    continue
                watchdog.rest()
                name = prefix + tag
                found = writer.evaluated(step, name)
                if not found:
                    numbers, pictures, arrays = sort_values(evaluator.run(run.objective, run.view, state))
                    found = {f'{name}/{k}': v for k, v in numbers.items() if not (prefix and k.startswith('random/'))}
                    writer.images(step, name, pictures)
                    writer.arrays(step, name, arrays)
                    writer.scalars(step, found)
                results.update(found)
                if best is not None and tag == best.tag and not final:
                    best.offer(step, state, {k.removeprefix(prefix): v for k, v in found.items()})

        # An implicit copy between host and device in here would cost every step: it is an error.
        stack.enter_context(jax.transfer_guard('disallow'))
        if start:
            evaluate(start)
        previous = asked = None
        for step in range(start, run.total_steps):
            watchdog.step(first=step == start)
            began = time.perf_counter()
            host_batch = next(iterator)
            if previous is None or previous[1].is_ready():  # else the device was busy meanwhile
                meter.waited(time.perf_counter() - began)
            stopping = asked
            state, metrics, asked = train_step(state, layout.put(host_batch), stop.flag)

            # One step behind, so that the device never waits for the host.
            stopping = stopping is not None and bool(jax.device_get(stopping))
            if previous is not None:
                _stop_if_not_finite(*previous, run, workdir)
            previous = step, metrics['loss'], host_batch
            done = step + 1
            if done == start + 1:  # tracing and compilation are no part of the rate
                jax.block_until_ready(state)
                meter.read(done)
                # Not before: nothing was lost by ending at once, and no scheduler waits for compilation.
                stack.enter_context(stop.listen())

            log, save = done % experiment.log_every == 0, done % save_every == 0
            if log or save or stopping or done == run.total_steps:
                _stop_if_not_finite(*previous, run, workdir)
            if log or done == run.total_steps:
                values = {k: float(v) for k, v in jax.device_get(metrics).items()}
                values |= {name: float(schedule(step)) for name, schedule in run.schedules.items()} | meter.read(done)
                alarms = run.health.alarms(values) if done >= watch_from else []
                writer.scalars(done, values | {'alarms': len(alarms)})
                progress.report(done, run.total_steps, values, alarms)
                if alarms and run.health.on_collapse == 'stop':
                    raise UserError(f'collapse at step {done}, and config.health.on_collapse is \'stop\': '
                                    + '; '.join(alarms))
            if save or stopping or done == run.total_steps:
                checkpoints.save(done, state)
            if stopping and done < run.total_steps:
                raise Stopped(f'stopped at step {done} of {run.total_steps}, which is saved: the same command '
                              f'continues {workdir}')
            began = time.perf_counter()
            evaluate(done)
            meter.paused(time.perf_counter() - began)

        if best is not None:
            del state   # there may not be room for two
            with jax.transfer_guard('allow'):
                state = best.restore(run.state)
            evaluate(run.total_steps, final=True)
            progress.say(f'the best {best.metric}, {best.value:.4g}, was that of step {best.step}: its results follow')

    if first_process:   # whoever finds it knows that the run has ended
        finite = {k: v if v is not None and np.isfinite(v) else None for k, v in results.items()}
        write_atomic(pathlib.Path(workdir, 'results.json'),
                     json.dumps({'step': run.total_steps} | finite, indent=2) + '\n')
    progress.say(f'{run.total_steps} steps done, results in {workdir}')
    if results and first_process:
        print(table(results), flush=True)
    return results


def _stop_if_not_finite(step: int, loss: jax.Array, host_batch: Mapping[str, np.ndarray], run: Run,
                        workdir: str) -> None:
    """Ends the run at a NaN or infinite loss; the batch is kept as .npz, so that the step can be replayed."""
    loss = float(jax.device_get(loss))
    if np.isfinite(loss):
        return
    path = pathlib.Path(workdir, f'nonfinite_step{step:08d}_process{jax.process_index()}.npz')
    np.savez(path, **host_batch)
    keys = run.data.keys(run.data.split, host_batch['index'])
    shown = ', '.join(keys[:8]) + (f' and {len(keys) - 8} more' if len(keys) > 8 else '')
    raise UserError(f'loss is {loss} at step {step}, examples {shown}: the batch is in {path}, '
                    'the last checkpoint is from before it')
