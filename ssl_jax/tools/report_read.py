"""Run folders as a report reads them: whatever is there, and in words what is not or is damaged."""
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ssl_jax.errors import UserError

HEALTH = 'health/'
LAST = 'last/'              # before the results of the last state, where a run's results are those of its best one
BASELINE = 'random/'        # after '<tag>/': with random weights
GAIN = 'gain/'              # the difference to those
FILES = ('config.json', 'metrics.jsonl')


@dataclasses.dataclass(frozen=True)
class Scores:
    """What one evaluator found for one state: metric -> number or None, without the tag."""
    tag: str
    step: int
    state: str              # in words: of which state
    values: Mapping[str, float | None]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder; everything but the folder may be missing.

    Args:
      lines: of metrics.jsonl, name -> number or None, each with 'step'.
      results: of results.json, which is there once a run has ended, or None.
      evaluation: of tools.evaluate, or None.
      starts: of environment.json.
      notes: what is missing or damaged, in words.
    """
    path: pathlib.Path
    name: str
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, float | None]]
    results: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    starts: Sequence[Mapping[str, Any]]
    notes: Sequence[str]

    def at(self, *keys: str) -> Any:
        """A value of the config, or None."""
        return at(self.config, *keys)

    @property
    def step(self) -> int:
        """The last one that was logged; 0 before the first."""
        return max((int(line['step']) for line in self.lines), default=0)

    @functools.cached_property
    def total_steps(self) -> int | None:
        """Of the whole run, as far as the log tells."""
        if self.results and isinstance(self.results.get('step'), int):
            return self.results['step']
        for line in reversed(self.lines):
            rate, left, batch = line.get('images_per_s'), line.get('eta_s'), self.at('batch')
            if rate is not None and left is not None and batch:
                return round(line['step'] + left * rate / batch)   # as the meter made them: exact
        return None

    @functools.cached_property
    def tags(self) -> list[str]:
        """Of the evaluators: those of the config, and all that have results."""
        # An evaluator's line holds nothing else, so that what training logs under a heading is not taken for one.
        lines = [[n for n in line if n != 'step'] for line in self.lines]
        found = [n.removeprefix(LAST) for names in lines if all('/' in n for n in names) for n in names]
        found += [n for n in self.evaluation or () if '/' in n]
        configured = self.at('evals')
        return list(dict.fromkeys([*(configured if isinstance(configured, Mapping) else ()),
                                   *(n.split('/')[0] for n in found if not n.startswith(HEALTH))]))

    @functools.cached_property
    def names(self) -> list[str]:
        """Of what training logged, in order of appearance; not what evaluators found."""
        heads = (*(f'{tag}/' for tag in self.tags), LAST)
        return [n for n in dict.fromkeys(n for line in self.lines for n in line)
                if n != 'step' and not n.startswith(heads)]

    def series(self, name: str) -> tuple[list[int], list[float | None]]:
        """Steps and values of what training logged."""
        found = [(int(line['step']), line[name]) for line in self.lines if name in line]
        return [s for s, _ in found], [v for _, v in found]

    @functools.cached_property
    def _evaluated(self) -> tuple[dict[str, dict[int, dict]], dict[str, dict[int, dict]]]:
        """By tag and step: what each evaluator found on the way, and for the best state at the end."""
        way, last = ({tag: {} for tag in self.tags} for _ in range(2))
        for line in self.lines:
            for tag in self.tags:
                for store, head in ((way, f'{tag}/'), (last, f'{LAST}{tag}/')):
                    found = _of_tag(line, head)
                    if found:
                        store[tag].setdefault(int(line['step']), {}).update(found)
        best = {}
        for tag, found in last.items():
            for step, values in found.items():
                # Under the evaluator's own name stands then the best state, which is that of an earlier step.
                best.setdefault(tag, {})[step] = way[tag].pop(step, {})
                way[tag][step] = _with_baseline(values, best[tag][step])
        return way, best

    def history(self, tag: str) -> list[Scores]:
        """What an evaluator found during training, by step, each for the state of that step."""
        found = self._evaluated[0].get(tag, {})
        return [Scores(tag, step, f'step {step:,}', found[step]) for step in sorted(found)]

    def latest(self, tag: str) -> list[Scores]:
        """The results that count, the first of them foremost: of the best state, of the last, and those made later."""
        found, way = [], self.history(tag)
        best = self._evaluated[1].get(tag, {})
        if best and best[max(best)]:
            step = self.best_step
            which = 'best state' if step is None else f'best state, of step {step:,}'
            found.append(Scores(tag, max(best), which, best[max(best)]))
        found += way[-1:]
        if self.evaluation:
            values = _of_tag(self.evaluation, f'{tag}/')
            step = self.evaluation.get('step')
            if values and isinstance(step, int) and all(values != s.values for s in found):
                found.append(Scores(tag, step, f'step {step:,}, by tools.evaluate', values))
        return found

    @property
    def best_step(self) -> int | None:
        """Of the best state that is kept."""
        steps = [int(p.name) for p in self.path.glob('best/*') if p.name.isdecimal()]
        return max(steps, default=None)


def _of_tag(line: Mapping[str, Any], head: str) -> dict[str, Any]:
    """What stands in a line under a heading."""
    return {n.removeprefix(head): v for n, v in line.items() if n.startswith(head)}


def _with_baseline(values: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return dict(values) | {k: v for k, v in other.items() if k.startswith(BASELINE) and k not in values}


def at(tree: Any, *keys: str) -> Any:
    """A value in nested mappings, or None where there is none."""
    for key in keys:
        tree = tree[key] if isinstance(tree, Mapping) and key in tree else None
    return tree


def is_run(path: pathlib.Path) -> bool:
    """Whether a folder is that of a run, be it only begun."""
    return any((path / name).is_file() for name in FILES)


def is_sweep(path: pathlib.Path) -> bool:
    """Whether tools.sweep has worked in a folder."""
    return (path / 'table.md').is_file() or next(path.glob('*/job.py'), None) is not None


def check(path: pathlib.Path) -> None:
    """Raises UserError unless the folder is that of a run or a sweep, naming the runs in it where there are some."""
    if not path.is_dir():
        raise UserError(f'RUN={path}: there is no such folder')
    if not is_run(path) and not is_sweep(path):
        inside = sorted(p.name for p in path.iterdir() if p.is_dir() and (is_run(p) or is_sweep(p)))
        hint = f' (there are some in it: {", ".join(inside[:10])})' if inside else ''
        raise UserError(f'RUN={path}: expected the folder of a run, with {" or ".join(FILES)}, or of a sweep{hint}')


def read(path: pathlib.Path, name: str) -> Run:
    """A run folder, in whatever state it is.

    Args:
      name: to call it in the report.
    """
    notes: list[str] = []
    config = _json(path / 'config.json', dict, notes, 'what was run is not known')
    results, evaluation = (_json(path / f'{file}.json', dict, notes) for file in ('results', 'evaluation'))
    return Run(path=path, name=name, config=config or {}, lines=_lines(path / 'metrics.jsonl', notes), results=results,
               evaluation=evaluation and {k: v if k == 'step' else _number(v) for k, v in evaluation.items()},
               starts=[s for s in _json(path / 'environment.json', list, notes) or () if isinstance(s, dict)],
               notes=notes)


def names(paths: Iterable[pathlib.Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, from the folder's name on."""
    parts = [p.resolve().parts for p in paths]
    found = []
    for mine in parts:
        others = [p for p in parts if p != mine]
        n = next((n for n in range(1, len(mine)) if all(p[-n:] != mine[-n:] for p in others)), len(mine))
        found.append('/'.join(mine[-n:]))
    return found


def _json(path: pathlib.Path, kind: type, notes: list[str], absent: str = '') -> Any:
    try:
        found = json.loads(path.read_text(errors='replace'))
    except FileNotFoundError:
        if absent:
            notes.append(f'there is no {path.name}: {absent}')
        return None
    except ValueError:
        notes.append(f'{path.name} is damaged and left out')
        return None
    if not isinstance(found, kind):
        notes.append(f'{path.name} does not hold what it should, and is left out')
        return None
    return found


def _lines(path: pathlib.Path, notes: list[str]) -> list[dict[str, float | None]]:
    """The lines of a log; of a killed run the last one may be cut short."""
    if not path.is_file():
        notes.append('there is no metrics.jsonl: nothing was logged')
        return []
    texts, lines, damaged = path.read_text(errors='replace').splitlines(), [], []
    for i, text in enumerate(texts):
        try:
            line = json.loads(text)
            lines.append({'step': int(line['step'])} | {str(k): _number(v) for k, v in line.items() if k != 'step'})
        except (ValueError, TypeError, KeyError, AttributeError):
            damaged.append(i)
    if damaged == [len(texts) - 1]:
        notes.append('the last line of metrics.jsonl is cut short, and left out')
    elif damaged:
        notes.append(f'{len(damaged)} damaged lines of metrics.jsonl are left out, the first is line {damaged[0] + 1}')
    elif not lines:
        notes.append('metrics.jsonl is empty: nothing was logged yet')
    return lines


def _number(value: Any) -> float | None:
    """Finite numbers; what is anything else counts as not known."""
    good = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if good else None
