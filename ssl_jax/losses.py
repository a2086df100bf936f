"""Losses as pure functions of arrays, computed in float32."""
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def patch_mse(pred: jax.Array, target: jax.Array, mask: jax.Array, valid: jax.Array | None = None,
              weights: jax.Array | None = None) -> jax.Array:
    """Mean squared error over the valid values of the chosen patches (He et al. 2022, arXiv:2111.06377, section 3).

    A value outside mask or valid adds exactly 0 to the loss and to its gradient, also where it is not finite.

    Args:
      pred, target: (B, N, P).
      mask: (B, N) bool, the patches that count.
      valid: (B, N, P) bool, the values that count; None for all.
      weights: (P,) relative weight of each value of a patch; None for equal.
    Returns:
      Scalar; 0 where nothing counts.
    """
    return _patch_mean(jnp.square, pred, target, mask, valid, weights)


def patch_l1(pred: jax.Array, target: jax.Array, mask: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """Mean absolute error (Xie et al. 2022, arXiv:2111.09886, section 3.4), in all else as `patch_mse`."""
    return _patch_mean(jnp.abs, pred, target, mask, valid, None)


def _patch_mean(distance: Callable, pred: jax.Array, target: jax.Array, mask: jax.Array, valid: jax.Array | None,
                weights: jax.Array | None) -> jax.Array:
    use = jnp.broadcast_to(mask[..., None], target.shape) if valid is None else mask[..., None] & valid
    # Selecting first keeps a NaN out of the gradient too: the derivative of the distance is taken at 0, where it is 0.
    error = distance(jnp.where(use, pred.astype(jnp.float32) - target.astype(jnp.float32), 0))
    weight = use.astype(jnp.float32)
    if weights is not None:
        error, weight = error * weights, weight * weights
    total = weight.sum()
    return error.sum() / jnp.where(total > 0, total, 1)


def cross_entropy(logits: jax.Array, target: jax.Array, *, smoothing: float = 0.0) -> jax.Array:
    """Cross entropy of each example.

    Args:
      logits: (..., K).
      target: (...) class index, or (..., K) probabilities.
      smoothing: share of the target that is spread evenly over all classes (Szegedy et al. 2016, arXiv:1512.00567,
        section 7).
    Returns:
      (...) float32.
    """
    classes = logits.shape[-1]
    if target.ndim < logits.ndim and not smoothing:
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
    if target.ndim < logits.ndim:
        target = jax.nn.one_hot(target, classes)
    target = (1 - smoothing) * target + smoothing / classes
    return -(target * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1)


def focal(logits: jax.Array, target: jax.Array, *, gamma: float = 2.0) -> jax.Array:
    """-(1 - p)^gamma log p of each example, p the probability of its class (Lin et al. 2017, arXiv:1708.02002, eq. 4).

    The modulating factor is a constant in the gradient, unlike in the paper and as in Hephaestus Minicubes'
    benchmark.

    Args:
      logits: (..., K).
      target: (...) class index.
    Returns:
      (...) float32.
    """
    error = cross_entropy(logits, target)
    return jax.lax.stop_gradient(1 - jnp.exp(-error)) ** gamma * error


def dice(logits: jax.Array, target: jax.Array, *, where: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """1 - 2 |P T| / (|P| + |T|), P the probabilities of a class and T its pixels, averaged over the classes.

    Milletari et al. 2016 (arXiv:1606.04797, section 3), with plain sums in the denominator, for several classes. The
    sums are over the whole batch, so that an image without a rare class doesn't count as missing it.

    Args:
      logits: (..., K).
      target: (...) class index.
      where: (...) bool, the pixels that count.
      weights: (K,) factor on each class's term; the mean divides by the number of classes, whatever their weights.
    Returns:
      Scalar float32: the mean over the classes that occur in the target; 0 where none does.
    """
    pixels = tuple(range(target.ndim))
    truth = jax.nn.one_hot(target, logits.shape[-1]) * where[..., None]
    p = jax.nn.softmax(logits.astype(jnp.float32)) * where[..., None]
    overlap, total, occurs = (p * truth).sum(pixels), (p + truth).sum(pixels), truth.sum(pixels) > 0
    terms = jnp.where(occurs, 1 - 2 * overlap / jnp.where(occurs, total, 1), 0)
    return (terms if weights is None else terms * weights).sum() / jnp.maximum(occurs.sum(), 1)


def info_nce(q: jax.Array, k: jax.Array, *, temperature: float,
             negatives: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """InfoNCE: picks the key of each query among others (van den Oord et al. 2018, arXiv:1807.03748, equation 4).

    Args:
      q, k: (B, D), L2-normalised; row i of k is the key of row i of q.
      negatives: (D, K) keys of other images, as in MoCo's queue (arXiv:1911.05722, equation 1); None: the other rows
        of k, as in MoCo v3 (arXiv:2104.02057, equation 1).
    Returns:
      losses (B,), and cosine similarities (B, 1 + K) with the positive first or, without `negatives`, (B, B) with it
      on the diagonal.
    """
    q, k = q.astype(jnp.float32), jax.lax.stop_gradient(k.astype(jnp.float32))
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if negatives is None:
        similarity, place = product(q, k.T), jnp.arange(len(q))
    else:
        positive = (q * k).sum(-1, keepdims=True)
        similarity = jnp.concatenate([positive, product(q, negatives)], axis=1)
        place = jnp.zeros(len(q), jnp.int32)
    return cross_entropy(similarity / temperature, place), similarity


def distillation(student: jax.Array, teacher: jax.Array, *, temperature: float,
                 weights: jax.Array | None = None) -> jax.Array:
    """Cross entropy of a student's predictions against a teacher's, over the views of each image.

    Without `weights` every pair of different views counts alike (Caron et al. 2021, arXiv:2104.14294, equation 3).
    With them each view is compared with itself, token by token: the tokens' weighted mean (their sum over at least 1),
    averaged over views and images (Zhou et al. 2022, arXiv:2111.07832, section 3.2).

    Args:
      student: (B, V, K) logits, or (B, T, N, K) with `weights`.
      teacher: (B, T, K) or (B, T, N, K) probabilities of the first T views.
      temperature: divides the student's logits.
      weights: (B, T, N).
    Returns:
      Scalar.
    """
    log_p = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    pairs = teacher.shape[1] * (student.shape[1] - 1)
    same = -(teacher * log_p[:, :teacher.shape[1]]).sum(-1)
    if weights is not None:
        return ((same * weights).sum(-1) / jnp.maximum(weights.sum(-1), 1)).mean()
    # The sum over all pairs needs only the sum of the teacher's views: no product of views is ever held.
    every = -(teacher.sum(1, keepdims=True) * log_p).sum(-1)
    return (every.sum(1) - same.sum(1)).mean() / pairs


def centred(logits: jax.Array, center: jax.Array, temperature: float | jax.Array) -> jax.Array:
    """A teacher's probabilities (..., K), its logits centred and sharpened (arXiv:2104.14294, section 3.1)."""
    return jax.nn.softmax((logits.astype(jnp.float32) - center) / temperature)


def sinkhorn(logits: jax.Array, temperature: float | jax.Array, *, where: jax.Array | None = None,
             iterations: int = 3) -> jax.Array:
    """A teacher's probabilities with every prototype used alike: Sinkhorn-Knopp's iterations over the whole batch.

    As SwAV does (Caron et al. 2020, arXiv:2006.09882, section 3.1) and DINOv2 in place of a centre (arXiv:2304.07193,
    section 4).

    Args:
      logits: (..., K); all rows are balanced together.
      where: (...) bool, the rows that count; None for all.
    Returns:
      (..., K) float32; rows sum to 1, columns nearly to the number of rows over K.
    """
    x = logits.astype(jnp.float32) / temperature
    rows, where = tuple(range(x.ndim - 1)), None if where is None else where[..., None]
    # In logarithms: exp(logit / temperature) leaves float32's range.
    for _ in range(iterations):
        total = jax.nn.logsumexp(x, axis=rows, keepdims=True, where=where)
        x = x - jnp.where(jnp.isfinite(total), total, 0)   # -inf where no row counts
        x = x - jax.nn.logsumexp(x, axis=-1, keepdims=True)
    return jnp.exp(x)


def negative_cosine(p: jax.Array, z: jax.Array) -> jax.Array:
    """-cos(p, z) of each row, z a constant in the gradient (Chen & He 2021, arXiv:2011.10566, equation 1)."""
    return -(normalise(p) * normalise(jax.lax.stop_gradient(z))).sum(-1)


def normalise(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """x / max(|x|, epsilon) along the last axis, in float32."""
    x = x.astype(jnp.float32)
    # Under the root, so that the gradient at 0 is 0 and not NaN.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), epsilon ** 2))
