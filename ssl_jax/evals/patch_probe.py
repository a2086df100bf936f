"""A linear classifier of patch tokens, trained for a few epochs as in the diagnostics of SimMIM-Pets. No plug-in."""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax.sharding import Layout

EPOCHS, RATE, BATCH = 5, 1e-2, 64   # of images


class Head(NamedTuple):
    kernel: np.ndarray   # (D, classes)
    bias: np.ndarray     # (classes,)


def start(width: int, classes: int) -> Head:
    """torch's default for a linear layer, uniform in +-1 / sqrt(D), of a fixed seed."""
    draw = functools.partial(np.random.default_rng(0).uniform, -width ** -0.5, width ** -0.5)
    return Head(draw((width, classes)).astype(np.float32), draw(classes).astype(np.float32))


def fit(tokens: np.ndarray, labels: np.ndarray, head: Head, layout: Layout, *, epochs: int = EPOCHS,
        batch: int = BATCH) -> tuple[Head, float]:
    """Adam on the cross entropy of patches, images in order (github.com/itshuey/masked-image-modelling).

    Args:
      tokens: (n, N, D) float32 of n images.
      labels: (n, N) classes; negative ones don't count.
      head: to start from.
      batch: images per step.
    Returns:
      the trained head, and its accuracy on the training patches, each counted before the step that it is part of, in
      the last epoch.
    """
    padding = -len(tokens) % batch
    cut = lambda x, fill: np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), constant_values=fill).reshape(
        -1, batch, *x.shape[1:])
    data = layout.put_replicated((cut(tokens, 0), cut(labels.astype(np.int32), -1)))
    head, accuracy = jax.device_get(_fit(data, layout.put_replicated(head), epochs=epochs))
    return head, float(accuracy)


def accuracy(head: Head, tokens: np.ndarray, labels: np.ndarray) -> float:
    """The share of patches with a label that get it; NaN if none has one."""
    known = labels >= 0
    found = (tokens[known] @ head.kernel + head.bias).argmax(-1)
    return float(np.mean(found == labels[known])) if known.any() else float('nan')


@functools.partial(jax.jit, static_argnames='epochs')
def _fit(data: tuple[jax.Array, jax.Array], head: Head, *, epochs: int) -> tuple[Head, jax.Array]:
    adam = optax.adam(RATE)

    def loss(head, tokens, labels):
        logits, known = tokens @ head.kernel + head.bias, labels >= 0
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        loss = jnp.where(known, loss, 0).sum() / jnp.maximum(known.sum(), 1)
        return loss, (known & (logits.argmax(-1) == labels)).sum()

    def step(state, batch):
        head, moments = state
        gradient, right = jax.grad(loss, has_aux=True)(head, *batch)
        update, moments = adam.update(gradient, moments)
        return (optax.apply_updates(head, update), moments), right

    epoch = lambda state, _: jax.lax.scan(step, state, data)
    (head, _), right = jax.lax.scan(epoch, (head, adam.init(head)), length=epochs)
    return head, right[-1].sum() / jnp.maximum((data[1] >= 0).sum(), 1)
