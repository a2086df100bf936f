"""Masked autoencoder (He et al. 2022, arXiv:2111.06377)."""
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax import config, losses, masking, monitors, targets
from ssl_jax.errors import UserError
from ssl_jax.models.decoders import MAEDecoder
from ssl_jax.models.layers import unpatchify
from ssl_jax.models.net import Net
from ssl_jax.step import Batch, Metrics, Tree, example_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class MAE:
    """Predicts the pixels of hidden patches from the visible ones.

    Parameters are {'encoder', 'decoder'}; aux is empty.

    Args:
      encoder: spec of a token model of `ssl_jax/models` ('vit').
      decoder: arguments of `models.decoders.MAEDecoder`.
      mask_ratio: share of hidden patches.
      norm_pix_loss: targets are normalised per patch to mean 0 and variance 1.
      channel_weights: relative weight of each channel in the loss; None for equal.
    Raises:
      UserError: a ratio that leaves nothing visible or nothing hidden, weights that do not fit the channels, and
        whatever encoder and decoder refuse.
    """
    encoder: Mapping[str, Any]
    decoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mask_ratio: float = 0.75
    norm_pix_loss: bool = False
    channel_weights: tuple[float, ...] | None = None
    image_size: tuple[int, int]
    channels: int
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    net: Net = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        w = self.channel_weights
        if w is not None and (len(w) != self.channels or min(w) < 0 or not sum(w)):
            raise UserError(f'config.objective.channel_weights={w}: expected {self.channels} numbers >= 0, '
                            'one per channel, not all 0')
        object.__setattr__(self, 'net', Net(lambda rngs: MAENet(self, rngs=rngs)))

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh ({'encoder', 'decoder'}, {})."""
        return self.net.init(key)[0], {}

    def loss(self, params: Tree, aux: Tree, batch: Batch, *, step: jax.Array,
             key: jax.Array) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        """Loss of {'image' (B, H, W, C), 'position' (B,)}, optionally with 'valid' (B, H, W, 1 or C)."""
        net = self.net.bind(params)
        keys = jax.vmap(jax.random.split)(example_keys(key, batch['position']))
        noise = masking.uniform_noise(keys[:, 0], net.patches)
        out = self.reconstruct(net, batch, noise, key=keys[:, 1], train=True)
        health = monitors.of_features(out['latent'][:, net.encoder.prefix:].mean(1))
        return out['loss'], (aux, {'loss': out['loss']} | health)

    def update_aux(self, params: Tree, aux: Tree, *, step: jax.Array) -> Tree:
        """No aux."""
        return aux

    def predict(self, params: Tree, aux: Tree, batch: Batch) -> Mapping[str, jax.Array]:
        """'cls' and 'patches' of the whole image; 'recon' and 'mask' of one masking, fixed by batch['index'].

        'recon' holds the prediction for every patch, visible ones too, in the units of batch['image']; with
        norm_pix_loss the mean and deviation of the true patch are put back.
        """
        net = self.net.bind(params)
        # A constant key: the same picture is masked alike at every evaluation, whatever its place in a batch.
        noise = masking.uniform_noise(example_keys(jax.random.key(0), batch['index']), net.patches)
        out = self.reconstruct(net, batch, noise)
        recon = out['pred'] * out['std'] + out['mean']
        return net.encoder.features(targets.fill_invalid(batch)) | {
            'recon': unpatchify(recon, net.encoder.grid, net.encoder.patch), 'mask': out['mask'].astype(jnp.float32)}

    def encoder_of(self, params: Tree, aux: Tree) -> nnx.Module:
        """See the protocol."""
        return self.net.bind(params).encoder

    def reconstruct(self, net: 'MAENet', batch: Batch, noise: jax.Array, *, key: jax.Array | None = None,
                    train: bool = False) -> dict[str, jax.Array]:
        """One masked forward pass.

        Args:
          noise: (B, N), see `masking.random_keep`.
          key: (B,) keys for drop-path in training.
        Returns:
          'pred' and 'target' (B, N, P), 'mean' and 'std' by which the target was normalised ((B, N, 1); scalars 0
          and 1 without norm_pix_loss), 'mask' and 'restore' (B, N), 'latent' (B, prefix + K, D), 'loss'.
        """
        keep, restore, mask = masking.random_keep(noise, self.mask_ratio)
        latent = net.encoder(targets.fill_invalid(batch), keep=keep, key=key, train=train)
        pred = net.decoder(latent[:, :1], latent[:, net.encoder.prefix:], restore)
        target, valid = targets.pixel_targets(batch, net.encoder.patch)
        mean, std = jnp.float32(0), jnp.float32(1)
        if self.norm_pix_loss:
            mean, std = targets.patch_statistics(target, valid)
        target = (target - mean) / std
        weights = None
        if self.channel_weights is not None:
            weights = jnp.tile(jnp.asarray(self.channel_weights, jnp.float32), net.encoder.patch ** 2)
        return dict(pred=pred, target=target, mean=mean, std=std, mask=mask, restore=restore, latent=latent,
                    loss=losses.patch_mse(pred, target, mask, valid, weights))


class MAENet(nnx.Module):
    """The encoder and decoder of an MAE."""

    def __init__(self, objective: MAE, *, rngs: nnx.Rngs):
        o = objective
        self.encoder = config.resolve('models', o.encoder, where='objective.encoder', image_size=o.image_size,
                                      channels=o.channels, dtype=o.dtype)(rngs=rngs)
        if not hasattr(self.encoder, 'patch'):
            raise UserError(f"config.objective.encoder.name={o.encoder['name']!r}: expected a model of patches ('vit')")
        self.patches = self.encoder.grid[0] * self.encoder.grid[1]
        if not self.encoder.class_token:
            raise UserError('config.objective.encoder.class_token=False: expected True, the decoder reads it')
        if not 0 < int(self.patches * (1 - o.mask_ratio)) < self.patches:
            raise UserError(f'config.objective.mask_ratio={o.mask_ratio}: expected some of the {self.patches} patches '
                            'visible and some hidden')
        self.decoder = config.bind(MAEDecoder, o.decoder, where='objective.decoder', encoder_width=self.encoder.width,
                                   grid=self.encoder.grid, values=self.encoder.patch ** 2 * o.channels,
                                   dtype=o.dtype)(rngs=rngs)


build = MAE
