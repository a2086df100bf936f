"""What `doctor` finds on one machine without a device: versions, variables, memory, processors, clock, disks."""
import ctypes
import dataclasses
import glob
import importlib.metadata
import os
import pathlib
import platform
import random
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence

from ssl_jax.data.source import OPEN_SHARDS

OK, WARNING, ERROR = LEVELS = ('ok', 'warning', 'error')
GIB = 2 ** 30
_PLUGINS = ('jax-cuda12-plugin', 'jax-cuda13-plugin', 'jax-rocm7-plugin', 'libtpu')
_VARIABLES = re.compile(r'JAX_|XLA_|LIBTPU_|TPU_|CUDA_VISIBLE|NCCL_|OMP_NUM|SSL_JAX_|TF_CPP_MIN_LOG')
# (a variable and its value), what it does.
_SLOW = (
    (r'JAX_DISABLE_JIT=(1|true)', 'every operation runs by itself, and a step takes many times as long'),
    (r'JAX_DISABLE_MOST_OPTIMIZATIONS=(1|true)', 'programs are compiled faster, and run slower'),
    (r'JAX_DEBUG_NANS=(1|true)', 'every step waits for the device'),
    (r'JAX_ENABLE_X64=(1|true)', 'numbers are of 64 bits, where this program means 32'),
    (r'JAX_DEFAULT_MATMUL_PRECISION=(highest|float32)', 'matrix products take several times as long'),
    (r'XLA_PYTHON_CLIENT_PREALLOCATE=(0|false)', 'memory of GPUs is taken bit by bit, and lost to fragmentation'),
    (r'XLA_PYTHON_CLIENT_ALLOCATOR=platform', 'every array is allocated anew on the GPU, which is slow'),
    (r'CUDA_LAUNCH_BLOCKING=1', 'every kernel is waited for'))


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the page.

    Args:
      level: of LEVELS.
      topic: what was looked at, in a word.
      text: what was found.
      advice: what to do; '' where nothing is wrong.
    """
    level: str
    topic: str
    text: str
    advice: str = ''


def amount(size: int) -> str:
    """Bytes for people: '58.3 kB'."""
    power = min((len(str(size)) - 1) // 3, 4)
    return f'{size / 1000 ** power:.3g} {("B", "kB", "MB", "GB", "TB")[power]}'


def versions(found: Mapping[str, str], platform_: str) -> list[Finding]:
    """Of Python and packages; what is missing for an accelerator that is plugged in.

    Args:
      found: versions by package.
      platform_: that JAX uses.
    """
    plugins = {}
    for name in _PLUGINS:
        try:
            plugins[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    shown = ', '.join(f'{name} {version}' for name, version in {**found, **plugins}.items())
    findings = [Finding(OK, 'versions', f'Python {platform.python_version()}, {shown}')]
    for name, version in plugins.items():
        if name.startswith('jax-') and version != found['jaxlib']:
            findings.append(Finding(ERROR, 'versions', f'{name} {version} and jaxlib {found["jaxlib"]} do not belong '
                                    'together', f"pip install -U 'jax[{name.split('-')[1]}]=={found['jax']}'"))
    gpus, driver = glob.glob('/dev/nvidia[0-9]*'), pathlib.Path('/proc/driver/nvidia/version')
    if driver.is_file():
        release = re.search(r'Kernel Module\D*([\d.]+)', driver.read_text())
        findings.append(Finding(OK, 'driver', f'NVIDIA {release[1] if release else "of unknown version"}'))
    tpus = glob.glob('/dev/accel[0-9]*') or glob.glob('/dev/vfio/[0-9]*')
    for there, name, extra in ((gpus, 'GPU', 'cuda12'), (tpus, 'TPU', 'tpu')):
        if there and platform_ == 'cpu':
            unset = 'unset JAX_PLATFORMS' if os.environ.get('JAX_PLATFORMS') else f"pip install 'ssl_jax[{extra}]'"
            findings.append(Finding(WARNING, 'devices', f'{len(there)} x {name} in this machine ({there[0]}), and JAX '
                                    'uses the CPU', unset))
    return findings


def variables(environment: Mapping[str, str]) -> list[Finding]:
    """Environment variables that JAX and its libraries read."""
    found = {name: value for name, value in sorted(environment.items()) if _VARIABLES.match(name)}
    shown = ', '.join(f'{name}={value if len(value) < 60 else value[:57] + "..."}' for name, value in found.items())
    findings = [Finding(OK, 'variables', shown or 'none that matter')]
    for name, value in environment.items():
        for pattern, effect in _SLOW:
            if re.fullmatch(pattern, f'{name}={value}', re.IGNORECASE):
                findings.append(Finding(WARNING, 'variables', f'{name}={value}: {effect}', f'unset {name}'))
    return findings


def memory(needed: int, shared_needed: int) -> list[Finding]:
    """Of the host: what is there, what a container may have of it, and what is shared between processes.

    Args:
      needed: bytes that the input pipeline keeps ready.
      shared_needed: those in shared memory.
    """
    info = {line.split(':')[0]: int(line.split()[1]) * 1024
            for line in pathlib.Path('/proc/meminfo').read_text().splitlines() if line.endswith('kB')}
    total, available = info['MemTotal'], info['MemAvailable']
    limit, used = cgroup(pathlib.Path('/sys/fs/cgroup'))
    text = f'{available / GIB:.1f} of {total / GIB:.1f} GiB are available'
    if limit is not None and limit < total:
        available = min(available, limit - used)
        text += f', and {max(available, 0) / GIB:.1f} of the {limit / GIB:.1f} GiB that this container may use'
    findings = [Finding(OK, 'memory', text)]
    if available < needed + 2 * GIB:
        findings = [Finding(WARNING, 'memory', f'{text}; 2 GiB for the program and {needed / GIB:.2f} for batches held '
                            'ready would be good', 'end other programs, or lower config.data.prefetch and workers')]
    shared = shutil.disk_usage('/dev/shm')
    if shared.free < shared_needed:
        findings.append(Finding(ERROR, 'shared memory', f'{shared.free / GIB:.2f} GiB left in /dev/shm, and the '
                                f'workers of config.data hand over up to {shared_needed / GIB:.2f}',
                                'docker run --shm-size=..., or config.data.workers=0'))
    return findings


def cgroup(folder: pathlib.Path) -> tuple[int | None, int]:
    """(limit in bytes or None, bytes in use) of the container, by either version of control groups."""
    for limit, used, statistics, cached in (
            ('memory.max', 'memory.current', 'memory.stat', 'inactive_file'),
            ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes', 'memory/memory.stat',
             'total_inactive_file')):
        if (folder / limit).is_file() and (folder / used).is_file():
            text = (folder / limit).read_text().strip()
            # What was read from files lately counts as used, and is given up for anything else.
            found = re.search(rf'^{cached} (\d+)', (folder / statistics).read_text(), re.MULTILINE)
            in_use = int((folder / used).read_text()) - (int(found[1]) if found else 0)
            return None if text == 'max' else int(text), max(in_use, 0)
    return None, 0


def processors(load: float, usable: int) -> list[Finding]:
    """How many there are, and how busy.

    Args:
      load: processes that want to run, averaged over a minute.
    """
    count = os.cpu_count()
    text = f'{usable} of {count} cores' if usable < count else f'{count} cores'
    if load > 1.2 * count:
        return [Finding(WARNING, 'processors', f'{text}, for which {load:.1f} threads wait on average',
                        'what is measured here and in a run is too slow: end other programs')]
    return [Finding(OK, 'processors', f'{text}, load {load:.1f}')]


def files(soft: int, hard: int) -> list[Finding]:
    """How many files this process may open; the reader keeps up to `OPEN_SHARDS` shards open."""
    wanted = 2 * OPEN_SHARDS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        return [Finding(WARNING, 'open files', f'{soft} at most: shards, checkpoints and sockets need up to {wanted}',
                        f'ulimit -n {min(hard, 65536) if hard > 0 else 65536}')]
    return [Finding(OK, 'open files', f'{"any number" if soft == resource.RLIM_INFINITY else soft} at once')]


def clock() -> list[Finding]:
    """Whether the kernel's clock is kept in time by somebody."""
    class Timex(ctypes.Structure):   # the beginning of struct timex of <sys/timex.h>
        _fields_ = [('modes', ctypes.c_uint), ('offset', ctypes.c_long), ('freq', ctypes.c_long),
                    ('maxerror', ctypes.c_long), ('esterror', ctypes.c_long), ('status', ctypes.c_int),
                    ('rest', ctypes.c_byte * 256)]

    state, timex = ctypes.CDLL(None, use_errno=True).adjtimex, Timex()
    if state(ctypes.byref(timex)) < 0:
        return [Finding(OK, 'clock', f'whether it is synchronised cannot be asked: {os.strerror(ctypes.get_errno())}')]
    if timex.status & 0x40:   # STA_UNSYNC
        return [Finding(OK, 'clock', 'the kernel does not say that it is synchronised: logs of several machines may '
                        'not fit together (timedatectl set-ntp true)')]
    return [Finding(OK, 'clock', f'synchronised, to {timex.maxerror / 1000:.0f} ms or better')]


def writable(folder: pathlib.Path) -> tuple[pathlib.Path, str]:
    """(the nearest folder above that is there, '' or why no file can be made in it)."""
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b'0')
    except OSError as error:
        return folder, error.strerror or str(error)
    return folder, ''


def cache(folder: str | None) -> list[Finding]:
    """Where compiled programs are kept between runs."""
    if not folder:
        return [Finding(WARNING, 'compile cache', 'there is none: every start compiles anew',
                        'set JAX_COMPILATION_CACHE_DIR to a folder')]
    if '://' in folder:
        return [Finding(OK, 'compile cache', folder)]
    path = pathlib.Path(folder).expanduser().absolute()
    where, why = writable(path)
    if why:
        return [Finding(WARNING, 'compile cache', f'{folder} cannot be written to ({where}: {why}): every start '
                        'compiles anew', 'set JAX_COMPILATION_CACHE_DIR or SSL_JAX_CACHE to a folder of yours')]
    if path.is_dir():
        sizes = [p.stat().st_size for p in path.iterdir() if p.is_file()]
        return [Finding(OK, 'compile cache', f'{folder}: {len(sizes):,} files, {amount(sum(sizes))}')]
    return [Finding(OK, 'compile cache', f'{folder}, to be made')]


def room(workdir: str, checkpoint: int, copies: int) -> list[Finding]:
    """Space for the checkpoints of a run.

    Args:
      checkpoint: bytes of one, all processes together.
      copies: on the disk at once, one that is being written included.
    """
    where, why = writable(pathlib.Path(workdir).absolute())
    if why:
        return [Finding(ERROR, 'run folder', f'{workdir} cannot be written to ({where}: {why})', 'another --workdir')]
    free = shutil.disk_usage(where).free
    text = (f'{amount(free)} free for {workdir}; a checkpoint is {amount(checkpoint)}, and up to {copies} are there at '
            'once')
    if free < checkpoint + 2 ** 20:
        return [Finding(ERROR, 'run folder', text, 'make room, or another --workdir')]
    if free < 2 * copies * checkpoint + 1e9:
        return [Finding(WARNING, 'run folder', text, 'make room, lower config.checkpoint.keep, or another --workdir')]
    return [Finding(OK, 'run folder', text)]


def reading(shards: Sequence[pathlib.Path], records: int, seconds: float = 1.5) -> list[Finding]:
    """How fast single records are read in random order, from the disk and from memory, by one thread.

    Args:
      shards: files of the split.
      records: in all of them.
    """
    sizes = [p.stat().st_size for p in shards]
    size = max(1, sum(sizes) // max(records, 1))
    chosen = random.Random(0).sample(range(len(shards)), min(len(shards), 64))
    places = [(i, at) for i in chosen for at in range(0, sizes[i], size)]
    random.Random(0).shuffle(places)
    opened = {i: os.open(shards[i], os.O_RDONLY) for i in chosen}
    try:
        for fd in opened.values():
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        kept = sum(_in_memory(opened[i], at) for i, at in places[:64]) / len(places[:64])
        cold, read = _rate(opened, places, size, seconds)
        warm, _ = _rate(opened, places[:read], size, seconds)
    finally:
        for fd in opened.values():
            os.close(fd)
    text = (f'{amount(sum(sizes))} in {len(shards)} shard{"s" * (len(shards) > 1)}; records of {amount(size)} in '
            f'random order, one thread: {cold:,.0f} MB/s')
    text += (f' (and {kept:.0%} of that came from memory, which could not be emptied)' if kept > 0.2 else
             ' from the disk')
    return [Finding(OK, 'data disk', f'{text}, {warm:,.0f} MB/s once they are in memory')]


def _in_memory(fd: int, at: int) -> bool:
    """Whether the page at this place would be read from memory."""
    try:
        return os.preadv(fd, [bytearray(1)], at, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False


def _rate(opened: Mapping[int, int], places: Sequence[tuple[int, int]], size: int,
          seconds: float) -> tuple[float, int]:
    """(MB/s, how many places were read)."""
    began, total, count = time.perf_counter(), 0, 0
    for i, at in places:
        total += len(os.pread(opened[i], size, at))
        count += 1
        if time.perf_counter() - began > seconds:
            break
    return total / (time.perf_counter() - began) / 1e6, count
