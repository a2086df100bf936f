import contextlib
import importlib
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ssl_jax.data import tfds_source
from ssl_jax.data.pipeline import Data
from ssl_jax.errors import UserError

# TFDS wants builders in modules, with a folder of their own.
MODULE = '''
import io
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, 'PNG')
    buffer.seek(0)
    return buffer

def images(i):
    rng = np.random.default_rng(i)
    return rng.integers(0, 256, (12, 12 + i % 2, 3), np.uint8), rng.integers(0, 4, (12, 12 + i % 2), np.uint8)

class TinyScenes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.2.0')

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
            'segmentation_mask': tfds.features.Image(shape=(None, None, 1), encoding_format='png'),
            'label': tfds.features.ClassLabel(names=['sea', 'land', 'sky']), 'file_name': tfds.features.Text()}))

    def _split_generators(self, manager):
        return {'train': self._generate_examples(range(9)), 'validation': self._generate_examples(range(9, 14))}

    def _generate_examples(self, indices):
        for i in indices:
            image, mask = map(png, images(i))
            yield i, {'image': image, 'segmentation_mask': mask, 'label': i % 3, 'file_name': f'{i}.png'}

class TinyFields(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            'image': tfds.features.Tensor(shape=(4, 6, 2), dtype=np.float32)}))

    def _split_generators(self, manager):
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i in range(3):
            yield i, {'image': np.full((4, 6, 2), i, np.float32)}
'''


@contextlib.contextmanager
def prepared(folder, package, source):
    """The two data sets of MODULE, prepared by TFDS in a data folder of their own; gives the module that made them."""
    (folder / package).mkdir()
    (folder / package / '__init__.py').write_text('')
    (folder / package / 'builders.py').write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv('TFDS_DATA_DIR', str(folder / 'data'))   # for worker processes
        patch.setattr(tfds.core.constants, 'DATA_DIR', str(folder / 'data'))
        patch.setenv('SSL_JAX_CACHE', str(folder / 'cache'))
        module = importlib.import_module(f'{package}.builders')
        for builder in vars(module).values():
            if isinstance(builder, type):
                builder(file_format='array_record').download_and_prepare()
        yield module
        sys.modules.pop(f'{package}.builders')


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    with prepared(tmp_path_factory.mktemp('tfds'), 'tiny_builders', MODULE) as module:
        yield module


def test_manifest_and_batches(scenes, capsys):
    data = Data('tfds:tiny_scenes', canvas=12)
    assert data.classes == ('sea', 'land', 'sky') and data.records == 9
    assert 'statistics of 9 examples' in capsys.readouterr().out
    pixels = np.concatenate([scenes.images(i)[0].reshape(-1, 3) for i in range(9)])
    np.testing.assert_allclose([c.mean for c in data.channels], pixels.mean(0))
    np.testing.assert_allclose([c.std for c in data.channels], pixels.std(0))

    found = list(data.eval('validation', batch=3))
    assert sorted(found[0]) == ['image', 'index', 'label', 'label_map', 'position', 'valid', 'weight']
    keys = data.keys('validation', np.concatenate([b['index'] for b in found])[:5])
    assert sorted(keys) == [f'validation/{i}.png' for i in sorted(range(9, 14), key=str)]
    for k, key in enumerate(keys):
        i = int(key.split('/')[1].split('.')[0])
        image, mask = scenes.images(i)
        batch = found[k // 3]
        np.testing.assert_array_equal(batch['image'][k % 3], image[:, :12])
        np.testing.assert_array_equal(batch['label_map'][k % 3], mask[:, :12])
        assert batch['label'][k % 3] == i % 3


def test_statistics_are_kept(scenes, monkeypatch, capsys):
    first = tfds_source.manifest('tiny_scenes')
    capsys.readouterr()
    assert tfds_source.manifest('tiny_scenes') == first and not capsys.readouterr().out
    monkeypatch.setattr(tfds_source, '_fields', lambda info: {'image': first.fields['image']})   # prepared anew
    assert tfds_source.manifest('tiny_scenes') != first and 'statistics' in capsys.readouterr().out


def test_raw_arrays_of_a_fixed_size(scenes):
    data = Data('tfds:tiny_fields:1.0.0')
    assert data.image_size == (4, 6) and data.classes == () and len(data.channels) == 2
    iterator = data.train(seed=0, batch=3)
    assert set(next(iterator)['image'][:, 0, 0, 0]) == {0., 1., 2.}
    iterator.close()


def test_in_a_worker_process(scenes):
    batches = []
    for workers in (0, 1):
        iterator = Data('tfds:tiny_scenes', canvas=8, workers=workers).train(seed=1, batch=4)
        batches.append([next(iterator) for _ in range(3)])
        iterator.close()
    for a, b in zip(*batches):
        np.testing.assert_array_equal(a['image'], b['image'])


@pytest.mark.parametrize(('root', 'message'), [
    ('tfds:tiny_sceens', 'tfds:tiny_sceens is neither'),
    ('tfds:tiny_scenes:9.9.9', 'tfds:tiny_scenes:9.9.9'),
    ('tfds:cifar10', r'not prepared .*download_and_prepare\(\)')])
def test_bad_names(scenes, root, message):
    with pytest.raises(UserError, match=message) as info:
        Data(root).manifest  # noqa: B018
    assert '\n' not in str(info.value)
    with pytest.raises(UserError, match="'test' is not in data set"):
        Data('tfds:tiny_fields').eval('test', batch=1)
