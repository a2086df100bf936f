"""Vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929)."""
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax.errors import UserError
from ssl_jax.models import layers, posemb

# S, Ti: DeiT (arXiv:2012.12877, table 1); B, L, H: ViT (arXiv:2010.11929, table 1); g: Zhai et al. (arXiv:2106.04560,
# table 2), MLP width 6144; 4M: the small transformer of SimMIM-Pets, heads wider than width / heads.
SIZES = {
    'Ti': dict(width=192, depth=12, heads=3),
    'S': dict(width=384, depth=12, heads=6),
    'B': dict(width=768, depth=12, heads=12),
    'L': dict(width=1024, depth=24, heads=16),
    'H': dict(width=1280, depth=32, heads=16),
    'g': dict(width=1408, depth=40, heads=16, mlp_ratio=48 / 11),
    '4M': dict(width=128, depth=12, heads=8, head_width=64, qkv_bias=False, patch_norm=True, norm_eps=1e-5,
               pos='learned', init='torch'),
}
USUAL = dict(mlp_ratio=4.0, head_width=None, qkv_bias=True, patch_norm=False, norm_eps=1e-6, pos='sincos', init='mae')


class ViT(nnx.Module):
    """Image (B, H, W, C) -> tokens (B, prefix + N, width): class token, registers, patches row by row.

    Args:
      size: preset of the arguments up to init; each of them, where given, replaces the preset's.
      head_width: of one attention head; None: width / heads.
      mlp: 'swiglu' for a gated one, mlp_ratio * width wide after the gate, as in DINOv2's largest (arXiv:2304.07193).
      qkv_bias: 'qv' for queries and values alone (BEiT, SimMIM).
      patch_norm: LayerNorm before and after the patch embedding.
      pos: 'sincos' is MAE's fixed table; 'sincos_rows' MoCo v3's, with the axes swapped; 'learned' a parameter;
        'relative' a bias of the attention by relative position, shared by all blocks (Liu et al. 2021, BEiT), and no
        other positions; 'relative_each' the same with a table in each block, as SimMIM's fine-tuning has it.
      init: initialisers as in the code of MAE, of DINO and timm, of SimMIM, of MoCo v3, or torch's defaults.
      patch: side of a patch in pixels.
      image_size: (H, W) of the position table. Images of another size get a resized table, and lose the rows and
        columns that fill no patch.
      pos_resize: rule of `posemb.resize`.
      class_token: False for none; the mean patch token then stands for it.
      registers: extra tokens without position (Darcet et al. 2024, arXiv:2309.16588).
      layer_scale: initial gain of the residual branches; None for no LayerScale.
      drop_path: stochastic depth rate of the last block.
      attn_dropout: share of the attention weights dropped in training.
      remat, unroll: see `layers.run_blocks`.
      dtype: of the computation; parameters, softmax, normalisation statistics and the result of the final norm
        are float32.
    Raises:
      UserError: a patch that does not divide the image, a width that heads or sin-cos cannot split, a size not given.
    """

    def __init__(self, *, size: Literal['Ti', 'S', 'B', 'L', 'H', 'g', '4M'] | None = None,
                 width: int | None = None, depth: int | None = None, heads: int | None = None,
                 mlp_ratio: float | None = None, head_width: int | None = None,
                 mlp: Literal['gelu', 'swiglu'] = 'gelu',
                 qkv_bias: bool | Literal['qv'] | None = None, patch_norm: bool | None = None,
                 norm_eps: float | None = None,
                 pos: Literal['sincos', 'sincos_rows', 'learned', 'relative', 'relative_each'] | None = None,
                 init: layers.InitName | None = None, patch: int = 16, image_size: tuple[int, int], channels: int,
                 dtype: Literal['float32', 'bfloat16'] = 'float32', pos_resize: posemb.Rule = 'torch',
                 class_token: bool = True, registers: int = 0, layer_scale: float | None = None,
                 drop_path: float = 0.0, attn_dropout: float = 0.0, remat: bool = False, unroll: int | bool = 1,
                 rngs: nnx.Rngs):
        given = dict(width=width, depth=depth, heads=heads, mlp_ratio=mlp_ratio, head_width=head_width,
                     qkv_bias=qkv_bias, patch_norm=patch_norm, norm_eps=norm_eps, pos=pos, init=init)
        shape = USUAL | SIZES.get(size, {}) | {k: v for k, v in given.items() if v is not None}
        width, depth, heads = (shape.get(k) for k in ('width', 'depth', 'heads'))
        pos, initial = shape['pos'], layers.INITS[shape['init']]
        if not (width and depth and heads):
            raise UserError(f'vit width={width}, depth={depth}, heads={heads}: expected a size '
                            f"({', '.join(SIZES)}) or all three")
        if min(patch, width, depth, heads) < 1 or registers < 0:
            raise UserError(f'vit patch={patch}, width={width}, depth={depth}, heads={heads}, registers={registers}: '
                            'expected positive numbers, and registers >= 0')
        sincos = pos.startswith('sincos')
        if (shape['head_width'] is None and width % heads) or (sincos and width % 4):
            raise UserError(f"vit width={width}: expected a multiple of heads={heads}, and of 4 where pos='sincos'")
        if not 0 <= drop_path < 1 or not 0 <= attn_dropout < 1:
            raise UserError(f'vit drop_path={drop_path}, attn_dropout={attn_dropout}: expected 0 <= rate < 1')
        if pos.startswith('relative') and registers:
            raise UserError(f'vit registers={registers}: expected 0 with pos={pos!r}, which knows none')
        self.patch, self.channels, self.width, self.depth = patch, channels, width, depth
        self.class_token, self.prefix = class_token, class_token + registers
        self.grid = self.grid_of(image_size)
        self.dtype, self.pos, self.pos_resize = dtype, pos, pos_resize
        self.drop_path, self.attn_dropout, self.remat, self.unroll = drop_path, attn_dropout, remat, unroll
        tokens, epsilon = self.grid[0] * self.grid[1], shape['norm_eps']
        self.patch_embed = layers.PatchEmbed(channels, width, patch, dtype, init=initial, rngs=rngs)
        self.patch_norm = shape['patch_norm']
        if self.patch_norm:
            self.patch_norm1 = layers.layer_norm(patch * patch * channels, dtype, epsilon=epsilon, rngs=rngs)
            self.patch_norm2 = layers.layer_norm(width, dtype, epsilon=epsilon, rngs=rngs)
        if class_token:
            self.cls_token = nnx.Param(initial.token(rngs.params(), (1, 1, width)))
        if pos == 'learned':
            self.pos_embed = nnx.Param(initial.position(rngs.params(), (1, class_token + tokens, width)))
        offsets = (2 * self.grid[0] - 1) * (2 * self.grid[1] - 1) + 3
        if pos == 'relative':
            self.rel_pos_table = nnx.Param(jnp.zeros((offsets, heads)))
        if registers:
            self.registers = nnx.Param(initial.token(rngs.params(), (1, registers, width)))
        self.blocks = layers.stack_blocks(depth, width, heads, round(shape['mlp_ratio'] * width),
                                          qkv_bias=shape['qkv_bias'], head_width=shape['head_width'],
                                          gated_mlp=mlp == 'swiglu',
                                          attn_dropout=attn_dropout, layer_scale=layer_scale, norm_eps=epsilon,
                                          offsets=offsets if pos == 'relative_each' else None, init=initial,
                                          dtype=dtype, rngs=rngs)
        self.norm = layers.layer_norm(width, 'float32', epsilon=epsilon, rngs=rngs)

    @property
    def layer_count(self) -> int:
        """How many `layers` the features can be asked for."""
        return self.depth

    def grid_of(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of patches in an image of (H, W), which the patch must divide."""
        h, w = image_size
        if h % self.patch or w % self.patch:
            raise UserError(f'image size {h}x{w} is not divisible by patch={self.patch}')
        return h // self.patch, w // self.patch

    def positions(self, grid: tuple[int, int]) -> tuple[jax.Array | float, jax.Array | float]:
        """What is added to the class token (1, 1, D) or 0, to the patches (1, N, D) or 0, for this grid; float32."""
        if self.pos.startswith('relative'):
            return 0.0, 0.0
        if self.pos == 'learned':
            table = self.pos_embed[0]
            cls, table = (table[None, :1], table[1:]) if self.class_token else (0.0, table)
        else:
            rows_first = self.pos == 'sincos_rows'
            cls = 0.0
            table = jnp.asarray(posemb.sincos_2d(self.width, self.grid, rows_first=rows_first), jnp.float32)
        return cls, posemb.resize(table, self.grid, grid, self.pos_resize)[None]

    def attention_bias(self) -> jax.Array | None:
        """What pos='relative' adds to the attention's products, (heads, T, T) float32; None for absolute positions.

        With 'relative_each' the rows (T, T) of the blocks' tables, see `layers.Attention`.
        """
        if not self.pos.startswith('relative'):
            return None
        index = posemb.relative_index(self.grid)
        index = index if self.class_token else index[1:, 1:]
        return jnp.moveaxis(self.rel_pos_table[...][index], -1, 0) if self.pos == 'relative' else index

    @jax.named_scope('encoder')
    def embed(self, image: jax.Array, keep: jax.Array | None = None, mask: jax.Array | None = None,
              mask_token: jax.Array | None = None) -> jax.Array:
        """The tokens before the first block; see `encode`."""
        if image.shape[-1] != self.channels:
            raise UserError(f'vit got images with {image.shape[-1]} channels: expected channels={self.channels}')
        h, w = grid = image.shape[1] // self.patch, image.shape[2] // self.patch
        if 0 in grid or (self.pos.startswith('relative') and (grid != self.grid or keep is not None)):
            raise UserError(f'vit patch={self.patch}, pos={self.pos!r} got images of {image.shape[1:3]}: expected '
                            + ('at least a patch' if 0 in grid else 'whole images of its own size'))
        x = layers.patchify(image[:, :h * self.patch, :w * self.patch].astype(self.dtype), self.patch)
        cls_pos, pos = self.positions(grid)
        pos = jnp.asarray(pos, self.dtype)
        if keep is not None:
            # Choosing before projecting leaves the hidden patches out of the work.
            x, pos = layers.take_tokens(x, keep), pos[0][keep]
        x = self.patch_embed(self.patch_norm1(x) if self.patch_norm else x)
        x = self.patch_norm2(x) if self.patch_norm else x
        if mask is not None:
            x = jnp.where(mask[..., None], mask_token.astype(self.dtype), x)
        x = x + pos
        if not self.prefix:
            return x
        prefix = [self.cls_token[...] + cls_pos] if self.class_token else []
        prefix += [self.registers[...]] if self.prefix > len(prefix) else []
        prefix = jnp.concatenate(prefix, axis=1).astype(self.dtype)
        return jnp.concatenate([jnp.broadcast_to(prefix, (len(x), *prefix.shape[1:])), x], axis=1)

    @jax.named_scope('encoder')
    def run(self, x: jax.Array, *, key: jax.Array | None, train: bool, every: bool = False,
            collect: tuple[int, ...] = ()) -> jax.Array | tuple[jax.Array, tuple[jax.Array, ...]]:
        """The blocks over the tokens of `embed`; see `layers.run_blocks` for what it returns."""
        gains = keys = None
        if train and (self.drop_path or self.attn_dropout):
            if key is None or key.shape != x.shape[:1]:
                raise ValueError('drop_path and attn_dropout in training need one key per example: key of shape (B,)')
            if self.drop_path:
                gains = layers.drop_path_gains(key, self.drop_path, self.depth)
            if self.attn_dropout:
                fold = jax.vmap(jax.random.fold_in, (0, None))
                keys = jax.vmap(lambda layer: fold(key, layer))(jnp.arange(1, self.depth + 1))
        return layers.run_blocks(self.blocks, x, gains=gains, keys=keys, bias=self.attention_bias(), remat=self.remat,
                                 unroll=self.unroll, every=every, collect=collect)

    def encode(self, image: jax.Array, *, keep: jax.Array | None = None, mask: jax.Array | None = None,
               mask_token: jax.Array | None = None, key: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Residual stream after the last block, before the final norm.

        Args:
          image: (B, H, W, C), normalised.
          keep: (B, K) indices of the patches to look at, in this order; None for all.
          mask: (B, N) bool, patches whose embedding `mask_token` (1, 1, width) replaces, before positions are added.
          key: (B,) keys, one per example, for drop-path and dropout in training.
        Returns:
          (B, prefix + K, width) of the compute dtype.
        """
        return self.run(self.embed(image, keep, mask, mask_token), key=key, train=train)

    def encode_layers(self, image: jax.Array) -> jax.Array:
        """Residual streams after every block: (depth, B, prefix + N, width)."""
        return self.run(self.embed(image), key=None, train=False, every=True)

    def attention(self, image: jax.Array, *, layer: int = -1) -> jax.Array:
        """Softmax weights of the attention in one block: (B, heads, T, T) float32, T = prefix + N, rows of sum 1.

        Row t is what token t takes of all tokens. Earlier blocks are run, later ones are not.

        Args:
          layer: counted from 0, or from the end if negative.
        Raises:
          UserError: there are not so many blocks.
        """
        if not -self.depth <= layer < self.depth:
            raise UserError(f'vit layer={layer}: expected a number from {-self.depth} to {self.depth - 1}')
        layer, x, bias = layer % self.depth, self.embed(image), self.attention_bias()
        before = jax.tree.map(lambda stack: stack[:layer], self.blocks)
        x = layers.run_blocks(before, x, bias=bias, remat=False, unroll=self.unroll)
        return jax.tree.map(lambda stack: stack[layer], self.blocks).attention(x, bias)

    def __call__(self, image: jax.Array, *, keep: jax.Array | None = None, mask: jax.Array | None = None,
                 mask_token: jax.Array | None = None, key: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Tokens after the final norm, (B, prefix + K, width) float32; see `encode`."""
        return self.norm(self.encode(image, keep=keep, mask=mask, mask_token=mask_token, key=key, train=train))

    def features(self, image: jax.Array, *, layers: tuple[int, ...] = (), mask: jax.Array | None = None,
                 mask_token: jax.Array | None = None, key: jax.Array | None = None,
                 train: bool = False) -> dict[str, Any]:
        """{'cls': (B, D), 'patches': (B, N, D)} after the final norm, float32; see `encode`.

        Args:
          layers: blocks, counted from 0; with any, 'layers' are the patch tokens (B, N, D) of the residual stream after
            each of them, without norm, in the compute dtype.
        Raises:
          UserError: there are not so many blocks.
        """
        if any(not 0 <= layer < self.depth for layer in layers):
            raise UserError(f'vit layers={tuple(layers)}: expected numbers from 0 to {self.depth - 1}')
        x = self.embed(image, mask=mask, mask_token=mask_token)
        x = self.run(x, key=key, train=train, collect=tuple(layers))
        x, streams = x if layers else (x, ())
        x = self.norm(x)
        patches = x[:, self.prefix:]
        out = {'cls': x[:, 0] if self.class_token else patches.mean(1), 'patches': patches}
        return out | ({'layers': tuple(s[:, self.prefix:] for s in streams)} if layers else {})

    def pooled(self, image: jax.Array, pool: Literal['cls', 'mean', 'all', 'last4'], *, key: jax.Array | None = None,
               train: bool = False) -> jax.Array:
        """One vector per image (B, D) float32.

        'cls' is the class token and 'all' the mean of all tokens, both after the final norm; 'mean' the mean patch
        token before it, for a norm that comes with the head (MAE's fine-tuning, arXiv:2111.06377, appendix A.1);
        'last4' (B, 4 D) the first tokens after the last four blocks, each through the final norm, one after the other
        (DINO's linear probe, arXiv:2104.14294, appendix F.2), of fewer blocks where there are not so many.
        """
        if pool == 'last4':
            x = self.norm(self.run(self.embed(image), key=key, train=train, every=True)[-4:, :, 0])
            return jnp.moveaxis(x, 0, 1).reshape(len(image), -1)
        if pool == 'mean':
            return self.encode(image, key=key, train=train)[:, self.prefix:].mean(1, dtype=jnp.float32)
        if pool == 'all':
            return self(image, key=key, train=train).mean(1)
        return self.features(image, key=key, train=train)['cls']


build = ViT
