"""A manifest for a data set that is not there, for dry runs."""
import dataclasses

import numpy as np

from ssl_jax.data.source import Channel, Field, Manifest, Split
from ssl_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Planned:
    """What a data set will hold. Its channels count as linear, from 1 to 255, but for `phases`: in [-pi, pi]."""
    records: int
    image_size: tuple[int, int]
    channels: tuple[str, ...]
    classes: int = 0
    dtype: str = 'uint8'
    phases: tuple[str, ...] = ()
    label_map: bool = False
    multilabel: bool = False

    def manifest(self, name: str, split: str) -> Manifest:
        """Of a data set of this name with one split.

        Raises:
          UserError: a phase that is no channel.
        """
        fields = {'image': Field('image', self.dtype, (*self.image_size, len(self.channels)), 'raw')}
        if self.classes:
            several = self.multilabel
            fields['label'] = Field('label', *(('float32', (self.classes,)) if several else ('int32', ())), 'raw')
        if self.label_map:
            fields['label_map'] = Field('label_map', 'uint8', self.image_size, 'raw')
        for phase in self.phases:
            if phase not in self.channels:
                raise UserError(f'config.data.planned.phases: {phase!r} is no channel{nearest(phase, self.channels)}')
        linear = Channel('', 'linear', mean=127.5, std=64.0, period=None, unit='', minimum=1.0, maximum=255.0,
                         percentiles={}, valid_fraction=1.0)
        phase = dataclasses.replace(linear, kind='phase', mean=0.0, std=1.8, period=2 * np.pi, minimum=-np.pi,
                                    maximum=np.pi)
        channels = tuple(dataclasses.replace(phase if n in self.phases else linear, name=n) for n in self.channels)
        return Manifest(name=name, fields=fields, channels=channels, source={},
                        splits={split: Split(records=self.records, class_counts=(), groups=0, shards=())},
                        classes=tuple(f'class {i}' for i in range(self.classes)))
