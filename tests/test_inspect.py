"""The data card: what it finds in data sets whose content is known, what it warns of, and that its page is safe."""
import base64
import dataclasses
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from data_prep import inspect, inspect_charts, inspect_gather, inspect_html, inspect_pictures
from data_prep.convert import ChannelSpec, Dataset, Item, convert
from data_prep.inspect_gather import gather, read
from data_prep.inspect_warnings import warnings
from ssl_jax.data.source import Channel, ShardSource
from ssl_jax.errors import UserError

EVIL = '<script>alert("&\')</script>'
VOID = {'meta', 'img', 'i', 'path', 'rect', 'image', 'br'}


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced, and keeps tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID or tag == 'i':
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID or tag == 'i':
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page(card, **options):
    """The page, checked to load nothing and run nothing."""
    text = inspect_html.page(card, **options)
    parsed = Page(text)
    assert not {tag for tag, _ in parsed.tags} & {'script', 'link', 'iframe', 'object', 'base'}
    for _, attributes in parsed.tags:
        assert all(v.startswith('data:image/png;base64,') for k, v in attributes.items() if k in ('src', 'href'))
        assert not any(k.startswith('on') for k in attributes)
    assert 'url(' not in text and '@import' not in text and 'http' not in text.replace('http-equiv', '')
    return parsed


def pictures_of(parsed):
    """The example pictures of a page, (H, W, 4)."""
    data = [a['src'].partition(',')[2] for tag, a in parsed.tags if tag == 'img']
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(d))).convert('RGBA')) for d in data]


def scene(item):
    """Phase without its first column, skewed power without its upper half where odd, constant; a label map."""
    i, day, place = item.data
    rng = np.random.default_rng(i)
    image = np.stack([rng.uniform(-np.pi, np.pi, (20, 30)), rng.lognormal(size=(20, 30)), np.full((20, 30), 5.0)], -1)
    image[:, 0, 0] = np.nan
    image[0, 0, 2] = i
    if i % 2:
        image[:10, :, 1] = np.nan
    return {'image': image.astype('f4'), 'label_map': np.full((20, 30), i % 3, np.uint8), 'time': day,
            'longitude': np.float32(place[0]), 'latitude': np.float32(place[1])}


@pytest.fixture(scope='module')
def card(tmp_path_factory):
    """Splits that overlap in groups and time, a class that is missing, another one rare."""
    root = tmp_path_factory.mktemp('scenes') / 'data'
    items, start = {}, {'train': '2019-01-01', 'val': '2020-01-20', 'test': '2021-06-01'}
    for s, (split, n) in enumerate({'train': 60, 'val': 8, 'test': 10}.items()):
        items[split] = [Item(f'{split}/{EVIL}/{i}', f'group {i + 57 * (s == 1)}' if s < 2 else f'own {i}',
                             int(split == 'train' and i % 30 == 29),
                             (1000 * s + i, str(np.datetime64(start[split]) + 10 * i), (10 * s + i / 10, 40 + s)))
                        for i in range(n)]
    channels = [ChannelSpec(f'phase {EVIL}', 'phase', 2 * np.pi, 'rad'), ChannelSpec('power', unit=EVIL),
                ChannelSpec('flat')]
    convert(Dataset(f'scenes {EVIL}', channels, (f'quiet {EVIL}', 'active', 'absent'), items, scene,
                    {'converter': 'test', 'arguments': {'input': EVIL}}), root, quiet=True, allow_shared_groups=True)
    return gather(root)


def test_gathering(card):
    train, val, test = card.splits.values()
    np.testing.assert_allclose(train.no_data, [1 / 30, 1 / 4, 0])
    assert card.axes == ('longitude', 'latitude') and train.positions.shape == (60, 2) and val.positions[3, 1] == 41
    assert (str(train.days.min()), str(train.days.max())) == ('2019-01-01', '2020-08-13')
    assert train.groups['group 57'] == val.groups['group 57'] == 1 and len(test.groups) == 10
    assert not card.sampled and [s.complete for s in card.splits.values()] == [True] * 3
    assert [h['counts'] for h in card.histograms] == [c.histogram['counts'] for c in card.manifest.channels]


def test_warnings(card):
    found = '\n'.join(warnings(card))
    for expected in (r"val has no example of 2 classes: 'active', 'absent'", r"train has no example of class 'absent'",
                     r"unbalanced: 58 examples of 'quiet .*', 2 of 'active'", r"'flat' is constant but for.*5\.",
                     r"train and val share 3 groups: 'group 57', 'group 58', 'group 59':",
                     'train and val overlap in time, from 2020-01-20 to 2020-03-30'):
        assert re.search(expected, found), (expected, found)
    assert 'test share' not in found and 'and test overlap' not in found and 'no data' not in found
    holes = {'train': dataclasses.replace(card.splits['train'], no_data=np.asarray([0.6, 0, 0]), undated='May')}
    source = card.manifest.source | {'skipped': [{'split': 'val', 'key': EVIL, 'reason': 'torn'}] * 40,
                                     'near_duplicates': {'count': 7, 'distance': 3, 'pairs': [
                                         dict(split='val', key='a', of_split='train', of_key='b', distance=2)]}}
    worse = dataclasses.replace(card, splits=card.splits | holes,
                                manifest=dataclasses.replace(card.manifest, source=source))
    found = '\n'.join(warnings(worse))
    assert re.search(r"no data in 60% of the pixels of train.*\n(.*\n)*.*'May' is one", found), found
    assert found.endswith('7 examples look almost like one of an earlier split.\n'
                          '40 bad examples were left out by the conversion.')
    shown = inspect.text(worse)
    assert f'left out: val {EVIL}: torn' in shown and 'and 10 more' in shown and 'a of val is like b of train' in shown
    page(worse)


def test_text(card):
    shown = inspect.text(card)
    for expected in (r'train +60 +60 +1 ', r'active +2 +0 +0\n', r'phase .* phase of 6.283 +rad',
                     r'3\.33% +3\.33% +3\.33%', 'val: longitude 10 to 10.7, latitude 41 to 41',
                     'test: from 2021-06-01 to 2021-08-30', 'arguments input: <script>',
                     'warning: train and val share'):
        assert re.search(expected, shown), (expected, shown)
    assert 'evenly spaced' not in shown


def test_page(card):
    parsed = page(card, per_class=3)
    text = ''.join(parsed.text)
    assert text.count(EVIL) >= 6    # name, class, channel, unit, argument, warning: as text
    for title in ('Splits', 'Classes', 'Channels', 'Examples', 'Time', 'Places', 'Where it comes from', 'Shards'):
        assert title in text
    assert 'Image sizes' not in text and 'longitude' in text
    shown = pictures_of(parsed)
    assert len(shown) == 4 * (3 + 1)    # channels and label map; the quiet class in three splits, the active in one
    assert inspect_html.page(card, per_class=3) == inspect_html.page(card, per_class=3)
    assert inspect_html.page(card, per_class=3, seed=1) != inspect_html.page(card, per_class=3)


def test_panels():
    """No data is hatched where it is, phases are painted around the circle, colours span the percentiles."""
    rng = np.random.default_rng(0)
    image = np.stack([np.tile([-3.14, 3.14], (64, 32)), rng.random((64, 64))], -1).astype('f4')
    valid = np.ones((64, 64, 2), bool)
    valid[:32, :, 1] = False
    channels = [dataclasses.replace(c, percentiles={'1': 0.0, '99': 1.0}) for c in _channels()]
    ranges = inspect_pictures.colour_ranges(channels)
    np.testing.assert_allclose(ranges, [(-np.pi, np.pi), (0, 1)], rtol=1e-6)
    (name, wrapped), (_, power), (_, labels) = inspect_pictures.panels(
        image, valid, {'label_map': np.eye(64, dtype='u1')}, channels, ranges, 32)
    assert name == 'phase' and wrapped.shape == (32, 32, 3) and np.ptp(wrapped.reshape(-1, 3).astype(int), 0).max() < 12
    hatched = (np.ptp(power.astype(int), axis=-1) == 0) & np.isin(power[..., 0], (150, 190))
    assert hatched[:16].all() and not hatched[16:].any()
    assert set(map(tuple, labels.reshape(-1, 3))) == {(222, 222, 222), (238, 102, 119)}
    # The mean of -3.14 and 3.14 on the circle is pi, not 0.
    mean, ok = inspect_pictures.shrink(image[..., 0], valid[..., 0], 2, 2 * np.pi)
    assert ok.all() and (np.abs(mean) > 3.1).all()


def _channels():
    return (Channel('phase', 'phase', 0.0, 1.8, 2 * np.pi, '', -np.pi, np.pi, {}, 1.0),
            Channel('power', 'linear', 0.5, 0.3, None, '', 0.0, 1.0, {}, 1.0))


def coloured(item):
    buffer = io.BytesIO()
    shape = (24 + item.data % 25, 32, 3)
    shade = np.random.default_rng(item.data).integers(0, 60, shape) + np.asarray([150, 0, 0]) * (item.label[0] > 0)
    Image.fromarray(shade.astype(np.uint8)).save(buffer, 'PNG')
    return {'image': buffer.getvalue()}


def test_photographs_of_varying_size_with_several_labels(tmp_path):
    items = {s: [Item(f'{s}{i}', '', [float(i % 2), float(i % 3 == 0)], i + 100 * (s == 'val')) for i in range(40)]
             for s in ('train', 'val')}
    channels = [ChannelSpec(c) for c in ('red', 'green', 'blue')]
    convert(Dataset('photographs', channels, ('odd', 'third'), items, coloured, {}, encoding='png'), tmp_path / 'data',
            quiet=True)
    card = gather(tmp_path / 'data')
    assert sum(card.splits['train'].sizes.values()) == 40 and len(inspect.sizes(card)) == 25
    assert inspect.sizes(card)[0][1:] in [(2, 2), (2, 1), (1, 2)] and 'images of varying size' in inspect.text(card)
    assert card.splits['val'].no_data is None and 'no data' not in inspect.text(card)
    parsed = page(card, per_class=2)
    assert 'across width, along height' in ''.join(parsed.text)
    shown = pictures_of(parsed)
    assert len(shown) == 4
    for picture in shown[:2]:     # odd ones are red
        opaque = picture[picture[..., 3] > 0].astype(int)
        assert (opaque[:, 0] - opaque[:, 1]).mean() > 100
    assert (picture[..., 3] == 0).any()   # gaps


def grey(item):
    return {'image': np.random.default_rng(item.data).integers(0, 256, (8, 8), dtype='u1')}


def test_unlabelled_data_in_part_and_of_an_earlier_version(tmp_path):
    items = {s: [Item(f'{s}{i}', f'{s}{i}', None, i + 1000 * (s == 'test')) for i in range(n)]
             for s, n in (('train', 300), ('test', 30))}
    manifest = convert(Dataset('plain', [ChannelSpec('grey')], (), items, grey, {}), tmp_path / 'data', quiet=True)
    card = gather(tmp_path / 'data', scan=33)
    assert [len(s.rows) for s in card.splits.values()] == [30, 3]
    assert card.splits['train'].rows.tolist() == list(range(0, 300, 10))
    assert 'of 30 of 300 of train, 3 of 30 of test (evenly spaced' in inspect.text(card)
    page(card)
    channel, = manifest.channels
    dataclasses.replace(manifest, channels=(dataclasses.replace(channel, histogram=None),)).save(tmp_path / 'data')
    sampled = gather(tmp_path / 'data', sample=100)
    assert sampled.sampled and 'histograms are of a sample' in inspect.text(sampled)
    assert 6000 < sum(sampled.histograms[0]['counts']) <= 6400    # of 100 images of 64 pixels
    page(sampled)


def test_charts():
    channel = _channels()[1]
    spike = {'low': 0.0, 'high': 1.0, 'counts': [5000] + [10] * 255, 'below': 3, 'above': 100}
    drawn = inspect_charts.value_histogram(channel, spike, False)
    assert '65% in the highest bin, cut off' in drawn and '0.04% below, 1.31% above' in drawn
    levels = {'low': 3.0, 'high': 12.0, 'counts': np.histogram(np.arange(3, 13), 256, (3, 12))[0].tolist(),
              'below': 0, 'above': 0}
    assert len(set(inspect_charts._density(levels, True)[1])) == 1      # integers, not a comb
    day = lambda *days: np.asarray(days, 'datetime64[D]')
    months = inspect_charts.timeline({'train': day('2018-01-05', '2018-01-09', '2019-03-01'), EVIL: day('2019-04-30')})
    assert months.count('<rect') == 3 and '2018-01: 2' in months and EVIL not in months
    assert inspect_charts.timeline({'train': day('2018-01-05'), 'val': day()}).count('<rect') == 1
    assert '1998: 1' in inspect_charts.timeline({'train': day('1998-01-05', '2018-01-05')})
    one = {'train': np.asarray([[179.0, 89.0]], 'f4'), 'val': np.zeros((0, 2), 'f4')}
    assert 'nan' not in inspect_charts.place_map(one, ('longitude', 'latitude'))
    assert inspect_charts.nice_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize('options, message', [(dict(scan=0), '--scan=0'), (dict(sample=0), '--sample=0')])
def test_bad_numbers(card, options, message):
    with pytest.raises(UserError, match=message):
        gather(card.root, **options)


def torn(record):
    raise ValueError('the record ends inside field')


def test_command(card, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['inspect', str(card.root), '-o', str(tmp_path / 'card.html'), '--per_class=1'])
    inspect.main()
    assert f'wrote {tmp_path / "card.html"}' in capsys.readouterr().out
    assert (tmp_path / 'card.html').read_text(encoding='utf-8').startswith('<!DOCTYPE html>')
    monkeypatch.setattr('sys.argv', ['inspect', str(tmp_path)])
    with pytest.raises(UserError, match='no manifest.json'):
        inspect.main()
    with monkeypatch.context() as m, pytest.raises(UserError, match='val-00000-of-00001.arrayrecord: record 3 is dam'):
        m.setattr(inspect_gather.records, 'decode', torn)
        read(ShardSource(card.root, 'val'), 3, card.manifest)
    shard = card.root / card.manifest.splits['val'].shards[0].name
    monkeypatch.setattr('sys.argv', ['inspect', str(card.root)])
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:-1])
        with pytest.raises(UserError, match='val.*truncated'):
            inspect.main()
    finally:
        shard.write_bytes(content)
