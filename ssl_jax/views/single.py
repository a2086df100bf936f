"""One view per image: masked image modelling, supervised training and every evaluation."""
import dataclasses

import jax

from ssl_jax.step import Batch, example_keys
from ssl_jax.views.augment import Augment


@dataclasses.dataclass(frozen=True)
class Single(Augment):
    """See `Recipe` for the options; none are on by default."""

    def train(self, batch: Batch, key: jax.Array) -> Batch:
        """Augmented and normalised: 'image' (B, h, w, C) float32 and the batch's other fields.

        The draws depend on `key` and the example's 'position' (B,) alone, not on its place in the batch.
        """
        return jax.vmap(self.random)(dict(batch), example_keys(key, batch['position']))


build = Single
