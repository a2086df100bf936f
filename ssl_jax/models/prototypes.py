"""Heads of self-distillation: an MLP, a normalised bottleneck, and cosines with weight-normalised prototypes."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax.errors import UserError
from ssl_jax.losses import normalise
from ssl_jax.models.heads import BatchNorm
from ssl_jax.models.layers import by_inputs, normal
from ssl_jax.partition import by_example, dot_general


class WeightNorm(nnx.Module):
    """x (..., width) -> x @ (g v / |v|), (..., count) float32, |v| that of each column (arXiv:1602.07868, equation 2).

    v starts as torch's linear layer does. The gain g starts at 1; without `train_gain` it stays there and is no
    parameter.
    """

    def __init__(self, width: int, count: int, *, train_gain: bool, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.v = nnx.Param(by_inputs(rngs.params(), (width, count)))
        if train_gain:
            self.g = nnx.Param(jnp.ones(count))
        self.train_gain, self.dtype = train_gain, dtype

    def weight(self) -> jax.Array:
        """(width, count) float32."""
        v = self.v[...]
        gain = self.g[...] if self.train_gain else 1.0
        return v * (gain / jnp.linalg.norm(v, axis=0))

    def __call__(self, x: jax.Array) -> jax.Array:
        # Temperatures multiply the products by up to 50, so that their own rounding to 16 bits would show.
        x, weight = by_example(x.astype(self.dtype)), self.weight().astype(self.dtype)
        return by_example(jnp.matmul(x, weight, preferred_element_type=jnp.float32))


class DINOHead(nnx.Module):
    """Features (B, ..., width) -> logits (B, ..., prototypes) (Caron et al. 2021, arXiv:2104.14294, section 3.1).

    Args:
      prototypes: K.
      layers: linear layers of the MLP, with GELU between them; the last one ends in the bottleneck.
      hidden, bottleneck: widths inside the MLP and at its end.
      batch_norm: normalise over the batch before each GELU.
      norm_last_layer: the prototypes' gains stay 1; else they are learned.
    Raises:
      UserError: a width or a number of layers below 1.
    """

    def __init__(self, width: int, *, prototypes: int = 65536, layers: int = 3, hidden: int = 2048,
                 bottleneck: int = 256, batch_norm: bool = False, norm_last_layer: bool = True,
                 dtype: Any = jnp.float32, rngs: nnx.Rngs):
        if min(prototypes, layers, hidden, bottleneck) < 1:
            raise UserError(f'config.objective.head: prototypes={prototypes}, layers={layers}, hidden={hidden}, '
                            f'bottleneck={bottleneck}: expected positive numbers')
        self.layers, self.batch_norm = layers, batch_norm
        widths = [width, *[hidden] * (layers - 1), bottleneck]
        for i in range(1, layers + 1):
            linear = nnx.Linear(*widths[i - 1:i + 1], kernel_init=normal, dtype=dtype, dot_general=dot_general,
                                rngs=rngs)
            setattr(self, f'fc{i}', linear)
            if batch_norm and i < layers:
                setattr(self, f'bn{i}', BatchNorm(hidden))
        self.last_layer = WeightNorm(bottleneck, prototypes, train_gain=not norm_last_layer, dtype=dtype, rngs=rngs)

    def project(self, x: jax.Array, *, train: bool) -> jax.Array:
        """The bottleneck, L2-normalised: (B, ..., bottleneck) float32."""
        for i in range(1, self.layers + 1):
            x = getattr(self, f'fc{i}')(x)
            if i < self.layers:
                x = getattr(self, f'bn{i}')(x, train=train) if self.batch_norm else x
                x = jax.nn.gelu(x, approximate=False)
        return normalise(x)

    @jax.named_scope('head')
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.last_layer(self.project(x, train=train))


class IBOTHead(DINOHead):
    """A DINO head for class and patch tokens (Zhou et al. 2022, arXiv:2111.07832, section 3.2).

    Args:
      patch_prototypes: the patch tokens have this many prototypes of their own; None: they share the class token's.
      others: see `DINOHead`.
    """

    def __init__(self, width: int, *, prototypes: int = 8192, patch_prototypes: int | None = None, layers: int = 3,
                 hidden: int = 2048, bottleneck: int = 256, batch_norm: bool = False, norm_last_layer: bool = False,
                 dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(width, prototypes=prototypes, layers=layers, hidden=hidden, bottleneck=bottleneck,
                         batch_norm=batch_norm, norm_last_layer=norm_last_layer, dtype=dtype, rngs=rngs)
        self.shared = patch_prototypes is None
        if not self.shared and patch_prototypes < 1:
            raise UserError(f'config.objective.head.patch_prototypes={patch_prototypes}: expected a positive number, '
                            'or None')
        if not self.shared:
            self.last_layer2 = WeightNorm(bottleneck, patch_prototypes, train_gain=not norm_last_layer, dtype=dtype,
                                          rngs=rngs)

    def patch_logits(self, z: jax.Array) -> jax.Array:
        """Logits of patch tokens from their bottleneck."""
        return self.last_layer(z) if self.shared else self.last_layer2(z)
