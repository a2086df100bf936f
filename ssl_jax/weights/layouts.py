"""Tables between other projects' names of weights and ours; each is read in both directions.

Our side is a flat *tree*: {'encoder/blocks/attn/qkv/kernel': (depth, D, 3D), 'stats/encoder/bn1/mean': ...}, the leaves
of a state without its first level ('params', 'aux'; see `state_path`). Their side is {'blocks.0.attn.qkv.weight': ...}.

In a pattern '{i}' stands for a number. One that is in their name alone counts the layers of a stack, axis 0 of ours.
"""
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

Arrays = Mapping[str, np.ndarray]
PARAMS = ('encoder', 'head', 'predictor', 'decoder', 'mask_token')


class Patch(NamedTuple):
    """What some changes of layout depend on: the side of a patch and its channels."""
    side: int
    channels: int


class Change(NamedTuple):
    """What becomes of values: `read` makes ours of a list of theirs, `write` is its inverse."""
    words: str
    read: Callable[[list[np.ndarray], Patch | None], np.ndarray]
    write: Callable[[np.ndarray, Patch | None], list[np.ndarray]]


class Rule(NamedTuple):
    """Their name, or several that make one of ours, and our name."""
    theirs: str | tuple[str, ...]
    ours: str
    change: Change


class Fixed(NamedTuple):
    """A value of theirs that ours do not store, because it follows from others.

    Args:
      of: the path of ours that it belongs to; where a tree has that, the value is written.
      make: the value, from the tree; None writes nothing.
      check: a value read must be this one.
    """
    theirs: str
    of: str
    words: str
    make: Callable[[Arrays], np.ndarray | None]
    check: bool = True


SAME = Change('', lambda v, _: v[0], lambda x, _: [x])
LINEAR = Change('transposed', lambda v, _: v[0].T, lambda x, _: [x.T])
CONV = Change('OIHW -> HWIO', lambda v, _: v[0].transpose(2, 3, 1, 0), lambda x, _: [x.transpose(3, 2, 0, 1)])


def shaped(words: str, read: Callable[[np.ndarray], np.ndarray],
           write: Callable[[np.ndarray], np.ndarray]) -> Change:
    """A change that adds or drops axes."""
    return Change(words, lambda v, _: read(v[0]), lambda x, _: [write(x)])


def joined(count: int, transpose: bool = False) -> Change:
    """Several outputs side by side, as the queries, keys and values of one projection."""
    turn = (lambda x: x.T) if transpose else (lambda x: x)
    return Change(f'{count} joined' + ', transposed' * transpose,
                  lambda v, _: turn(np.concatenate(v)), lambda x, _: np.split(turn(x), count))


def dense(theirs: str, ours: str) -> list[Rule]:
    """A linear layer; where one has no bias, the rule for it matches nothing."""
    return [Rule(f'{theirs}.weight', f'{ours}/kernel', LINEAR), Rule(f'{theirs}.bias', f'{ours}/bias', SAME)]


def norm(theirs: str, ours: str) -> list[Rule]:
    """Scale and shift of a normalisation."""
    return [Rule(f'{theirs}.weight', f'{ours}/scale', SAME), Rule(f'{theirs}.bias', f'{ours}/bias', SAME)]


def stats_path(ours: str) -> str:
    """Where the running statistics of a module of our tree are: of 'momentum/head' at 'momentum_stats/head'."""
    first, _, rest = ours.partition('/')
    return f'{first}_stats/{rest}' if first in ('momentum', 'teacher') else f'stats/{ours}'


def batch_norm(theirs: str, ours: str) -> list[Rule | Fixed]:
    """Scale, shift and running statistics; the counter of batches is not ours."""
    stats = stats_path(ours)
    return [*norm(theirs, ours), Rule(f'{theirs}.running_mean', f'{stats}/mean', SAME),
            Rule(f'{theirs}.running_var', f'{stats}/var', SAME),
            Fixed(f'{theirs}.num_batches_tracked', f'{stats}/mean', 'counter of batches', lambda _: np.int64(0), False)]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one project names the weights of one kind of model.

    Args:
      words: what it is, for people.
      table: rules and fixed values.
      marks: patterns; a file with a match of each has this layout, unless one before it in the list fits too.
      unused: patterns of names that hold nothing of ours, with the reason.
      aliases: (regular expression, replacement) for other spellings of their names, which are read and not written.
      encoder: options of the encoder that follow from the layout and not from shapes.
      objective: the one that holds all of it.
      container: where the authors' file keeps it.
      prefix: before every name in the authors' file, from a wrapper around the model.
      pos_resize: the authors' rule for positions of another grid; see `models.posemb.resize`.
      after, before: further changes of a tree that was read, or is to be written.
    """
    name: str
    words: str
    table: tuple[Rule | Fixed, ...]
    marks: tuple[str, ...]
    unused: tuple[tuple[str, str], ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    encoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    objective: str | None = None
    container: str = ''
    prefix: str = ''
    pos_resize: str = 'torch'
    after: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda tree: tree
    before: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda tree: tree


class Found(NamedTuple):
    """One name of a file, and what became of it."""
    theirs: str
    shape: tuple[int, ...]
    ours: str      # '' where nothing did
    words: str
    problem: bool = False


def read_tree(layout: Layout, weights: Arrays) -> tuple[dict[str, np.ndarray], list[Found]]:
    """Their weights as a tree of ours, and what became of each name, in the order of `weights`.

    Names without a rule, incomplete stacks and fixed values that are others than ours are marked as problems.
    """
    rules = [(compiled(name), rule, place) for rule in layout.table if isinstance(rule, Rule)
             for place, name in enumerate(names_of(rule))]
    fixed = [(compiled(rule.theirs), rule) for rule in layout.table if isinstance(rule, Fixed)]
    unused = [(compiled(name), reason) for name, reason in layout.unused]
    parts: dict[tuple, dict] = {}
    found, waiting = {}, []
    for name, value in weights.items():
        spelt = respelt(layout, name)
        shape = tuple(value.shape)
        hits = [(m, rule, place) for pattern, rule, place in rules if (m := pattern.fullmatch(spelt))]
        if hits:
            m, rule, place = hits[0]
            numbers = {k: int(v) for k, v in m.groupdict().items()}
            ours = rule.ours.format(**numbers)
            layer = tuple(n for k, n in sorted(numbers.items()) if '{' + k + '}' not in rule.ours)
            parts.setdefault((ours, rule), {}).setdefault(layer, {})[place] = name
            found[name] = Found(name, shape, ours, rule.change.words)
        elif any(m := pattern.fullmatch(spelt) for pattern, _ in fixed):
            rule = next(rule for pattern, rule in fixed if pattern.fullmatch(spelt))
            waiting.append((name, value, rule))
            found[name] = Found(name, shape, '', rule.words)
        elif any(pattern.fullmatch(spelt) for pattern, _ in unused):
            reason = next(reason for pattern, reason in unused if pattern.fullmatch(spelt))
            found[name] = Found(name, shape, '', reason)
        else:
            found[name] = Found(name, shape, '', 'no place for it', problem=True)

    patch = _patch_of(layout, weights)
    tree = {}
    for (ours, rule), layers in parts.items():
        names = [name for places in layers.values() for name in places.values()]
        several = len(names_of(rule))
        lacking = [layer for layer in layers if len(layers[layer]) < several]
        lacking += [(i,) for i in range(len(layers)) if () not in layers and (i,) not in layers]
        if lacking:
            numbers = ', '.join(str(*layer) for layer in lacking)
            found |= {n: found[n]._replace(words=f'layer {numbers} of it is missing', problem=True) for n in names}
            continue
        made = [rule.change.read([np.asarray(weights[layers[layer][k]]) for k in range(several)], patch)
                for layer in sorted(layers)]
        stacked = () not in layers
        if len({x.shape for x in made}) > 1:
            shapes = ', '.join(map(str, sorted({x.shape for x in made})))
            found |= {n: found[n]._replace(words=f'layers of different shapes: {shapes}', problem=True) for n in names}
            continue
        tree[ours] = np.stack(made) if stacked else made[0]
    tree = layout.after(tree)
    for name, value, rule in waiting:
        expected = rule.make(tree) if rule.check and _has(tree, rule.of) else None
        if expected is not None and not same(value, expected):
            found[name] = found[name]._replace(words=f'not the usual {rule.words}, which ours compute', problem=True)
    return tree, list(found.values())


def write_tree(layout: Layout, tree: Arrays) -> tuple[dict[str, np.ndarray], list[str]]:
    """Our tree under their names, and the paths that the layout has no name for."""
    tree = layout.before(dict(tree))
    kernel = tree.get('encoder/patch_embed/kernel')
    patch = None if kernel is None else Patch(kernel.shape[0], kernel.shape[2])
    rules = [(compiled(rule.ours), rule) for rule in layout.table if isinstance(rule, Rule)]
    named, homeless = {}, []
    for path, value in tree.items():
        hits = [(m, rule) for pattern, rule in rules if (m := pattern.fullmatch(path))]
        if not hits:
            homeless.append(path)
            continue
        match, rule = hits[0]
        counted = [k for k in numbers_in(names_of(rule)[0]) if k not in match.groupdict()]
        layers = [({counted[0]: str(i)}, x) for i, x in enumerate(value)] if counted else [({}, value)]
        for number, x in layers:
            values = rule.change.write(np.asarray(x), patch)
            for name, v in zip(names_of(rule), values):
                named[name.format(**match.groupdict(), **number)] = np.ascontiguousarray(v).reshape(v.shape)
    for rule in layout.table:
        if not isinstance(rule, Fixed):
            continue
        for path in (p for p in tree if compiled(rule.of).fullmatch(p)):
            value, numbers = rule.make(tree), compiled(rule.of).fullmatch(path).groupdict()
            counted = [k for k in numbers_in(rule.theirs) if k not in numbers]
            for i in range(len(tree[path])) if counted else (0,):
                name = rule.theirs.format(**numbers, **({counted[0]: i} if counted else {}))
                if value is not None:
                    named.setdefault(name, np.asarray(value))
    return named, homeless


def state_path(path: str) -> str:
    """Where a leaf of a tree is in a state: 'params/encoder/norm/scale', 'aux/teacher/encoder/norm/scale'."""
    return f'{"params" if path.split("/")[0] in PARAMS else "aux"}/{path}'


def tree_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """A flat state {'params/...', 'aux/...', ...} as a tree; the step and the optimiser's moments are left out."""
    return {k.partition('/')[2]: v for k, v in state.items() if k.startswith(('params/', 'aux/'))}


def respelt(layout: Layout, name: str) -> str:
    """A name of theirs as the layout's table spells it."""
    for old, new in layout.aliases:
        name = re.sub(old, new, name)
    return name


def compiled(pattern: str) -> re.Pattern:
    """The regular expression of a pattern."""
    return re.compile(re.sub(r'\\{(\w+)\\}', r'(?P<\1>\\d+)', re.escape(pattern)))


def numbers_in(pattern: str) -> list[str]:
    """The names of a pattern's numbers."""
    return re.findall(r'{(\w+)}', pattern)


def names_of(rule: Rule) -> tuple[str, ...]:
    return (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal, but for the rounding of a table computed in float32."""
    return a.shape == b.shape and bool(np.allclose(np.asarray(a, np.float64), b, rtol=0, atol=2e-6))


def _has(tree: Iterable[str], pattern: str) -> bool:
    return any(compiled(pattern).fullmatch(path) for path in tree)


def _patch_of(layout: Layout, weights: Arrays) -> Patch | None:
    for rule in layout.table:
        if isinstance(rule, Rule) and rule.ours == 'encoder/patch_embed/kernel':
            shapes = [v.shape for k, v in weights.items() if respelt(layout, k) == rule.theirs]
            if shapes and len(shapes[0]) == 4:
                return Patch(shapes[0][2], shapes[0][1])
    return None
