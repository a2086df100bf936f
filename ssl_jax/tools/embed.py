"""Embeddings of a data set by a run's encoder, as Zarr or npz, and a map of them.

    python -m ssl_jax.tools.embed runs/cifar10 -o cifar10.zarr
    python -m ssl_jax.tools.embed runs/cifar10 -o lenses.npz --data data/lenses --split test --tokens cls,mean,patches

For every split (--split) the store has a group, OUT['test'], of arrays over its examples, in their order: 'cls' and
'mean' (of the patch tokens), (N, D) float32; 'patches', (N, patches, D), row by row of the image, where asked for; and
what is known of the examples: 'key', 'label' (-1: none), 'group', other texts and numbers. In an .npz, the name of an
array is 'test/cls'. The same command finishes a Zarr store whose making was interrupted. All devices take part, and of
several processes on a shared disk each writes its own rows.

Beside it, OUT's name with .html, goes a map: two dimensions by PCA, and with --umap by UMAP, too; one file that opens
offline, to be zoomed, coloured by class, group or number, with a thumbnail of the example under the pointer.
"""
import argparse
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging

from ssl_jax import processes
from ssl_jax.errors import UserError, nearest

TOKENS = ('cls', 'mean', 'patches')


def embed(run: str, output: str, *, splits: Sequence[str] = (), data: str | None = None,
          tokens: Sequence[str] = ('cls', 'mean'), checkpoint: str | None = None, points: int = 20_000,
          thumbnails: int = 2000, umap: bool = False) -> pathlib.Path:
    """Writes the embeddings and their map; returns the path of the latter. What is there already is not made again.

    Args:
      run: folder of a run.
      output: .zarr or .npz.
      splits: of the data set; all if empty.
      data: root of another data set, brought to the size of the run's images, and normalised as a run on it would.
      tokens: of TOKENS.
      checkpoint: 'best', 'last' or a step; None: the best if the run kept one.
      points: on the map at most, evenly spaced over the examples.
      thumbnails: on the map at most.
      umap: a second map, by UMAP.
    Raises:
      UserError: no such run, checkpoint, split or data set; another model; an output of something else or too large.
    """
    import jax
    from jax.experimental import multihost_utils

    from ssl_jax.tools import embed_map
    from ssl_jax.tools.embed_encoder import describe, load, token_shapes
    from ssl_jax.tools.embed_store import Column, open_store
    _check(output, tokens, points, thumbnails)
    tokens = sorted(tokens, key=TOKENS.index)
    if umap:
        embed_map.check_umap()
    encoder = load(run, data=data, checkpoint=checkpoint)
    splits = list(splits) or list(encoder.data.manifest.splits)
    for split in splits:
        encoder.data.source(split)      # there, and not empty
    if output.endswith('.npz') and jax.process_count() > 1:
        raise UserError(f'--output={output}: {jax.process_count()} processes write a .zarr')
    facts, first = describe(run, encoder, tokens), jax.process_index() == 0
    columns = known_columns(encoder.data.manifest, tokens)
    columns |= {token: Column('float32', shape) for token, shape in token_shapes(encoder, tokens).items()}

    def begin():
        store = open_store(output, facts, splits, first=first)
        for split in splits:
            store.begin(split, encoder.data.manifest.split(split).records, columns)
        return store

    if first:
        store = begin()
    multihost_utils.sync_global_devices('begun')
    if not first:
        store = begin()
    with jax.set_mesh(encoder.layout.mesh):
        for split in splits:
            fill(encoder, store, split, tokens)
    store.finish()
    multihost_utils.sync_global_devices('embedded')
    page = pathlib.Path(output).with_suffix('.html')
    if first:
        embed_map.write(page, store, encoder.data, splits, facts, points=points, thumbnails=thumbnails, umap=umap)
    return page


def fill(encoder: Any, store: Any, split: str, tokens: Sequence[str]) -> None:
    """Computes the chunks of a split that the store lacks, this process its share of them."""
    import jax
    from jax.experimental import multihost_utils
    from tqdm import tqdm

    from ssl_jax.tools.embed_encoder import features
    first, count = jax.process_index() == 0, encoder.data.manifest.split(split).records
    # What the first process sees on the disk counts, as all must take equally many steps.
    complete = multihost_utils.broadcast_one_to_all(store.complete(split))
    chunks = [chunk for chunk, there in zip(store.chunks(split), complete) if not there]
    if not chunks:
        return

    block, blocks = encoder.layout.block()
    local = encoder.batch // blocks
    shares = [sum(chunk.stop - chunk.start for chunk in chunks[i::blocks]) for i in range(blocks)]
    mine = chunks[block::blocks]
    rows = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in mine] or [np.zeros(0, int)])
    rows = np.pad(rows, (0, -(-max(shares) // local) * local - len(rows)), constant_values=count)
    source, known = encoder.data.source(split), known_columns(encoder.data.manifest, tokens)
    sizes = [chunk.stop - chunk.start for chunk in mine]
    with tqdm(total=count, initial=count - sum(shares), desc=split, unit=' examples', disable=not first or None) as bar:
        # The pieces first: they go on to the end of all batches, where the chunks have ended.
        for values, chunk in zip(cut(features(encoder, split, rows, local, tokens), sizes), mine):
            store.write(split, chunk, values | read_columns(known, source, split, chunk))
            bar.update((chunk.stop - chunk.start) * blocks)
    multihost_utils.sync_global_devices(f'{split} done')


def cut(batches: Iterable[dict[str, np.ndarray]], sizes: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
    """The rows of all batches in pieces of these sizes; goes on to the end of `batches`."""
    batches, held, count = iter(batches), [], 0
    for size in sizes:
        while count < size:
            held.append(next(batches))
            count += len(next(iter(held[-1].values())))
        joined = {k: np.concatenate([rows[k] for rows in held]) for k in held[0]}
        yield {k: v[:size] for k, v in joined.items()}
        held, count = [{k: v[size:] for k, v in joined.items()}], count - size
    # Of what is left every row is padding, but the other processes wait for this one's part in the computation.
    for _ in batches:
        continue


def known_columns(manifest: Any, tokens: Sequence[str]) -> dict[str, Any]:
    """What the data set knows of every example: key, label, texts and numbers.

    Raises:
      UserError: one of them is called as tokens are.
    """
    from ssl_jax.tools.embed_store import Column
    columns = {'key': Column('str', ())}
    for name, field in manifest.fields.items():
        if field.kind == 'text':
            columns[name] = Column('str', ())
        elif field.kind == 'label':
            columns[name] = Column('int32' if np.dtype(field.dtype).kind in 'iu' else 'float32', field.shape)
        elif field.kind == 'scalar' and None not in field.shape:
            columns[name] = Column(np.dtype(field.dtype).name, field.shape)
    for token in tokens:
        if token in columns:
            raise UserError(f'field {token!r} of data set {manifest.name!r} has the name of a token: expected another')
    return columns


def read_columns(columns: dict[str, Any], source: Sequence[Any], split: str, chunk: slice) -> dict[str, np.ndarray]:
    """What is known of the examples of a chunk."""
    stored = [{'key': f'{split}/{i}'} | dict(source[i]) for i in range(chunk.start, chunk.stop)]
    return {name: np.asarray([example.get(name, column.missing) for example in stored],
                             object if column.dtype == 'str' else column.dtype) for name, column in columns.items()}


def _check(output: str, tokens: Sequence[str], points: int, thumbnails: int) -> None:
    for token in tokens:
        if token not in TOKENS:
            raise UserError(f'--tokens={",".join(tokens)}: there is no {token!r}{nearest(token, TOKENS)}')
    if len(set(tokens)) < len(tokens) or not tokens:
        raise UserError(f'--tokens={",".join(tokens)}: expected different ones of {", ".join(TOKENS)}')
    for name, value, least in (('points', points, 2), ('thumbnails', thumbnails, 0)):
        if value < least:
            raise UserError(f'--{name}={value}: expected at least {least}')
    if not output.endswith(('.zarr', '.npz')):
        raise UserError(f'--output={output}: expected a name that ends in .zarr or .npz')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', help='folder of a run')
    parser.add_argument('-o', '--output', required=True, help='NAME.zarr or NAME.npz; the map is NAME.html')
    parser.add_argument('--split', action='append', default=[], help='only this; may be given more than once')
    parser.add_argument('--data', help='root of another data set than the run\'s, with as many channels')
    parser.add_argument('--tokens', default='cls,mean', help='of cls,mean,patches (default: %(default)s)')
    parser.add_argument('--checkpoint', help='best, last or a step (default: the best if the run kept one)')
    parser.add_argument('--points', type=int, default=20_000, help='on the map at most (default: %(default)s)')
    parser.add_argument('--thumbnails', type=int, default=2000, help='in the map at most (default: %(default)s)')
    parser.add_argument('--umap', action='store_true', help="a map by UMAP, too; needs pip install 'ssl_jax[umap]'")
    a = parser.parse_args()
    logging.set_verbosity(logging.ERROR)    # Orbax warns of files that other ways of saving would have left
    try:
        processes.start()
        page = embed(a.run, a.output, splits=a.split, data=a.data, tokens=a.tokens.split(','),
                     checkpoint=a.checkpoint, points=a.points, thumbnails=a.thumbnails, umap=a.umap)
    except (UserError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(f'embeddings: {a.output}, map: {page}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
