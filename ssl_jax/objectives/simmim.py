"""SimMIM (Xie et al. 2022, arXiv:2111.09886)."""
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax import config, losses, masking, monitors, targets
from ssl_jax.errors import UserError
from ssl_jax.models.heads import torch_linear
from ssl_jax.models.layers import cut_normal, unpatchify
from ssl_jax.models.net import Net
from ssl_jax.step import Batch, Metrics, Tree, example_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimMIM:
    """Regresses the pixels of hidden patches, which the encoder sees as a mask token, by one linear layer.

    Parameters are {'encoder', 'decoder', 'mask_token'}; aux is empty.

    Args:
      encoder: spec of a token model of `ssl_jax/models` ('vit').
      mask_unit: side in pixels of the squares that are hidden as a whole, a multiple of the encoder's patch.
      mask_ratio: share of hidden units.
      mask_rounding: of their number.
      divide_by_hidden: divides the mean error once more, by the number of hidden patches of an image, as SimMIM-Pets
        (github.com/itshuey/masked-image-modelling) does.
    Raises:
      UserError: a unit that is no multiple of the patch or does not divide the image, a ratio that hides nothing or
        everything, and whatever the encoder refuses.
    """
    encoder: Mapping[str, Any]
    mask_unit: int = 32
    mask_ratio: float = 0.6
    mask_rounding: Literal['up', 'down'] = 'up'
    divide_by_hidden: bool = False
    image_size: tuple[int, int]
    channels: int
    dtype: Literal['float32', 'bfloat16'] = 'float32'
    net: Net = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, 'net', Net(lambda rngs: SimMIMNet(self, rngs=rngs)))

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Fresh ({'encoder', 'decoder', 'mask_token'}, {})."""
        return self.net.init(key)[0], {}

    def loss(self, params: Tree, aux: Tree, batch: Batch, *, step: jax.Array,
             key: jax.Array) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        """Loss of {'image' (B, H, W, C), 'position' (B,)}, optionally with 'valid' (B, H, W, 1 or C)."""
        net = self.net.bind(params)
        keys = jax.vmap(jax.random.split)(example_keys(key, batch['position']))
        out = self.reconstruct(net, batch, self.draw(net, keys[:, 0]), key=keys[:, 1], train=True)
        return out['loss'], (aux, {'loss': out['loss']} | monitors.of_features(out['latent'].mean(1)))

    def update_aux(self, params: Tree, aux: Tree, *, step: jax.Array) -> Tree:
        """No aux."""
        return aux

    def predict(self, params: Tree, aux: Tree, batch: Batch) -> Mapping[str, jax.Array]:
        """'cls' and 'patches' of the whole image; 'recon' and 'mask' of one masking, fixed by batch['index'].

        'recon' holds the prediction for every patch, visible ones too, in the units of batch['image'].
        """
        net = self.net.bind(params)
        # A constant key: the same picture is masked alike at every evaluation, whatever its place in a batch.
        mask = self.draw(net, example_keys(jax.random.key(0), batch['index']))
        out = self.reconstruct(net, batch, mask)
        return net.encoder.features(targets.fill_invalid(batch)) | {
            'recon': unpatchify(out['pred'], net.encoder.grid, net.encoder.patch), 'mask': mask.astype(jnp.float32)}

    def encoder_of(self, params: Tree, aux: Tree) -> nnx.Module:
        """See the protocol."""
        return self.net.bind(params).encoder

    def draw(self, net: 'SimMIMNet', keys: jax.Array) -> jax.Array:
        """(B, N) bool, True = hidden, from one key per example."""
        noise = masking.uniform_noise(keys, math.prod(net.units))
        return masking.unit_mask(noise, net.hidden, net.units, self.mask_unit // net.encoder.patch)

    def reconstruct(self, net: 'SimMIMNet', batch: Batch, mask: jax.Array, *, key: jax.Array | None = None,
                    train: bool = False) -> dict[str, jax.Array]:
        """One masked forward pass.

        Args:
          mask: (B, N) bool, True = hidden.
          key: (B,) keys for drop-path in training.
        Returns:
          'latent' (B, N, D), 'pred' and 'target' (B, N, P), 'loss'.
        """
        encoder = net.encoder
        image = targets.fill_invalid(batch)
        tokens = encoder(image, mask=mask, mask_token=net.mask_token[...], key=key, train=train)
        latent = tokens[:, encoder.prefix:]
        pred = net.decoder(latent).astype(jnp.float32)
        target, valid = targets.pixel_targets(batch, encoder.patch)
        loss = losses.patch_l1(pred, target, mask, valid)
        if self.divide_by_hidden:
            loss = loss / (net.hidden * (self.mask_unit // encoder.patch) ** 2)
        return dict(latent=latent, pred=pred, target=target, loss=loss)


class SimMIMNet(nnx.Module):
    """Encoder, mask token and linear decoder.

    `units` is the grid of mask units, `hidden` how many of them are hidden.
    """

    def __init__(self, objective: SimMIM, *, rngs: nnx.Rngs):
        o, (h, w) = objective, objective.image_size
        self.encoder = config.resolve('models', o.encoder, where='objective.encoder', image_size=o.image_size,
                                      channels=o.channels, dtype=o.dtype)(rngs=rngs)
        if not hasattr(self.encoder, 'patch'):
            raise UserError(f"config.objective.encoder.name={o.encoder['name']!r}: expected a model of patches ('vit')")
        patch = self.encoder.patch
        if o.mask_unit < 1 or o.mask_unit % patch or h % o.mask_unit or w % o.mask_unit:
            raise UserError(f'config.objective.mask_unit={o.mask_unit}: expected a multiple of patch={patch} that '
                            f'divides the image of {h}x{w}')
        self.units = h // o.mask_unit, w // o.mask_unit
        units = math.prod(self.units)
        self.hidden = (math.ceil if o.mask_rounding == 'up' else math.floor)(units * o.mask_ratio)
        if not 0 < self.hidden < units:
            raise UserError(f'config.objective.mask_ratio={o.mask_ratio}: expected some of the {units} units of '
                            f'mask_unit={o.mask_unit} visible and some hidden')
        self.decoder = torch_linear(self.encoder.width, patch ** 2 * o.channels, dtype=o.dtype, rngs=rngs)
        self.mask_token = nnx.Param(cut_normal(rngs.params(), (1, 1, self.encoder.width)))


build = SimMIM
