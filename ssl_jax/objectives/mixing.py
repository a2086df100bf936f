"""Images mixed in pairs: mixup and CutMix. No plug-in."""
import jax
import jax.numpy as jnp


def mix(image: jax.Array, key: jax.Array, *, mixup: float, cutmix: float) -> tuple[jax.Array, jax.Array]:
    """Every image mixed with the one at the other end of the batch, row i with row B - 1 - i, all in the same way.

    Mixup (Zhang et al. 2018, arXiv:1710.09412) is the weighted mean of both; CutMix (Yun et al. 2019, arXiv:1905.04899,
    section 3.1) puts a box of the other image into the first, cut off at the edges. Where both are on, each step is one
    or the other with equal chances, as in timm.

    Args:
      image: (B, H, W, C).
      key: of the step.
      mixup, cutmix: alpha of the Beta(alpha, alpha) that the share is drawn from; 0 for never.
    Returns:
      The mixed images, and the share of the first in each, a scalar: the loss is that share of the loss for its label,
      and the rest of that for the other's.
    """
    which, amount, place = jax.random.split(key, 3)
    cut = jax.random.bernoulli(which) if mixup and cutmix else jnp.bool_(cutmix > 0)
    alpha = jnp.where(cut, cutmix, mixup)
    share = jax.random.beta(amount, alpha, alpha)
    inside = jnp.ones(())
    for n, centre in zip(image.shape[1:3], jax.random.uniform(place, (2,))):
        half = jnp.floor(jnp.floor(n * jnp.sqrt(1 - share)) / 2)
        centre = jnp.floor(centre * n)
        pixel = jnp.arange(n)
        inside = inside[..., None] * ((pixel >= centre - half) & (pixel < centre + half))
    share = jnp.where(cut, 1 - inside.mean(), share)
    weight = jnp.where(cut, 1 - inside, share)[..., None].astype(image.dtype)
    return weight * image + (1 - weight) * image[::-1], share
