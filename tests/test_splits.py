"""Splits by time, block and file: nothing leaks over a border, and what doesn't fit is named."""
import argparse
import collections
import itertools
import json

import numpy as np
import pytest

from data_prep import splits
from data_prep.convert import Item
from ssl_jax.errors import UserError


def items(count, group=''):
    return [Item(f'e{i}', group, i % 2) for i in range(count)]


def keys(found):
    return {name: [item.key for item in members] for name, members in found.items()}


# ---- time


def test_time_splits_begin_on_their_date_and_keep_a_gap():
    times = ['2019-05-01', '2019-05-24T23:59:59', '2019-05-25', '2019-05-31T23:00:00', '2019-06-01', '2019-12-24',
             '2019-12-31T23:00:00-02:00', '2020-01-01', '20210101T000000Z', np.datetime64('2018-01-01T00:00:00', 'ns')]
    found = splits.by_time(items(10), times, {'val': '2019-06-01', 'test': '2020-01-01'}, gap_days=7)
    assert keys(found) == {'train': ['e0', 'e1', 'e9'], 'val': ['e4', 'e5'], 'test': ['e6', 'e7', 'e8']}
    found = splits.by_time(items(10), times, {'test': '2019-06-01'})
    assert keys(found) == {'train': ['e0', 'e1', 'e2', 'e3', 'e9'], 'test': ['e4', 'e5', 'e6', 'e7', 'e8']}


@pytest.mark.parametrize('time', ['2019-13-01', '', None, '31.12.2019', 'NaT', 20190631])
def test_a_time_that_is_none_is_named(time):
    with pytest.raises(UserError, match=f"time of example 'e1' is '{time}': expected an ISO 8601 date"):
        splits.by_time(items(2), ['2019-01-01', time], {'val': '2019-06-01'})


@pytest.mark.parametrize('boundaries, gap, expected', [
    ({'val': '2020-01-01', 'test': '2019-01-01'}, 0, "'test' begins on 2019-01-01, not after 'val' on 2020-01-01"),
    ({'val': 'June'}, 0, "first date of split 'val' is 'June'"), ({'val': '2020-01-01'}, -1, 'gap_days=-1')],
    ids=['order', 'date', 'gap'])
def test_bad_boundaries_are_refused(boundaries, gap, expected):
    with pytest.raises(UserError, match=expected):
        splits.by_time(items(1), ['2019-01-01'], boundaries, gap)


# ---- space


def distance_to_block(position, cell, side, wrap=None):
    found = []
    for turn in (-wrap, 0, wrap) if wrap else (0,):
        moved = position[0], position[1] + turn
        found.append(np.hypot(*(max(c * side - p, p - (c + 1) * side, 0) for p, c in zip(moved, cell))))
    return min(found)


@pytest.mark.parametrize('wrap', [None, 36.0], ids=['plane', 'turn'])
def test_block_splits_keep_blocks_whole_and_drop_what_is_near_another_split(wrap):
    rng = np.random.default_rng(0)
    positions = rng.uniform((-10, 0), (10, 36), (1000, 2))
    entries, side, buffer = items(1000), 3.0, 0.7
    fractions = {'val': 0.2, 'test': 0.2}
    found = splits.by_block(entries, positions, side, buffer, fractions, 5, wrap=wrap)
    whole = splits.by_block(entries, positions, side, 0, fractions, 5, wrap=wrap)
    cell_of = {item.key: tuple(np.floor(p / side).astype(int)) for item, p in zip(entries, positions)}
    place_of = {item.key: p for item, p in zip(entries, positions)}
    owner = collections.defaultdict(set)
    for name, members in whole.items():
        for item in members:
            owner[cell_of[item.key]].add(name)
    assert sum(map(len, whole.values())) == 1000 and all(len(names) == 1 for names in owner.values())
    assert all(abs(len(whole[s]) - 200) < 40 for s in fractions)
    for name, members in whole.items():
        kept = {item.key for item in found[name]}
        for item in members[::5]:
            near = any(names != {name} and distance_to_block(place_of[item.key], cell, side, wrap) < buffer
                       for cell, names in owner.items())
            assert (item.key not in kept) == near, item.key
    assert keys(found) == keys(splits.by_block(entries, positions, side, buffer, fractions, 5, wrap=wrap))
    assert keys(found) != keys(splits.by_block(entries, positions, side, buffer, fractions, 6, wrap=wrap))


def test_blocks_of_other_rasters_are_no_neighbours():
    """The first of three coordinates tells rasters apart."""
    positions = [(raster, y, 0) for raster in range(20) for y in (4, 6)]
    found = splits.by_block(items(40), positions, 10, 8, {'val': 0.5}, 0)
    assert len(found['train']) == len(found['val']) == 20
    positions = [(0, raster * 10 + y, 0) for raster in range(20) for y in (4, 6)]
    assert sum(map(len, splits.by_block(items(40), positions, 10, 8, {'val': 0.5}, 0).values())) < 40


@pytest.mark.parametrize('positions, block, buffer, expected', [
    ([(0, 0), (np.nan, 1)], 1, 0, r"example 'e1' lies at \[nan, 1.0\]"), ([(0, 0), (1, 1)], 0, 0, 'block=0'),
    ([(0, 0), (1, 1)], 1, -1, 'buffer=-1')], ids=['nan', 'block', 'buffer'])
def test_bad_blocks_are_refused(positions, block, buffer, expected):
    with pytest.raises(UserError, match=expected):
        splits.by_block(items(2), positions, block, buffer, {'val': 0.5}, 0)


# ---- a file


@pytest.mark.parametrize('name, text', [
    ('s.json', json.dumps({'train': ['e2', 'e0'], 'test': ['e1', 'e3']})),
    ('s.csv', 'key,split\ne2,train\ne1,test\n\ne0,train\ne3,test\n'),
    ('s.txt', 'e2,train\ne1,test\ne0,train\ne3,test')],
    ids=['json', 'csv', 'bare'])
def test_splits_of_a_file_keep_the_order_of_the_items(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert keys(splits.from_file(items(4), tmp_path / name)) == {'train': ['e0', 'e2'], 'test': ['e1', 'e3']}
    assert len(splits.from_file(items(3), tmp_path / name, left_out=['e3', 'row 7'])['test']) == 1


@pytest.mark.parametrize('name, text, expected', [
    ('s.json', '{"train": ["e0", "e1", "e9"]}', "'e9' is no example of this data set .1 of the 3 keys are not"),
    ('s.json', '{"train": ["e0"]}', "does not list example 'e1' .1 of 2 are missing"),
    ('s.json', '{"train": ["e0", "e1"], "val": ["e0"]}', "'e0' is listed twice, in 'train' and 'val'"),
    ('s.json', '{"train": ["e0", 1]}', "split 'train' lists 1, expected keys as text"),
    ('s.json', '{"train": "e0"}', 'expected {"split": '), ('s.json', '["e0"]', 'expected {"split": '),
    ('s.json', '{"train": ["e0"', 'is not JSON'), ('s.csv', 'e0,train\ne1', "line 'e1': expected key,split"),
    ('s.csv', 'e0,train\ne1,', "line 'e1,': expected key,split"), ('s.csv', b'\xff\xfe', 'is not text')],
    ids=[f'case{i}' for i in range(10)])
def test_a_file_that_does_not_fit_is_refused(name, text, expected, tmp_path):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=expected) as error:
        splits.from_file(items(2), tmp_path / name)
    assert name in str(error.value) and '\n' not in str(error.value)


# ---- flags


def parsed(text):
    parser = argparse.ArgumentParser()
    splits.add_flags(parser)
    return parser.parse_args(text.split())


def test_flags_choose_the_way_to_split(tmp_path, capsys):
    entries = items(40)
    times = [f'2020-01-{1 + i // 2:02d}' for i in range(40)]
    positions = list(itertools.product(range(8), range(5)))
    assert keys(splits.split(entries, parsed(''))) == {'train': [i.key for i in entries]}
    fractions = parsed('--val_fraction=0.2 --seed=3')
    assert splits.split(entries, fractions) == splits.stratified(entries, {'val': 0.2}, seed=3)
    assert capsys.readouterr().out == ''
    by_time = splits.split(entries, parsed('--test_from=2020-01-11 --gap_days=2'), times=times)
    assert {k: len(v) for k, v in by_time.items()} == {'train': 16, 'test': 20}
    assert capsys.readouterr().out == '4 of 40 examples lie too near to another split and are left out\n'
    by_block = splits.split(entries, parsed('--val_fraction=0.3 --block=2 --buffer=0.5'), positions=positions)
    assert by_block == splits.by_block(entries, positions, 2, 0.5, {'val': 0.3}, 0)
    (tmp_path / 's.json').write_text(json.dumps({'train': [i.key for i in entries]}))
    assert len(splits.split(entries, parsed(f'--split_file={tmp_path}/s.json'))['train']) == 40


@pytest.mark.parametrize('flags, expected', [
    ('--val_fraction=0.1 --test_from=2020-01-01', '--val_from or --test_from and --val_fraction or'),
    ('--gap_days=3 --val_fraction=0.1', '--gap_days=3 needs --val_from or --test_from'),
    ('--block=1', '--block=1 needs --val_fraction'), ('--buffer=1', '--buffer=1 needs --block'),
    ('--val_from=2020-01-01', 'does not tell the time of its examples'),
    ('--val_fraction=0.1 --block=1', 'does not tell where its examples lie')], ids=[f'case{i}' for i in range(6)])
def test_flags_that_do_not_fit_are_refused(flags, expected):
    with pytest.raises(UserError, match=expected):
        splits.split(items(4), parsed(flags))
