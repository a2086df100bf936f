"""iBOT: masked image modelling with an online tokenizer (Zhou et al. 2022, arXiv:2111.07832)."""
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ssl_jax import config, losses, masking
from ssl_jax.errors import UserError
from ssl_jax.models.layers import take_tokens
from ssl_jax.models.prototypes import IBOTHead
from ssl_jax.objectives.dino import DINO, DINONet, check_crops, crops_of, encode
from ssl_jax.step import Batch, Metrics, Tree, example_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class IBOT(DINO):
    """DINO, and the student also predicts what the teacher says of the patches that its global crops hide from it.

    Beside DINO's, parameters have 'mask_token' and aux has 'patch_center'. The encoder must be a ViT. The head sees
    as many patches of an image as the largest ratio hides, or all of them where it has BatchNorm, whose statistics
    must not depend on the masks.

    Args:
      head: arguments of `models.prototypes.IBOTHead`.
      teacher_patch_temp, warmup_teacher_patch_temp: for patches; the warm-up takes `teacher_temp_warmup` too.
      patch_center_momentum: of the centre of the teacher's patch logits, hidden or not.
      class_weight, patch_weight: of the two losses.
      mask: rectangles or single patches; see `masking.block_mask`, `masking.random_mask`.
      mask_ratio, mask_spread: each global crop draws one of the ratios, give or take its spread; 0 hides nothing.
      others: see `DINO`.
    """
    teacher_temp: float = 0.07
    teacher_temp_warmup: config.Duration = '30ep'
    teacher_patch_temp: float = 0.07
    warmup_teacher_patch_temp: float = 0.04
    patch_center_momentum: float = 0.9
    class_weight: float = 1.0
    patch_weight: float = 1.0
    mask: Literal['block', 'random'] = 'block'
    mask_ratio: tuple[float, ...] = (0.0, 0.3)
    mask_spread: tuple[float, ...] = (0.0, 0.2)

    head_class = IBOTHead

    def __post_init__(self):
        ratios, spreads = self.mask_ratio, self.mask_spread
        if (not ratios or len(ratios) != len(spreads) or not max(ratios) or min(spreads) < 0
                or not all(0 <= r - s <= r + s <= 1 for r, s in zip(ratios, spreads))):
            raise UserError(f'config.objective.mask_ratio={ratios}, mask_spread={spreads}: expected as many of the one '
                            'as of the other, with 0 <= ratio - spread, ratio + spread <= 1 and some ratio > 0')
        for key in ('class_weight', 'patch_weight'):
            if not getattr(self, key) >= 0:
                raise UserError(f'config.objective.{key}={getattr(self, key)!r}: expected a number >= 0')
        super().__post_init__()

    def network(self, encoder: Mapping[str, Any], *, rngs: nnx.Rngs) -> 'IBOTNet':
        """The student."""
        return IBOTNet(self, encoder, rngs=rngs)

    def centers(self, params: Tree) -> dict[str, jax.Array]:
        """The centres at the start."""
        if self.centering != 'mean':
            return {}
        head = params['head']
        patch = head.get('last_layer2', head['last_layer'])
        return super().centers(params) | {'patch_center': jnp.zeros(patch['v'].shape[1])}

    def loss(self, params: Tree, aux: Tree, batch: Batch, *, step: jax.Array,
             key: jax.Array) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        """Loss of {'global' (G, B, H, W, C), 'position' (B,)}, optionally with 'local' (L, B, h, w, C).

        Raises:
          UserError: the view makes no crops, or a single one.
        """
        check_crops(batch)
        keys = jax.vmap(jax.random.split)(example_keys(key, batch['position']))
        mask = self.masks(keys[:, 0], len(batch['global']), self.net.bind(params, aux.get('stats')).encoder.grid)
        return self.distil(params, aux, batch, mask, keys=keys[:, 1], step=step)

    def masks(self, keys: jax.Array, views: int, grid: tuple[int, int]) -> jax.Array:
        """(B, V, N) bool from one key per image; every view draws its own ratio and mask."""
        n = grid[0] * grid[1]

        def of_view(view):
            pair = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, view)))(keys)
            share = masking.hidden_share(pair[:, 0], n, self.mask_ratio, self.mask_spread)
            if self.mask == 'block':
                return masking.block_mask(pair[:, 1], share, grid)
            return masking.random_mask(pair[:, 1], share, n)

        return jax.vmap(of_view, out_axes=1)(jnp.arange(views))

    def distil(self, params: Tree, aux: Tree, batch: Batch, mask: jax.Array, *, keys: jax.Array | None = None,
               step: jax.Array) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        """`loss` with given masks.

        Args:
          mask: (B, G, N) bool, True = hidden from the student; no crop hides more than the ratios allow.
          keys: (B,) for drop-path.
        """
        student, teacher = self.bind(params, aux)
        hidden = encode(student.encoder, batch['global'], keys=keys, mask=mask, mask_token=student.mask_token[...])
        local = [encode(student.encoder, crops, keys=keys, first=first)['cls'] for crops, first in crops_of(batch)[1:]]
        features = jnp.concatenate([hidden['cls'], *local], axis=1)
        seen = encode(teacher.encoder, batch['global'])

        most = masking.most_hidden(mask.shape[-1], self.mask_ratio, self.mask_spread)
        ids = jnp.argsort(~mask, axis=-1)[..., :most]       # the hidden ones, then some that do not count
        weights = jnp.take_along_axis(mask, ids, axis=-1)
        z, z_patches = project(student.head, features, hidden['patches'], ids)
        logits, patch_logits = student.head.last_layer(z), student.head.patch_logits(z_patches)
        z, z_patches = project(teacher.head, seen['cls'], seen['patches'])
        probabilities, aux = self.assign(teacher.head.last_layer(z), aux, step)
        targets, aux = self.assign_patches(teacher.head, z_patches, ids, weights, aux, step)

        class_loss = self.class_weight * losses.distillation(logits, probabilities, temperature=self.student_temp)
        patch_loss = self.patch_weight * losses.distillation(patch_logits, targets, temperature=self.student_temp,
                                                             weights=weights.astype(jnp.float32))
        loss = class_loss + patch_loss
        metrics = {'loss': loss, 'class_loss': class_loss, 'patch_loss': patch_loss, **self.plan(step),
                   **self.health(aux, features, probabilities)}
        return loss, (self.with_stats(aux, student, teacher), metrics)

    def assign_patches(self, head: IBOTHead, z: jax.Array, ids: jax.Array, weights: jax.Array, aux: Tree,
                       step: jax.Array) -> tuple[jax.Array, Tree]:
        """The teacher's probabilities of the patches `ids`, (B, G, M, K), and aux with the patch centre moved."""
        temperature = self.temperature(self.warmup_teacher_patch_temp, self.teacher_patch_temp)(step)
        logits = head.patch_logits(choose(z, ids))
        if self.centering == 'sinkhorn':
            return losses.sinkhorn(logits, temperature, where=weights), aux
        probabilities = losses.centred(logits, aux['patch_center'], temperature)
        # Logits are linear in z: the mean over all patches without the logits of all patches.
        mean = head.patch_logits(z.mean((0, 1, 2)))
        m = self.patch_center_momentum
        return probabilities, aux | {'patch_center': m * aux['patch_center'] + (1 - m) * mean}


class IBOTNet(DINONet):
    """An encoder, its head and the token in place of a hidden patch."""

    def __init__(self, objective: IBOT, encoder: Mapping[str, Any], *, rngs: nnx.Rngs):
        super().__init__(objective, encoder, rngs=rngs)
        if not hasattr(self.encoder, 'patch'):
            raise UserError(f"config.objective.encoder.name={encoder['name']!r}: expected 'vit', whose patches can be "
                            'hidden')
        n = self.encoder.grid[0] * self.encoder.grid[1]
        if not masking.most_hidden(n, objective.mask_ratio, objective.mask_spread):
            raise UserError(f'config.objective.mask_ratio={objective.mask_ratio}: hides none of {n} patches, expected '
                            'one or more')
        self.mask_token = nnx.Param(jnp.zeros((1, 1, self.encoder.width)))


def project(head: IBOTHead, cls: jax.Array, patches: jax.Array,
            ids: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The head's bottleneck of class tokens (B, V, D) and patch tokens (B, G, N, D), all in one pass.

    Args:
      ids: (B, G, M), the patches that matter; None for all.
    Returns:
      (B, V, Z) and (B, G, M, Z).
    """
    b, v = cls.shape[:2]
    early = ids is not None and not head.batch_norm
    patches = choose(patches, ids) if early else patches
    tokens = jnp.concatenate([cls, patches.reshape(b, -1, patches.shape[-1])], axis=1)
    z = head.project(tokens, train=True)
    z_patches = z[:, v:].reshape(*patches.shape[:-1], z.shape[-1])
    return z[:, :v], z_patches if early or ids is None else choose(z_patches, ids)


def choose(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Tokens `ids` (B, G, M) of x (B, G, N, D)."""
    return jax.vmap(take_tokens)(x, ids)


build = IBOT
