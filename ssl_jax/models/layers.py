"""Transformer parts shared by encoders and decoders, and patches <-> image."""
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax.partition import by_example, dot_general

xavier = nnx.initializers.xavier_uniform()
normal = nnx.initializers.normal(0.02)
zeros = nnx.initializers.zeros


def uniform(bound: float) -> Callable:
    """An initialiser, uniform in +-bound."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def by_inputs(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """torch's default for a kernel (rows, columns): uniform in +-1 / sqrt(rows)."""
    return uniform(shape[0] ** -0.5)(key, shape, dtype)


def xavier_thirds(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """Xavier-uniform of queries, keys and values each by itself: (rows, 3 * columns)."""
    return uniform(math.sqrt(6 / (shape[0] + shape[1] // 3)))(key, shape, dtype)


def cut_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Normal of deviation 0.02, cut at +-0.02."""
    return 0.02 * jax.random.truncated_normal(key, -1, 1, shape, dtype)


class Init(NamedTuple):
    """Initialisers of a transformer. Kernels are (rows, columns); biases are 0 unless `biased`, then as torch's."""
    kernel: Callable          # of linear layers
    qkv: Callable             # of the fused projection (width, 3 * inner)
    patch: Callable           # of the patch embedding (values, width)
    token: Callable = normal  # class token, registers
    position: Callable = normal
    patch_biased: bool = False
    biased: bool = False
    shrink: bool = False      # kernels that end a residual branch of layer i (from 1) divided by sqrt(2 i)


# The cut of DINO's and timm's truncated normal, +-2 for a deviation of 0.02, is never reached.
INITS = {
    'mae': Init(xavier, xavier, xavier, patch_biased=True),
    'trunc_normal': Init(normal, normal, by_inputs, patch_biased=True),
    'simmim': Init(cut_normal, cut_normal, cut_normal, token=cut_normal, position=cut_normal, shrink=True),
    'mocov3': Init(xavier, xavier_thirds, xavier, token=nnx.initializers.normal(1e-6)),
    'torch': Init(by_inputs, by_inputs, by_inputs, token=nnx.initializers.normal(1.0),
                  position=nnx.initializers.normal(1.0), patch_biased=True, biased=True),
}
InitName = Literal['mae', 'trunc_normal', 'simmim', 'mocov3', 'torch']


def patchify(image: jax.Array, patch: int) -> jax.Array:
    """(B, H, W, C) -> (B, N, patch * patch * C): patches row by row, inside a patch row, column, channel (fastest)."""
    b, h, w, c = image.shape
    x = image.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def unpatchify(patches: jax.Array, grid: tuple[int, int], patch: int) -> jax.Array:
    """The inverse of `patchify` for a grid of (rows, columns)."""
    b, h, w = len(patches), *grid
    x = patches.reshape(b, h, w, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, -1)


def take_tokens(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `ids` (B, K) of each example's tokens (B, N, D)."""
    return jnp.take_along_axis(x, ids[..., None], axis=1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Attention of q, k, v (B, T, heads, head width), softmax in float32; by cuDNN's fused kernel where it can be.

    Args:
      bias: (heads, T, T), added to the scaled products.
    """
    fused = bias is None and cudnn_takes(q.dtype, q.shape[-1])
    bias = bias if bias is None else bias[None].astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, bias, implementation='cudnn' if fused else 'xla')


def attention_with_dropout(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, rate: float,
                           keys: jax.Array) -> jax.Array:
    """As `attention`, with a share `rate` of the weights after the softmax set to 0 and the others scaled up.

    Args:
      keys: (B,), one per example.
    """
    weights = attention_weights(q, k, bias)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, weights.shape[1:]))(keys)
    weights = jnp.where(kept, weights / (1 - rate), 0)
    return jnp.einsum('bhqk,bkhd->bqhd', weights.astype(v.dtype), v)


def attention_weights(q: jax.Array, k: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """What every query (third axis) takes of every key: (B, heads, T, T) float32, rows of sum 1. See `attention`."""
    products = jnp.einsum('bqhd,bkhd->bhqk', q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jax.nn.softmax(products if bias is None else products + bias)


def cudnn_takes(dtype: Any, head_width: int) -> bool:
    """Whether cuDNN's attention runs here: a CUDA device since Ampere, 16-bit types, a head width it was made for."""
    device, mesh = jax.local_devices()[0], jax.sharding.get_abstract_mesh().shape
    if device.platform != 'gpu' or 'cuda' not in device.client.platform_version:
        return False
    # It refuses operands split along tokens or head width, which XLA may choose where parameters are split.
    whole = all(size == 1 for axis, size in mesh.items() if axis != 'data')
    return (whole and float(device.compute_capability) >= 8 and dtype in (jnp.bfloat16, jnp.float16)
            and head_width % 8 == 0 and head_width <= 128)


def layer_norm(width: int, dtype: Any, *, epsilon: float = 1e-6, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm; statistics are always float32, `dtype` is that of the result."""
    # The one-pass variance E[x^2] - E[x]^2 cancels on residual streams with a large mean.
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)


class PatchEmbed(nnx.Module):
    """Projection of patchified images (B, N, patch * patch * C), the same as a convolution with stride `patch`."""

    def __init__(self, channels: int, width: int, patch: int, dtype: Any, *, init: Init = INITS['mae'],
                 rngs: nnx.Rngs):
        inputs = patch * patch * channels
        kernel = init.patch(rngs.params(), (inputs, width))
        self.kernel = nnx.Param(kernel.reshape(patch, patch, channels, width))
        bias = uniform(inputs ** -0.5) if init.patch_biased else zeros
        self.bias = nnx.Param(bias(rngs.params(), (width,)))
        self.dtype = dtype

    def __call__(self, patches: jax.Array) -> jax.Array:
        kernel, bias = (x[...].astype(self.dtype) for x in (self.kernel, self.bias))
        patches = by_example(patches.astype(self.dtype))
        return by_example(patches @ kernel.reshape(-1, len(bias))) + bias


def linear(rows: int, columns: int, kernel: Callable, init: Init, *, bias: bool = True, dtype: Any,
           rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer that starts as `init` says, its kernel by `kernel`."""
    return nnx.Linear(rows, columns, use_bias=bias, kernel_init=kernel, dtype=dtype, rngs=rngs,
                      dot_general=dot_general, bias_init=uniform(rows ** -0.5) if init.biased else zeros)


class Attention(nnx.Module):
    """Multi-head self-attention with one fused projection whose columns are ordered q, k, v, each head by head.

    Args:
      qkv_bias: 'qv' for one of queries and values alone: softmax does not see that of the keys.
      head_width: of one head; None: width / heads.
      dropout: of the attention weights.
      offsets: rows of a table of its own, a bias by relative position; None for none.
    """

    def __init__(self, width: int, heads: int, *, qkv_bias: bool | Literal['qv'], head_width: int | None = None,
                 dropout: float = 0.0, offsets: int | None = None, init: Init = INITS['mae'], dtype: Any,
                 rngs: nnx.Rngs):
        inner = width if head_width is None else heads * head_width
        self.qkv = linear(width, 3 * inner, init.qkv, init, bias=qkv_bias is True, dtype=dtype, rngs=rngs)
        self.proj = linear(inner, width, init.kernel, init, dtype=dtype, rngs=rngs)
        if qkv_bias == 'qv':
            self.q_bias, self.v_bias = nnx.Param(jnp.zeros(inner)), nnx.Param(jnp.zeros(inner))
        self.rel_pos_table = None if offsets is None else nnx.Param(jnp.zeros((offsets, heads)))
        self.heads, self.split_bias, self.dropout = heads, qkv_bias == 'qv', dropout

    @jax.named_scope('attention')
    def __call__(self, x: jax.Array, bias: jax.Array | None = None, keys: jax.Array | None = None) -> jax.Array:
        """x: (B, T, D). bias: see `attention`, or rows (T, T) of its own table. keys: (B,), else nothing is dropped."""
        q, k, v, bias = self.parts(x, bias)
        if self.dropout and keys is not None:
            out = attention_with_dropout(q, k, v, bias, self.dropout, keys)
        else:
            out = attention(q, k, v, bias)
        return self.proj(out.reshape(*x.shape[:2], -1))

    def parts(self, x: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Queries, keys and values (B, T, heads, head width), and the bias (heads, T, T) or None."""
        b, n, _ = x.shape
        if self.rel_pos_table is not None:
            bias = jnp.moveaxis(self.rel_pos_table[...][bias], -1, 0)
        qkv = self.qkv(x)
        if self.split_bias:
            q, v = self.q_bias[...], self.v_bias[...]
            qkv += jnp.concatenate([q, jnp.zeros_like(q), v]).astype(qkv.dtype)
        return *jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, -1), 2, 0), bias


class MLP(nnx.Module):
    """Linear, exact (erf) GELU, Linear.

    Args:
      gated: SwiGLU instead (Shazeer 2020, arXiv:2002.05202, equation 6, with biases): the first layer puts out twice as
        much, and the SiLU of one half is multiplied with the other.
    """

    def __init__(self, width: int, hidden: int, *, gated: bool = False, init: Init = INITS['mae'], dtype: Any,
                 rngs: nnx.Rngs):
        self.gated = gated
        self.fc1 = linear(width, hidden * (1 + gated), init.kernel, init, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, width, init.kernel, init, dtype=dtype, rngs=rngs)

    @jax.named_scope('mlp')
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.fc1(x)
        if self.gated:
            gate, x = jnp.split(x, 2, axis=-1)
            return self.fc2(jax.nn.silu(gate) * x)
        return self.fc2(jax.nn.gelu(x, approximate=False))


class LayerScale(nnx.Module):
    """Learned gain per channel of a residual branch (Touvron et al. 2021, arXiv:2103.17239, section 2)."""

    def __init__(self, width: int, value: float):
        self.gamma = nnx.Param(jnp.full((width,), value, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma[...].astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm transformer block (Dosovitskiy et al. 2021, arXiv:2010.11929, equations 2-3)."""

    def __init__(self, width: int, heads: int, hidden: int, *, qkv_bias: bool | Literal['qv'] = True,
                 head_width: int | None = None, attn_dropout: float = 0.0, offsets: int | None = None,
                 gated_mlp: bool = False, layer_scale: float | None = None, norm_eps: float = 1e-6,
                 init: Init = INITS['mae'], dtype: Any, rngs: nnx.Rngs):
        self.norm1 = layer_norm(width, dtype, epsilon=norm_eps, rngs=rngs)
        self.attn = Attention(width, heads, qkv_bias=qkv_bias, head_width=head_width, dropout=attn_dropout,
                              offsets=offsets, init=init, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, dtype, epsilon=norm_eps, rngs=rngs)
        self.mlp = MLP(width, hidden, gated=gated_mlp, init=init, dtype=dtype, rngs=rngs)
        self.ls1 = None if layer_scale is None else LayerScale(width, layer_scale)
        self.ls2 = None if layer_scale is None else LayerScale(width, layer_scale)

    def __call__(self, x: jax.Array, gains: jax.Array | None = None, keys: jax.Array | None = None,
                 bias: jax.Array | None = None) -> jax.Array:
        """x: (B, T, D). gains: (2, B) factors of the residual branches, see `drop_path_gains`. Else as Attention."""
        attn = self.attn(self.norm1(x), bias, keys)
        if self.ls1 is not None:
            attn = self.ls1(attn)
        x = x + (attn if gains is None else attn * gains[0, :, None, None].astype(attn.dtype))
        mlp = self.mlp(self.norm2(x))
        if self.ls2 is not None:
            mlp = self.ls2(mlp)
        return x + (mlp if gains is None else mlp * gains[1, :, None, None].astype(mlp.dtype))


    def attention(self, x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """The weights with which each token of x (B, T, D) looks at the others: (B, heads, T, T) float32."""
        q, k, _, bias = self.attn.parts(self.norm1(x), bias)
        return attention_weights(q, k, bias)


def stack_blocks(depth: int, width: int, heads: int, hidden: int, *, init: Init = INITS['mae'], rngs: nnx.Rngs,
                 **options: Any) -> Block:
    """`depth` blocks as one Block whose parameters carry a leading layer axis; run it with `run_blocks`."""
    make = lambda key: Block(width, heads, hidden, init=init, rngs=nnx.Rngs(key), **options)
    blocks = jax.vmap(make)(jax.random.split(rngs.params(), depth))
    if init.shrink:
        factor = (2 * jnp.arange(1, depth + 1)[:, None, None]) ** -0.5
        for last in (blocks.attn.proj, blocks.mlp.fc2):
            last.kernel[...] = last.kernel[...] * factor
    return blocks


def run_blocks(blocks: Block, x: jax.Array, *, gains: jax.Array | None = None, keys: jax.Array | None = None,
               bias: jax.Array | None = None, remat: bool, unroll: int | bool, every: bool = False,
               collect: tuple[int, ...] = ()) -> jax.Array | tuple[jax.Array, tuple[jax.Array, ...]]:
    """Runs stacked blocks over the tokens x (B, T, D).

    Args:
      gains: (depth, 2, B) from `drop_path_gains`.
      keys: (depth, B) for dropout in the attention.
      bias: the same for every layer; see `Attention`.
      remat: recompute each block in the backward pass instead of storing its activations.
      unroll: layers per loop iteration; True for no loop.
      every: return the stream after every block, (depth, B, T, D).
      collect: blocks, counted from 0: return (last stream, the streams after these blocks). Only these are kept.
    """
    def layer(x, block_and_noise):
        block, gains, keys = block_and_noise
        x = block(by_example(x), gains, keys, bias)
        return x, (x if every else None)

    if remat:
        # Inside a loop XLA cannot merge the recomputation with the forward pass; without a loop it would.
        layer = jax.checkpoint(layer, prevent_cse=unroll is True)
    if collect:
        return _collected(layer, x, (blocks, gains, keys), collect, unroll)
    last, streams = jax.lax.scan(layer, x, (blocks, gains, keys), unroll=unroll)
    return streams if every else last


def _collected(layer: Callable, x: jax.Array, stacks: Any, collect: tuple[int, ...],
               unroll: int | bool) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    depth, kept = len(jax.tree.leaves(stacks)[0]), sorted(set(collect))
    # One loop, so one compiled block: streams that nobody asked for go to a last place that is thrown away.
    places = jnp.asarray([kept.index(i) if i in kept else len(kept) for i in range(depth)])

    def step(carry, stack_and_place):
        x, streams = carry
        stack, place = stack_and_place
        x, _ = layer(x, stack)
        return (x, jax.lax.dynamic_update_index_in_dim(streams, x, place, 0)), None

    streams = jnp.zeros((len(kept) + 1, *x.shape), x.dtype)
    (last, streams), _ = jax.lax.scan(step, (x, streams), (stacks, places), unroll=unroll)
    return last, tuple(streams[kept.index(i)] for i in collect)


def drop_path_gains(keys: jax.Array, rate: float, depth: int) -> jax.Array:
    """Stochastic depth per example and branch, its rate rising linearly from 0 to `rate` at the last block.

    A branch is dropped (0) or scaled by 1 / (1 - rate of its block), so that its expectation stays
    (Huang et al. 2016, arXiv:1603.09382, with the linear decay rule of section 3).

    Args:
      keys: (B,), one per example.
    Returns:
      (depth, 2, B) float32.
    """
    keep = 1 - jnp.linspace(0, rate, depth)[:, None, None]
    noise = jax.vmap(lambda key: jax.random.uniform(key, (depth, 2)), out_axes=2)(keys)
    return (noise < keep) / keep
