"""What `doctor` finds with the devices: a sum over all of them, a step of a config, and whether its loader keeps up."""
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssl_jax import flops
from ssl_jax.data import stream
from ssl_jax.experiment import Run
from ssl_jax.guards import StopRequest
from ssl_jax.tools.doctor_machine import ERROR, GIB, OK, WARNING, Finding

SECONDS = 3.0   # of measuring the loader, and about that of steps


@dataclasses.dataclass(frozen=True)
class Step:
    """A measured train step.

    Args:
      seconds: median.
      compiled: seconds to the end of the first one.
    """
    seconds: float
    compiled: float


def devices() -> list[Finding]:
    """Kind, number and memory."""
    everywhere, here = jax.devices(), jax.local_devices()
    text = f'{len(everywhere)} x {everywhere[0].device_kind}'
    if jax.process_count() > 1:
        text += f' in {jax.process_count()} processes, {len(here)} in this one'
    found = [d.memory_stats() for d in here]
    if not all(found):
        return [Finding(OK, 'devices', text)]
    limit, used = min(s['bytes_limit'] for s in found), max(s['bytes_in_use'] for s in found)
    text += f', {limit / GIB:.1f} GiB each'
    kinds = {d.device_kind for d in everywhere}
    if len(kinds) > 1:
        return [Finding(WARNING, 'devices', f'{text}; they are of several kinds: {", ".join(sorted(kinds))}',
                        'the slowest one sets the pace: use one kind')]
    if used > 0.1 * limit:
        return [Finding(WARNING, 'devices', f'{text}, of which {used / GIB:.1f} GiB are taken already',
                        'end other programs on them')]
    return [Finding(OK, 'devices', text)]


def all_reduce(size: int | None = None) -> list[Finding]:
    """The sum of a vector from every device, checked and timed.

    Args:
      size: bytes of the vector; None: 64 MiB, on CPUs 4 MiB.
    """
    count, platform = jax.device_count(), jax.devices()[0].platform
    if count == 1:
        return [Finding(OK, 'all-reduce', 'nothing to sum over: there is one device')]
    size = size or (4 if platform == 'cpu' else 64) * 2 ** 20
    mesh = Mesh(np.asarray(jax.devices()), ('device',))
    split, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ('device', None))
    seconds = {}
    total = jax.jit(lambda x: x.sum(0), out_shardings=whole)
    for values in (1, size // 4):
        # Device i has i + 1 everywhere.
        make = jax.jit(lambda values=values: jnp.broadcast_to(1.0 + jnp.arange(count)[:, None], (count, values)),
                       out_shardings=split)
        x = jax.block_until_ready(make())
        result = total(x)
        right = count * (count + 1) / 2
        wrong = [s.device for s in result.addressable_shards if not (np.asarray(s.data) == right).all()]
        if wrong:
            return [Finding(ERROR, 'all-reduce', f'the sum over {count} devices is wrong on {wrong[0]}',
                            'leave this machine: its devices or their connections compute wrongly')]
        times = []
        for _ in range(10):
            began = time.perf_counter()
            jax.block_until_ready(total(x))
            times.append(time.perf_counter() - began)
        seconds[values] = statistics.median(times)
    latency, whole_time = seconds.values()
    # What each device must send and receive, whatever the algorithm (Thakur et al. 2005).
    rate = 2 * (count - 1) / count * size / whole_time / 1e9
    text = (f'correct over {count} devices of {jax.process_count()} process{"es" * (jax.process_count() > 1)}: '
            f'{1e3 * latency:.2f} ms for one number, {1e3 * whole_time:.1f} ms for {size // 2 ** 20} MiB '
            f'({rate:.2f} GB/s per device)')
    if platform != 'cpu' and rate < 1:
        return [Finding(WARNING, 'all-reduce', text, 'the network is slow: NCCL_DEBUG=INFO says what it uses, '
                        'NCCL_SOCKET_IFNAME chooses')]
    return [Finding(OK, 'all-reduce', text)]


def skew() -> list[Finding]:
    """How far the clocks of the processes are apart."""
    if jax.process_count() == 1:
        return []
    multihost_utils.sync_global_devices('doctor clock')
    times = multihost_utils.process_allgather(np.asarray(np.frombuffer(np.float64(time.time()).tobytes(), np.uint32)))
    times = np.frombuffer(np.ascontiguousarray(times).tobytes(), np.float64)   # JAX would make 32 bits of them
    apart, last = times.max() - times.min(), int(times.argmax())
    text = f'{1e3 * apart:.0f} ms at most between processes, which includes the time of asking'
    if apart > 1:
        return [Finding(WARNING, 'clock', f'{text}; process {last} is ahead', 'synchronise them: logs and the age of '
                        'files do not fit together')]
    return [Finding(OK, 'clock', text)]


def step(run: Run) -> tuple[Step, list[Finding]]:
    """Times the compiled step of the loop, on batches that are in memory already."""
    block, blocks = run.layout.block()
    iterator = run.data.train(seed=run.experiment.seed, batch=run.experiment.batch, process_index=block,
                              process_count=blocks)
    host = next(iterator)
    iterator.close()
    with jax.set_mesh(run.layout.mesh):
        state, compiled, flag = run.init(), run.jit_step(), StopRequest(run.layout).flag
        times, count = [], 3
        began = time.perf_counter()
        while len(times) < count:
            state, metrics, _ = compiled(state, run.layout.put(host), flag)
            jax.block_until_ready(state)
            now = time.perf_counter()
            times.append(now - began)
            began = now
            if len(times) == 3:   # as many on all processes
                count = int(multihost_utils.broadcast_one_to_all(np.int32(min(20, 3 + SECONDS / times[-1]))))
        loss = float(jax.device_get(metrics['loss']))
    found = Step(statistics.median(times[1:]), times[0])
    rate = run.experiment.batch / found.seconds
    speed, peak = run.flops_per_step / found.seconds, flops.peak_flops(jax.devices()[0])
    text = f'{1e3 * found.seconds:,.1f} ms, {rate:,.0f} images/s, {speed / 1e9:,.1f} GFLOP/s'
    if peak:
        text += f' (MFU {speed / peak / jax.device_count():.1%})'
    text += f'; the first one took {found.compiled:.0f} s'
    findings = [Finding(OK, 'step', text)]
    if not np.isfinite(loss):
        findings = [Finding(ERROR, 'step', f'{text}; the loss is {loss}', 'see config.optim, and the data')]
    used = [d.memory_stats() for d in jax.local_devices()]
    if all(used):
        limit, most = min(s['bytes_limit'] for s in used), max(s['peak_bytes_in_use'] for s in used)
        line = f'{most / GIB:.1f} of {limit / GIB:.1f} GiB at the most'
        findings.append(Finding(OK, 'device memory', line) if most < 0.95 * limit else
                        Finding(WARNING, 'device memory', line, 'evaluations may not find room: config.accumulate=2, '
                                'remat, or config.mesh.fsdp'))
    return found, findings


def loader(run: Run, step_seconds: float) -> list[Finding]:
    """Times the input pipeline as it is configured, against a step."""
    data, (block, blocks) = run.data, run.layout.block()
    iterator = data.train(seed=run.experiment.seed, batch=run.experiment.batch, process_index=block,
                          process_count=blocks)
    try:
        next(iterator)
        # What was made ready meanwhile is no measure.
        for _ in range(data.workers * (data.prefetch + stream.BUFFER + 1) or (data.prefetch if data.threads else 0)):
            next(iterator)
        count, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < SECONDS or not count:
            next(iterator)
            count += 1
    finally:
        iterator.close()
    factor = count / passed * step_seconds
    text = (f'{count / passed * run.experiment.batch:,.0f} images/s ({data.threads} threads, {data.workers} workers): '
            f'{factor:.2g} times what the step takes')
    if jax.devices()[0].platform == 'cpu':
        text += ', which shares its processors'
    if factor >= 1.5:
        return [Finding(OK, 'loader', text)]
    advice = ('python -m ssl_jax.tools.bench data --config=... tries config.data.threads and workers; a smaller '
              'image on disk, or a faster disk')
    return [Finding(WARNING, 'loader', f'{text}; the devices will wait' if factor < 1 else f'{text}; it has little to '
                    'spare', advice)]


def held(run: Run) -> tuple[int, int]:
    """Bytes of batches that this process's input pipeline keeps ready: in all, and in shared memory."""
    batch = sum(x.nbytes for x in run.batch.values()) // jax.process_count()
    shared = run.data.workers * stream.BUFFER * batch
    return max(run.data.workers, 1) * run.data.prefetch * batch + shared, shared


def checkpoint(run: Run) -> tuple[int, int]:
    """(bytes of a checkpoint, how many are on the disk at once)."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.state))
    return size, run.checkpoint.keep + 1 + 2 * (run.checkpoint.best is not None)


def agree(mine: bool) -> bool:
    """Whether all processes say so."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray([mine])))) if jax.process_count() > 1 else mine


def gather(text: str) -> list[str]:
    """The texts of all processes."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray([len(data)])).ravel()
    padded = np.pad(data, (0, int(sizes.max()) - len(data)))
    return [row[:n].tobytes().decode() for row, n in zip(multihost_utils.process_allgather(padded), sizes)]


