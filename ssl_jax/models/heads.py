"""Heads that turn an encoder's features into predictions, projections and what a loss compares."""
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax.models import layers
from ssl_jax.partition import dot_general


def torch_linear(rows: int, columns: int, *, bias: bool = True, dtype: Any = jnp.float32, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer that starts as torch's does: kernel and bias uniform in +-1 / sqrt(rows)."""
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1, 1) * rows ** -0.5
    return nnx.Linear(rows, columns, use_bias=bias, kernel_init=init, bias_init=init, dtype=dtype,
                      dot_general=dot_general, rngs=rngs)


class BatchNorm(nnx.Module):
    """Batch normalisation of (B, ..., D) over all axes but the last, in float32, as torch's (arXiv:1502.03167).

    Under jit the batch is the global one, whatever devices it lies on. The running variance is the unbiased one.

    Args:
      affine: learned scale and shift.
      scale: initial scale.
      groups: contiguous parts of the batch that are normalised each by itself, like the devices of a run without
        synchronisation; the running statistics follow their mean.
      momentum: weight of the new value in the running statistics.
    """

    def __init__(self, width: int, *, affine: bool = True, scale: float = 1.0, groups: int = 1, momentum: float = 0.1,
                 epsilon: float = 1e-5):
        if affine:
            self.scale, self.bias = nnx.Param(jnp.full(width, scale, jnp.float32)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))
        self.affine, self.groups, self.momentum, self.epsilon = affine, groups, momentum, epsilon

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Result of the shape and dtype of x.

        Raises:
          ValueError: in training, a batch that `groups` does not divide.
        """
        shape, dtype = x.shape, x.dtype
        x = x.astype(jnp.float32)
        if train:
            if shape[0] % self.groups:
                raise ValueError(f'batch normalisation in groups={self.groups} does not divide a batch of {shape[0]}')
            x = x.reshape(self.groups, -1, *shape[1:])
            axes = tuple(range(1, x.ndim - 1))
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
            n = x.size // (self.groups * shape[-1])
            new_mean, new_var = (s.reshape(self.groups, -1).mean(0) for s in (mean, var))
            self.mean[...] += self.momentum * (new_mean - self.mean[...])
            self.var[...] += self.momentum * (new_var * (n / max(n - 1, 1)) - self.var[...])
        else:
            mean, var = self.mean[...], self.var[...]
        x = ((x - mean) * jax.lax.rsqrt(var + self.epsilon)).reshape(shape)
        if self.affine:
            x = x * self.scale[...] + self.bias[...]
        return x.astype(dtype)


class LinearHead(nnx.Module):
    """Features (B, D) -> logits (B, classes) in float32.

    Args:
      batch_norm: normalise the features first, as MAE's linear probe does (arXiv:2111.06377, appendix A.1).
      std: deviation of the initial kernel; the bias starts at 0.
      pool: features are tokens (B, N, D), which an `AttentivePool` makes one vector of.
      layer_norm: `fc_norm` of the features, as in MAE's fine-tuning.
    """

    def __init__(self, width: int, classes: int, *, batch_norm: bool, std: float, pool: bool = False,
                 layer_norm: bool = False, rngs: nnx.Rngs):
        self.pool = AttentivePool(width, rngs=rngs) if pool else None
        self.fc_norm = layers.layer_norm(width, jnp.float32, rngs=rngs) if layer_norm else None
        self.norm = BatchNorm(width, affine=False, epsilon=1e-6) if batch_norm else None
        self.linear = nnx.Linear(width, classes, kernel_init=nnx.initializers.normal(std),
                                 dot_general=dot_general, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = self.features(x)
        return self.linear(x if self.norm is None else self.norm(x, train=train))

    def features(self, x: jax.Array) -> jax.Array:
        """What is normalised over the batch and classified, (B, D) float32."""
        x = x.astype(jnp.float32)
        x = x if self.pool is None else self.pool(x)
        return x if self.fc_norm is None else self.fc_norm(x)


class AttentivePool(nnx.Module):
    """Tokens (B, N, D) -> (B, D): a learned query looks at them in one cross-attention block.

    The pooling of the attentive probe of Bardes et al. 2024 (V-JEPA, arXiv:2404.08471). Heads are some 64 wide.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.heads = next(n for n in range(max(width // 64, 1), 0, -1) if width % n == 0)
        make = functools.partial(layers.linear, kernel=layers.normal, init=layers.INITS['trunc_normal'],
                                 dtype=jnp.float32, rngs=rngs)
        self.query = nnx.Param(layers.normal(rngs.params(), (1, 1, width)))
        self.norm1 = layers.layer_norm(width, jnp.float32, rngs=rngs)
        self.q, self.kv, self.proj = make(width, width), make(width, 2 * width), make(width, width)
        self.norm2 = layers.layer_norm(width, jnp.float32, rngs=rngs)
        self.mlp = layers.MLP(width, 4 * width, init=layers.INITS['trunc_normal'], dtype=jnp.float32, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        split = lambda x: x.reshape(*x.shape[:2], self.heads, -1)
        x = jnp.broadcast_to(self.query[...], (len(tokens), 1, tokens.shape[-1]))
        k, v = jnp.split(self.kv(self.norm1(tokens)), 2, axis=-1)
        seen = layers.attention(split(self.q(x)), split(k), split(v))
        x = x + self.proj(seen.reshape(x.shape))
        return (x + self.mlp(self.norm2(x)))[:, 0]


class MLPHead(nnx.Module):
    """Linear, ReLU, ..., Linear: projectors and predictors of SimSiam and MoCo, (B, widths[0]) -> (B, widths[-1]).

    Layers are fc1, fc2, ..., their normalisations bn1, bn2, .... A layer has a bias where no normalisation follows it,
    but see `last_bias`.

    Args:
      widths: of the input, every hidden layer and the output.
      norm: BatchNorm between a hidden layer and its ReLU.
      last_norm: BatchNorm without scale and shift after the last layer.
      last_bias: of the last layer where no normalisation follows it.
      groups: see `BatchNorm`.
    """

    def __init__(self, widths: tuple[int, ...], *, norm: bool = True, last_norm: bool = False, last_bias: bool = True,
                 groups: int = 1, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.depth, self.norm, self.last_norm = len(widths) - 1, norm, last_norm
        for i, (rows, columns) in enumerate(zip(widths, widths[1:]), start=1):
            last = i == self.depth
            normed = last_norm if last else norm
            bias = not normed and (last_bias or not last)
            setattr(self, f'fc{i}', torch_linear(rows, columns, bias=bias, dtype=dtype, rngs=rngs))
            if normed:
                setattr(self, f'bn{i}', BatchNorm(columns, affine=not last, groups=groups))

    @jax.named_scope('head')
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for i in range(1, self.depth + 1):
            last = i == self.depth
            x = getattr(self, f'fc{i}')(x)
            if self.last_norm if last else self.norm:
                x = getattr(self, f'bn{i}')(x, train=train)
            x = x if last else jax.nn.relu(x)
        return x
