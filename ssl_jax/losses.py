"""Losses as pure functions of arrays, computed in float32."""
import jax
import jax.numpy as jnp


def patch_mse(pred: jax.Array, target: jax.Array, mask: jax.Array, valid: jax.Array | None = None,
              weights: jax.Array | None = None) -> jax.Array:
    """Mean squared error over the valid values of the chosen patches (He et al. 2022, arXiv:2111.06377, section 3).

    A value outside mask or valid adds exactly 0 to the loss and to its gradient, also where it is not finite.

    Args:
      pred, target: (B, N, P).
      mask: (B, N) bool, the patches that count.
      valid: (B, N, P) bool, the values that count; None for all.
      weights: (P,) relative weight of each value of a patch; None for equal.
    Returns:
      Scalar; 0 where nothing counts.
    """
    use = jnp.broadcast_to(mask[..., None], target.shape) if valid is None else mask[..., None] & valid
    # Selecting before squaring keeps a NaN out of the gradient too: the derivative of the square is taken at 0.
    error = jnp.square(jnp.where(use, pred.astype(jnp.float32) - target.astype(jnp.float32), 0))
    weight = use.astype(jnp.float32)
    if weights is not None:
        error, weight = error * weights, weight * weights
    total = weight.sum()
    return error.sum() / jnp.where(total > 0, total, 1)


def cross_entropy(logits: jax.Array, target: jax.Array, *, smoothing: float = 0.0) -> jax.Array:
    """Cross entropy of each example.

    Args:
      logits: (..., K).
      target: (...) class index, or (..., K) probabilities.
      smoothing: share of the target that is spread evenly over all classes (Szegedy et al. 2016, arXiv:1512.00567,
        section 7).
    Returns:
      (...) float32.
    """
    classes = logits.shape[-1]
    if target.ndim < logits.ndim:
        target = jax.nn.one_hot(target, classes)
    target = (1 - smoothing) * target + smoothing / classes
    return -(target * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1)


def focal(logits: jax.Array, target: jax.Array, *, gamma: float = 2.0) -> jax.Array:
    """-(1 - p)^gamma log p of each example, p the probability of its class (Lin et al. 2017, arXiv:1708.02002, eq. 4).

    The modulating factor is a constant in the gradient, unlike in the paper and as in Hephaestus Minicubes'
    benchmark.

    Args:
      logits: (..., K).
      target: (...) class index.
    Returns:
      (...) float32.
    """
    error = cross_entropy(logits, target)
    return jax.lax.stop_gradient(1 - jnp.exp(-error)) ** gamma * error
