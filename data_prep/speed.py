"""How fast Minicubes are converted, beside what zarr alone takes to read the same rasters, in one run.

    python -m data_prep.speed --input=FOLDER --examples=1000 --workers=2

Both read the whole frames of the same interferograms, in as many processes. They take turns, `--rounds` times, so that
what else the machine does hits both; the files are read once before, so that both find them in memory.
"""
import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import resource
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from data_prep import hephaestus_minicubes as minicubes
from data_prep.convert import Dataset, convert, run
from data_prep.minicube_store import Cube
from data_prep.shards import end_with_parent
from ssl_jax.errors import UserError


@functools.lru_cache(maxsize=64)
def _cube(path: str) -> Cube:
    return Cube(path)


def _read(variables: Sequence[str], items: Sequence[Any]) -> tuple[float, int]:
    """Reads with zarr alone; returns the seconds of CPU time and the bytes of the arrays."""
    start, size = time.process_time(), 0
    for item in items:
        path, cells, _ = item.data
        for name in variables:
            for cell in [()] if name == 'dem' else cells:
                size += _cube(path).arrays[name][cell or ...].nbytes
    return time.process_time() - start, size


def _cpu() -> float:
    """Seconds of CPU time of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def measure(dataset: Dataset, workers: int, rounds: int) -> tuple[dict[str, tuple[float, float]], int]:
    """(seconds, CPU seconds) of the fastest round of 'zarr alone' and of 'conversion', and the bytes read."""
    items = [item for found in dataset.items.values() for item in found]
    variables = dataset.load.args[0].rasters
    parts = [items[i::workers * 4] for i in range(workers * 4)]
    found: dict[str, list[tuple[float, float]]] = {'zarr alone': [], 'conversion': []}
    context = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(workers, context, end_with_parent, (os.getpid(),)) as pool:
        read = lambda: [sum(column) for column in zip(*pool.map(functools.partial(_read, variables), parts))]
        size = read()[1]
        for _ in range(rounds):
            start = time.perf_counter()
            cpu, _ = read()
            found['zarr alone'].append((time.perf_counter() - start, cpu))
            with tempfile.TemporaryDirectory() as folder:
                start, cpu = time.perf_counter(), _cpu()
                convert(dataset, pathlib.Path(folder, 'out'), workers=workers, shard_mb=64, allow_duplicates=True,
                        quiet=True)
                found['conversion'].append((time.perf_counter() - start, _cpu() - cpu))
    return {name: tuple(map(min, zip(*times))) for name, times in found.items()}, size


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', required=True, help='folder of <frame>.zarr')
    parser.add_argument('--examples', type=int, default=1000, help='how many to convert')
    parser.add_argument('--crop', type=int, default=512)
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='processes')
    parser.add_argument('--rounds', type=int, default=3)
    given = parser.parse_args(arguments)
    if min(given.examples, given.workers, given.rounds) < 1:
        raise UserError('--examples, --workers and --rounds are at least 1')
    dataset = minicubes.describe(given.input, crop=given.crop)
    # More than there are: again, with other crops, since a crop is drawn from the key.
    items = [dataclasses.replace(item, key=f'{item.key}/{n // len(dataset.items["train"])}') for n, item in zip(
        range(given.examples), itertools.cycle(dataset.items['train']))]
    dataset = dataclasses.replace(dataset, items={'train': items})
    found, size = measure(dataset, given.workers, given.rounds)
    for name, (seconds, cpu) in found.items():
        print(f'{name:11} {len(items) / seconds:8.1f} examples/s {size / 1e6 / seconds:8.0f} MB/s'
              f'{cpu / len(items) * 1e3:8.1f} ms of CPU per example')
    wall, cpu = (a / b for a, b in zip(found['zarr alone'], found['conversion']))
    print(f'conversion reaches {wall:.0%} of the speed of zarr alone, {cpu:.0%} by CPU time')


if __name__ == '__main__':
    run(main)
