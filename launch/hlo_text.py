"""The text of optimised HLO as instructions, shapes and groups of devices."""
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

_BITS = {'pred': 8, 'token': 0, 'opaque': 0, 's2': 2, 'u2': 2, 's4': 4, 'u4': 4, 'bf16': 16, 'c64': 64, 'c128': 128}
_ARRAY = re.compile(r'\b([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{\s*$')
_LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_CALLED = re.compile(r'\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'\b(?:branch_computations|called_computations)=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_IOTA_GROUPS = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_LISTED_GROUPS = re.compile(r'replica_groups=\{\{([\d,]+)\}')
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
                          r'\{([^}]*)\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Args:
      operands: names.
      rest: what follows the opcode: the operands as written, and attributes.
    """
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str

    def called(self) -> Iterator[str]:
        """Names of the computations that it runs."""
        yield from _CALLED.findall(self.rest)
        for names in _BRANCHES.findall(self.rest):
            yield from (n.strip().lstrip('%') for n in names.split(',') if n.strip())


def read(text: str) -> tuple[dict[str, dict[str, Instruction]], str | None]:
    """Computations by name, their instructions by name, and the name of the one that is the program."""
    computations, entry, table = {}, None, None
    for line in re.sub(r'/\*.*?\*/', '', text).splitlines():
        head = _HEAD.match(line)
        if head and not line.startswith('HloModule'):
            table = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif line.startswith('}'):
            table = None
        elif table is not None and (match := _LINE.match(line)):
            table[match[1]] = _instruction(match[1], match[2])
    return computations, entry


def _instruction(name, text):
    end = _closing(text, 0) + 1 if text.startswith('(') else text.index(' ')
    shape, rest = text[:end], text[end:].lstrip()
    start = rest.index('(')
    end = _closing(rest, start)
    operands = () if rest.startswith(('parameter(', 'constant(')) else tuple(
        o.split()[-1].lstrip('%') for o in _split(rest[start + 1:end]) if o.split())
    return Instruction(name, shape, rest[:start], operands, rest[start:])


def _closing(text, start):
    depth = 0
    for i in range(start, len(text)):
        depth += {'(': 1, ')': -1}.get(text[i], 0)
        if not depth:
            return i
    raise ValueError(f'unbalanced parentheses: {text[:80]}')


def _split(text):
    """At the commas outside of brackets; operands may have shapes with layouts before their names."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in '([{') - (c in ')]}')
        if c == ',' and not depth:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def trips(loop: Instruction, computations: Mapping[str, Mapping[str, Instruction]]) -> int | None:
    """How often a while loop runs; None where the text does not say."""
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    # A counter from 0 that is compared with a constant.
    condition = computations.get(re.search(r'condition=%?([\w.\-]+)', loop.rest)[1], {}).values()
    constants = [re.match(r'\((\d+)\)', i.rest) for i in condition if i.opcode == 'constant']
    compares = [i for i in condition if i.opcode == 'compare' and 'direction=LT' in i.rest]
    return int(constants[0][1]) if len(constants) == len(compares) == 1 and constants[0] else None


def arrays(shape: str) -> list[tuple[str, list[int], str]]:
    """(dtype, sizes, layout) of the arrays in a shape."""
    return [(kind, [int(n.lstrip('<=')) for n in sizes.split(',') if n], layout or '')
            for kind, sizes, layout in _ARRAY.findall(shape)]


def size_of(shape: str, *, off_chip: bool = False) -> int:
    """Bytes of all arrays in a shape; `off_chip` are those in memory space 0, the device's main memory."""
    total = 0
    for kind, sizes, layout in arrays(shape):
        bits = _BITS[kind] if kind in _BITS else 8 if kind.startswith('f8') else int(re.sub(r'\D', '', kind) or 0)
        total += 0 if off_chip and re.search(r'S\([1-9]', layout) else math.prod(sizes) * bits
    return total // 8


def group_of(rest: str, devices: int) -> tuple[int, ...]:
    """The devices of the first group of a collective with these attributes, of all devices in the program.

    Raises:
      ValueError: the groups are written in an unknown way.
    """
    listed, iota, mesh = (pattern.search(rest) for pattern in (_LISTED_GROUPS, _IOTA_GROUPS, _MESH_GROUPS))
    if listed:
        return tuple(map(int, listed[1].split(',')))
    if iota:
        return tuple(_numbers(iota[2], iota[3]).reshape(_integers(iota[1]))[0].tolist())
    if mesh:
        return _mesh_group(*mesh.groups())
    if re.search(r'replica_groups=(?!\{\})', rest):
        raise ValueError(f'unknown form of replica groups: {rest[rest.index("replica_groups"):][:120]}')
    return tuple(range(max(devices, 1)))


def _integers(text):
    return [int(n) for n in (text or '').split(',') if n]


def _numbers(sizes, order):
    numbers = np.arange(math.prod(_integers(sizes))).reshape(_integers(sizes))
    return numbers.transpose(_integers(order)) if order else numbers


def _mesh_group(axes, sizes, order, names):
    """mesh['a'=4,'b'=8], device_ids=([8,4]T(1,0)) {'a','b':(2)4}: devices along 'a' and the last 4 of 2 x 4 of 'b'."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    chosen = {name: (int(before or 1), int(size or axes[name]))
              for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", names)}
    shape, along = [], []
    for name, size in axes.items():
        before, part = chosen.get(name, (size, 1))
        along += [len(shape) + 1] if name in chosen else []
        shape += [before, part, size // (before * part)]
    numbers = _numbers(sizes, order) if sizes else np.arange(math.prod(shape))
    groups = np.moveaxis(numbers.reshape(shape), along, range(-len(along), 0))
    groups = groups.reshape(-1, math.prod(part for _, part in chosen.values()))
    return tuple(groups[(groups == 0).any(1)][0].tolist())
