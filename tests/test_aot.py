import dataclasses
import importlib.util
import math
import os
import subprocess
import sys

import pytest
import tiny
from ml_collections import ConfigDict

from launch import compiled, estimate, hlo, report
from launch.chips import CHIPS, Slice
from launch.estimate import Devices
from ssl_jax import flops
from ssl_jax.errors import UserError

# As the compilers write it: layouts with tiles and memory spaces, comments in long lists, a loop with a known number of
# trips and one that only its condition tells, a fusion that slices a stack, TPU's fused reduce-scatter.
TEXT = '''HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (p0: f32[64,32]) -> f32[8,32] {
  %p0 = f32[64,32]{1,0} parameter(0)
  %all-reduce.9 = f32[64,32]{1,0} all-reduce(%p0), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %cut = f32[8,32]{1,0} dynamic-slice(%all-reduce.9, %zero, %zero), dynamic_slice_sizes={8,32}
}

%sliced (p0: f32[4,64,32], p1: s32[]) -> f32[64,32] {
  %p0.1 = f32[4,64,32]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %layer = f32[1,64,32]{2,1,0} dynamic-slice(%p0.1, %p1, %zero.1, %zero.1), dynamic_slice_sizes={1,64,32}
  ROOT %flat = f32[64,32]{1,0} bitcast(%layer)
}

%body (arg: (s32[], f32[16,64], f32[4,64,32])) -> (s32[], f32[16,64], f32[4,64,32]) {
  %arg = (s32[], f32[16,64]{1,0:T(8,128)}, /*index=2*/f32[4,64,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %h = f32[16,64]{1,0} get-tuple-element(%arg), index=1
  %stack = f32[4,64,32]{2,1,0} get-tuple-element(%arg), index=2
  %fusion.3 = f32[64,32]{1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%sliced
  %gather = (f32[64,32]{1,0}, f32[64,256]{1,0}) all-gather-start(%fusion.3), replica_groups=[2,4]<=[8], SOURCE
  %gathered = f32[64,256]{1,0} all-gather-done(%gather)
  %dot.1 = f32[16,256]{1,0} dot(%h, %gathered), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[16,64]{1,0}, f32[4,64,32]{2,1,0}) tuple(%i, %h, %stack)
}

%condition (arg.1: (s32[], f32[16,64], f32[4,64,32])) -> pred[] {
  %arg.1 = (s32[], f32[16,64]{1,0}, f32[4,64,32]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: f32[16,64], b: f32[4,64,32]) -> f32[8,32] {
  %a = f32[16,64]{1,0} parameter(0)
  %b = f32[4,64,32]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], f32[16,64]{1,0}, f32[4,64,32]{2,1,0}) tuple(%start, %a, %b)
  %loop = (s32[], f32[16,64]{1,0}, f32[4,64,32]{2,1,0}) while(%init), condition=%condition, body=%bodyBACKEND
  %c = f32[64,32]{1,0} constant({...})
  %all-to-all.1 = bf16[8,32]{1,0} all-to-all(%e), channel_id=2, GROUPS, dimensions={0}
  %e = bf16[8,32]{1,0} parameter(2)
  %kernel = f32[3,3,4,16]{3,2,1,0} parameter(3)
  %image = f32[2,10,10,4]{3,2,1,0} parameter(4)
  %convolution.1 = f32[2,8,8,16]{3,2,1,0} convolution(%image, %kernel), window={size=3x3}, dim_labels=b01f_01io->b01f
  ROOT %scattered = f32[8,32]{1,0} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.1
}
'''


def program(limit=4, known=None, groups='replica_groups=[4,2]<=[2,4]T(1,0)'):
    backend = f', backend_config={{"known_trip_count":{{"n":"{known}"}}}}' if known else ''
    source = 'metadata={op_name="jit(step)/while/body/dot_general"}'
    text = TEXT.replace('LIMIT', str(limit)).replace('BACKEND', backend).replace('SOURCE', source)
    return hlo.parse(text.replace('GROUPS', groups))


def test_collectives_count_as_often_as_their_loop_runs():
    found = {c.kind: c for c in program(limit=4).collectives}
    assert set(found) == {'all-gather', 'all-to-all', 'reduce-scatter'}
    gather = found['all-gather']
    assert (gather.count, gather.group, gather.source) == (4, (0, 1, 2, 3), 'jit(step)/while/body/dot_general')
    assert gather.size == 64 * 256 * 4 / 2 and gather.moved == gather.size * 3 / 4
    scatter = found['reduce-scatter']
    assert (scatter.count, scatter.size, len(scatter.group)) == (1, 64 * 32 * 4, 8)
    assert scatter.moved == scatter.size * 7 / 8
    assert found['all-to-all'].group == (0, 4) and found['all-to-all'].size == 8 * 32 * 2
    assert {c.kind: c.count for c in program(limit=4, known=24).collectives}['all-gather'] == 24


@pytest.mark.parametrize('groups, expected', [
    ('replica_groups={{0,5},{1,4}}', (0, 5)), ('replica_groups={}', tuple(range(8))),
    ('replica_groups=[4,2]<=[8]', (0, 1)),
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
    ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", tuple(range(8))),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", (0, 4)),
    ("replica_groups=mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)), ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4))])
def test_groups_in_all_ways_of_writing_them(groups, expected):
    assert {c.kind: c.group for c in program(groups=groups).collectives}['all-to-all'] == expected


def test_groups_that_are_not_understood():
    with pytest.raises(ValueError, match='unknown form of replica groups: replica_groups=@circle'):
        program(groups='replica_groups=@circle')


CONVOLUTION = '''HloModule jit_step, num_partitions=1

ENTRY %main (a: f32[6,5,SIZE], b: f32[KERNEL,7,5]) -> f32[OUT,6,7] {
  %a = f32[6,5,SIZE]{2,1,0} parameter(0)
  %b = f32[KERNEL,7,5]{2,1,0} parameter(1)
  ROOT %c = f32[OUT,6,7]{2,1,0} convolution(%a, %b), window={WINDOW}, dim_labels=bf0_0oi->0bf
}
'''


@pytest.mark.parametrize('size, kernel, out, window, products', [
    (9, 3, 7, 'size=3', 21), (9, 3, 9, 'size=3 pad=1_1', 25), (9, 3, 4, 'size=3 stride=2', 12),
    (9, 3, 5, 'size=3 rhs_dilate=2', 15),
    (3, 3, 3, 'size=3 lhs_dilate=2', 5),           # inputs at 0, 2, 4 of 5 places
    (1, 16, 16, 'size=16 pad=15_15 rhs_reversal=1', 16)])   # a product of matrices, once for each place
def test_padding_and_holes_are_no_work(size, kernel, out, window, products):
    text = CONVOLUTION
    for name, value in dict(SIZE=size, KERNEL=kernel, OUT=out, WINDOW=window).items():
        text = text.replace(name, str(value))
    assert hlo.parse(text).flops == 2 * 6 * 7 * 5 * products


def test_an_overlapped_collective_counts_once():
    parts = ''.join(f'  %part.{i} = f32[64,32]{{1,0}} all-gather(%c), channel_id=7, replica_groups=[1,8]<=[8]\n'
                    for i in range(3))
    text = TEXT.replace('  %e =', parts + '  %e =').replace('GROUPS', '').replace('BACKEND', '').replace('LIMIT', '4')
    assert sorted(c.count for c in hlo.parse(text).collectives if c.kind == 'all-gather') == [1, 4]


def test_an_all_reduce_moves_everything_twice():
    one = hlo.Collective('all-reduce', (600, 424), tuple(range(4)), 1)
    assert one.size == 1024 and one.moved == 2 * 1024 * 3 / 4
    assert dataclasses.replace(one, kind='collective-permute').moved == 1024


def test_products_and_traffic():
    found = program(limit=4)
    assert found.flops == 4 * 2 * 16 * 256 * 64 + 2 * (2 * 8 * 8 * 16) * (3 * 3 * 4)
    # The fusion reads a layer of the stack, and leaves it on the chip.
    layer = 4 * 64 * 32 + 4
    assert any(w.count == 4 and w.traffic == pytest.approx(layer, abs=8) for w in found.work)
    assert found.unknown_loops == 0


def test_a_loop_of_unknown_length_is_told():
    text = TEXT.replace('BACKEND', '').replace('GROUPS', '')
    text = text.replace('%limit = s32[] constant(LIMIT)', '%limit = s32[] add(%i.1, %i.1)')
    assert hlo.parse(text).unknown_loops == 1
    with pytest.raises(ValueError, match='no ENTRY'):
        hlo.parse('HloModule x\n')


def test_chips_agree_with_those_whose_utilisation_is_measured():
    names = {'v4': 'TPU v4', 'v5e': 'TPU v5 lite', 'v5p': 'TPU v5', 'v6e': 'TPU v6 lite'}
    assert {k: CHIPS[k].flops for k in names} == {k: flops.PEAK_FLOPS[v] for k, v in names.items()}
    for chip in CHIPS.values():
        assert 100 < chip.flops / chip.bandwidth < 1000   # a slip of a unit would be a factor of 8 or 1000
        assert 1 / 20 < chip.interconnect / chip.bandwidth < 1 / 2
        assert chip.link * 2 * chip.dimensions == chip.interconnect


def test_a_slice_by_name():
    slice_ = Slice.named('v5p:8x8x16')
    assert slice_.shape == (8, 8, 16) and slice_.chips == 1024
    assert slice_.grown(8).name == 'v5p:2x2x2' and slice_.grown(32).name == 'v5p:2x4x4'
    assert Slice.named('v5e:16x16').grown(512) is None


@pytest.mark.parametrize('text, message', [
    ('v5:16x16', "unknown chip 'v5'"), ('v5e', 'expected 2 sides, as in v5e:4x4'),
    ('v5e:4x4x4', 'expected 2 sides'), ('v5p:8x8', 'expected 3 sides, as in v5p:4x4x4'),
    ('v5e:0x4', 'expected 2 sides'), ('v5e:32x32', 'at most 256 chips, got 1024'), ('', 'unknown chip')], ids=str)
def test_a_slice_that_is_none(text, message):
    with pytest.raises(UserError, match=message) as error:
        Slice.named(text)
    assert '\n' not in str(error.value) and '--topology=' in str(error.value)


def places(slice_):
    return [(i, j, 0) for i in range(slice_.shape[0]) for j in range(slice_.shape[1])]


def test_the_links_that_a_group_can_use():
    slice_ = Slice.named('v5e:16x16')
    everywhere, column = places(slice_), [(0, j, 0) for j in range(16)]
    assert slice_.ring(everywhere)[0] == slice_.chip.interconnect
    assert slice_.ring(column) == (slice_.chip.interconnect / 2, pytest.approx(8e-6))
    # Half a side is no ring.
    assert slice_.ring(column[:8]) == (slice_.chip.interconnect / 4, pytest.approx(7e-6))


def result(**changes):
    slice_ = Slice.named('v5e:2x4')
    where = Devices(slice_, tuple(places(slice_)), dict(data=8, fsdp=1, tensor=1))
    step = program()
    base = compiled.Result(
        name='mae', slice=slice_, mesh=where.mesh, batch=64, remat=False, accumulate=1, needed=8 * 2 ** 30,
        limit=16 * 2 ** 30, model_flops=1e12, steps_per_epoch=100, seconds=1.0, program=step, devices=where,
        memory=compiled.Memory(10, 8, 8, 5, 1), estimate=estimate.estimate(step, where))
    return dataclasses.replace(base, **changes)


def test_the_report_names_what_was_asked_for():
    text = '\n'.join(report.text(result(), price=2.0, scaling=True))
    for part in ('8.00 of 16 GiB per device: fits', 'reduce-scatter', 'all-to-all', 'images/s', 'chip-hours', 'MFU',
                 'at 2 per chip-hour', 'v5e:16x16', '10 % of compute'):
        assert part in text, part
    assert result().memory.total == 16
    unfit = '\n'.join(report.text(result(program=None, needed=20 * 2 ** 30)))
    assert '20.00 of 16 GiB per device: DOES NOT FIT' in unfit and '--suggest' in unfit


def test_the_estimate_is_a_roofline_of_each_instruction():
    slice_ = Slice.named('v5e:2x4')
    where = Devices(slice_, tuple(places(slice_)), dict(data=8, fsdp=1, tensor=1))
    gather = hlo.Collective('all-gather', (2 ** 20,), tuple(range(8)), 3)
    step = hlo.Program((gather,), (hlo.Work(197e9, 0.0, 2), hlo.Work(0.0, 800e6, 1), hlo.Work(197e9, 800e6, 1)), 0)
    found = estimate.estimate(step, where)
    assert found.matrices == pytest.approx(3e-3) and found.compute == pytest.approx(4e-3)
    # Two lines, of 2 and of 4 chips: a link in each, and 4 hops.
    assert found.communication == pytest.approx(3 * (7 * 2 ** 20 / 100e9 + 4e-6))
    assert found.step == found.compute + found.communication


def test_weak_scaling_follows_the_ring():
    slice_ = Slice.named('v5p:2x2x2')
    where = Devices(slice_, tuple((i >> 2, i >> 1 & 1, i & 1) for i in range(8)), dict(data=8, fsdp=1, tensor=1))
    group = tuple(range(8))
    collectives = hlo.Collective('all-reduce', (8000,), group, 2), hlo.Collective('all-gather', (1000,), group, 1)
    step = hlo.Program(collectives, (hlo.Work(459e9, 0.0, 1),), 0)
    scales = estimate.weak_scaling(step, where, (8, 64, 1024))
    assert [s.chips for s in scales] == [8, 64, 1024]
    for s in scales:
        assert s.moved == pytest.approx((2 * 2 * 8000 + 8000) * (s.chips - 1) / s.chips)
    assert estimate.crossing(scales) is None
    slow = [dataclasses.replace(s, communication=s.chips * 1e-5) for s in scales]
    assert estimate.crossing(slow) == 64 and math.isclose(slow[0].compute, 1e-3)


def test_meshes_worth_trying():
    assert estimate.meshes((16, 16), 256, 4096) == [
        dict(data=256, fsdp=1, tensor=1), dict(data=16, fsdp=16, tensor=1), dict(data=1, fsdp=256, tensor=1)]
    assert estimate.meshes((8, 8, 8), 512, 256)[0] == dict(data=256, fsdp=1, tensor=2)


def test_the_search_stops_at_what_fits_and_ranks_by_images_per_second():
    config = ConfigDict(dict(batch=64, accumulate=1, mesh=dict(data=-1, fsdp=1, tensor=1, min_size=4),
                             objective=dict(name='mae', encoder=dict(remat=False), decoder=dict(width=16)))).lock()
    seen = []

    def step(config, slice_, devices):
        c = config
        seen.append((c.batch, c.mesh.fsdp, c.objective.encoder.remat, c.accumulate))
        assert c.mesh.min_size == 4 and 'remat' not in c.objective.decoder
        fits = c.mesh.fsdp > 1 and c.objective.encoder.remat or c.accumulate == 2
        changes = dict(batch=c.batch, mesh=dict(c.mesh), remat=c.objective.encoder.remat, accumulate=c.accumulate)
        times = estimate.Estimate(0.0, 1e-3 * (2 if c.mesh.fsdp == 1 else 1), 0.0)
        return result(**changes, estimate=times) if fits else result(**changes, program=None, estimate=None)

    found = list(compiled.search(config, Slice.named('v5e:2x4'), [None] * 8, step=step))
    assert seen[:3] == [(64, 1, False, 1), (64, 1, True, 1), (64, 1, True, 2)] and seen[3][1] == 4
    assert config.batch == 64 and not config.objective.encoder.remat
    lines = report.ranking(found)
    assert len(lines) == 6 + 3
    assert all('batch 128' in line and 'fsdp 1 x' not in line for line in lines[:2])
    assert 'fsdp 1 x' in lines[5] and 'batch 64' in lines[5] and 'in 2 parts' in lines[5]
    assert any(line.startswith('the first: --config.mesh.data=') and '--config.batch=128' in line for line in lines)
    assert report.ranking([r for r in found if not r.fits]) == [
        f'none of {sum(not r.fits for r in found)} variants fits: take more chips, or fewer images']
    without = ConfigDict(tiny.config('anywhere'))
    assert 'mesh' not in without and compiled.changed(without, 8, dict(data=2, fsdp=4), False, 1).mesh.fsdp == 4


def run(*arguments, path=None):
    environment = os.environ | ({'PYTHONPATH': path} if path else {})
    return subprocess.run([sys.executable, '-m', 'launch.aot', *arguments], capture_output=True, text=True,
                          env=environment, timeout=300)


def test_mistakes_are_one_line(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(f'from ml_collections import ConfigDict\n\ndef get_config():\n'
                    f'    return ConfigDict({tiny.config("nowhere")!r})\n')
    for arguments, message in ((['--topology=v9:2x2'], "unknown chip 'v9'"), ([], '--topology is missing')):
        done = run(f'--config={path}', *arguments)
        assert done.returncode == 2 and done.stderr.startswith('error: ') and message in done.stderr, done
        assert len(done.stderr.splitlines()) == 1
    if importlib.util.find_spec('libtpu') is None:
        done = run(f'--config={path}', '--topology=v5e:2x2')
        assert done.returncode == 2 and "pip install 'ssl_jax[tpu]'" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs the TPU compiler: pip install libtpu')
def test_a_step_compiles_for_a_tpu(tmp_path):
    path = tmp_path / 'config.py'
    planned = dict(records=64, image_size=(32, 32), channels=('a', 'b', 'c'), classes=2)
    path.write_text(f'from ml_collections import ConfigDict\n\ndef get_config():\n'
                    f'    return ConfigDict({tiny.config("nowhere", data=dict(root="nowhere", planned=planned))!r})\n')
    done = run(f'--config={path}', '--topology=v5e:2x2')
    assert done.returncode == 0, done.stderr
    assert 'fits' in done.stdout and 'all-reduce' in done.stdout and 'all-to-all' not in done.stdout
