"""The handwritten digits that come with scikit-learn: 1,797 real images of 8x8 pixels with grey values 0 to 16.

    python -m data_prep.digits --output=DIR

A small labelled data set that needs no download: a reduced test set of the UCI "Optical Recognition of Handwritten
Digits" (Alpaydin and Kaynak, 1998). Split at random, stratified by class: 60 % train, 20 % val, 20 % test. Its writers
are not told apart, so the same hand is in all splits.
"""
import argparse
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep import convert
from data_prep.convert import ChannelSpec, Dataset, Item
from data_prep.splits import stratified


def describe() -> Dataset:
    """The data set, ready for `convert`."""
    _, labels = _load()
    items = [Item(f'{i:04d}', label=int(label), data=i) for i, label in enumerate(labels)]
    return Dataset('digits', [ChannelSpec('grey')], [str(k) for k in range(10)],
                   stratified(items, {'val': 0.2, 'test': 0.2}, seed=0), load,
                   {'converter': 'data_prep.digits', 'arguments': {}})


def load(item: Item) -> Mapping[str, Any]:
    images, _ = _load()
    return {'image': images[item.data]}


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits
    digits = load_digits()
    return digits.images.astype(np.uint8)[..., None], digits.target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    convert.add_flags(parser)
    arguments = parser.parse_args()
    convert.convert(describe(), arguments.output, **convert.options(arguments))


if __name__ == '__main__':
    convert.run(main)
