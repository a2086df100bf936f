"""Enumeration, splits, series, masks and crops, by hand cases and properties."""
import io
import itertools
import json
import tarfile

import numpy as np
import pytest

from data_prep import minicube_samples as samples
from data_prep.minicube_samples import Group
from ssl_jax.errors import UserError


def annotation(frame, primary, secondary, label='Non_Deformation', **flaws):
    return dict(uniqueID=1, frameID=frame, primary_date=primary, secondary_date=secondary, label=[label],
                corrupted=0, processing_error=0, no_info=0) | flaws


def group(n, positive=False, frame='A', date='20180101'):
    pairs = tuple((date, f'2018{month:02d}15') for month in range(1, n + 1)) if n <= 12 else tuple(
        (date, f'{20190000 + i}') for i in range(n))
    return Group(frame, date, pairs, tuple(int(positive and i == 0) for i in range(n)))


# ---- labels, files, groups


def test_label_is_negative_only_by_its_name():
    assert samples.label_of({'label': ['Non_Deformation']}) == 0
    for label in (['Deformation'], ['Earthquake'], ['Deformation', 'Earthquake']):
        assert samples.label_of({'label': label}) == 1


def test_annotations_from_json_folder_and_tar(tmp_path):
    found = [annotation('A', '20180101', f'2018010{i}') for i in range(2, 5)]
    (tmp_path / 'all.json').write_text(json.dumps({str(i): a for i, a in enumerate(found)}))
    (tmp_path / 'folder').mkdir()
    with tarfile.open(tmp_path / 'all.tar.gz', 'w:gz') as tar:
        for i, a in enumerate(found):
            text = json.dumps(a).encode()
            (tmp_path / 'folder' / f'{i}.json').write_bytes(text)
            member = tarfile.TarInfo(f'mnt/somewhere/{i}.json')
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    read = [samples.read_annotations(tmp_path / name) for name in ('all.json', 'folder', 'all.tar.gz')]
    assert read[0] == read[1] == read[2]
    assert read[0]['A', '20180101', '20180103'] == found[1]


def test_bad_annotations_are_named(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('[1]')
    with pytest.raises(UserError, match='a.json'):
        samples.read_annotations(path)
    broken = annotation('A', '20180101', '20180102')
    del broken['corrupted']
    path.write_text(json.dumps({'7': broken}))
    with pytest.raises(UserError, match="no field 'corrupted'"):
        samples.read_annotations(path)


def test_groups_by_primary_and_by_secondary():
    pairs = {('B', '20180101', '20180201'): 1, ('A', '20180101', '20180301'): 0, ('A', '20180101', '20180201'): 1,
             ('A', '20180115', '20180201'): 0}
    by_primary = samples.group_pairs(pairs)
    assert by_primary == [Group('A', '20180101', (('20180101', '20180201'), ('20180101', '20180301')), (1, 0)),
                          Group('A', '20180115', (('20180115', '20180201'),), (0,)),
                          Group('B', '20180101', (('20180101', '20180201'),), (1,))]
    by_secondary = samples.group_pairs(pairs, 'secondary')
    assert by_secondary[0] == Group('A', '20180201', (('20180101', '20180201'), ('20180115', '20180201')), (1, 0))
    assert [g.positive for g in by_primary] == [True, False, True]
    with pytest.raises(UserError, match='ordering'):
        samples.group_pairs(pairs, 'tertiary')


def test_quality_pairs_name_what_is_missing():
    timeseries = {'106A': {'20180101': {'length': 1, 'secondary_date': ['20180113'], 'uniqueID': [1]}}}
    known = {('106A', '20180101', '20180113'): annotation('106A', '20180101', '20180113', 'Earthquake')}
    assert samples.quality_pairs(timeseries, known) == {('106A', '20180101', '20180113'): 1}
    with pytest.raises(UserError, match=r"'106B' is not in quality_timeseries.json \(did you mean '106A'\?\)"):
        samples.quality_pairs(timeseries, known, ['106B'])
    with pytest.raises(UserError, match='106A/20180101_20180113: .* no annotation'):
        samples.quality_pairs(timeseries, {})


# ---- splits


def test_date_splits_include_both_ends():
    days = ['20131231', '20140101', '20190531', '20190601', '20191231', '20200101', '20211231', '20220101']
    parts = samples.split_by_date([group(1, date=d) for d in days], samples.DATE_SPLITS)
    assert {s: [g.date for g in found] for s, found in parts.items()} == {
        'train': ['20140101', '20190531'], 'val': ['20190601', '20191231'], 'test': ['20200101', '20211231']}


def test_ranges_are_parsed_and_checked():
    assert samples.parse_ranges('train:20140101-20181231,test:20190101-20190101') == {
        'train': ('20140101', '20181231'), 'test': ('20190101', '20190101')}
    for bad in ('benchmrk', 'train:2014-2018', 'train:20190101-20180101', ':20180101-20190101', ''):
        with pytest.raises(UserError, match='benchmark, pretrain, frame'):
            samples.parse_ranges(bad)


def test_frames_that_share_a_volcano_stay_together():
    names = {'a': 'Etna', 'b': 'Vesuvius, Ischia', 'c': 'ischia,Etna', 'd': 'Taal', 'e': 'Taal'}
    assert samples.volcanoes(list('abcdef'), names) == dict(a='a', b='a', c='a', d='d', e='d', f='f')


def test_split_by_frame_holds_out_whole_volcanoes():
    component = {f'f{i}': f'f{i - i % 2}' for i in range(20)}
    groups = [group(3, frame=f, date=f'201801{d:02d}') for f in component for d in range(1, 6)]
    parts = samples.split_by_frame(groups, component, seed=1)
    assert list(parts) == ['train', 'val', 'test']
    held = {s: {component[g.frame] for g in found} for s, found in parts.items()}
    assert not held['train'] & held['val'] and not held['train'] & held['test'] and not held['val'] & held['test']
    assert sum(map(len, parts.values())) == len(groups)
    assert all(0.15 <= len(parts[s]) / len(groups) <= 0.25 for s in ('val', 'test'))
    assert parts != samples.split_by_frame(groups, component, seed=2)
    chosen = samples.split_by_frame(groups, component, test_frames=['f3'])
    assert list(chosen) == ['train', 'test'] and {g.frame for g in chosen['test']} == {'f3'}
    with pytest.raises(UserError, match="frame 'g3' is unknown"):
        samples.split_by_frame(groups, component, val_frames=['g3'])
    with pytest.raises(UserError, match='at least 3'):
        samples.split_by_frame(groups[:20], component)


# ---- series


@pytest.mark.parametrize('n', [1, 2, 3, 4, 7])
@pytest.mark.parametrize('length', [1, 2, 3, 5])
@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('positive', [False, True])
def test_series_properties(n, length, split, positive):
    found = samples.series(group(n, positive), length, split, seed=3)
    assert all(len(s) == length and list(s) == sorted(s) for s in found)
    if n <= length:
        assert len(found) == 1 and set(found[0]) == set(range(n))      # all are there, some repeated
        return
    assert found[0] == tuple(range(length))
    assert all(len(set(s)) == length for s in found)
    limit = 1 if split != 'train' else length - 1 if positive else length - 2
    overlap = [len(set(a) & set(b)) for a, b in itertools.combinations(found, 2)]
    if length == 1:
        assert found == [(i,) for i in range(n)]
        return
    assert all(o < limit for o in overlap)
    if limit > 0:       # greedy: nothing that was left out would still fit
        left = set(itertools.combinations(range(n), length)) - set(found)
        assert all(any(len(set(a) & set(b)) >= limit for b in found) for a in left)


def test_thinning_by_hand():
    assert samples.series(group(4), 3, 'val', 0) == [(0, 1, 2)]                                 # the others share one
    assert samples.series(group(6), 3, 'test', 0) == [(0, 1, 2), (3, 4, 5)]
    assert samples.series(group(4, True), 3, 'train', 0) == [(0, 1, 2)]                         # limit 2
    assert samples.series(group(5, True), 3, 'train', 0) == [(0, 1, 2), (0, 3, 4)]
    assert samples.series(group(5), 3, 'train', 0) == [(0, 1, 2)]                               # limit 1
    assert samples.series(group(5), 2, 'train', 0) == [(0, 1)]                                  # limit 0: one is kept
    assert samples.series(group(4, True), 2, 'train', 0) == [(0, 1), (2, 3)]
    assert len(samples.series(group(22), 11, 'val', 0)) == 2


def test_padding_repeats_every_member_and_follows_the_seed():
    drawn = {samples.series(group(2), 4, 'train', seed)[0] for seed in range(60)}
    assert drawn == {(0, 1, 1, 1), (0, 0, 1, 1), (0, 0, 0, 1)}
    assert samples.series(group(2), 4, 'train', 5) == samples.series(group(2), 4, 'test', 5)


# ---- masks and crops


def test_mask_targets():
    masks = np.zeros((3, 4, 4), np.int32)
    masks[0, 0, 0] = 1
    masks[1, 1:3, 1:3] = 2
    masks[2, 3, :2] = 1
    last, peak, union = (samples.mask_target(masks, which) for which in samples.MASK_TARGETS)
    assert last.dtype == np.uint8 and set(np.unique(union)) == {0, 1}
    assert last.sum() == 2 and last[3, 0] == 1
    np.testing.assert_array_equal(peak, masks[1] == 2)
    assert union.sum() == 7


def test_a_thousand_crops_show_deformation_inside_the_frame():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        shape = tuple(rng.integers(20, 90, 2))
        size = int(rng.integers(8, 100))
        mask = np.zeros(shape, np.uint8)
        for _ in range(rng.integers(1, 4)):      # scattered blobs: the middle of their box is often empty
            r, c = (int(rng.integers(n)) for n in shape)
            mask[r:r + 3, c:c + 2] = 1
        row, column, side = samples.crop_window(mask, size, rng)
        assert side == min(size, *shape)
        assert 0 <= row <= shape[0] - side and 0 <= column <= shape[1] - side
        assert mask[row:row + side, column:column + side].any()


def test_crops_move_around_the_deformation():
    mask = np.zeros((200, 200), np.uint8)
    mask[150:154, 40:44] = 1
    places = [samples.crop_window(mask, 64, np.random.default_rng(n)) for n in range(300)]
    rows, columns = np.array([p[:2] for p in places]).T
    assert abs(rows.mean() + 32 - 151.5) < 3 and abs(columns.mean() + 32 - 41.5) < 5      # clamped at the left
    assert np.ptp(rows) == 32      # a quarter of the crop to both sides
    assert all(mask[r:r + 64, c:c + 64].sum() == 16 for r, c, _ in places)


def test_crops_without_deformation_lie_around_the_middle():
    mask = np.zeros((300, 200), np.uint8)
    rows, columns = np.array([samples.crop_window(mask, 64, np.random.default_rng(n))[:2] for n in range(300)]).T
    assert rows.min() >= 149 - 32 - 16 and rows.max() <= 149 - 32 + 16 and len(set(rows)) > 20
    assert columns.min() >= 99 - 32 - 16 and columns.max() <= 99 - 32 + 16


def test_tiles_cover_the_frame():
    covered = np.zeros((100, 70), int)
    tiles = samples.tile_windows((100, 70), 32, 32)
    for row, column, side in tiles:
        assert side == 32
        covered[row:row + side, column:column + side] += 1
    assert covered.shape == (100, 70) and covered.min() == 1 and len(tiles) == 4 * 3
    assert samples.tile_windows((32, 64), 32, 16) == [(0, 0, 32), (0, 16, 32), (0, 32, 32)]
    assert samples.tile_windows((20, 30), 32, 32) == [(0, 0, 20), (0, 10, 20)]
