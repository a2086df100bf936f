"""Runs the evaluators of a run on its newest checkpoint: python -m ssl_jax.tools.evaluate --workdir=RUN [--tag=knn]

--best takes the best state instead, where the run kept one (config.checkpoint.best). --add measures by an evaluator
that the run's config does not have: --add='{"name": "diagnostics", "compare": ["runs/other"]}'; its tag is its name.
"""
import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ssl_jax.errors import UserError, exit_status, nearest


def evaluate(workdir: str, tags: list[str] | None = None, *, best: bool = False,
             add: Sequence[Mapping[str, Any]] = ()) -> dict[str, float]:
    """Results '<tag>/<metric>' -> number; also in RUN/evaluation.json; pictures in RUN/images, arrays in RUN/arrays.

    Args:
      tags: of the evaluators to run; None for all.
      best: on the best state, not on the newest.
      add: specs of evaluators that the run's config does not have; with any and without `tags`, only these are run.
    Raises:
      UserError: not a run folder, no checkpoint, no such tag.
    """
    import jax

    from ssl_jax.checkpoint import Checkpoints
    from ssl_jax.experiment import assemble
    from ssl_jax.metrics import save_arrays, save_images, sort_values, write_atomic

    path = pathlib.Path(workdir, 'config.json')
    if not path.is_file():
        raise UserError(f'--workdir={workdir}: expected the folder of a run, with config.json')
    config, added = json.loads(path.read_text()), {str(spec.get('name')): dict(spec) for spec in add}
    run = assemble(config | dict(evals=dict(config['evals']) | added), workdir)
    tags = [*(tags or ()), *added]
    for tag in tags:
        if tag not in run.evals:
            raise UserError(f'--tag={tag} is not an evaluator of this run{nearest(tag, run.evals)}')
    with jax.set_mesh(run.layout.mesh):
        checkpoints = Checkpoints(workdir, keep=run.checkpoint.keep, position=run.position,
                                  folder='best' if best else 'checkpoints')
        step = checkpoints.latest()
        if step is None:
            raise UserError(f'--workdir={workdir}: no checkpoint yet' + ' that is the best' * best)
        state = checkpoints.restore(run.state)
        checkpoints.close()
        results = {}
        for tag in tags or run.evals:
            numbers, pictures, arrays = sort_values(run.evals[tag].run(run.objective, run.view, state))
            results |= {f'{tag}/{k}': v for k, v in numbers.items()}
            save_images(workdir, step, tag, pictures)
            save_arrays(workdir, step, tag, arrays)
    write_atomic(pathlib.Path(workdir, 'evaluation.json'), json.dumps({'step': step} | results, indent=2) + '\n')
    return results


def evaluator(text: str) -> dict[str, Any]:
    """The spec that a JSON object is."""
    spec = json.loads(text)
    if not isinstance(spec, dict):
        raise ValueError
    return spec


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--workdir', required=True)
    parser.add_argument('--tag', action='append', help='only this evaluator; may be given more than once')
    parser.add_argument('--add', action='append', default=[], type=evaluator, metavar='JSON',
                        help='another evaluator; may be given more than once')
    parser.add_argument('--best', action='store_true', help='the best state, not the newest')
    arguments = parser.parse_args()
    from ssl_jax.metrics import table
    return exit_status(lambda: print(table(evaluate(arguments.workdir, arguments.tag, best=arguments.best,
                                                    add=arguments.add))))


if __name__ == '__main__':
    sys.exit(main())
