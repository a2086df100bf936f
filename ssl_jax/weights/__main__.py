"""Weights in and out: python -m ssl_jax.weights inspect|import|export|diff

    python -m ssl_jax.weights inspect mae_pretrain_vit_base.pth
    python -m ssl_jax.weights import mae_pretrain_vit_base.pth -o runs/mae_b --data data/galaxy10 --imagenet
    python -m ssl_jax.weights export runs/cifar10 -o cifar10.safetensors --layout timm
    python -m ssl_jax.weights export runs/cifar10 -o cifar10_hf --layout hf
    python -m ssl_jax.weights export runs/cifar10 -o cifar10_frozen --layout stablehlo
    python -m ssl_jax.weights diff runs/cifar10 cifar10.safetensors

A file is a .pth, .safetensors or .npz, a run or checkpoint folder of ours, a folder of Hugging Face, or a URL.
"""
import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from ssl_jax.errors import UserError, exit_status


def inspect(source: str, *, layout: str | None = None, ignore: Sequence[str] = ()) -> str:
    """What a file holds, which layout that is, and the encoder's config that fits it."""
    from ssl_jax.weights.convert import load, table
    imported = load(source, layout=layout, ignore=ignore)
    count = sum(x.size for x in imported.tree.values())
    lines = [table(imported), '', f'layout   {imported.words}', f'weights  {count:,} numbers in '
             f'{len(imported.tree)} arrays of ours']
    encoder = imported.encoder
    if encoder is not None:
        size = 'any size' if encoder.image_size is None else ' x '.join(map(str, encoder.image_size)) + ' pixels'
        lines += [f'images   {size}, {encoder.channels} channels',
                  f'encoder  config.objective.encoder = {encoder.spec}']
        lines += [f'         {name} is the usual one: the file does not tell' for name in encoder.unsure]
        lines += [f'         {name} is to be added: the file does not tell' for name in encoder.unknown]
    return '\n'.join(lines)


def bring_in(source: str, output: str, *, arguments: argparse.Namespace) -> str:
    """Makes a run folder of a file; returns the table of what was read."""
    from ssl_jax.weights import runs
    from ssl_jax.weights.convert import load, table
    imported = load(source, layout=arguments.layout, ignore=tuple(arguments.ignore))
    if imported.encoder is None:
        raise UserError(f'{source} holds no encoder')
    imported = imported._replace(encoder=runs.with_heads(imported.encoder, arguments.heads))
    size = (arguments.image_size,) * 2 if arguments.image_size else None
    config = runs.config_of(imported, data=arguments.data, image_size=size, imagenet=arguments.imagenet)
    notes = runs.build(imported, config, output, channels=arguments.channels)
    return f'{imported.words}\n{table(imported, notes)}\n{output}: config.json and a checkpoint'


def bring_out(run_folder: str, output: str, *, arguments: argparse.Namespace) -> list[str]:
    """Writes a run's weights by another project's names, and a model card; returns the paths."""
    import jax

    from ssl_jax.checkpoint import find, flatten, restore_weights
    from ssl_jax.experiment import assemble
    from ssl_jax.weights import export, write_pth, write_safetensors
    from ssl_jax.weights.card import card, scores_of, use
    from ssl_jax.weights.layouts import tree_of

    checkpoint = find(run_folder)
    folder = pathlib.Path(run_folder) if (pathlib.Path(run_folder) / 'config.json').is_file() else checkpoint.parents[1]
    if not (folder / 'config.json').is_file():
        raise UserError(f'{run_folder}: expected the folder of a run, with config.json')
    config = json.loads((folder / 'config.json').read_text())
    run = assemble(config | {'evals': {}, 'checkpoint': {}}, str(folder), need_data=False)
    with jax.set_mesh(run.layout.mesh):
        params, aux = restore_weights(checkpoint, run.state.params, run.state.aux)
    manifest = run.data.manifest
    common = dict(title=f'{config["objective"]["name"]}: {folder.name}', config=config, view=run.view,
                  data=run.data if run.data.exists() else None, scores=scores_of(folder))
    target, stored = pathlib.Path(output), np.dtype(manifest.fields['image'].dtype)
    if arguments.layout == 'stablehlo':
        from ssl_jax.weights import frozen
        options = dict(image_size=run.data.image_size, channels=len(run.data.channels), dtype=stored)
        program = frozen.freeze(run.objective, run.view, params, aux, **options)
        frozen.write(target, program, **options)
        text = card(files={frozen.FILE: 'the encoder with its normalisation, for jax.export',
                           frozen.EXAMPLE: 'runs it'}, use=(target / frozen.EXAMPLE).read_text(), **common)
        return [str(target / frozen.FILE), str(target / frozen.EXAMPLE), _write(target / 'README.md', text)]

    encoder = config['objective']['encoder']
    tree = tree_of(jax.device_get(flatten({'params': params, 'aux': aux})))
    layout = export.layout_for(arguments.layout, encoder)
    channels = len(run.view.outputs)
    named = export.export(tree, encoder, run.view.size, layout, parts=arguments.parts, network=arguments.network)
    alone = target.suffix in ('.safetensors', '.pth')
    weights = target if alone else target / 'model.safetensors'
    weights.parent.mkdir(parents=True, exist_ok=True)
    if weights.suffix == '.pth':
        write_pth(weights, export.contained(named, layout, arguments.parts))
    else:
        write_safetensors(weights, named, {'format': 'pt', 'layout': layout.name})
    written = [str(weights)]
    if layout.name.startswith('hf'):
        described = export.hf_config(encoder, run.view.size, channels, named, manifest.classes)
        pictures = export.hf_preprocessor(run.view.size, run.view.mean, run.view.std, dtype=str(stored),
                                          interpolation=run.view.interpolation)
        for name, content in (('config.json', described), ('preprocessor_config.json', pictures)):
            if alone:
                raise UserError(f'-o {output}: expected a folder for layout {layout.name}, {name} goes with it')
            written.append(_write(target / name, json.dumps(content, indent=2) + '\n'))
    words = f'{sum(x.size for x in named.values()):,} numbers; {layout.words}'
    code = use(layout.name, weights.name, encoder, run.view.size, channels, named)
    text = card(files={weights.name: words}, use=code, **common)
    return [*written, _write(target.with_suffix('.md') if alone else target / 'README.md', text)]


def diff(a: str, b: str) -> str:
    """The largest difference of each weight of two files, whatever their layouts; names in both are ours."""
    from ssl_jax.weights.convert import load, settled
    left, right = (settled(load(source)) for source in (a, b))
    lines, width = [], max(map(len, {*left, *right}))
    for path in sorted({*left, *right}):
        if path not in left or path not in right:
            lines.append(f'{path:{width}}  only in {a if path in left else b}')
        elif left[path].shape != right[path].shape:
            lines.append(f'{path:{width}}  {left[path].shape} and {right[path].shape}')
        else:
            gap = np.abs(left[path].astype(np.float64) - right[path]).max() if left[path].size else 0.0
            lines.append(f'{path:{width}}  {gap:.3g}')
    return '\n'.join(lines)


def _write(path: pathlib.Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='python -m ssl_jax.weights', description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    reading = argparse.ArgumentParser(add_help=False)
    reading.add_argument('source')
    reading.add_argument('--layout', help='of the file, where it is not recognised')
    reading.add_argument('--ignore', action='append', default=[], help="a name to leave out, '*' for anything; repeats")
    commands.add_parser('inspect', parents=[reading], help='what a file holds')
    importing = commands.add_parser('import', parents=[reading], help='a run folder of ours from a file')
    importing.add_argument('-o', '--output', required=True, help='folder of the run')
    importing.add_argument('--data', help='root of the data set to evaluate on')
    importing.add_argument('--image_size', type=int, help='side of the images in pixels, if not that of the file')
    importing.add_argument('--heads', type=int, help='of the attention, which most files do not tell')
    importing.add_argument('--channels', choices=('mean', 'repeat', 'sum'), help='how another number of them is taken')
    importing.add_argument('--imagenet', action='store_true', help="normalise by ImageNet's statistics (8-bit RGB)")
    exporting = commands.add_parser('export', help="a run's weights as another project names them")
    exporting.add_argument('source', help='run folder')
    exporting.add_argument('-o', '--output', required=True, help='.safetensors, .pth or a folder')
    exporting.add_argument('--layout', default='timm', help="'timm', 'hf', 'stablehlo', or as inspect names it")
    exporting.add_argument('--parts', choices=('encoder', 'head', 'all'), default='encoder')
    exporting.add_argument('--network', choices=('', 'teacher', 'momentum', 'average'), default='')
    comparing = commands.add_parser('diff', help='how far two files are apart')
    comparing.add_argument('a')
    comparing.add_argument('b')
    chosen = parser.parse_args(arguments)
    work = {'inspect': lambda: inspect(chosen.source, layout=chosen.layout, ignore=chosen.ignore),
            'import': lambda: bring_in(chosen.source, chosen.output, arguments=chosen),
            'export': lambda: '\n'.join(bring_out(chosen.source, chosen.output, arguments=chosen)),
            'diff': lambda: diff(chosen.a, chosen.b)}[chosen.command]
    return exit_status(lambda: print(work()))


if __name__ == '__main__':
    sys.exit(main())
