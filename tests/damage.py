"""Damaged copies of a file, and the check of what a converter makes of them."""
import numpy as np

from ssl_jax.errors import UserError


def flips(data, n, seed):
    """n copies of `data`, each with one byte changed at random."""
    rng = np.random.default_rng([seed, 1])
    for place in rng.integers(0, len(data), n).tolist():
        yield data[:place] + bytes([data[place] ^ int(rng.integers(1, 256))]) + data[place + 1:]


def truncations(data, n, seed):
    """n copies of `data` cut short at random, the first by one byte."""
    yield data[:-1]
    for length in np.random.default_rng([seed, 2]).integers(0, len(data) - 1, n - 1).tolist():
        yield data[:length]


def damaged(data, n=30, seed=0):
    """n copies of `data`: two thirds with a changed byte, the others cut short."""
    return [*flips(data, n - n // 3, seed), *truncations(data, n // 3, seed)]


def check(convert, whole, names):
    """Converts a damaged input and says what came of it.

    Args:
      convert: runs the converter and returns the records, as {(split, key): fields}.
      whole: what it returns for the undamaged input.
      names: a refusal has to contain one of them.
    Returns:
      'refused', 'whole' if nothing is missing or different, 'other' if something is.
    """
    try:
        found = convert()
    except UserError as error:
        text = str(error)
        assert '\n' not in text, text
        assert any(name in text for name in names), text
        return 'refused'
    return 'whole' if same(found, whole) else 'other'


def same(a, b):
    """Whether two results of `convert` hold the same records."""
    return a.keys() == b.keys() and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in ((a[k], b[k]) for k in a))
