"""A profiler's trace as tables: what the devices did, by kind of operation, by part of the step, and one by one.

From the .xplane.pb files that jax.profiler writes.
"""
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from ssl_jax import xplane
from ssl_jax.errors import UserError
from ssl_jax.xplane import Instruction

STEP = 'train'   # the annotation around every step
MATRIX, ELEMENTWISE, COPIES = 'matrix products, convolutions', 'elementwise, reductions', 'copies, layout'
COLLECTIVES, SORTING, CONTROL = 'between devices', 'gather, scatter, sort', 'loops'
DECOMPOSITIONS, OTHER, HOST = 'matrix decompositions', 'other', 'to and from the host'

_COLLECTIVE = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute',
               'collective-broadcast', 'send', 'recv')
# The first of these that is among the opcodes of an instruction and of what is fused in it.
_OPCODES = {**dict.fromkeys([f'{name}{end}' for name in _COLLECTIVE for end in ('', '-start', '-done')], COLLECTIVES),
            **dict.fromkeys(('dot', 'convolution', 'ragged-dot', 'scaled-dot'), MATRIX),
            **dict.fromkeys(('gather', 'scatter', 'sort', 'topk'), SORTING),
            **dict.fromkeys(('cholesky', 'triangular-solve'), DECOMPOSITIONS),
            **dict.fromkeys(('infeed', 'outfeed'), HOST), **dict.fromkeys(('while', 'conditional'), CONTROL)}
_LAYOUT = set('''copy copy-start copy-done transpose bitcast bitcast-convert broadcast concatenate pad slice reshape
                 reverse dynamic-slice dynamic-update-slice async-start async-done'''.split())
_ELEMENTS = set('''abs add and atan2 clamp compare convert cosine divide exponential floor fusion log map maximum
                   minimum multiply negate not or power reduce reduce-window rng-bit-generator rsqrt select
                   shift-left shift-right-logical sine sqrt subtract tanh xor'''.split())
_NEUTRAL = {'fusion', 'call', 'parameter', 'constant', 'iota', 'tuple', 'get-tuple-element', 'custom-call'}
# Functions of libraries and kernels, by their names.
_KERNELS = tuple((re.compile(pattern, re.IGNORECASE), kind) for pattern, kind in (
    (r'nccl|all_?reduce|all_?gather', COLLECTIVES), (r'lapack|solver|eigh|svd', DECOMPOSITIONS),
    (r'gemm|matmul|cutlass|cublas|cudnn|fmha|flash|attention|nvjet|wgmma|conv(?!ert)', MATRIX),
    (r'topk|sort', SORTING), (r'memcpy(h2d|d2h)', HOST), (r'memcpy|memset', COPIES)))
# In the path of an operation, what transformations and control flow put there.
_SYNTAX = {'while', 'body', 'cond', 'closed_call', 'checkpoint', 'remat', 'rematted_computation', 'pjit', 'shard_map',
           'custom_jvp_call', 'custom_vjp_call', 'core_call', 'scan', 'stack_blocks'}
_WRAPPED = re.compile(r'(?:transpose|jvp|vmap|checkpoint|remat)\((.*)\)')
_SCOPE = re.compile(r'[A-Za-z_]\w*')


@dataclasses.dataclass(frozen=True)
class Op:
    """One run of an operation on a device.

    Args:
      part: the scopes of the model's code that it comes from, 'encoder/attention'; '' if it is in none.
      backward: whether it belongs to the derivative.
      start, end: ns; the end is that of what goes on in the background, too.
      own: ns, without the operations that run within it.
    """
    name: str
    kind: str
    part: str
    backward: bool
    program: str
    device: str
    start: float
    end: float
    own: float


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one process recorded of these steps."""
    steps: tuple[int, ...]
    ops: tuple[Op, ...]

    @property
    def devices(self) -> list[str]:
        return sorted({op.device for op in self.ops})

    @property
    def span(self) -> float:
        """ns from the start of the first operation to the end of the last one."""
        return max(op.end for op in self.ops) - min(op.start for op in self.ops)

    @property
    def idle(self) -> float:
        """The share of `span` in which a device has nothing to do, on average."""
        busy = sum(_covered((o.start, o.end) for o in self.ops if o.device == device) for device in self.devices)
        return max(0.0, 1 - busy / (self.span * len(self.devices)))


@dataclasses.dataclass(frozen=True)
class _Event:
    name: str
    start: float
    duration: float
    end: float
    device: str
    stats: Mapping[str, Any]


def find(path: str) -> pathlib.Path:
    """The newest trace in a folder, such as that of a run; where several processes wrote one, the first one's.

    Raises:
      UserError: there is none.
    """
    folder = pathlib.Path(path).expanduser()
    if folder.is_file():
        return folder
    found = [p for p in folder.glob('**/plugins/profile/*/*.xplane.pb')
             if not re.search('process[1-9]', str(p.relative_to(folder)))]
    if not found:
        raise UserError(f'{path}: expected a folder with a trace (*.xplane.pb), such as that of a run with '
                        'config.profile.start')
    return max(found, key=lambda p: p.stat().st_mtime)


def read(path: pathlib.Path) -> Trace:
    """The trace in an .xplane.pb file.

    Raises:
      UserError: it is not one, or has no operation of a device.
    """
    try:
        trace = parse(path.read_bytes())
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise UserError(f'{path} is damaged, or no trace ({type(error).__name__})') from error
    if not trace.ops:
        raise UserError(f'{path}: the trace has no operation of a device')
    return trace


def parse(data: bytes) -> Trace:
    """The trace in a serialised XSpace."""
    shared, programs = xplane.metadata(memoryview(data))
    planes = list(jax.profiler.ProfileData.from_serialized_xspace(data).planes)
    host = [p for p in planes if p.name.startswith('/host:CPU')]
    steps = {int(dict(e.stats)['step_num']) for p in host for line in p.lines for e in line.events if e.name == STEP}
    accelerators = [p for p in planes if re.search(r'/device:(GPU|TPU):\d+$', p.name)]
    ops = []
    for plane in accelerators or host:
        lines = _accelerator(plane, shared[plane.name]) if accelerators else _processor(plane)
        ops += [_op(event, own, programs) for line in lines for event, own in _own_times(line)]
    return Trace(tuple(sorted(steps)), tuple(ops))


def _accelerator(plane, shared: Mapping[str, Mapping[str, Any]]) -> Iterator[list[_Event]]:
    """Operations by queue of a GPU or TPU. What other lines have is derived from these, and would count twice."""
    lines = list(plane.lines)
    streams = [line for line in lines if line.name.startswith('Stream')]
    for line in streams or [line for line in lines if line.name == 'XLA Ops']:
        yield [_Event(e.name, e.start_ns, e.duration_ns, e.end_ns, plane.name,
                      shared.get(e.name, {}) | dict(e.stats)) for e in line.events]


def _processor(plane) -> Iterator[list[_Event]]:
    """Operations by thread of a CPU. Some only begin in it: an event says when they have ended in other threads."""
    lines, ended = [], {}
    for line in plane.lines:
        lines.append([])
        for e in line.events:
            stats = dict(e.stats)
            if 'hlo_op' in stats:
                lines[-1].append((e, stats))
            elif e.name.startswith('end: ') and '_c' in stats:
                ended[stats['_c']] = e.start_ns
    for line in lines:
        yield [_Event(e.name, e.start_ns, e.duration_ns, max(e.end_ns, ended.get(stats.get('_p'), 0)),
                      f'cpu:{stats.get("device_ordinal", 0)}', stats) for e, stats in line]


def _own_times(events: Iterable[_Event]) -> Iterator[tuple[_Event, float]]:
    """Each event of a line with its duration less that of the events within it."""
    outer: list[list] = []
    for event in sorted(events, key=lambda e: (e.start, -e.duration)):
        while outer and outer[-1][0].start + outer[-1][0].duration <= event.start:
            yield tuple(outer.pop())
        if outer:
            outer[-1][1] -= event.duration
        outer.append([event, event.duration])
    while outer:
        yield tuple(outer.pop())


def _op(event: _Event, own: float, programs: Mapping[str, Mapping[str, Instruction]]) -> Op:
    stats = event.stats
    # On a TPU the name is the whole instruction.
    name = str(stats.get('hlo_op') or event.name).removeprefix('%').split(' = ')[0]
    program = str(stats.get('hlo_module', ''))
    exact = f'{program}({stats.get("program_id")})'
    found = programs.get(exact, programs.get(program, programs.get('', {}))).get(name)
    found = found or Instruction(frozenset([re.sub(r'[.\d]+$', '', name)]), event.name, str(stats.get('tf_op', '')))
    part, backward = part_of(found.source)
    return Op(name, kind_of(found), part, backward, program, event.device, event.start, event.end, max(own, 0.0))


def kind_of(instruction: Instruction) -> str:
    """Its kind, by what it computes."""
    opcodes = instruction.opcodes
    for opcode, kind in _OPCODES.items():
        if opcode in opcodes:
            return kind
    for pattern, kind in _KERNELS:
        if pattern.search(instruction.target):
            return kind
    working = opcodes - _NEUTRAL
    if working and working <= _LAYOUT:
        return COPIES
    return ELEMENTWISE if any(o in _ELEMENTS or 'fusion' in o or o.startswith('wrapped_') for o in opcodes) else OTHER


def part_of(source: str) -> tuple[str, bool]:
    """(scopes, whether backward) of a JAX operation: 'jit(f)/transpose(jvp(encoder))/while/body/mlp/dot_general'."""
    for path in source.split(';'):
        # What a compiler merged is several paths: the first that says where it comes from.
        scopes = [s for component in _components(path)[:-1] for s in _scopes(component)]
        if scopes:
            return '/'.join(scopes), 'transpose(' in source
    return '', 'transpose(' in source


def _components(path: str) -> list[str]:
    """Split at the slashes that are in no parentheses."""
    parts, depth = [''], 0
    for c in path:
        depth += (c == '(') - (c == ')')
        if c == '/' and depth == 0:
            parts.append('')
        else:
            parts[-1] += c
    return parts


def _scopes(component: str) -> Iterator[str]:
    wrapped = _WRAPPED.fullmatch(component)
    if wrapped:
        for inner in _components(wrapped[1]):
            yield from _scopes(inner)
    elif _SCOPE.fullmatch(component) and component not in _SYNTAX and not component.startswith('branch_'):
        yield component


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    total, until = 0.0, float('-inf')
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
