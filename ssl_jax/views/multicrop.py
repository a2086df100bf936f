"""A few large and many small views per image (Caron et al. 2020, SwAV, arXiv:2006.09882): DINO, iBOT."""
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ssl_jax import config
from ssl_jax.errors import UserError
from ssl_jax.step import Batch
from ssl_jax.views.augment import Augment
from ssl_jax.views.branches import SHARED, branch, crops, rest


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiCrop(Augment):
    """See `Recipe` for the options of the global crops; none are on by default, nor are there local ones.

    Args:
      count: of global crops.
      second: what the options of all global crops but the first have different.
      local: `count` of local crops, and what their options have different from the first global crop's:
        `dict(count=8, size=96, crop=dict(scale=(0.05, 0.4)), blur=dict(probability=0.5))`.
    """
    count: int = 2
    second: Mapping[str, Any] | None = None
    local: Mapping[str, Any] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.count < 1:
            raise UserError(f'config.view.count={self.count}: expected at least 1 global crop')
        numbers = list(range(self.count))
        parts = {'global': [(self, numbers)]}
        if self.second is not None:
            if self.count == 1:
                raise UserError('config.view.second: config.view.count=1, so there is no second global crop')
            second = branch(self, 'second', self.second, shared=('size', *SHARED))
            parts['global'] = [(self, numbers[:1]), (second, numbers[1:])]
        if self.local is not None:
            changes = dict(self.local)
            count = changes.pop('count', None)
            local = branch(self, 'local', changes)
            if not config.matches(count, int) or count < 0:
                raise UserError(f'config.view.local.count={count!r}: expected how many local crops there are')
            if count:
                parts['local'] = [(local, list(range(self.count, self.count + count)))]
        object.__setattr__(self, '_parts', parts)

    def train(self, batch: Batch, key: jax.Array) -> Batch:
        """Augmented and normalised crops, and the batch's 'label', 'index', ...

        The draws depend on `key` and the example's 'position' (B,) alone. Invalid pixels are 0; where they are is not
        passed on, nor is 'label_map'.

        Returns:
          'global' (count, B, h, w, C) float32; 'local' (local.count, B, h', w', C) if there are any.
        """
        return rest(batch) | {name: jnp.concatenate([crops(recipe, batch, key, numbers) for recipe, numbers in parts])
                              for name, parts in self._parts.items()}


build = MultiCrop
