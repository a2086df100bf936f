"""Intel Image Classification to records: photographs of six kinds of scenes, 150 x 150 pixels but for a few.

    python -m data_prep.intel --input=archive.zip --output=DIR --val_fraction=0.1

The zip, or a folder that it was unpacked to, has seg_train/seg_train/<class>/N.jpg and seg_test/seg_test/<class>/N.jpg,
which make train and test, and seg_pred/seg_pred/N.jpg without labels. Those are left out, or with `--with_pred` join
train in a data set without any labels, to pretrain on. `--val_fraction` takes val out of train, stratified by class.
"""
import argparse
import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from data_prep import convert, image_folder
from data_prep.archives import File, Source, open_source
from data_prep.convert import Dataset
from data_prep.shards import PARTIAL
from ssl_jax.errors import UserError

CLASSES = ('buildings', 'forest', 'glacier', 'mountain', 'sea', 'street')


@dataclasses.dataclass(frozen=True)
class Scenes:
    """The archive with its paths as `image_folder` reads them: <split>/<class>/N.jpg, or pred/N.jpg in train."""
    source: Source
    with_pred: bool

    def files(self) -> list[File]:
        found, classes = [], {'train': set(), 'test': set()}
        for file in self.source.files():
            match = re.search(r'(?:^|/)seg_(train|test|pred)/(?:seg_\1/)?([^/.][^/]*(?:/[^/.][^/]*)?)$', file.path)
            if not match or '__MACOSX' in file.path:
                continue
            split, path = match.groups()
            if split != 'pred':
                name = path.rpartition('/')[0]
                if name not in CLASSES:
                    raise UserError(f'{file.path} is in none of the class folders {", ".join(CLASSES)}')
                classes[split].add(name)
                found.append(dataclasses.replace(file, path=f'{split}/{path}'))
            elif self.with_pred:
                found.append(dataclasses.replace(file, path=f'train/pred/{path}'))
        for split, names in classes.items():
            missing = sorted(set(CLASSES) - names)
            if missing:
                raise UserError(f'seg_{split} has no image of {", ".join(missing)}')
        return sorted(found, key=lambda f: f.path)

    def read(self, place: Any) -> bytes:
        return self.source.read(place)


def describe(source: Source, *, with_pred: bool = False, val_fraction: float = 0, seed: int = 0,
             provenance: Mapping[str, Any]) -> Dataset:
    """The data set of the zip or folder; the arguments are the flags of this converter.

    Raises:
      UserError: classes are missing, or others are there.
    """
    return image_folder.describe(Scenes(source, with_pred), name='intel_image_classification', unlabelled=with_pred,
                                 val_fraction=val_fraction, seed=seed, provenance=provenance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', required=True, help='the zip, or the folder that it was unpacked to')
    parser.add_argument('--val_fraction', type=float, default=0.0, help='of train')
    parser.add_argument('--seed', type=int, default=0, help='of the random split')
    parser.add_argument('--with_pred', action='store_true', help='an unlabelled data set, with the images of seg_pred')
    convert.add_flags(parser)
    a = parser.parse_args()
    with open_source(a.input, pathlib.Path(a.output, PARTIAL)) as source:
        dataset = describe(source, with_pred=a.with_pred, val_fraction=a.val_fraction, seed=a.seed,
                           provenance=convert.provenance('data_prep.intel', a))
        convert.convert(dataset, a.output, **convert.options(a))


if __name__ == '__main__':
    convert.run(main)
