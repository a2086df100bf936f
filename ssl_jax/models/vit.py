"""Vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), initialised as in MAE's code."""
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax.errors import UserError
from ssl_jax.models import layers, posemb

# width, depth, heads, mlp ratio. S, Ti: DeiT (arXiv:2012.12877, table 1); B, L, H: ViT (arXiv:2010.11929, table 1);
# g: Zhai et al. (arXiv:2106.04560, table 2), MLP width 6144.
SIZES = {
    'Ti': (192, 12, 3, 4.0),
    'S': (384, 12, 6, 4.0),
    'B': (768, 12, 12, 4.0),
    'L': (1024, 24, 16, 4.0),
    'H': (1280, 32, 16, 4.0),
    'g': (1408, 40, 16, 48 / 11),
}


class ViT(nnx.Module):
    """Image (B, H, W, C) -> tokens (B, 1 + registers + N, width): class token, registers, patches row by row.

    Args:
      size: preset of width, depth, heads and mlp_ratio; each of them, where given, replaces the preset's.
      patch: side of a patch in pixels.
      image_size: (H, W) of the position table; images of another size get a resized one.
      pos: 'sincos' is fixed, 'learned' a parameter.
      pos_resize: rule of `posemb.resize`.
      registers: extra tokens without position (Darcet et al. 2024, arXiv:2309.16588).
      layer_scale: initial gain of the residual branches; None for no LayerScale.
      drop_path: stochastic depth rate of the last block.
      remat, unroll: see `layers.run_blocks`.
      dtype: of the computation; parameters, softmax, normalisation statistics and the result of the final norm
        are float32.
    Raises:
      UserError: a patch that does not divide the image, a width that heads or sin-cos cannot split, a size not given.
    """

    def __init__(self, *, size: Literal['Ti', 'S', 'B', 'L', 'H', 'g'] | None = None, patch: int = 16,
                 width: int | None = None, depth: int | None = None, heads: int | None = None,
                 mlp_ratio: float | None = None, image_size: tuple[int, int], channels: int,
                 dtype: Literal['float32', 'bfloat16'] = 'float32', pos: Literal['sincos', 'learned'] = 'sincos',
                 pos_resize: posemb.Rule = 'torch', registers: int = 0, layer_scale: float | None = None,
                 drop_path: float = 0.0, qkv_bias: bool = True, remat: bool = False, unroll: int | bool = 1,
                 rngs: nnx.Rngs):
        given, preset = (width, depth, heads, mlp_ratio), SIZES[size] if size else (None, None, None, 4.0)
        width, depth, heads, mlp_ratio = (p if g is None else g for g, p in zip(given, preset))
        if not (width and depth and heads):
            raise UserError(f'vit width={width}, depth={depth}, heads={heads}: expected a size '
                            f"({', '.join(SIZES)}) or all three")
        if min(patch, width, depth, heads) < 1 or registers < 0:
            raise UserError(f'vit patch={patch}, width={width}, depth={depth}, heads={heads}, registers={registers}: '
                            'expected positive numbers, and registers >= 0')
        if width % heads or (pos == 'sincos' and width % 4):
            raise UserError(f"vit width={width}: expected a multiple of heads={heads}, and of 4 where pos='sincos'")
        if not 0 <= drop_path < 1:
            raise UserError(f'vit drop_path={drop_path}: expected 0 <= drop_path < 1')
        self.patch, self.channels, self.width, self.depth, self.prefix = patch, channels, width, depth, 1 + registers
        self.grid = self.grid_of(image_size)
        self.dtype, self.pos, self.pos_resize = dtype, pos, pos_resize
        self.drop_path, self.remat, self.unroll = drop_path, remat, unroll
        self.patch_embed = layers.PatchEmbed(channels, width, patch, dtype, rngs=rngs)
        self.cls_token = nnx.Param(layers.normal(rngs.params(), (1, 1, width)))
        if pos == 'learned':
            self.pos_embed = nnx.Param(layers.normal(rngs.params(), (1, 1 + self.grid[0] * self.grid[1], width)))
        if registers:
            self.registers = nnx.Param(layers.normal(rngs.params(), (1, registers, width)))
        self.blocks = layers.stack_blocks(depth, width, heads, round(mlp_ratio * width), qkv_bias=qkv_bias,
                                          layer_scale=layer_scale, dtype=dtype, rngs=rngs)
        self.norm = layers.layer_norm(width, 'float32', rngs=rngs)

    def grid_of(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches in an image of (H, W)."""
        h, w = image_size
        if h % self.patch or w % self.patch:
            raise UserError(f'image size {h}x{w} is not divisible by patch={self.patch}')
        return h // self.patch, w // self.patch

    def positions(self, grid: tuple[int, int]) -> tuple[jax.Array | float, jax.Array]:
        """What is added to the class token (1, 1, D) or 0, and to the patches (1, N, D), for this grid; float32."""
        if self.pos == 'sincos':
            cls, table = 0.0, jnp.asarray(posemb.sincos_2d(self.width, self.grid), jnp.float32)
        else:
            cls, table = self.pos_embed[...][:, :1], self.pos_embed[0, 1:]
        return cls, posemb.resize(table, self.grid, grid, self.pos_resize)[None]

    def embed(self, image: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """The tokens before the first block."""
        if image.shape[-1] != self.channels:
            raise UserError(f'vit got images with {image.shape[-1]} channels: expected channels={self.channels}')
        grid = self.grid_of(image.shape[1:3])
        x = layers.patchify(image.astype(self.dtype), self.patch)
        cls_pos, pos = self.positions(grid)
        pos = pos.astype(self.dtype)
        if keep is not None:
            # Choosing before projecting leaves the hidden patches out of the work.
            x, pos = layers.take_tokens(x, keep), pos[0][keep]
        x = self.patch_embed(x) + pos
        prefix = [self.cls_token[...] + cls_pos] + ([self.registers[...]] if self.prefix > 1 else [])
        prefix = jnp.concatenate(prefix, axis=1).astype(self.dtype)
        return jnp.concatenate([jnp.broadcast_to(prefix, (len(x), *prefix.shape[1:])), x], axis=1)

    def run(self, x: jax.Array, *, key: jax.Array | None, train: bool, every: bool = False) -> jax.Array:
        """The blocks over the tokens of `embed`."""
        gains = None
        if train and self.drop_path:
            if key is None or key.shape != x.shape[:1]:
                raise ValueError('drop_path in training needs one key per example: key of shape (B,)')
            gains = layers.drop_path_gains(key, self.drop_path, self.depth)
        return layers.run_blocks(self.blocks, x, gains=gains, remat=self.remat, unroll=self.unroll, every=every)

    def encode(self, image: jax.Array, *, keep: jax.Array | None = None, key: jax.Array | None = None,
               train: bool = False) -> jax.Array:
        """Residual stream after the last block, before the final norm.

        Args:
          image: (B, H, W, C), normalised.
          keep: (B, K) indices of the patches to look at, in this order; None for all.
          key: (B,) keys, one per example, for drop-path in training.
        Returns:
          (B, prefix + K, width) of the compute dtype.
        """
        return self.run(self.embed(image, keep), key=key, train=train)

    def encode_layers(self, image: jax.Array) -> jax.Array:
        """Residual streams after every block: (depth, B, prefix + N, width)."""
        return self.run(self.embed(image), key=None, train=False, every=True)

    def __call__(self, image: jax.Array, *, keep: jax.Array | None = None, key: jax.Array | None = None,
                 train: bool = False) -> jax.Array:
        """Tokens after the final norm, (B, prefix + K, width) float32; see `encode`."""
        return self.norm(self.encode(image, keep=keep, key=key, train=train))

    def features(self, image: jax.Array, *, key: jax.Array | None = None, train: bool = False) -> dict[str, jax.Array]:
        """{'cls': (B, D), 'patches': (B, N, D)} after the final norm, float32."""
        x = self(image, key=key, train=train)
        return {'cls': x[:, 0], 'patches': x[:, self.prefix:]}

    def pooled(self, image: jax.Array, pool: Literal['cls', 'mean'], *, key: jax.Array | None = None,
               train: bool = False) -> jax.Array:
        """One vector per image (B, D) float32: the class token, or the mean patch token, through the final norm.

        'mean' averages before the norm (MAE's fine-tuning, arXiv:2111.06377, appendix A.1), so the norm's
        parameters then play the part of its `fc_norm`.
        """
        x = self.encode(image, key=key, train=train)
        return self.norm(x[:, 0] if pool == 'cls' else x[:, self.prefix:].mean(1, dtype=jnp.float32))


build = ViT
