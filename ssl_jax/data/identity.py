"""What tells a data set from another one: digests of what decides the content of its training batches."""
import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from ssl_jax.data.source import Manifest


def identity(manifest: Manifest, split: str, *, rows: np.ndarray | None = None, shards: bool = True) -> dict[str, str]:
    """The data set's name, and digests of its fields, channels, classes and of the examples of `split`.

    Where it lies, what made it and what its other splits hold does not matter.

    Args:
      rows: of a subset.
      shards: False for data that are made on every machine anew, by whatever versions of libraries it has.
    """
    listed = manifest.split(split)
    found = {'name': manifest.name, 'fields': _digest({k: dataclasses.asdict(f) for k, f in manifest.fields.items()}),
             'classes': _digest(manifest.classes)}
    if shards:   # what is made anew may also differ in the last digit of a mean
        found['channels'] = _digest([dataclasses.asdict(c) for c in manifest.channels])
        found['examples'] = _digest([listed.records, [s.sha256 for s in listed.shards],
                                     listed.labels and listed.labels.sha256])
    if rows is not None:
        found['subset'] = _digest(np.asarray(rows).tolist())
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
