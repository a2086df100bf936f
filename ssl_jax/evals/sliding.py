"""Predictions for images larger than a network takes. No plug-in."""
from collections.abc import Callable, Mapping

import numpy as np

Arrays = Mapping[str, np.ndarray]


def sliding_window(predict: Callable[[Arrays], np.ndarray], images: Arrays, window: tuple[int, int],
                   stride: tuple[int, int]) -> np.ndarray:
    """The predictions of overlapping windows, blended by weights that fade towards each window's border.

    The weight is sin^2 along both axes, so that predictions near a border, which lack what lies beyond it, hardly count
    where another window sees more, and none begins or ends abruptly.

    Args:
      predict: arrays of windows (B, h, w, ...) -> (B, h, w, K). Called once per place, always with the same shapes.
      images: arrays (B, H, W, ...), cut alike.
      window, stride: (rows, columns); the last windows end at the image's border, wherever that is.
    Returns:
      (B, H, W, K) float32.
    Raises:
      ValueError: a window larger than the image, or a stride that leaves gaps.
    """
    b, *size = next(iter(images.values())).shape[:3]
    if any(w > n or not 0 < s <= w for n, w, s in zip(size, window, stride)):
        raise ValueError(f'windows of {tuple(window)} every {tuple(stride)} pixels do not cover {tuple(size)} alone')
    weight = np.outer(*(np.sin(np.pi * (np.arange(w) + 0.5) / w) ** 2 for w in window)).astype(np.float32)[..., None]
    places = [(row, column) for row in _starts(size[0], window[0], stride[0])
              for column in _starts(size[1], window[1], stride[1])]
    total, weights = None, np.zeros((*size, 1), np.float32)
    for row, column in places:
        part = slice(row, row + window[0]), slice(column, column + window[1])
        found = predict({k: np.ascontiguousarray(x[:, *part]) for k, x in images.items()})
        if total is None:
            total = np.zeros((len(found), *size, found.shape[-1]), np.float32)
        total[:, *part] += weight * found
        weights[part] += weight
    return total / weights


def _starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin."""
    return [*range(0, size - window, stride), size - window]
