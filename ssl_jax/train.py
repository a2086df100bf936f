"""The one loop: pretraining, fine-tuning, probing and segmentation differ in what they plug in, not here."""
import contextlib
import functools
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
from ssl_jax.checkpoint import Checkpoints
from ssl_jax.errors import Stopped, UserError
from ssl_jax.experiment import Run, assemble
from ssl_jax.failures import Failures
from ssl_jax.graft import graft
from ssl_jax.guards import StopRequest, Watchdog
from ssl_jax.metrics import Meter, Progress, Writer, sort_values, table, write_atomic
from ssl_jax.origin import origin
from ssl_jax.profiling import Tracer
from ssl_jax.step import TrainState


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
        checkpoints = Checkpoints(workdir, keep=run.checkpoint.keep, position=run.position,
                                  origin=origin(experiment, run.data, run.optim))
        stack.callback(checkpoints.close)
        best = None
        if run.checkpoint.best is not None:
            best = Best(workdir, run.checkpoint.best, position=run.position)
            stack.callback(best.close)
        start = checkpoints.recover() or 0
        if start:
            state = checkpoints.restore(run.state, resume=experiment.resume)
            progress.say(f'continuing {workdir} from step {start} of {run.total_steps}')
            for name, theirs, ours in checkpoints.differences():
                progress.say(f'it was made with {name}={theirs}, and goes on with {ours}')
        else:
            state = initial(run)
        failures = Failures(run, workdir, checkpoints.values() if start else {})

        # Only now: a run that does not fit the checkpoint leaves the folder as it was.
        if first_process:
            pathlib.Path(workdir, 'results.json').unlink(missing_ok=True)
            write_atomic(pathlib.Path(workdir, 'config.json'), json.dumps(configs.plain(config), indent=2) + '\n')
            environment.record(workdir, step=start)

        # Data from the very example where the checkpoint left off: its position is a function of the step alone.
        block, blocks = layout.block()
        draw = functools.partial(run.data.train, seed=experiment.seed, batch=experiment.batch, process_index=block,
                                 process_count=blocks)
        iterator = draw(start=start)
        stack.callback(lambda: iterator.close())

        writer = Writer(workdir, start=start, active=first_process, config=configs.plain(config),
                        wandb=experiment.wandb)
        stack.callback(writer.close)

        train_step = run.jit_step()
        stop, watchdog = StopRequest(layout), Watchdog(experiment.watchdog)
        stack.callback(watchdog.rest)
        tracer = Tracer(run.profile, workdir, start=start, total_steps=run.total_steps, say=progress.say)
        stack.callback(tracer.close)
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
                tracer.end(step, state, early=True)
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
        step, loss, asked = start, None, None
        while step < run.total_steps:
            watchdog.step(first=step == start)
            began = time.perf_counter()
            host_batch = next(iterator)
            if loss is None or loss.is_ready():  # else the device was busy meanwhile
                meter.waited(time.perf_counter() - began)
            stopping = asked
            with tracer.step(step):
                state, metrics, asked = train_step(state, layout.put(host_batch), stop.flag)

            # One step behind, so that the device never waits for the host.
            stopping = stopping is not None and bool(jax.device_get(stopping))
            loss, done = metrics['loss'], step + 1
            if done == start + 1:  # tracing and compilation are no part of the rate
                jax.block_until_ready(state)
                meter.read(done)
                # Not before: nothing was lost by ending at once, and no scheduler waits for compilation.
                stack.enter_context(stop.listen())

            last, log, save = (done % every == 0 for every in (run.total_steps, experiment.log_every, save_every))
            evaluates = not all(done % every for every in eval_every.values())
            failed = failures.watch(step, metrics, host_batch, now=last or log or save or evaluates or stopping)
            if failed is not None:
                watchdog.rest()
                iterator.close()
                del state   # there may not be room for two
                state, done = failures.roll_back(failed, checkpoints, initial), failed + 1
                iterator = draw(start=done)
                writer.scalars(done, failures.logged())
            elif log or last:
                checkpoints.check()
                values = {k: float(v) for k, v in jax.device_get(metrics).items()}
                values |= {name: float(schedule(step)) for name, schedule in run.schedules.items()} | meter.read(done)
                values |= failures.logged()
                alarms = run.health.alarms(values) if done >= watch_from and np.isfinite(values['loss']) else []
                writer.scalars(done, values | {'alarms': len(alarms)})
                progress.report(done, run.total_steps, values, alarms)
                if alarms and run.health.on_collapse == 'stop':
                    raise UserError(f'collapse at step {done}, and config.health.on_collapse is \'stop\': '
                                    + '; '.join(alarms))
            if failed is None and (save or last or stopping):
                # To go back to one from a request to stop would be another run than one without the request.
                checkpoints.save(done, state, counts=save or last or experiment.on_nonfinite != 'rollback',
                                 **failures.saved(regular=save or last))
            if stopping and done < run.total_steps:
                raise Stopped(f'stopped at step {done} of {run.total_steps}, which is saved: the same command '
                              f'continues {workdir}')
            began = time.perf_counter()
            tracer.end(done, state)
            evaluate(done)
            tracer.begin(done, state)
            meter.paused(time.perf_counter() - began)
            step = done

        if best is not None:
            del state   # there may not be room for two
            with jax.transfer_guard('allow'):
                state = best.restore(run.state, experiment.resume)
            evaluate(run.total_steps, final=True)
            progress.say(f'the best {best.metric}, {best.value:.4g}, was that of step {best.step}: its results follow')

    if first_process:   # whoever finds it knows that the run has ended
        finite = {k: v if v is not None and np.isfinite(v) else None for k, v in results.items()}
        write_atomic(pathlib.Path(workdir, 'results.json'),
                     json.dumps({'step': run.total_steps} | finite, indent=2) + '\n')
    progress.say(f'{run.total_steps} steps done, results in {workdir}')
    if failures.total():
        progress.say(failures.total())
    if results and first_process:
        print(table(results), flush=True)
    return results


def initial(run: Run) -> TrainState:
    """The state that a run begins with: fresh, or with an encoder from elsewhere."""
    state = run.init()
    if run.experiment.init_from is not None:
        state = graft(state, run.experiment.init_from, run.experiment.objective.get('encoder'))
    return state
