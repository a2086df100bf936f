"""A first look at a data set: some examples tell the fields of all, and what their statistics are anchored at."""
import dataclasses
import math
import pathlib

import numpy as np

from data_prep.dataset import Dataset, describe_fields, encode_example, load_example
from data_prep.gathering import Gatherer
from data_prep.problems import OnError
from data_prep.shard_files import Plan
from ssl_jax.errors import UserError

SAMPLE = 32     # examples of the train split that are looked at


def look(dataset: Dataset, out: pathlib.Path, compression: str, on_error: OnError) -> tuple[Plan, Gatherer, float]:
    """Loads a sample of the train split: the fields, the anchors of the statistics, the mean size of a record.

    Under 'skip', bad examples are passed over, and the fields are those that most examples have.
    """
    items = dataset.items['train']
    count = min(len(items), SAMPLE)
    with_group = any(item.group for split in dataset.items.values() for item in split)
    looks, bad = {}, []
    for k in range(count):
        try:
            example = load_example(dataset, items[k * len(items) // count], with_group=with_group)
            size = len(encode_example(example))
            middles = _middles(example.pixels, example.valid)
            kind = tuple(sorted((name, dtype, len(shape)) for name, (dtype, shape) in example.signature().items()))
            if kind not in looks and (not looks or on_error == 'skip'):
                fields = describe_fields(example, dataset.encoding)
                looks[kind] = Gatherer(fields, np.nan_to_num(middles), len(dataset.classes)), [], []
            sample, all_middles, sizes = looks.get(kind) or next(iter(looks.values()))
            sample.add(example)
            all_middles.append(middles)
            sizes.append(size)
        except UserError as error:
            if on_error == 'stop':
                raise
            bad.append(str(error))
    if not looks:
        raise UserError(f'all {len(bad)} training examples that were looked at are bad, the first: {bad[0]}')
    sample, middles, sizes = max(looks.values(), key=lambda look: len(look[2]))
    known = [[m for m in column if not math.isnan(m)] for column in zip(*middles)]
    anchors = tuple(float(np.median(m)) if m else 0.0 for m in known)
    codec = 'uncompressed' if compression == 'none' else compression
    plan = Plan(out, dataclasses.replace(dataset, items={}, problems=()), sample.fields, with_group, anchors,
                f'group_size:1,{codec},max_parallelism:1', on_error)
    return plan, sample, float(np.mean(sizes))


def _middles(pixels: np.ndarray, valid: np.ndarray | None) -> list[float]:
    """Per channel the median of the valid pixels, nan where there are none; every 7th pixel is enough for an anchor."""
    values = [pixels[..., c] if valid is None else pixels[..., c][valid[..., c]] for c in range(pixels.shape[2])]
    return [float(np.median(v.reshape(-1)[::7].astype(np.float64))) if v.size else math.nan for v in values]
