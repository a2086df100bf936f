"""Transformer parts shared by encoders and decoders, and patches <-> image."""
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

xavier = nnx.initializers.xavier_uniform()
normal = nnx.initializers.normal(0.02)


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


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of q, k, v (B, T, heads, head width), softmax in float32; by cuDNN's fused kernel where it can be."""
    fused = cudnn_takes(q.dtype, q.shape[-1])
    return jax.nn.dot_product_attention(q, k, v, implementation='cudnn' if fused else 'xla')


def cudnn_takes(dtype: Any, head_width: int) -> bool:
    """Whether cuDNN's attention runs here: a CUDA device since Ampere, 16-bit types, a head width it was made for."""
    device, mesh = jax.local_devices()[0], jax.sharding.get_abstract_mesh().shape
    if device.platform != 'gpu' or 'cuda' not in device.client.platform_version:
        return False
    # It refuses operands split along tokens or head width, which XLA may choose where parameters are split.
    whole = all(size == 1 for axis, size in mesh.items() if axis != 'data')
    return (whole and float(device.compute_capability) >= 8 and dtype in (jnp.bfloat16, jnp.float16)
            and head_width % 8 == 0 and head_width <= 128)


def layer_norm(width: int, dtype: Any, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with epsilon 1e-6; statistics are always float32, `dtype` is that of the result."""
    # The one-pass variance E[x^2] - E[x]^2 cancels on residual streams with a large mean.
    return nnx.LayerNorm(width, epsilon=1e-6, use_fast_variance=False, dtype=dtype, rngs=rngs)


class PatchEmbed(nnx.Module):
    """Projection of patchified images (B, N, patch * patch * C), the same as a convolution with stride `patch`.

    Initialised as in MAE's code: kernel xavier-uniform as a (patch * patch * C, width) matrix, bias uniform
    in +-1 / sqrt(patch * patch * C).
    """

    def __init__(self, channels: int, width: int, patch: int, dtype: Any, *, rngs: nnx.Rngs):
        inputs = patch * patch * channels
        kernel = xavier(rngs.params(), (inputs, width))
        self.kernel = nnx.Param(kernel.reshape(patch, patch, channels, width))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (width,), minval=-1, maxval=1) * inputs ** -0.5)
        self.dtype = dtype

    def __call__(self, patches: jax.Array) -> jax.Array:
        kernel, bias = (x[...].astype(self.dtype) for x in (self.kernel, self.bias))
        return patches.astype(self.dtype) @ kernel.reshape(-1, len(bias)) + bias


class Attention(nnx.Module):
    """Multi-head self-attention with one fused projection whose columns are ordered q, k, v, each head by head."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool, dtype: Any, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(width, 3 * width, use_bias=qkv_bias, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(width, width, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(self, x: jax.Array) -> jax.Array:
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads)
        return self.proj(attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]).reshape(b, n, d))


class MLP(nnx.Module):
    """Linear, exact (erf) GELU, Linear."""

    def __init__(self, width: int, hidden: int, *, dtype: Any, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(width, hidden, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, width, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class LayerScale(nnx.Module):
    """Learned gain per channel of a residual branch (Touvron et al. 2021, arXiv:2103.17239, section 2)."""

    def __init__(self, width: int, value: float):
        self.gamma = nnx.Param(jnp.full((width,), value))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.gamma[...].astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm transformer block (Dosovitskiy et al. 2021, arXiv:2010.11929, equations 2-3)."""

    def __init__(self, width: int, heads: int, hidden: int, *, qkv_bias: bool = True, layer_scale: float | None = None,
                 dtype: Any, rngs: nnx.Rngs):
        self.norm1 = layer_norm(width, dtype, rngs=rngs)
        self.attn = Attention(width, heads, qkv_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, dtype, rngs=rngs)
        self.mlp = MLP(width, hidden, dtype=dtype, rngs=rngs)
        self.ls1 = None if layer_scale is None else LayerScale(width, layer_scale)
        self.ls2 = None if layer_scale is None else LayerScale(width, layer_scale)

    def __call__(self, x: jax.Array, gains: jax.Array | None = None) -> jax.Array:
        """x: (B, T, D). gains: (2, B) factors of the two residual branches, see `drop_path_gains`."""
        attn = self.attn(self.norm1(x))
        if self.ls1 is not None:
            attn = self.ls1(attn)
        x = x + (attn if gains is None else attn * gains[0, :, None, None].astype(attn.dtype))
        mlp = self.mlp(self.norm2(x))
        if self.ls2 is not None:
            mlp = self.ls2(mlp)
        return x + (mlp if gains is None else mlp * gains[1, :, None, None].astype(mlp.dtype))


def stack_blocks(depth: int, width: int, heads: int, hidden: int, *, rngs: nnx.Rngs, **options: Any) -> Block:
    """`depth` blocks as one Block whose parameters carry a leading layer axis; run it with `run_blocks`."""
    make = lambda key: Block(width, heads, hidden, rngs=nnx.Rngs(key), **options)
    return jax.vmap(make)(jax.random.split(rngs.params(), depth))


def run_blocks(blocks: Block, x: jax.Array, *, gains: jax.Array | None = None, remat: bool, unroll: int | bool,
               every: bool = False) -> jax.Array:
    """Runs stacked blocks over the tokens x (B, T, D).

    Args:
      gains: (depth, 2, B) from `drop_path_gains`.
      remat: recompute each block in the backward pass instead of storing its activations.
      unroll: layers per loop iteration; True for no loop.
      every: return the stream after every block, (depth, B, T, D).
    """
    def layer(x, block_and_gains):
        block, gains = block_and_gains
        x = block(x, gains)
        return x, (x if every else None)

    if remat:
        # Inside a loop XLA cannot merge the recomputation with the forward pass; without a loop it would.
        layer = jax.checkpoint(layer, prevent_cse=unroll is True)
    last, streams = jax.lax.scan(layer, x, (blocks, gains), unroll=unroll)
    return streams if every else last


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
