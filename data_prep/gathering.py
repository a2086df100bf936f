"""What is gathered of the examples of a shard while they are written, or of a sample."""
from collections.abc import Mapping, Sequence

import numpy as np

from data_prep.dataset import Example, common_shape, pixel_hash
from data_prep.duplicates import block_means, hash_means
from data_prep.statistics import Statistics
from ssl_jax.data.source import Field
from ssl_jax.errors import UserError

_SAMPLED = 1 << 16   # bytes: hashing all of a large image takes as long as copying it
_HELD = 1 << 20      # bytes of block means that are held back: hashing many at a time takes a fraction of the time


class Gatherer:
    """Checks that examples have the same fields, and gathers what is told of them: the content of a shard, or a sample.

    Args:
      fields: what every example has.
      anchors: see `Statistics`.
    """

    def __init__(self, fields: Mapping[str, Field], anchors: Sequence[float], classes: int):
        self.fields = fields
        self.statistics = Statistics(fields['image'].dtype, anchors)
        self.class_counts = np.zeros(classes, np.int64)
        self.shapes: dict[str, list[int | None]] = {}
        self.labels: list[np.ndarray] = []
        self.hashes: list[bytes] = []
        self.blank: list[str] = []      # examples without a valid pixel
        self._signature: Mapping[str, tuple[str, tuple[int, ...]]] = {}     # of the last example
        self._looks: list[np.ndarray] = []      # perceptual hashes
        self._means: list[np.ndarray] = []      # of the last images, from which theirs are made

    def add(self, example: Example) -> None:
        """Adds an example, or nothing of it.

        Raises:
          UserError: it has other fields than `fields`, or of other dtypes.
        """
        signature = example.signature()
        if signature != self._signature:
            self._check(example.key, signature)
            self.shapes = {k: common_shape(self.shapes.get(k, shape), shape) for k, (_, shape) in signature.items()}
            self._signature = signature
        self.statistics.add(example.pixels, example.valid)
        if example.valid is not None and not example.valid.any():
            self.blank.append(example.key)
        if 'label' in example.fields:
            label = example.fields['label']
            self.class_counts += label > 0 if label.ndim else np.arange(len(self.class_counts)) == label
            self.labels.append(label)
        self.hashes.append(pixel_hash(example.pixels, _SAMPLED))
        self._look(block_means(example.pixels, example.valid))

    def _check(self, key: str, signature: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        for name in self.fields | signature:
            dtype, shape = signature.get(name, ('missing', ()))
            known = self.fields.get(name)
            if known is None or (dtype, len(shape)) != (known.dtype, len(known.shape)):
                others = f'{known.dtype} with {len(known.shape)} axes' if known else 'no such field'
                raise UserError(f'example {key!r}: field {name!r} is {dtype} {shape}, others have {others}')

    @property
    def looks(self) -> np.ndarray:
        """(n,) uint64, perceptual hashes."""
        self._look()
        return np.concatenate([np.zeros(0, np.uint64), *self._looks])

    def _look(self, means: np.ndarray | None = None) -> None:
        held = self._means
        if held and (means is None or means.shape != held[0].shape or len(held) * means.nbytes > _HELD):
            self._looks.append(hash_means(np.stack(held)))
            held.clear()
        if means is not None:
            held.append(means)

    def label_array(self) -> np.ndarray:
        """The labels, (n,) or (n, K); empty for unlabelled data."""
        if 'label' not in self.fields:
            return np.zeros(0, np.int32)
        return np.array(self.labels, self.fields['label'].dtype).reshape(-1, *self.fields['label'].shape)
