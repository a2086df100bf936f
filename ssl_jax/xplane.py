"""What jax.profiler.ProfileData leaves out of an .xplane.pb file: the programs, and what all events of a name share.

Read from the wire format of protocol buffers, by the field numbers of xplane.proto and hlo.proto.
"""
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a compiled program.

    Args:
      opcodes: its own and those of what is fused in it.
      target: the library's function that it calls; '' for none.
      source: the JAX operation behind it, 'jit(step)/jvp(encoder)/dot_general'; '' where the compiler does not say.
    """
    opcodes: frozenset[str]
    target: str
    source: str


def metadata(data: memoryview) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, dict[str, Instruction]]]:
    """Statistics by plane, name of the events, and name; and the instructions of the programs by their name.

    A program is under 'module(id)' and under 'module'; those of all programs are under '', too.

    Raises:
      ValueError, IndexError, KeyError: this is no serialised XSpace.
    """
    shared, programs = {}, {'': {}}
    for plane in _fields(data).get(1, ()):
        fields = _fields(plane)
        name = _text(fields, 2)
        stat_names = {k: _text(v, 2) for k, v in _map(fields.get(5, ()))}
        shared[name] = {}
        for _, event in _map(fields.get(4, ())):
            stats = {stat_names.get(s[1][0]): s for s in map(_fields, event.get(5, ()))}
            module = stats.get('Hlo Proto') or stats.get('hlo_proto')
            if module:
                found = _instructions(_fields(_fields(module[6][0])[1][0]))
                for key in (_text(event, 2), _text(event, 2).split('(')[0], ''):
                    programs.setdefault(key, {}).update(found)
            else:
                shared[name][_text(event, 2)] = {
                    key: stat_names.get(s[7][0]) if 7 in s else _text(s, 5) if 5 in s else s.get(3, s.get(4))[0]
                    for key, s in stats.items() if s.keys() & {3, 4, 5, 7}}
    return shared, programs


def _instructions(module: Mapping[int, list]) -> dict[str, Instruction]:
    """Of an HloModuleProto, by name."""
    computations = [_fields(c) for c in module.get(3, ())]
    bodies = {c[5][0]: [_fields(i) for i in c.get(2, ())] for c in computations if 5 in c}
    found = {}
    for i in (i for body in bodies.values() for i in body):
        opcode, source = _text(i, 2), _fields(i[7][0]) if 7 in i else {}
        opcodes = {opcode}
        if opcode in ('fusion', 'call', 'async-start'):
            called = [n for ids in i.get(38, ()) for n in ([ids] if isinstance(ids, int) else _varints(ids))]
            opcodes |= {_text(inner, 2) for n in called for inner in bodies.get(n, ())}
        found[_text(i, 1)] = Instruction(frozenset(opcodes), _text(i, 28), _text(source, 2))
    return found


def _map(entries: Iterable[memoryview]) -> Iterator[tuple[int, dict[int, list]]]:
    for entry in map(_fields, entries):
        yield entry.get(1, [0])[0], _fields(entry[2][0])


def _text(fields: Mapping[int, list], number: int) -> str:
    return bytes(fields[number][-1]).decode(errors='replace') if number in fields else ''


def _fields(message: memoryview) -> dict[int, list]:
    """Field number -> its values, of a message in the wire format: numbers, and bytes of all that is not a varint."""
    found, at = {}, 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
        else:
            size, at = (8, at) if wire == 1 else (4, at) if wire == 5 else _varint(message, at)
            if wire not in (1, 2, 5) or at + size > len(message):
                raise ValueError(f'wire type {wire} at byte {at}')
            value, at = message[at:at + size], at + size
        found.setdefault(key >> 3, []).append(value)
    return found


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = message[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _varints(packed: memoryview) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value
