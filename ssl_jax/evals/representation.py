"""Statistics of one vector per image: rank, alignment, uniformity, similarity of two representations. No plug-in."""
import numpy as np

ROWS = 1024   # of a block of pairwise distances


def effective_rank(x: np.ndarray) -> float:
    """RankMe: exp(entropy of the singular values of (N, D) as shares of their sum).

    Between 1 and min(N, D), so that only numbers of equal N compare (Garrido et al. 2023, arXiv:2210.02885, equation
    1, without the small constant that the paper adds). NaN where all features are 0.
    """
    values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    if not values.any():
        return float('nan')
    p = values[values > 0] / values.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def alignment(x: np.ndarray, y: np.ndarray) -> float:
    """Mean squared distance of positive pairs (N, D), L2-normalised: 0 where they are the same, at most 4.

    Wang & Isola 2020, arXiv:2005.10242, section 4.2, with alpha = 2.
    """
    return float(np.square(_normalised(x) - _normalised(y)).sum(1).mean())


def uniformity(x: np.ndarray) -> float:
    """log of the mean over all pairs of exp(-2 |x_i - x_j|^2), of L2-normalised (N, D).

    0 where all are the same, less the more evenly they cover the sphere (Wang & Isola 2020, arXiv:2005.10242, section
    4.2, with t = 2). NaN for a single example.
    """
    x, total = _normalised(x), 0.0
    for start in range(0, len(x), ROWS):
        cosine = x[start:start + ROWS] @ x[start:].T
        # Each pair once: in the first columns the rows themselves come again.
        total += np.triu(np.exp(4 * np.minimum(cosine, 1) - 4), 1).sum()
    pairs = len(x) * (len(x) - 1) / 2
    return float(np.log(total / pairs)) if pairs else float('nan')


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """|Y'X|^2 / (|X'X| |Y'Y|) of centred features (N, D) and (N, E) of the same examples, Frobenius norms.

    1 where they agree up to rotation and scale, near 0 where they have nothing in common and N is much larger than D
    and E (Kornblith et al. 2019, arXiv:1905.00414, equation 5). NaN where one is constant.
    """
    x, y = (_centred(v) for v in (x, y))
    norm = lambda a, b: np.linalg.norm(a.T @ b)
    below = norm(x, x) * norm(y, y)
    return float(norm(x, y) ** 2 / below) if below else float('nan')


def cka_matrix(first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    """`linear_cka` of every layer of one encoder with every layer of another: (layers, layers)."""
    return np.array([[linear_cka(x, y) for y in second] for x in first])


def components(x: np.ndarray, count: int = 3) -> np.ndarray:
    """Principal components of (N, D), those of the largest variance first: (N, count) scores.

    Signs are such that the largest score by absolute value is positive. Columns beyond the rank are 0.
    """
    x = _centred(x)
    u, values, _ = np.linalg.svd(x, full_matrices=False)
    scores = u[:, :count] * values[:count]
    scores *= np.sign(np.take_along_axis(scores, np.abs(scores).argmax(0)[None], 0))
    return np.pad(scores, ((0, 0), (0, count - scores.shape[1])))


def _centred(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x - x.mean(0)


def _normalised(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
