"""What a compiled program does, read from the text of its optimised HLO: collectives, matrix products, memory traffic.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop runs.
"""
import dataclasses
import math
import re

import numpy as np

from launch.hlo_text import arrays, group_of, read, size_of, trips

KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')
_OTHER_NAMES = {'ragged-all-to-all': 'all-to-all', 'collective-broadcast': 'collective-permute'}

_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all',
         'partition-id', 'replica-id', 'iota', 'optimization-barrier'}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of the program.

    Args:
      kind: of KINDS.
      operands: bytes of each array that a device puts in.
      group: the devices that take part with device 0, by their number in the program.
      count: how often it runs per call of the program.
      source: the JAX operation that it stands for, '' where the compiler does not say.
    """
    kind: str
    operands: tuple[int, ...]
    group: tuple[int, ...]
    count: int
    source: str = ''

    @property
    def size(self) -> int:
        """Bytes of the whole arrays: of an all-gather what comes out, else what goes in."""
        return sum(self.operands) * (len(self.group) if self.kind == 'all-gather' else 1)

    @property
    def moved(self) -> float:
        """Bytes that each device must receive per run: a ring's optimum (Thakur et al. 2005)."""
        if self.kind == 'collective-permute':
            return self.size
        share = (len(self.group) - 1) / len(self.group)
        return self.size * share * (2 if self.kind == 'all-reduce' else 1)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one instruction costs a device, at each of `count` runs.

    Args:
      flops: of matrix products and convolutions, two operations per multiply-add.
      traffic: bytes read from and written to the device's memory; what lies on the chip is free.
    """
    flops: float
    traffic: float
    count: int


@dataclasses.dataclass(frozen=True)
class Program:
    """One call, on one device.

    Args:
      unknown_loops: loops whose number of trips the text does not tell; they count once.
    """
    collectives: tuple[Collective, ...]
    work: tuple[Work, ...]
    unknown_loops: int

    @property
    def flops(self) -> float:
        return sum(w.flops * w.count for w in self.work)

    @property
    def traffic(self) -> float:
        return sum(w.traffic * w.count for w in self.work)


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: it is no HLO text.
    """
    computations, entry = read(text)
    if entry is None:
        raise ValueError('no ENTRY computation: not the text of an HLO module')
    devices = math.prod(int(n) for key in ('num_partitions', 'replica_count')
                        for n in re.findall(rf'\b{key}=(\d+)', text[:text.index('\n')]))
    found, work, unknown = {}, [], 0
    for name, times in _runs(computations, entry):
        for i in computations[name].values():
            unknown += i.opcode == 'while' and trips(i, computations) is None
            flops = 0.0
            for inner, table in _inside(i, computations[name], computations):
                flops += _flops(inner, table) if inner.opcode in ('dot', 'convolution') else 0
                one = _collective(inner, table, i, times, devices)
                # Overlapped with other work it is written three times, of one channel: start, middle and end.
                channel = re.search(r'channel_id=(\d+)', inner.rest)
                found |= {(name, channel[1] if channel else id(inner)): one} if one else {}
            traffic = _traffic(i, computations[name], computations)
            work += [Work(flops, traffic, times)] if flops or traffic else []
    return Program(tuple(found.values()), tuple(work), unknown)


_CONTROL = ('while', 'conditional', 'call', 'async-start')


def _runs(computations, entry):
    """(computation, how often it runs) of the program, its loops and branches, once for each of their callers."""
    todo = [(entry, 1)]
    while todo:
        name, times = todo.pop()
        yield name, times
        for i in computations[name].values():
            if i.opcode in _CONTROL:
                inner = times * (trips(i, computations) or 1) if i.opcode == 'while' else times
                todo += [(c, inner) for c in i.called() if c in computations]


def _inside(i, table, computations):
    """(instruction, table of its computation) of this one and of those fused into it."""
    todo = [(i, table)]
    while todo:
        i, table = todo.pop()
        yield i, table
        if i.opcode not in _CONTROL and not i.opcode.endswith(('-done', '-update')):
            todo += [(j, computations[c]) for c in i.called() if c in computations for j in computations[c].values()]


def _collective(i, table, caller, times, devices):
    kind = i.opcode.removesuffix('-start')
    kind = _OTHER_NAMES.get(kind, kind)
    if kind not in KINDS:
        return None
    # A TPU's reduce-scatter is a fusion of an all-reduce and a slice.
    fused = any(c.startswith('all-reduce-scatter') for c in caller.called())
    kind = 'reduce-scatter' if kind == 'all-reduce' and fused else kind
    group = group_of(i.rest, devices)
    if len(group) == 1 and kind != 'collective-permute':
        return None
    source = re.search(r'op_name="([^"]*)"', i.rest) or re.search(r'op_name="([^"]*)"', caller.rest)
    operands = tuple(size_of(table[o].shape) for o in i.operands if o in table)
    return Collective(kind, operands, group, times, source[1] if source else '')


def _flops(i, table):
    if any(o not in table for o in i.operands):
        return 0
    output, left, right = (arrays(s)[0][1] for s in (i.shape, *(table[o].shape for o in i.operands)))
    if i.opcode == 'dot':
        axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', i.rest)[1]
        return 2 * math.prod(output) * math.prod(left[int(a)] for a in axes.split(',') if a)
    names = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', i.rest).groups()
    inputs, kernel, outputs = (dict(zip(*pair)) for pair in zip(names, (left, right, output)))
    window = re.search(r'window=\{([^}]*)\}', i.rest)
    window = dict(part.split('=') for part in window[1].split()) if window else {}
    products = outputs['b'] * outputs['f'] * kernel['i']
    for axis in filter(str.isdigit, names[1]):
        size, stride, hole, step = (int(window[k].split('x')[int(axis)]) if k in window else 1
                                    for k in ('size', 'stride', 'lhs_dilate', 'rhs_dilate'))
        before = int(window['pad'].split('x')[int(axis)].split('_')[0]) if 'pad' in window else 0
        # Padding, and holes that dilation puts between inputs, are no work: a TPU's programs multiply matrices by
        # convolutions that slide one over much padding.
        at = np.arange(outputs[axis])[:, None] * stride + np.arange(size) * step - before
        products *= int(((at >= 0) & (at < inputs[axis] * hole) & (at % hole == 0)).sum())
    return 2 * products


_SLICES = ('dynamic-slice', 'slice', 'gather')


def _traffic(i, table, computations):
    """Bytes read and written; of what is sliced or updated in place, the slice alone."""
    if i.opcode in _FREE or i.opcode.endswith(('-done', '-update')) or '"AllocateBuffer"' in i.rest:
        return 0
    written = 0 if i.opcode.endswith('-start') else size_of(i.shape, off_chip=True)
    read = {o: size_of(table[o].shape, off_chip=True) for o in i.operands if o in table}
    if i.opcode in _SLICES:
        return 2 * written
    if i.opcode == 'dynamic-update-slice':
        return 2 * read[i.operands[1]]
    if i.opcode == 'fusion':
        for j, inside in _inside(i, table, computations):
            if j.opcode == 'dynamic-update-slice' and j.operands[1] in inside:
                update = size_of(inside[j.operands[1]].shape)
                written = max(written - size_of(j.shape) + update, update)
        read = {o: min(size, _read_by(i, k, computations)) for k, o in enumerate(i.operands) if (size := read.get(o))}
    return written + sum(read.values())


def _read_by(fusion, number, computations):
    """Bytes of its operand of this number that a fusion reads."""
    inside = computations.get(next(fusion.called(), ''), {})
    names = [j.name for j in inside.values() if j.opcode == 'parameter' and j.rest.startswith(f'({number})')]
    return sum(_read(name, inside, computations) for name in names)


def _read(name, table, computations):
    total = 0
    for user in (j for j in table.values() if name in j.operands):
        if user.opcode in _SLICES and user.operands[0] == name:
            total += size_of(user.shape)
        elif user.opcode == 'bitcast':
            total += _read(user.name, table, computations)
        elif user.opcode == 'fusion':
            total += sum(_read_by(user, k, computations) for k, o in enumerate(user.operands) if o == name)
        elif user.opcode != 'dynamic-update-slice' or user.operands[0] != name:
            return math.inf
    return total
