"""Heads that turn an encoder's features into predictions."""
import jax
import jax.numpy as jnp
from flax import nnx


class BatchNorm(nnx.Module):
    """Batch normalisation of (B, D) without scale and shift; the running variance is the unbiased one, as in torch."""

    def __init__(self, width: int, *, momentum: float = 0.1, epsilon: float = 1e-6):
        self.mean = nnx.BatchStat(jnp.zeros(width))
        self.var = nnx.BatchStat(jnp.ones(width))
        self.momentum, self.epsilon = momentum, epsilon

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        mean, var = (x.mean(0), x.var(0)) if train else (self.mean[...], self.var[...])
        if train:
            n = len(x)
            self.mean[...] += self.momentum * (mean - self.mean[...])
            self.var[...] += self.momentum * (var * (n / max(n - 1, 1)) - self.var[...])
        return (x - mean) * jax.lax.rsqrt(var + self.epsilon)


class LinearHead(nnx.Module):
    """Features (B, D) -> logits (B, classes) in float32.

    Args:
      batch_norm: normalise the features first, as MAE's linear probe does (arXiv:2111.06377, appendix A.1).
      std: deviation of the initial kernel; the bias starts at 0.
    """

    def __init__(self, width: int, classes: int, *, batch_norm: bool, std: float, rngs: nnx.Rngs):
        self.norm = BatchNorm(width) if batch_norm else None
        self.linear = nnx.Linear(width, classes, kernel_init=nnx.initializers.normal(std), rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = x.astype(jnp.float32)
        return self.linear(x if self.norm is None else self.norm(x, train=train))
