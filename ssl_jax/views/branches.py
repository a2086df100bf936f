"""Several views of one image: recipes that differ in a few options, and many draws of one recipe."""
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssl_jax import config
from ssl_jax.errors import UserError
from ssl_jax.step import Batch, example_keys
from ssl_jax.views.augment import Augment
from ssl_jax.views.recipe import Recipe

# All views of a run have the same channels, normalised alike.
SHARED = ('transforms', 'mean', 'std')


def branch(recipe: Recipe, where: str, changes: Mapping[str, Any], *, shared: Sequence[str] = SHARED) -> Augment:
    """`recipe` with the options that `changes` names set anew.

    Where both have a mapping, only its named keys change: `blur=dict(probability=0.1)` keeps the sigma. None switches
    an option off.

    Args:
      where: the key of `changes` in config.view, for messages.
      shared: options that a branch may not change.
    Raises:
      UserError: as for the options of the view itself.
    """
    given = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)}
    for key, value in changes.items():
        if key in shared:
            raise UserError(f'config.view.{where}.{key}={value!r}: all views share that of config.view')
        old = given.get(key)
        merges = dataclasses.is_dataclass(old) and isinstance(value, Mapping)
        given[key] = dataclasses.asdict(old) | value if merges else value
    make = config.bind(Augment, given, where=f'view.{where}')
    try:
        return make()
    except UserError as e:   # a recipe takes itself for the whole view
        raise UserError(str(e).replace('config.view', f'config.view.{where}', 1)) from e


def crops(recipe: Augment, batch: Batch, key: jax.Array, numbers: Sequence[int]) -> jax.Array:
    """Views of every image, (len(numbers), B, h, w, C) float32.

    One program for them all: compiling it takes no longer for ten than for one.

    Args:
      numbers: of the views, each of which has its own draws from `key` and the example's 'position' (B,).
    """
    keys = jax.vmap(lambda n: example_keys(jax.random.fold_in(key, n), batch['position']))(jnp.asarray(numbers))
    examples = {name: batch[name] for name in ('image', 'valid') if name in batch}
    one = lambda example, key: recipe.random(example, key)['image']
    return jax.vmap(lambda keys: jax.vmap(one)(examples, keys))(keys)


def rest(batch: Batch) -> dict[str, jax.Array]:
    """The fields that do not lie on the image's grid."""
    return {name: x for name, x in batch.items() if name not in ('image', 'valid', 'label_map')}
