"""Data sets of TensorFlow Datasets to records, read without TensorFlow.

    python -m data_prep.from_tfds --dataset=mnist:3.0.1 --output=DIR
    python -m data_prep.from_tfds --dataset=oxford_iiit_pet --output=DIR --label_map=segmentation_mask \
        '--splits=train=train[:90%],val=train[90%:],test'
    python -m data_prep.from_tfds --dataset=my_package.my_module:MyBuilder --prepare --output=DIR

A data set is named as in TFDS, or by the class of its builder, and must have been prepared in a format with random
access (array_record). `--prepare` does that first, which downloads what the builder asks for. Training can also read it
in place (`--config.data.root=tfds:<name>`); converting adds exact statistics, checks, labels and groups for samplers.

`--splits` says which to take, by TFDS's names and slices; `new=old` renames one, validation becomes val by itself.
`--image`, `--label` and `--label_map` name the features of those roles. Texts and single numbers among the other
features are kept under their own names. Image files are copied as they are, other arrays stored as pixels. The numbers
in label maps are TFDS's: those of oxford_iiit_pet count from 1.
"""
import argparse
import collections
import dataclasses
import functools
import importlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep import convert
from data_prep.convert import ChannelSpec, Dataset, Item
from data_prep.pictures import check_whole, storable
from data_prep.splits import stratified
from ssl_jax.data.decode import decode_label_map
from ssl_jax.data.source import first_line
from ssl_jax.data.tfds_source import channel_names, check_prepared, is_encoded, open_builder
from ssl_jax.errors import UserError, nearest

RESERVED = ('image', 'valid', 'label', 'label_map', 'key', 'group')
SAMPLE = 32     # images, evenly spaced over a split, that tell how images are encoded


@dataclasses.dataclass(frozen=True)
class Stored:
    """Which data set, and which of its features are what. Loads an item whose data are (TFDS split, index)."""
    dataset: str
    data_dir: str | None
    image: str
    label: str | None
    label_map: str | None
    others: tuple[str, ...]

    def __call__(self, item: Item) -> Mapping[str, Any]:
        split, index = item.data
        example = self.read(split, index)
        try:
            fields = {'image': example[self.image]}
            if isinstance(fields['image'], bytes):
                fields['image'] = storable(fields['image'])
            if self.label:
                fields['label'] = int(example[self.label])
            if self.label_map:
                fields['label_map'] = _label_map(example[self.label_map])
            for name in self.others:
                value = example[name]
                fields[name] = value.decode() if isinstance(value, bytes) else np.asarray(value)[()]
        except ValueError as error:
            raise UserError(f'{self.dataset}: {item.key}: {first_line(error)}') from error
        return fields

    def read(self, split: str, index: int) -> Mapping[str, Any]:
        """One example as TFDS gives it, but for image files, which stay encoded."""
        source = _source(self.dataset, self.data_dir, split)
        try:
            return source[index]
        except RuntimeError as error:   # what array_record raises for a damaged chunk
            raise UserError(f'{self.dataset}: record {index} of {split} is damaged ({first_line(error)})') from error


def describe(dataset: str, *, data_dir: str | None = None, splits: str = '', image: str = 'image', label: str = 'label',
             label_map: str = '', val_fraction: float = 0, seed: int = 0, prepare: bool = False,
             provenance: Mapping[str, Any]) -> Dataset:
    """The prepared data set `dataset`; the arguments are the flags of this converter.

    Raises:
      UserError: it is unknown or not prepared, or a split or feature is not there or of another kind.
    """
    found = builder(dataset, data_dir, prepare)
    features = dict(found.info.features)
    roles = {'image': image, 'label': label if label in features or label != 'label' else None,
             'label_map': label_map or None}
    for role, name in roles.items():
        if name is not None and name not in features:
            raise UserError(f'--{role}={name}: {dataset} has no such feature{nearest(name, features)}')
    shape = features[image].shape
    if not isinstance(shape, tuple) or len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] is None):
        raise UserError(f'--image={image}: the feature has shape {shape}, expected (H, W, C)')
    others = [k for k in features if k not in roles.values() and k not in RESERVED and _is_simple(features[k])]
    left = [k for k in features if k not in (*roles.values(), *others)]
    if left:
        print(f'features left out: {", ".join(left)}')
    stored = Stored(dataset, data_dir, **roles, others=tuple(others))
    items, sizes = {}, {}
    for name, split in _splits(found, dataset, splits).items():
        source = _source(dataset, data_dir, split)
        items[name] = [Item(f'{split}/{i}', data=(split, i)) for i in range(len(source))]
        sizes[split] = len(source)
    classes = _classes(features, roles['label'])
    if val_fraction:
        items = _with_val(items, stored, val_fraction, seed)
    return Dataset(found.info.name, [ChannelSpec(c) for c in channel_names(shape[2] if len(shape) == 3 else 1)],
                   classes, items, stored, {**provenance, 'tfds': found.info.full_name, 'lengths': sizes,
                                            'bytes': {k: s.num_bytes for k, s in found.info.splits.items()}},
                   encoding=_encoding(stored, items) if is_encoded(features[image]) else 'raw')


def builder(dataset: str, data_dir: str | None = None, prepare: bool = False) -> Any:
    """The tfds builder of '<name>[/<config>][:<version>]' or '<module>:<class>', ready to be read.

    Raises:
      UserError: there is none, or it has not been prepared.
    """
    import tensorflow_datasets as tfds
    module, _, name = dataset.partition(':')
    own = bool(name) and name.isidentifier() and '/' not in module
    if not own and not prepare:
        return open_builder(dataset, data_dir)
    if own:
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError as error:
            raise UserError(f'--dataset={dataset}: {module} cannot be imported ({first_line(error)})') from error
        if not (isinstance(found, type) and issubclass(found, tfds.core.DatasetBuilder)):
            raise UserError(f'--dataset={dataset}: {module} has no builder class {name}')
        # A builder that has been prepared keeps its format; the argument decides for one that has not.
        found = found(data_dir=data_dir, file_format='array_record')
    else:
        try:
            found = tfds.builder(dataset, data_dir=data_dir, file_format='array_record')
        except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
            raise UserError(f'--dataset={dataset}: {first_line(error)}') from error
    if prepare:
        found.download_and_prepare()
    check_prepared(found, dataset)
    return found


@functools.lru_cache(16)
def _source(dataset: str, data_dir: str | None, split: str) -> Any:
    """Opened once per process and split."""
    import tensorflow_datasets as tfds
    found = builder(dataset, data_dir)
    decoders = {k: tfds.decode.SkipDecoding() for k, feature in found.info.features.items() if is_encoded(feature)}
    try:
        return found.as_data_source(split, decoders=decoders)
    except (ValueError, KeyError) as error:
        known = ', '.join(found.info.splits)
        raise UserError(f'--splits: {dataset} has no {split!r} among {known} ({first_line(error)})') from error


def _splits(found: Any, dataset: str, text: str) -> dict[str, str]:
    """Our name -> TFDS's, from --splits."""
    chosen = {}
    for part in text.split(',') if text else found.info.splits:
        name, _, split = part.rpartition('=')
        name = name or {'validation': 'val'}.get(split, split)
        if not name.isidentifier():
            raise UserError(f'--splits={text}: {part!r} needs a name, as in train={part}')
        if name in chosen:
            raise UserError(f'--splits={text}: {name} is there twice')
        chosen[name] = split
    return chosen


def _with_val(items: Mapping[str, list[Item]], stored: Stored, fraction: float, seed: int) -> dict[str, list[Item]]:
    if 'val' in items or 'train' not in items:
        raise UserError(f'--val_fraction={fraction}: it is taken out of train, but the splits are {", ".join(items)}')
    labelled = items['train']
    if stored.label:
        labelled = [dataclasses.replace(i, label=int(stored.read(*i.data)[stored.label])) for i in labelled]
    drawn = stratified(labelled, {'val': fraction}, seed=seed)
    return {'train': drawn['train'], 'val': drawn['val'], **{k: v for k, v in items.items() if k != 'train'}}


def _classes(features: Mapping[str, Any], label: str | None) -> list[str]:
    import tensorflow_datasets as tfds
    if label is None:
        return []
    feature = features[label]
    if not isinstance(feature, tfds.features.ClassLabel) or not feature.num_classes:
        raise UserError(f'--label={label}: the feature is {type(feature).__name__}, expected a ClassLabel')
    return list(feature.names)


def _is_simple(feature: Any) -> bool:
    import tensorflow_datasets as tfds
    if isinstance(feature, tfds.features.Text):
        return True
    return (isinstance(feature, tfds.features.Tensor) and feature.shape == ()
            and np.dtype(feature.np_dtype).kind in 'biuf')


def _label_map(value: Any) -> np.ndarray:
    if isinstance(value, bytes):
        check_whole(value)
        return decode_label_map(value)
    return np.asarray(value).reshape(np.shape(value)[:2])


def _encoding(stored: Stored, items: Mapping[str, list[Item]]) -> str:
    """'png' where a sample of all splits holds nothing else; what is called 'jpeg' may hold both."""
    heads = collections.Counter()
    for chosen in items.values():
        for k in range(min(SAMPLE, len(chosen))):
            data = stored.read(*chosen[k * len(chosen) // min(SAMPLE, len(chosen))].data)[stored.image]
            heads[data.startswith(b'\xff\xd8')] += 1
    return 'jpeg' if heads[True] else 'png'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--dataset', required=True, help='<name>[/<config>][:<version>], or <module>:<builder class>')
    parser.add_argument('--data_dir', help="TFDS's data folder (default: TFDS_DATA_DIR, or ~/tensorflow_datasets)")
    parser.add_argument('--splits', default='', help='train,test,... (default: all)')
    parser.add_argument('--image', default='image', help='feature (default: image)')
    parser.add_argument('--label', default='label', help='feature, a ClassLabel (default: label, if there is one)')
    parser.add_argument('--label_map', default='', help='feature, one label per pixel (default: none)')
    parser.add_argument('--val_fraction', type=float, default=0.0, help='of train, stratified by class')
    parser.add_argument('--seed', type=int, default=0, help='of --val_fraction')
    parser.add_argument('--prepare', action='store_true', help='download and prepare it first, if need be')
    convert.add_flags(parser)
    a = parser.parse_args()
    prepare, data_dir = vars(a).pop('prepare'), a.data_dir and os.path.expanduser(a.data_dir)
    dataset = describe(a.dataset, data_dir=data_dir, splits=a.splits, image=a.image, label=a.label,
                       label_map=a.label_map, val_fraction=a.val_fraction, seed=a.seed, prepare=prepare,
                       provenance=convert.provenance('data_prep.from_tfds', a))
    convert.convert(dataset, a.output, **convert.options(a))


if __name__ == '__main__':
    convert.run(main)
