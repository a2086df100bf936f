"""What masked image models predict: the pixels of patches, as far as there are any."""
import jax
import jax.numpy as jnp

from ssl_jax.models.layers import patchify
from ssl_jax.step import Batch


def fill_invalid(batch: Batch) -> jax.Array:
    """The image with 0 (the mean) where pixels are missing."""
    return jnp.where(batch['valid'], batch['image'], 0) if 'valid' in batch else batch['image']


def pixel_targets(batch: Batch, patch: int) -> tuple[jax.Array, jax.Array | None]:
    """The image's patches (B, N, patch * patch * C) in float32, 0 where pixels are missing, and which values are valid.

    The second is bool and of the same shape; None where all are.
    """
    target, valid = patchify(fill_invalid(batch).astype(jnp.float32), patch), None
    if 'valid' in batch:
        valid = patchify(jnp.broadcast_to(batch['valid'], batch['image'].shape), patch)
    return target, valid


def patch_statistics(patches: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation sqrt(unbiased variance + 1e-6) of each patch's valid values: (B, N, P) -> (B, N, 1) twice."""
    valid = jnp.ones(patches.shape, bool) if valid is None else valid
    count = valid.sum(-1, keepdims=True)
    mean = jnp.where(valid, patches, 0).sum(-1, keepdims=True) / jnp.maximum(count, 1)
    squares = jnp.where(valid, jnp.square(patches - mean), 0).sum(-1, keepdims=True)
    return mean, jnp.sqrt(squares / jnp.maximum(count - 1, 1) + 1e-6)
