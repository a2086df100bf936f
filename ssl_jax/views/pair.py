"""Two views per image: SimSiam, MoCo."""
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ssl_jax.step import Batch
from ssl_jax.views.augment import Augment
from ssl_jax.views.branches import SHARED, branch, crops, rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair(Augment):
    """See `Recipe` for the options of both views; none are on by default.

    Args:
      second: what the second view's options have different, as in MoCo v3 and BYOL:
        `dict(blur=dict(probability=0.1), solarise=dict(probability=0.2))`.
    """
    second: Mapping[str, Any] | None = None

    def __post_init__(self):
        super().__post_init__()
        parts = [(self, [0, 1])]
        if self.second is not None:
            parts = [(self, [0]), (branch(self, 'second', self.second, shared=('size', *SHARED)), [1])]
        object.__setattr__(self, '_parts', parts)

    def train(self, batch: Batch, key: jax.Array) -> Batch:
        """Two augmented and normalised views, 'views' (2, B, h, w, C) float32, and the batch's 'label', 'index', ...

        The draws depend on `key` and the example's 'position' (B,) alone. Invalid pixels are 0; where they are is not
        passed on, nor is 'label_map'.
        """
        views = [crops(recipe, batch, key, numbers) for recipe, numbers in self._parts]
        return rest(batch) | {'views': jnp.concatenate(views)}


build = Pair
