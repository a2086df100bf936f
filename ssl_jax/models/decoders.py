"""Decoders that turn encoder tokens back into pixels."""
import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax.errors import UserError
from ssl_jax.models import layers, posemb
from ssl_jax.partition import dot_general


class MAEDecoder(nnx.Module):
    """Visible tokens -> pixels of all patches (He et al. 2022, arXiv:2111.06377, section 3).

    Args:
      encoder_width: of the tokens that come in.
      grid: (rows, columns) of patches.
      values: predicted numbers per patch.
    Raises:
      UserError: a width that is not a multiple of the heads and of 4, or not positive numbers.
    """

    def __init__(self, *, width: int = 512, depth: int = 8, heads: int = 16, mlp_ratio: float = 4.0,
                 remat: bool = False, unroll: int | bool = 1, encoder_width: int, grid: tuple[int, int], values: int,
                 dtype: str = 'float32', rngs: nnx.Rngs):
        if min(width, depth, heads) < 1 or width % heads or width % 4:
            raise UserError(f'decoder width={width}, depth={depth}, heads={heads}: expected positive numbers, '
                            'width a multiple of heads and of 4')
        self.width, self.grid, self.dtype, self.remat, self.unroll = width, grid, dtype, remat, unroll
        self.embed = nnx.Linear(encoder_width, width, kernel_init=layers.xavier, dtype=dtype, dot_general=dot_general,
                                rngs=rngs)
        self.mask_token = nnx.Param(layers.normal(rngs.params(), (1, 1, width)))
        self.blocks = layers.stack_blocks(depth, width, heads, round(mlp_ratio * width), dtype=dtype, rngs=rngs)
        self.norm = layers.layer_norm(width, dtype, rngs=rngs)
        self.pred = nnx.Linear(width, values, kernel_init=layers.xavier, dtype=dtype, dot_general=dot_general,
                               rngs=rngs)

    @jax.named_scope('decoder')
    def __call__(self, cls: jax.Array, visible: jax.Array, restore: jax.Array) -> jax.Array:
        """Predictions for every patch.

        Args:
          cls: (B, 1, encoder_width), the class token.
          visible: (B, K, encoder_width), the patches kept by `masking.random_keep`.
          restore: (B, N), the places of the patches in [kept, hidden].
        Returns:
          (B, N, values) float32.
        """
        cls, x = self.embed(cls), self.embed(visible)
        hidden = (len(x), restore.shape[1] - x.shape[1], self.width)
        hidden = jnp.broadcast_to(self.mask_token[...].astype(x.dtype), hidden)
        x = layers.take_tokens(jnp.concatenate([x, hidden], axis=1), restore)
        x = x + jnp.asarray(posemb.sincos_2d(self.width, self.grid), x.dtype)
        x = layers.run_blocks(self.blocks, jnp.concatenate([cls, x], axis=1), remat=self.remat, unroll=self.unroll)
        return self.pred(self.norm(x[:, 1:])).astype(jnp.float32)
