"""What an encoder's representation looks like: variances, similarities, rank, attention, and likeness to others."""
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from ssl_jax.errors import UserError
from ssl_jax.evals import diagnostic_figures as figures
from ssl_jax.evals import diagnostic_passes as passes
from ssl_jax.evals import patch_probe, patch_statistics, representation
from ssl_jax.evals.base import Evaluator, Values, random_weights
from ssl_jax.evals.features import ByIdentity
from ssl_jax.evals.reconstruct import spread
from ssl_jax.step import Objective, TrainState, View

Rows = dict[str, Any]
TRAINED, RANDOM = 'trained', 'random'   # names of this run's encoder, and of the same one with random weights


class Survey(NamedTuple):
    """What is found of one encoder."""
    numbers: dict[str, float]
    cosine: np.ndarray        # (distances,) mean cosine of patches at Manhattan distance 1, 2, ...
    layers: list[np.ndarray]  # (N, D) mean patch after each layer
    grid: tuple[int, int]
    shown: Rows               # of the examples in the pictures, see `passes.look`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnostics(Evaluator):
    """Of the encoder's patch tokens and of its vectors by image, on one split, without augmentation.

    Numbers: 'within_variance' over the patches of an image, 'across_variance' of the mean patch over images, their sum
    'total_variance'; 'cosine_1' of neighbouring patches and 'cosine_min', the lowest mean over the Manhattan distances;
    for the class token ('cls') and the mean patch ('mean') 'rankme/<it>', 'uniformity/<it>', and 'alignment/<it>' of
    two of the run's own training views. Where there are label maps, those of a linear classifier of patches by their
    most frequent label, trained on `train` for 5 epochs: 'probe/accuracy' on `split`, and 'probe/training_accuracy' of
    its last epoch, which SimMIM-Pets reports; 'chance/probe/accuracy' is that of the most frequent label.
    'cka/<encoder>' is the linear CKA of the last layer's mean patch with that of another encoder, 'compare/<run>/...'
    are another run's numbers. Patches of which less than half has data don't count.

    Pictures: 'similarity/000', ...: cosine of three reference patches with all others; 'attention/000', ...: of the
    last block's heads, from the class token (without one, the mean over patches); 'pca': three principal components of
    the patches as red, green and blue; 'cosine' by distance; 'cka' by layer. Each shows this encoder, the one with
    random weights, and those of `compare`. Of the pictures' numbers there are arrays of the same names, and of the
    reference patches the record 'similarity'.

    Args:
      train: split that the probe is trained on.
      limit: use so many examples of each split, evenly spaced; rank and CKA depend on it. None for all.
      count: number of examples in the pictures, always the same ones.
      foreground, boundary: labels of the reference patches; see `patch_statistics.references`.
      compare: runs, or checkpoints of runs, on data with the same channels and canvas.
      restore: see `experiment.restore`.
    """
    split: str = 'val'
    train: str = 'train'
    limit: int | None = 1024
    count: int = 4
    foreground: int | None = None
    boundary: int | None = None
    compare: tuple[str, ...] = ()
    restore: Callable[..., tuple[Objective, View, TrainState]]
    _others: dict[str, Survey] = dataclasses.field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self):
        where = f'config.evals.{self.tag}'
        self.data.manifest.split(self.split)
        if self._mapped:
            self.data.manifest.split(self.train)
            if self.train == self.split:
                raise UserError(f'{where}.train={self.train!r} is the split that is measured: expected another one')
        elif self.foreground is not None or self.boundary is not None:
            raise UserError(f"{where}.foreground={self.foreground}, boundary={self.boundary}: data set "
                            f"{self.data.root!r} has no 'label_map', expected None")
        if self.count < 1:
            raise UserError(f'{where}.count={self.count}: expected at least 1')

    def measure(self, objective: Objective, view: View, state: TrainState) -> Values:
        """The numbers of this encoder by itself."""
        return self._survey(objective, view, state).numbers

    def run(self, objective: Objective, view: View, state: TrainState) -> dict[str, Any]:
        """See the class. Other encoders are measured once."""
        if not self._others:
            compared: dict[str, Survey] = {}
            for path in self.compare:   # first, as paths may be wrong
                other = self.restore(path, self.data.image_size, self.data.channels, self.layout)
                compared[_name(path, compared)] = self._survey(*other)
            if self.baseline:
                self._others[RANDOM] = self._survey(objective, view, random_weights(objective, state))
            self._others.update(compared)
        own = self._survey(objective, view, state)
        if not self._mapped:
            logging.log_first_n(logging.WARNING, "%s: no 'label_map' in %s, so no probe of patches", 1, self.tag,
                                self.data.root)
        if 'attention' not in own.shown:
            logging.log_first_n(logging.WARNING, '%s: the encoder has no attention, so no pictures of it', 1, self.tag)
        values = dict(own.numbers)
        for name, other in self._others.items():
            prefix = 'random' if name == RANDOM else f'compare/{name}'
            values |= {f'{prefix}/{k}': v for k, v in other.numbers.items() if not k.startswith('chance/')}
            values[f'cka/{name}'] = representation.linear_cka(own.layers[-1], other.layers[-1])
        return values | self._drawn({TRAINED: own} | self._others, view)

    @property
    def _mapped(self) -> bool:
        return 'label_map' in self.data.manifest.fields

    def _survey(self, objective: Objective, view: View, state: TrainState) -> Survey:
        if not hasattr(objective, 'encoder_of'):
            raise UserError(f"config.evals.{self.tag}: {type(objective).__name__} has no 'encoder_of', expected an "
                            'objective that says which encoder predicts')
        fixed = dict(objective=ByIdentity(objective), view=ByIdentity(view), replicated=self.layout.replicated)
        call = lambda function, host: function(state.params, state.aux, self.layout.put(host), **fixed)
        rows, grid = list(self._rows(self.split, functools.partial(call, passes.read))), passes.grid(objective, state)
        stack = lambda name: np.concatenate([r[name] for r in rows])
        within, across = float(np.nanmean(stack('within'))), patch_statistics.across_variance(stack('middle'))
        pairs = stack('pairs').sum(0, dtype=np.float64)
        cosine = stack('cosine').sum(0, dtype=np.float64) / np.where(pairs > 0, pairs, np.nan)
        numbers = {'within_variance': within, 'across_variance': across, 'total_variance': within + across}
        if len(cosine):
            numbers |= {'cosine_1': float(cosine[0]), 'cosine_min': float(np.nanmin(cosine))}
        alike = np.array_equal(stack('cls'), stack('mean'))   # as of a ResNet
        for name in ('cls',) if alike else ('cls', 'mean'):
            x = stack(name)
            numbers |= {f'rankme/{name}': representation.effective_rank(x),
                        f'uniformity/{name}': representation.uniformity(x),
                        f'alignment/{name}': representation.alignment(*np.moveaxis(stack(f'{name}_views'), 1, 0))}
        if self._mapped:
            numbers |= self._probe(functools.partial(call, passes.tokens), grid)
        layers = [np.concatenate(parts) for parts in zip(*(r['layers'] for r in rows))]
        shown = self._shown(functools.partial(call, passes.look), stack('several'))
        return Survey(numbers, cosine, layers, grid, shown)

    def _rows(self, split: str, function: Callable[[Mapping[str, np.ndarray]], Any]) -> Iterator[Rows]:
        """What `function` finds of every batch, without padding."""
        block, blocks = self.layout.block()
        fields = ('image', 'label_map') if self._mapped else ('image',)
        waiting = None
        for host in self.data.eval(split, batch=self.batch, process_index=block, process_count=blocks, fields=fields,
                                   limit=self.limit):
            ready, waiting = waiting, function(host)
            # One batch behind, so that the device has work while the host counts.
            if ready is not None:
                yield passes.fetched(ready)
        yield passes.fetched(waiting)

    def _probe(self, function: Callable, grid: tuple[int, int]) -> dict[str, float]:
        tokens, labels = {}, {}
        for split in (self.train, self.split):
            rows = []
            for r in self._rows(split, function):
                found = patch_statistics.patch_counts(r['label_map'], grid, max(r['label_map'].max() + 1, 1))
                rows.append((r['patches'], patch_statistics.majority(found)))
            tokens[split], labels[split] = (np.concatenate(parts) for parts in zip(*rows))
        classes = int(labels[self.train].max()) + 1
        if not classes:
            raise UserError(f'config.evals.{self.tag}: no patch of split {self.train!r} has a label')
        head, training = patch_probe.fit(tokens[self.train], labels[self.train],
                                         patch_probe.start(tokens[self.train].shape[-1], classes), self.layout)
        held_out, known = labels[self.split], labels[self.train][labels[self.train] >= 0]
        chance = np.mean(held_out[held_out >= 0] == np.bincount(known).argmax()) if (held_out >= 0).any() else np.nan
        return {'probe/accuracy': patch_probe.accuracy(head, tokens[self.split], held_out),
                'probe/training_accuracy': training, 'chance/probe/accuracy': float(chance)}

    def _shown(self, function: Callable, several: np.ndarray) -> Rows:
        """What pictures need of the chosen examples, half of which have several labels if there are such."""
        load = self.data.load(self.split, ('image', 'label_map') if self._mapped else ('image',), self.limit,
                              weighted=True)
        places = spread(several, self.count)
        parts = self.layout.batch_parts
        padded = np.pad(places, (0, -len(places) % parts), constant_values=load.count)   # of weight 0
        block, blocks = self.layout.block()
        examples = [load((0, int(p))) for p in padded.reshape(blocks, -1)[block]]
        return passes.fetched(function({k: np.stack([e[k] for e in examples]) for k in examples[0]}))

    def _drawn(self, surveys: Mapping[str, Survey], view: View) -> dict[str, Any]:
        """Pictures, arrays and the record of them all."""
        own = surveys[TRAINED]
        images = figures.images(own.shown, self.data.channels, view)
        values: dict[str, Any] = {'cosine': figures.cosine({k: s.cosine for k, s in surveys.items()})}
        values |= {f'cosine/{k}': s.cosine for k, s in surveys.items()}
        matrices = {k: representation.cka_matrix(own.layers, s.layers) for k, s in surveys.items()}
        values |= {'cka': figures.cka(matrices, TRAINED)} | {f'cka_layers/{k}': m for k, m in matrices.items()}
        scores = {k: _components(s) for k, s in surveys.items()}
        values |= {'pca': figures.components(images, scores)} | {f'pca/{k}': s for k, s in scores.items()}
        record = []
        for i, image in enumerate(images):
            references, facts = self._references(own, i)
            maps = {k: _similarity(s, i, references, own.grid) for k, s in surveys.items()}
            values[f'similarity/{i:03d}'] = figures.similarity(image, own.grid, references, maps)
            values |= {f'similarity/{i:03d}/{k}': m for k, m in maps.items()}
            record.append({'index': int(own.shown['index'][i])} | facts | {'references': references})
            heads = {k: _heads(s, i) for k, s in surveys.items() if 'attention' in s.shown}
            if heads:
                values[f'attention/{i:03d}'] = figures.attention(image, heads)
                values |= {f'attention/{i:03d}/{k}': a for k, a in heads.items()}
        low, high = figures.SIMILARITY
        return values | {'similarity': {'grid': own.grid, 'encoders': list(surveys), 'lowest': low, 'highest': high,
                                        'examples': record}}

    def _references(self, survey: Survey, i: int) -> tuple[dict[str, int], dict[str, Any]]:
        """Reference patches of an example, and what is known of its labels."""
        shown, usable = survey.shown, survey.shown['usable'][i]
        if not self._mapped:
            return patch_statistics.references_without_labels(shown['image'][i], usable, survey.grid), {}
        classes = int(max(shown['label_map'].max() + 1, 1))
        counts = patch_statistics.patch_counts(shown['label_map'][i:i + 1], survey.grid, classes)[0]
        labels = patch_statistics.majority(counts).reshape(survey.grid).tolist()
        return (patch_statistics.references(counts, usable, self.foreground, self.boundary),
                {'classes': classes, 'labels': labels})


def _name(path: str, taken: Mapping[str, Any]) -> str:
    """Of a run the name of its folder, of one checkpoint with its step; the whole path where that is taken."""
    parts = pathlib.Path(path).expanduser().absolute().parts
    name = f'{parts[-3]}-{parts[-1]}' if len(parts) > 3 and parts[-1].isdigit() else parts[-1]
    return name if name not in (*taken, TRAINED, RANDOM) else '-'.join(parts[1:])


def _components(survey: Survey) -> np.ndarray:
    """(n, rows, columns, 3) principal components of the patches of all examples together."""
    tokens = survey.shown['patches']
    return representation.components(tokens.reshape(-1, tokens.shape[-1])).reshape(len(tokens), *survey.grid, 3)


def _similarity(survey: Survey, i: int, references: Mapping[str, int], grid: tuple[int, int]) -> np.ndarray:
    """(references, rows, columns) cosine of each with all patches of an example."""
    tokens = survey.shown['patches'][i]
    unit = tokens / np.maximum(np.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)
    rows = [patch_statistics.same_place(patch, grid, survey.grid) for patch in references.values()]
    return (unit[rows] @ unit.T).reshape(-1, *survey.grid)


def _heads(survey: Survey, i: int) -> np.ndarray:
    """(heads, rows, columns) of an example, in multiples of what each of all tokens gets if they get the same."""
    heads = survey.shown['attention'][i]
    return heads.reshape(len(heads), *survey.grid)


build = Diagnostics
