"""The counts of the published data set, from its side files."""
import json

import pytest

from data_prep import minicube_counts
from data_prep import minicube_samples as samples
from data_prep.convert import run
from data_prep.hephaestus_minicubes import read_json


def command(monkeypatch, timeseries, annotations):
    monkeypatch.setattr('sys.argv', ['minicube_counts', f'--quality_timeseries={timeseries}',
                                     f'--annotations={annotations}'])
    try:
        run(minicube_counts.main)
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_the_real_files_have_the_published_counts(real_data):
    """The published test figures are of 509 positive and 5992 negative interferograms."""
    folder = real_data / 'hephaestus'
    timeseries = read_json(folder / 'quality_timeseries.json')
    annotations = samples.read_annotations(folder / 'annotations.tar.gz')
    table = minicube_counts.table(minicube_counts.counts(timeseries, annotations))
    assert table.count('  ok') == len(table.splitlines()) - 1 == 42
    for what, number in (('groups', 5498), ('interferograms', 18911), ('frames', 38), ('groups of 4', 2353),
                         ('test: positive interferograms', 509), ('pretrain: interferograms', 12410)):
        assert f'\n{what:37}{number:8}{number:11}  ok' in table

    groups = samples.group_pairs(samples.quality_pairs(timeseries, annotations))
    parts = samples.split_by_date(groups, samples.DATE_SPLITS)
    assert sum(len(samples.series(g, 1, 'test', 42)) for g in parts['test']) == 6501
    volcano = samples.volcanoes(list(timeseries), read_json(folder / 'frame_names.json'))
    assert volcano['106A_09090_000404'] == volcano['128D_09016_110500']      # both see Sierra Negra
    by_frame = samples.split_by_frame(groups, volcano)
    assert all(any(g.positive for g in found) for found in by_frame.values())


def test_other_files_are_told(tmp_path, monkeypatch, capsys):
    flaws = dict(corrupted=0, processing_error=0, no_info=0)
    annotations = {str(i): dict(uniqueID=i, frameID='A', primary_date='20180101', secondary_date=f'2018010{i}',
                                label=['Earthquake' if i == 2 else 'Non_Deformation'], **flaws) for i in (2, 3, 4)}
    timeseries = {'A': {'20180101': {'length': 3, 'secondary_date': ['20180102', '20180103'], 'uniqueID': [2, 5]}}}
    for name, value in (('q.json', timeseries), ('a.json', annotations)):
        (tmp_path / name).write_text(json.dumps(value))
    assert command(monkeypatch, tmp_path / 'q.json', tmp_path / 'a.json') == 1
    rows = {line[:37].strip(): line[37:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows['annotations'] == ['3', '19919', 'NO'] and rows['groups of 2'] == ['1', '697', 'NO']
    assert rows['left out without a flaw, ids'] == ['1', 'ids', '15', 'ids', 'NO']
    assert rows['ids that differ from the annotations'] == ['2', '0', 'NO']      # 5 for 3, and 3 for a length of 2
    assert rows['train: positive interferograms'] == ['1', '1143', 'NO'] and rows['val: frames'] == ['0', '36', 'NO']
    (tmp_path / 'q.json').write_text('{')
    assert command(monkeypatch, tmp_path / 'q.json', tmp_path / 'a.json') == 2
    assert 'q.json is not JSON' in capsys.readouterr().err


@pytest.mark.parametrize('content', [[1], {'A': [1]}, {'A': {'20180101': {'secondary_date': [1]}}}])
def test_bad_lists_are_one_line(tmp_path, monkeypatch, capsys, content):
    (tmp_path / 'q.json').write_text(json.dumps(content))
    (tmp_path / 'a.json').write_text('{}')
    assert command(monkeypatch, tmp_path / 'q.json', tmp_path / 'a.json') == 2
    assert capsys.readouterr().err.count('\n') == 1
