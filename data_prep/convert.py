"""Writes a data set: ArrayRecord shards and a manifest, from what a converter describes.

A converter builds a `Dataset` (ordered items per split, and a function that loads one) and calls `convert`. Worker
processes load, check, encode and write example by example; memory does not grow with the data set, but for its items
and a 16-byte hash per example.

Which shard an item goes to depends on the items and options alone, every shard is moved to its place when complete,
and the manifest comes last. So after kill -9 at any point the same command redoes the unfinished shards only and ends
in the same bytes, for any number of workers.

What is checked, and from what. Before any pixel is read: empty splits, unique keys, groups shared by splits. Before
writing, a first look at a sample of the train split: fields, value ranges, no-data, constant channels. From every
pixel, after writing but before the manifest makes the data set usable: the same again, duplicates across splits, images
of one split that look almost like one of another, and the statistics that the manifest carries.

A bad example stops the conversion, or with on_error='skip' is left out and listed in the manifest.
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep import checks
from data_prep.contents import Content, collect, report_speed
from data_prep.dataset import ChannelSpec, Dataset, Item, common_shape
from data_prep.look import look
from data_prep.problems import OnError, check_on_error
from data_prep.shard_files import PARTIAL, Plan, Task
from data_prep.shards import own_folder, write_shards
from data_prep.statistics import Summary
from ssl_jax.data.source import MANIFEST, Channel, Manifest, check_size, labels
from ssl_jax.errors import UserError

__all__ = ['ChannelSpec', 'Dataset', 'Item', 'add_flags', 'convert', 'options', 'provenance', 'run']

SHARD_RECORDS = 8192   # at most: so that small examples also spread over workers, and little is redone after a kill


def convert(dataset: Dataset, out: str | os.PathLike, *, shard_mb: float = 256, compression: str = 'none',
            workers: int = 1, allow_shared_groups: bool = False, allow_duplicates: bool = False,
            overwrite: bool = False, on_error: OnError = 'stop', quiet: bool = False) -> Manifest:
    """Writes `dataset` to the folder `out`, or completes what an interrupted run of the same conversion left there.

    Args:
      shard_mb: size at which a new shard begins, estimated from a sample; a shard has at most 8192 records.
      compression: 'none', 'snappy', 'zstd:1', 'brotli:5', ...; random reads are about 4 times as fast without.
      workers: processes that load and write; 1 = this one alone. The bytes written don't depend on it.
      allow_shared_groups: write although splits share groups.
      allow_duplicates: write although splits share identical images.
      overwrite: replace another data set in `out`, or write a finished one again.
      on_error: 'skip' leaves bad examples out and lists them in the manifest's source['skipped'], 'stop' stops there.
      quiet: neither report nor progress bar.
    Returns:
      The manifest as written.
    Raises:
      UserError: the data would train silently wrong, an input is bad, or `out` holds something else.
    """
    say = (lambda text: None) if quiet else print
    out = pathlib.Path(out)
    check_on_error(on_error)
    checks.check_declaration(dataset, shard_mb, compression, workers)
    dataset = checks.check_items(dataset, allow_shared_groups, on_error, say)
    plan, sample, record_bytes = look(dataset, out, compression, on_error)
    tasks = _assign(dataset, record_bytes, shard_mb)
    fingerprint = _fingerprint(dataset, plan, tasks)
    manifest = None if overwrite else _complete(out, fingerprint, on_error)
    if manifest:
        say(f'{out} is complete already: nothing to do')
        return manifest

    total = sum(map(len, tasks))
    say(f'{checks.report_items(dataset)}\nabout {record_bytes * total / 1e9:.3g} GB in {len(tasks)} shards; '
        f'a sample of {len(sample.hashes)} training examples:\n{checks.report_channels(dataset, sample.statistics)}')
    for problem in checks.channel_problems(dataset, sample.statistics):
        if len(sample.hashes) == len(dataset.items['train']):
            raise UserError(problem)
        say(f'warning: in the sample, {problem}')
    with own_folder(out, fingerprint, overwrite):
        start = time.perf_counter()
        written = write_shards(plan, dataset.items, tasks, workers=workers, quiet=quiet)
        speed = report_speed(plan, written, time.perf_counter() - start)
        contents = {s: collect(plan, dataset, [t for t in tasks if t.split == s]) for s in dataset.items}
        skipped = [('', *p) for p in dataset.problems] + [(s, *p) for s, c in contents.items() for p in c.skipped]
        if skipped:
            say(checks.report_skipped(skipped))
        for split, content in contents.items():
            say(f'{split}: {content.split.records} examples'
                f'{checks.report_classes(dataset, content.split.class_counts)}\n'
                f'{checks.report_channels(dataset, content.statistics)}')
        checks.check_contents(dataset, plan, contents, allow_duplicates, say)
        near = checks.check_near_duplicates(dataset, contents, say)
        source = {'skipped': [dict(zip(('split', 'key', 'reason'), p)) for p in skipped], 'near_duplicates': near}
        manifest = _manifest(plan, dataset, contents, source | {'fingerprint': fingerprint})
        manifest.save(out)
    say(f'wrote {out / MANIFEST}{speed}')
    return manifest


def _assign(dataset: Dataset, record_bytes: float, shard_mb: float) -> list[Task]:
    """Items to shards: contiguous runs of nearly equal length."""
    most = max(1, min(SHARD_RECORDS, int(shard_mb * 1e6 / record_bytes)))
    tasks = []
    for split, items in dataset.items.items():
        n, k = len(items), math.ceil(len(items) / most)
        names = [f'{split}-{i:05d}-of-{k:05d}.arrayrecord' for i in range(k)]
        tasks += [Task(name, split, i * n // k, (i + 1) * n // k) for i, name in enumerate(names)]
    return tasks


def _fingerprint(dataset: Dataset, plan: Plan, tasks: Sequence[Task]) -> str:
    """Equal for runs that write the same bytes: declaration, options, items, package versions, looks of the sample."""
    declared = dataclasses.asdict(dataclasses.replace(dataset, items={}, load=None))
    fields = {k: dataclasses.asdict(f) for k, f in plan.fields.items()}
    content = [declared, fields, plan.anchors, plan.options, [dataclasses.astuple(t) for t in tasks], _versions()]
    digest = hashlib.blake2b(json.dumps(content, default=_plain).encode(), digest_size=16)
    for split, items in dataset.items.items():
        for item in items:
            digest.update(json.dumps([split, item.key, item.group, item.label], default=_plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f'{value!r} is no JSON value: a data set is described by those')


def _versions() -> dict[str, str]:
    import importlib.metadata  # not in every worker process: it takes a tenth of their start

    return {p: importlib.metadata.version(p) for p in ('array_record', 'numpy', 'pillow')}


def _complete(out: pathlib.Path, fingerprint: str, on_error: OnError) -> Manifest | None:
    """The manifest of `out` if this very conversion has been finished there; None where there is none."""
    if not (out / MANIFEST).exists():
        return None
    manifest = Manifest.load(out)
    if manifest.source.get('fingerprint') != fingerprint:
        raise UserError(f'{out} holds another data set, {manifest.name!r} (or other items, options or package versions '
                        'of it): choose another --output, or replace it with --overwrite')
    skipped = manifest.source['skipped']
    if skipped and on_error == 'stop':
        raise UserError(f'{out} was written without {len(skipped)} bad examples, such as {skipped[0]["key"]!r} '
                        f'({skipped[0]["reason"]}): --on_error=skip takes it so, --overwrite writes it again')
    for name, split in manifest.splits.items():
        for shard in split.shards:
            check_size(out, shard)
        if split.labels:
            labels(out, name, manifest)
    if (out / PARTIAL).exists():   # killed after the manifest was written
        shutil.rmtree(out / PARTIAL)
    return manifest


def _manifest(plan: Plan, dataset: Dataset, contents: Mapping[str, Content],
              found: Mapping[str, Any]) -> Manifest:
    shapes = {}
    for content in contents.values():
        shapes = {k: common_shape(shapes.get(k, s), s) for k, s in content.shapes.items()}
    fields = {k: dataclasses.replace(f, shape=tuple(shapes[k])) for k, f in plan.fields.items()}
    channels = tuple(_channel(c, s) for c, s in zip(dataset.channels, contents['train'].statistics.summary()))
    source = json.loads(json.dumps(dict(dataset.source), default=_plain))
    return Manifest(dataset.name, fields, channels, tuple(dataset.classes), {k: c.split for k, c in contents.items()},
                    source | {'versions': _versions(), 'records': plan.options} | found)


def _channel(spec: ChannelSpec, s: Summary) -> Channel:
    period = None if spec.period is None else float(spec.period)
    return Channel(spec.name, spec.kind, s.mean, s.std, period, spec.unit, s.minimum, s.maximum, s.percentiles,
                   s.valid / s.pixels, s.histogram)


_FLAGS = ('output', 'workers', 'compression', 'shard_mb', 'on_shared_group', 'on_duplicate', 'on_error', 'overwrite')


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every converter has; `options` turns them into arguments of `convert`."""
    parser.add_argument('--output', required=True, help='folder to write the data set to')
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='processes (default: one per CPU)')
    parser.add_argument('--compression', default='none', help='none, snappy, zstd:1, brotli:5, ... (default: none)')
    parser.add_argument('--shard_mb', type=float, default=256, help='size of a shard in MB (default: 256)')
    parser.add_argument('--on_shared_group', choices=('error', 'keep'), default='error', help='splits share a group')
    parser.add_argument('--on_duplicate', choices=('error', 'keep'), default='error', help='splits share an image')
    parser.add_argument('--on_error', choices=('stop', 'skip'), default='stop', help='an example cannot be read')
    parser.add_argument('--overwrite', action='store_true', help='replace the data set in the output folder')


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `convert` from the flags of `add_flags`."""
    return dict(workers=arguments.workers, compression=arguments.compression, shard_mb=arguments.shard_mb,
                allow_shared_groups=arguments.on_shared_group == 'keep',
                allow_duplicates=arguments.on_duplicate == 'keep', on_error=arguments.on_error,
                overwrite=arguments.overwrite)


def provenance(converter: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """`Dataset.source` of a command: the converter and its own flags, which decide what is written."""
    return {'converter': converter, 'arguments': {k: v for k, v in vars(arguments).items() if k not in _FLAGS}}


def run(main: Callable[[], Any]) -> None:
    """Runs a converter's `main`; what its user can mend is one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        sys.exit(_fail(error))
    except OSError as error:
        sys.exit(_fail(f'{error.strerror}: {error.filename}' if error.filename else error))
    except KeyboardInterrupt:
        sys.exit('interrupted; a conversion goes on where it stopped when the same command is run again')


def _fail(message: Any) -> int:
    print(f'error: {message}', file=sys.stderr)
    return 2
