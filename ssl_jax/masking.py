"""Which patches to hide, as pure functions of per-example keys."""
import jax
import jax.numpy as jnp


def uniform_noise(keys: jax.Array, n: int) -> jax.Array:
    """(B, n) uniform noise in [0, 1) from one key per example."""
    return jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys)


def random_keep(noise: jax.Array, ratio: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random masking by sorting noise (He et al. 2022, arXiv:2111.06377, section 3 'Simple implementation').

    Args:
      noise: (B, N); the int(N * (1 - ratio)) patches with the smallest noise stay visible.
      ratio: share of hidden patches.
    Returns:
      keep (B, K) indices of the visible patches by rising noise; restore (B, N) the place of each patch in
      [visible, hidden] order; mask (B, N) bool, True = hidden.
    """
    visible = int(noise.shape[1] * (1 - ratio))
    order = jnp.argsort(noise, axis=1)
    restore = jnp.argsort(order, axis=1)
    return order[:, :visible], restore, restore >= visible
