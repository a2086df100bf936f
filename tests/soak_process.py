"""ssl_jax.main as a process that soak.py disturbs: it notes in $SOAK_LOG what it does, and with which examples.

It is also the config: `--config=tests/soak_process.py:mae`, or another of tiny.OBJECTIVES.

A line of JSON has 'time' (of the machine's monotonic clock) and 'phase', or 'step' with the examples it is made of.
"""
import copy
import functools
import json
import os
import pathlib
import sys
import time

STEPS, BATCH, SAVE_EVERY, EVALUATE_EVERY = 40, 16, 5, 8
PHASES = ('start', 'compile', 'step', 'save', 'evaluate')


def get_config(objective):
    import tiny
    from ml_collections import ConfigDict

    view = tiny.view(objective) | dict(size=16)
    if view['name'] == 'multicrop':
        view |= dict(local=tiny.MULTICROP['local'] | dict(size=8))
    chosen, changes = copy.deepcopy(tiny.OBJECTIVES[objective]), {}
    if 'patch' in chosen['encoder']:
        chosen['encoder'] |= dict(patch=4)
    if 'mask_unit' in chosen:
        chosen['mask_unit'] = 8
    if chosen['name'] in ('simsiam', 'moco'):   # as in their papers; Adam makes whole steps of rounding noise
        changes['optim'] = dict(name='sgd', lr=0.03, lr_reference_batch=256, momentum=0.9, weight_decay=5e-4, warmup=2)
    changes |= dict(
        objective=chosen, view=view, batch=BATCH, duration=STEPS,
        checkpoint=dict(every=SAVE_EVERY, keep=2), mesh=dict(data=-1, fsdp=1, tensor=1, min_size=1),
        evals=dict(knn=dict(name='knn', every=EVALUATE_EVERY, k=(5,), test='val', limit=64)))
    return ConfigDict(tiny.config('') | changes)


def main():
    # How the processes that were started together know each other.
    attempt = os.environ.get('JAX_COORDINATOR_ADDRESS', f'alone {os.getpid()}')
    path = pathlib.Path(os.environ['SOAK_LOG'], f'{time.monotonic_ns()}-{os.getpid()}.jsonl')
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(**values):   # whatever kills the process leaves whole lines
        os.write(log, (json.dumps({'time': time.monotonic()} | values) + '\n').encode())

    note(phase='start', pid=os.getpid(), index=int(os.environ.get('JAX_PROCESS_ID', 0)), attempt=attempt)

    def before(owner, name, phase):
        original = getattr(owner, name)

        @functools.wraps(original)
        def noted(*args, **kwargs):
            entered = phase(*args, **kwargs)
            if entered:
                note(phase=entered)
            return original(*args, **kwargs)
        setattr(owner, name, noted)

    from ssl_jax import main as program
    from ssl_jax.checkpoint import Checkpoints
    from ssl_jax.data.pipeline import Data
    from ssl_jax.guards import Watchdog
    from ssl_jax.metrics import Writer

    before(Watchdog, 'step', lambda self, first=False: 'compile' if first else 'step')
    before(Checkpoints, 'save', lambda *args, **kwargs: 'save')
    evaluated = Writer.evaluated
    before(Writer, 'evaluated', lambda self, step, tag: None if evaluated(self, step, tag) else 'evaluate')

    original = Data.train

    def train(self, *, start=0, process_index=0, process_count=1, **kwargs):
        batches = original(self, start=start, process_index=process_index, process_count=process_count, **kwargs)
        try:
            for step, batch in enumerate(batches, start):
                note(step=step, block=[process_index, process_count], index=batch['index'].tolist(),
                     position=batch['position'].tolist())
                yield batch
        finally:
            batches.close()

    Data.train = train
    status = program.main(sys.argv)
    note(phase='end')
    return status


if __name__ == '__main__':
    sys.exit(main())
