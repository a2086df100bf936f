"""Weights of a file as a tree of ours, and the table that says what became of each of them."""
import collections
import fnmatch
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.weights.encoders import MOCOV3_HEADS, SINCOS, Encoder, encoder_of, shapes
from ssl_jax.weights.layouts import Found, Layout, compiled, names_of, numbers_in, read_tree, tree_of
from ssl_jax.weights.recognise import recognise, similar, unwrap

OWN = 'ssl_jax'   # what a file of our own state is called, in place of a layout's name


class Imported(NamedTuple):
    """A file as ours.

    `tree` see `layouts`; `found` what became of each name of the file; `encoder` None where it holds none.
    """
    layout: Layout | None
    tree: dict[str, np.ndarray]
    found: list[Found]
    encoder: Encoder | None

    @property
    def words(self) -> str:
        """What the file is."""
        return "ssl_jax's own state" if self.layout is None else f'{self.layout.name}: {self.layout.words}'


def load(source: str | os.PathLike, **options: Any) -> Imported:
    """Reads a file, see `files.read`, and a config.json of Hugging Face beside it; `options` as of `convert`."""
    from ssl_jax.weights import read
    weights = read(source)
    try:
        return convert(weights, beside(source), **options)
    except UserError as error:
        raise UserError(f'{source}: {error}') from error


def beside(source: str | os.PathLike) -> dict[str, Any]:
    """Options of the encoder that a config.json of Hugging Face next to a file tells; {} where there is none."""
    path = pathlib.Path(source)
    path = (path if path.is_dir() else path.parent) / 'config.json'
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    names = {'num_attention_heads': 'heads', 'layer_norm_eps': 'norm_eps'}
    if not isinstance(config, dict) or 'model_type' not in config:
        return {}
    return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}


def convert(weights: Mapping[str, np.ndarray], options: Mapping[str, Any] | None = None, *, layout: str | None = None,
            ignore: Sequence[str] = ()) -> Imported:
    """Weights by the names of another project, or our own, as a tree of ours.

    Args:
      weights: as from `files.read`.
      options: of the encoder, known from elsewhere.
      layout: its name, where it is known; else it is recognised.
      ignore: names that have no place, or are the problem otherwise, which are left out; '*' stands for anything.
    Raises:
      UserError: no known layout, a name that has no place and is not in `ignore`, a stack of layers with a gap, an
        encoder that lacks something.
    """
    if layout is None and any(name.startswith(('params/', 'aux/')) for name in weights):
        tree = {k: np.asarray(v) for k, v in tree_of(weights).items()}
        found = [Found(k, tuple(v.shape), '', 'no weights') if k.partition('/')[2] not in tree else
                 Found(k, tuple(v.shape), k.partition('/')[2], '') for k, v in weights.items()]
        prefix = any(k.startswith('encoder/') for k in tree)
        return Imported(None, tree, found, encoder_of(tree, options) if prefix else None)
    names, others = unwrap(weights)
    rules = recognise(names, layout)
    ignored = [name for name in weights if any(fnmatch.fnmatch(name, pattern) for pattern in ignore)]
    kept = {plain: weights[name] for plain, name in names.items() if name not in ignored}
    tree, found = read_tree(rules, kept)
    bad = [row for row in found if row.problem]
    if bad:
        shown = ', '.join(f'{names[row.theirs]} {row.shape} ({row.words})' for row in bad[:3])
        more = f' and {len(bad) - 3} more' if len(bad) > 3 else ''
        close = similar(bad[0].theirs, [n for rule in rules.table for n in _names(rule)])
        raise UserError(f'it has the layout {rules.name}, and there is a problem with {shown}{more}{close}: what shall '
                        'be left out must be named in ignore')
    found = [row._replace(theirs=names[row.theirs]) for row in found]
    counts = collections.Counter((name.partition('/')[0], words) for name, words in others.items())
    found += [Found(f'{top}/* ({count} arrays)' if count > 1 else top, (), '', words)
              for (top, words), count in counts.items()]
    found += [Found(name, tuple(weights[name].shape), '', 'left out, as asked') for name in ignored]
    known = dict(rules.encoder) | ({'usual_heads': MOCOV3_HEADS} if rules.name == 'mocov3' else {})
    if not any(path.startswith('encoder/') for path in tree):
        return Imported(rules, tree, found, None)
    encoder = encoder_of(tree, known | dict(options or {}))
    imported = Imported(rules, tree, found, encoder)
    _complete(imported)
    return imported


def settled(imported: Imported) -> dict[str, np.ndarray]:
    """The tree without position tables that its encoder computes."""
    if imported.encoder is None or imported.encoder.spec.get('pos') not in SINCOS:
        return imported.tree
    return {k: v for k, v in imported.tree.items() if not re.fullmatch(r'(\w+/)?encoder/pos_embed', k)}


def table(imported: Imported, notes: Mapping[str, str] | None = None) -> str:
    """What was read, transposed, resized, left unused: one line per name, layers of a stack together.

    Args:
      notes: of `fit`, by path in the tree.
    """
    notes = dict(notes or {})
    groups: dict[tuple, list[Found]] = {}
    for row in imported.found:
        groups.setdefault((re.sub(r'\d+', '#', row.theirs), row.shape, re.sub(r'\d+', '#', row.ours), row.words),
                          []).append(row)
    lines = [('in the file', 'shape', 'here', '')]
    for (_, shape, _, words), rows in groups.items():
        stacked = len(rows) > 1 and len({row.ours for row in rows}) == 1
        said = [words, f'{len(rows)} layers stacked' if stacked and rows[0].ours else '',
                *(notes.pop(row.ours, '') for row in rows[:1])]
        lines.append((_span([row.theirs for row in rows]), 'x'.join(map(str, shape)) or '-',
                      _span([row.ours for row in rows]) or '-', ', '.join(s for s in said if s)))
    lines += [('-', '', path, words) for path, words in notes.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return '\n'.join('  '.join((*(cell.ljust(w) for cell, w in zip(line, widths)), line[3])).rstrip() for line in lines)


def _span(names: Sequence[str]) -> str:
    """Names that differ in their numbers as one: 'blocks.0-11.norm1.bias'."""
    split = [re.split(r'(\d+)', name) for name in dict.fromkeys(names)]
    if len({len(parts) for parts in split}) > 1:
        return names[0]
    out = []
    for i, parts in enumerate(zip(*split)):
        if i % 2 == 0 or len(set(parts)) == 1:
            out.append(parts[0])
        else:
            numbers = sorted(set(map(int, parts)))
            whole = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1
            out.append(f'{numbers[0]}-{numbers[-1]}' if whole else ','.join(map(str, numbers)))
    return ''.join(out)


def _names(rule: Any) -> tuple[str, ...]:
    return names_of(rule) if hasattr(rule, 'ours') else (rule.theirs,)


def _complete(imported: Imported) -> None:
    """Raises UserError where the encoder lacks something, or has something of another shape."""
    tree = imported.tree
    for name, shape in shapes(imported.encoder).items():
        path = name.replace('stats/', 'stats/encoder/', 1) if name.startswith('stats/') else f'encoder/{name}'
        if path not in tree and not (name.startswith('norm/') and 'head/fc_norm/scale' in tree):
            raise UserError(f'it lacks {_theirs(imported.layout, path)}, {path} {shape} of ours')
        if path in tree and tuple(tree[path].shape) != shape:
            raise UserError(f'{_theirs(imported.layout, path)} makes {path} {tree[path].shape}, expected {shape}')


def _theirs(layout: Layout, path: str) -> str:
    """The name that a file of the layout has for a leaf of ours."""
    for rule in layout.table:
        if hasattr(rule, 'ours') and (match := compiled(rule.ours).fullmatch(path)):
            name = names_of(rule)[0]
            return re.sub(r'{\w+}', '*', name.format_map({k: '{' + k + '}' for k in numbers_in(name)}
                                                         | match.groupdict()))
    return 'what it has no name for'
