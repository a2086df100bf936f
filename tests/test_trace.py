import jax
import pytest

from ssl_jax import profiling, trace
from ssl_jax.errors import UserError
from ssl_jax.xplane import Instruction


def space(text: str) -> bytes:
    return jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)


def plane(name, lines, events=(), stats=()):
    """lines: {name: [(event, start, duration in ns, {stat: text or number})]}; events: {name: {stat: text}}."""
    names = {n: i for i, n in enumerate([*events, *(e for line in lines.values() for e, *_ in line
                                                    if e not in events)], 1)}
    given = [s for line in lines.values() for *_, stats in line for s in stats]
    keys = {n: i for i, n in enumerate(dict.fromkeys([*given, *(s for e in dict(events).values() for s in e)]), 1)}

    def stat(key, value):
        kind = f'str_value: "{value}"' if isinstance(value, str) else f'int64_value: {value}'
        return f'stats {{ metadata_id: {keys[key]} {kind} }}'

    text = f'planes {{ name: "{name}" '
    for key, i in keys.items():
        text += f'stat_metadata {{ key: {i} value {{ id: {i} name: "{key}" }} }} '
    for event, i in names.items():
        shared = ' '.join(stat(k, v) for k, v in dict(events).get(event, {}).items())
        text += f'event_metadata {{ key: {i} value {{ id: {i} name: "{event}" {shared} }} }} '
    for i, (line, found) in enumerate(lines.items()):
        inner = ' '.join(f'events {{ metadata_id: {names[e]} offset_ps: {1000 * start} duration_ps: {1000 * duration} '
                         + ' '.join(stat(k, v) for k, v in stats.items()) + ' }' for e, start, duration, stats in found)
        text += f'lines {{ id: {i} name: "{line}" {inner} }} '
    return text + '} '


STEPS = plane('/host:CPU', {'python': [('train', 0, 9, {'step_num': 3}), ('train', 50, 9, {'step_num': 4})]})


def test_gpu_streams_count_once():
    kernel = lambda op, start, ns: (op, start, ns, {'hlo_op': op, 'hlo_module': 'jit_step'})
    streams = {'Stream #1(Compute)': [kernel('gemm_fusion_dot.1', 100, 30), kernel('loop_add_fusion', 150, 10),
                                      ('MemcpyH2D', 170, 5, {})],
               'Stream #2': [kernel('all-reduce-start.7', 120, 25)],
               'XLA Ops': [kernel('gemm_fusion_dot.1', 100, 30)], 'Steps': [('3', 100, 80, {})]}
    found = trace.parse(space(STEPS + plane('/device:GPU:0', streams)))
    assert found.steps == (3, 4) and found.devices == ['/device:GPU:0'] and len(found.ops) == 4
    assert {op.name: op.kind for op in found.ops} == {
        'gemm_fusion_dot.1': trace.MATRIX, 'loop_add_fusion': trace.ELEMENTWISE, 'MemcpyH2D': trace.HOST,
        'all-reduce-start.7': trace.COLLECTIVES}
    # 100-145, 150-160 and 170-175 of 100-175.
    assert found.span == 75 and found.idle == pytest.approx(15 / 75)


def test_tpu_operations_by_what_their_names_share():
    dot = '%fusion.3 = f32[8,8] fusion(%p), kind=kOutput'
    events = {dot: {'tf_op': 'jit(step)/transpose(jvp(encoder))/while/body/mlp/dot_general', 'hlo_op': 'fusion.3'}}
    found = trace.parse(space(STEPS + plane('/device:TPU:0', {
        'XLA Modules': [('jit_step(7)', 0, 60, {})],
        'XLA Ops': [('%while.1 = () while()', 0, 50, {}), (dot, 5, 40, {})]}, events)))
    loop, inner = sorted(found.ops, key=lambda op: op.start)
    assert (inner.name, inner.part, inner.backward, inner.own) == ('fusion.3', 'encoder/mlp', True, 40)
    assert (loop.name, loop.kind, loop.own, found.idle) == ('while.1', trace.CONTROL, 10, 0)


def test_cpu_operations_that_end_in_another_thread():
    op = lambda name, start, ns, flow: (name, start, ns, {'hlo_op': name, 'device_ordinal': 1, '_p': flow})
    found = trace.parse(space(plane('/host:CPU', {
        'a': [op('dot.1', 0, 10, 5), op('add.2', 60, 40, 6), ('ThunkExecutor::Execute', 0, 90, {})],
        'b': [('end: dot.1', 45, 1, {'_c': 5}), ('end: add.2', 99, 1, {'_c': 6})]})))
    assert [(o.name, o.own, o.end - o.start, o.device) for o in found.ops] == [('dot.1', 10, 45, 'cpu:1'),
                                                                              ('add.2', 40, 40, 'cpu:1')]
    assert found.idle == pytest.approx(0.15)


@pytest.mark.parametrize(('opcodes', 'target', 'kind'), [
    ({'fusion', 'dot', 'add'}, '', trace.MATRIX), ({'custom-call'}, '__cublas$lt$matmul', trace.MATRIX),
    ({'fusion', 'copy', 'transpose', 'parameter'}, '', trace.COPIES), ({'fusion', 'convert'}, '', trace.ELEMENTWISE),
    ({'custom-call'}, 'lapack_ssyevd_ffi', trace.DECOMPOSITIONS), ({'sort', 'compare'}, '', trace.SORTING),
    ({'reduce-scatter'}, '', trace.COLLECTIVES), ({'custom-call'}, 'mine', trace.OTHER)])
def test_kinds(opcodes, target, kind):
    assert trace.kind_of(Instruction(frozenset(opcodes), target, '')) == kind


@pytest.mark.parametrize(('source', 'part'), [
    ('jit(f)/jvp(encoder)/while/body/closed_call/attention/vmap(BTNH,BSNH->BNTS)/dot_general',
     ('encoder/attention', False)),
    ('jit(f)/transpose(jvp())/transpose(jvp(decoder))/checkpoint/rematted_computation/mlp/dot_general',
     ('decoder/mlp', True)),
    ('jit(<lambda>)/jit(_threefry_split)/while/body/add', ('', False)),
    ('jit(f)/mul;jit(f)/optimiser/jit(_where)/select_n', ('optimiser', False)),
    ("state.params['encoder']['norm']['bias']", ('', False)), ('', ('', False))])
def test_parts(source, part):
    assert trace.part_of(source) == part


def test_not_a_trace(tmp_path):
    with pytest.raises(UserError, match='expected a folder with a trace'):
        trace.find(str(tmp_path))
    path = tmp_path / 'plugins' / 'profile' / 'now' / 'host.xplane.pb'
    path.parent.mkdir(parents=True)
    for content, message in ((b'\xff' * 50, 'damaged, or no trace'), (space(STEPS), 'no operation of a device')):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            trace.read(trace.find(str(tmp_path)))
    assert profiling.main([str(tmp_path)]) == 2
