"""Training on every mesh of eight devices of the CPU, against training on one of them.

    python tests/meshes.py mae [2x2x2 ...]

prints, for meshes data x fsdp x tensor, the largest differences after three steps; its status is 1 if one is beyond
LIMITS.
A process of its own: the suite has two devices.
"""
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
DEVICES = 8
STEPS = 3
MESHES = ['x'.join(map(str, sizes)) for sizes in itertools.product((8, 4, 2, 1), repeat=3)
          if functools.reduce(int.__mul__, sizes) == DEVICES]
# Of momenta, which are sums of gradients, those of parameters over the step size. Of losses as a share, but those below
# 1 in themselves: SimSiam's begins near 0.
LIMITS = {'loss': 1e-5, 'params': 2e-5, 'aux': 2e-5, 'momenta': 2e-4}
LEARNING_RATE = 0.1


def environment():
    """The devices, and time for them to meet: with fewer cores than devices some start their part late."""
    flags = [f for f in os.environ.get('XLA_FLAGS', '').split() if 'device_count' not in f]
    flags.append(f'--xla_force_host_platform_device_count={DEVICES}')
    # Other versions may not know them, and XLA ends the process at a flag that it does not know.
    if importlib.metadata.version('jaxlib').startswith('0.10.'):
        flags += ['--xla_cpu_collective_call_warn_stuck_timeout_seconds=120',
                  '--xla_cpu_collective_call_terminate_timeout_seconds=600']
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    return os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join(flags), 'PYTHONPATH': path}


def run(name, layout):
    """Losses and final parts of the state of an entry of tiny.OBJECTIVES; layout: None is one device."""
    import jax
    import numpy as np
    import optax
    import tiny
    from test_contract import build, build_view, make_batch, start

    from ssl_jax.step import make_train_step

    objective, tx = build(name), optax.sgd(LEARNING_RATE, momentum=0.9)
    # The queue of MoCo holds no more than 24.
    key, batch = jax.random.key(1), make_batch(rows=24 if tiny.OBJECTIVES[name]['name'] == 'moco' else 64)
    step, state = make_train_step(objective, build_view(name), tx), start(objective, tx)
    if layout is None:
        step = jax.jit(step)
    else:
        batch, state = layout.put(batch), jax.device_put(state, layout.shardings(state))
        step = jax.jit(step, out_shardings=(jax.tree.map(lambda x: x.sharding, state), None))
        split = [x for x in jax.tree.leaves((state.params, state.aux)) if not x.sharding.is_fully_replicated]
        assert split or layout.data == DEVICES, 'nothing is split'
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, batch, key)
        losses.append(float(metrics['loss']))
    momenta = state.opt_state[0].trace
    return {k: jax.tree.map(np.asarray, v) for k, v in
            dict(loss=np.array(losses), params=state.params, aux=state.aux, momenta=momenta).items()}


def differences(found, expected):
    """The largest of each part, by name."""
    import jax
    import numpy as np
    largest = {}
    for part, tree in expected.items():
        pairs = zip(jax.tree.leaves(found[part]), jax.tree.leaves(tree), strict=True)
        largest[part] = max((float(np.abs(a - b).max()) for a, b in ((np.float64(a), np.float64(b)) for a, b in pairs)),
                            default=0.0)
    largest['loss'] /= max(1.0, float(np.abs(expected['loss']).max()))
    return largest


def main(name, meshes):
    import jax

    from ssl_jax.sharding import Layout

    alone, within = run(name, None), True
    for mesh in meshes:
        layout = Layout(**dict(zip(('data', 'fsdp', 'tensor'), map(int, mesh.split('x')))), min_size=1)
        with jax.set_mesh(layout.mesh):
            found = differences(run(name, layout), alone)
        within &= all(v <= LIMITS[k] for k, v in found.items())
        print(json.dumps(dict(objective=name, mesh=mesh) | found), flush=True)
    return int(not within)


if __name__ == '__main__':
    if f'device_count={DEVICES}' not in os.environ.get('XLA_FLAGS', ''):
        os.execve(sys.executable, [sys.executable, *sys.argv], environment())
    sys.exit(main(sys.argv[1], sys.argv[2:] or MESHES))
