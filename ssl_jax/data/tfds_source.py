"""Data sets prepared by TensorFlow Datasets, read without TensorFlow: 'tfds:<name>[/<config>][:<version>]'.

They lie in TFDS_DATA_DIR (else ~/tensorflow_datasets), in one of the formats with random access (array_record). Read
are the features with the names that TFDS's image data sets use: image, label (one class), segmentation_mask, which
becomes label_map.
"""
import dataclasses
import functools
from typing import Any

import numpy as np

from ssl_jax.data.decode import decode_image
from ssl_jax.data.embedded import cache_folder
from ssl_jax.data.source import MANIFEST, Channel, Field, Manifest, Split, first_line
from ssl_jax.errors import UserError

SAMPLE = 1000   # examples, evenly spaced over the train split, that channel statistics are estimated from
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)   # of RGB in [0, 1], as recipes have them
_NAMES = {'image': 'image', 'label': 'label', 'segmentation_mask': 'label_map'}


class Examples:
    """The examples of one split: images and masks as encoded bytes where they are stored so."""

    def __init__(self, name: str, split: str):
        import tensorflow_datasets as tfds
        builder = open_builder(name)
        features = dict(builder.info.features)
        encoded = [k for k in _NAMES if is_encoded(features.get(k))]
        self.root, self.split = f'tfds:{name}', split
        self._source = builder.as_data_source(split, decoders={k: tfds.decode.SkipDecoding() for k in encoded})
        self._has_name = 'file_name' in features

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            stored = self._source[index]
        except RuntimeError as error:   # what array_record raises for a damaged chunk
            raise UserError(f'{self.root}, split {self.split!r}: record {index} is damaged '
                            f'({first_line(error)})') from error
        example = {ours: stored[theirs] for theirs, ours in _NAMES.items() if theirs in stored}
        if not isinstance(example.get('label_map', b''), bytes):
            example['label_map'] = example['label_map'].reshape(example['label_map'].shape[:2])
        name = stored['file_name'].decode() if self._has_name else index
        return example | {'key': f'{self.split}/{name}'}

    def where(self, index: int) -> str:
        """The record of an example, where a report names it."""
        return f'record {index}'


def manifest(name: str) -> Manifest:
    """What a prepared data set holds.

    Channel statistics are estimated from SAMPLE examples of the train split on first use and kept in the cache folder.
    Mean and std of imagenet2012 are the figures that its published recipes share.

    Raises:
      UserError: unknown, not prepared, not readable without TensorFlow, or without images.
    """
    info = open_builder(name).info
    found = Manifest(name=f'tfds:{info.full_name}', fields=_fields(info), channels=(), source={'tfds': info.full_name},
                     classes=tuple(info.features['label'].names) if 'label' in _fields(info) else (),
                     splits={k: Split(records=s.num_examples, class_counts=(), groups=0, shards=())
                             for k, s in info.splits.items()})
    folder = cache_folder() / 'tfds' / info.full_name.replace('/', '-')
    if (folder / MANIFEST).is_file():
        cached = Manifest.load(folder)
        if dataclasses.replace(cached, channels=()) == found:   # else it was prepared anew from other data
            return cached
    found = dataclasses.replace(found, channels=_channels(name, info, found))
    folder.mkdir(parents=True, exist_ok=True)
    found.save(folder)
    return found


def prepared(name: str) -> bool:
    """Whether the data set can be read here."""
    try:
        open_builder(name)
    except UserError:
        return False
    return True


@functools.lru_cache(8)
def open_builder(name: str, data_dir: str | None = None) -> Any:
    """The tfds builder of a prepared data set; `data_dir` replaces TFDS_DATA_DIR.

    Raises:
      UserError: unknown, not prepared, or not readable without TensorFlow.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(f'tfds:{name} needs the package tensorflow_datasets ({error})') from error
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(f'tfds:{name} is neither a data set of TFDS nor one in its data folder '
                        f'{data_dir or tfds.core.constants.DATA_DIR}') from error
    except (AssertionError, ValueError) as error:   # a version or configuration that does not exist
        raise UserError(f'tfds:{name}: {first_line(error)}') from error
    check_prepared(builder, f'tfds:{name}')
    return builder


def check_prepared(builder: Any, where: str) -> None:
    """Raises UserError unless a tfds builder has been prepared in a format with random access."""
    import tensorflow_datasets as tfds
    readable = {f.value for f in tfds.core.FileFormat.with_random_access()}
    if not builder.info.splits:
        raise UserError(f'{where} is not prepared in {builder.data_dir}: run tfds.builder({builder.name!r}, '
                        "file_format='array_record').download_and_prepare(), or set TFDS_DATA_DIR")
    if not readable & {f.value for f in builder.info.available_file_formats()}:
        raise UserError(f'{where} is prepared as {builder.info.file_format.value}, which has no random access: '
                        f'expected one of {", ".join(sorted(readable))}')


def is_encoded(feature: Any) -> bool:
    """Whether a feature is stored as an image file of its own pixels.

    TFDS writes float images as PNGs of 4 channels that hold the bytes of the floats: those it has to decode itself.
    """
    import tensorflow_datasets as tfds
    return isinstance(feature, tfds.features.Image) and np.dtype(feature.np_dtype).kind == 'u'


def channel_names(count: int) -> tuple[str, ...]:
    """Names for the channels of an image of which nothing else is known."""
    known = {1: ('grey',), 3: ('red', 'green', 'blue'), 4: ('red', 'green', 'blue', 'alpha')}
    return known.get(count) or tuple(f'channel{c}' for c in range(count))


def _fields(info: Any) -> dict[str, Field]:
    import tensorflow_datasets as tfds
    features = dict(info.features)
    image = features.get('image')
    if image is None or len(image.shape) != 3 or image.shape[2] is None:
        raise UserError(f'tfds:{info.full_name} has no feature image of shape (H, W, C), but {", ".join(features)}')
    fields = {'image': Field('image', np.dtype(image.np_dtype).name, tuple(image.shape),
                             'png' if is_encoded(image) else 'raw')}
    if isinstance(features.get('label'), tfds.features.ClassLabel):
        fields['label'] = Field('label', 'int32', ())
    if 'segmentation_mask' in features:
        mask = features['segmentation_mask']
        fields['label_map'] = Field('label_map', np.dtype(mask.np_dtype).name, tuple(mask.shape[:2]),
                                    'png' if is_encoded(mask) else 'raw')
    return fields


def _channels(name: str, info: Any, found: Manifest) -> tuple[Channel, ...]:
    from data_prep.statistics import Statistics
    split = 'train' if 'train' in found.splits else min(found.splits)
    examples, count = Examples(name, split), found.fields['image'].shape[2]
    sample = min(SAMPLE, len(examples))
    print(f'tfds:{name}: statistics of {sample} examples of split {split!r} (once)', flush=True)
    statistics = None
    for i in range(sample):
        image = examples[i * len(examples) // sample]['image']
        image = decode_image(image, count) if isinstance(image, bytes) else image
        if not np.isfinite(image).all():
            raise UserError(f'tfds:{name}: example {i * len(examples) // sample} has NaN or infinite pixels: '
                            'convert it with data_prep, which marks them as invalid')
        if statistics is None:
            statistics = Statistics(image.dtype.name, np.median(image, (0, 1)))
        statistics.add(image)
    channels = [Channel(name=n, kind='linear', mean=s.mean, std=s.std, period=None, unit='', minimum=s.minimum,
                        maximum=s.maximum, percentiles=s.percentiles, valid_fraction=1.0, histogram=s.histogram)
                for n, s in zip(channel_names(count), statistics.summary())]
    if info.name == 'imagenet2012':
        channels = [dataclasses.replace(c, mean=255 * m, std=255 * s)
                    for c, m, s in zip(channels, IMAGENET_MEAN, IMAGENET_STD)]
    return tuple(channels)
