"""Who may import whom, and names that must not appear."""
import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PRODUCT = sorted(p for folder in ('ssl_jax', 'data_prep', 'configs', 'launch') for p in (ROOT / folder).rglob('*.py'))

# Modules of ssl_jax that each part may import; what is not named may be imported by nobody but itself.
LEAVES = {'errors'}
ALLOWED = {
    'errors': set(),
    'partition': set(),
    'config': LEAVES,
    'schedules': LEAVES | {'config'},
    'losses': LEAVES,
    'monitors': LEAVES | {'config', 'losses', 'partition'},
    'masking': LEAVES,
    'flops': LEAVES,
    'models': LEAVES | {'config', 'losses', 'partition'},
    'data': LEAVES | {'config'},
    'step': LEAVES,
    'sharding': LEAVES,
    'transforms': LEAVES | {'schedules', 'sharding'},
    'optim': LEAVES | {'config', 'schedules', 'sharding', 'transforms'},
    'views': LEAVES | {'config', 'data', 'step'},
    'targets': LEAVES | {'models', 'step'},
    'objectives': LEAVES | {'config', 'losses', 'masking', 'models', 'monitors', 'partition', 'schedules', 'step',
                            'targets'},
    'evals': LEAVES | {'config', 'data', 'pictures', 'sharding', 'step'},
    'pictures': LEAVES | {'data'},
    'metrics': LEAVES,
    'environment': LEAVES | {'metrics'},
    'guards': LEAVES | {'sharding'},
    'processes': LEAVES,
    'xplane': LEAVES,
    'trace': LEAVES | {'xplane'},
    'profiling': LEAVES | {'trace'},
    'origin': LEAVES,
    'integrity': LEAVES | {'metrics'},
    'checkpoint': LEAVES | {'config', 'integrity', 'origin', 'sharding', 'step'},
    'graft': LEAVES | {'checkpoint', 'models', 'sharding', 'step', 'weights'},
    'failures': LEAVES | {'checkpoint', 'experiment', 'step'},
    'best': LEAVES | {'checkpoint', 'step'},
    'experiment': LEAVES | {'checkpoint', 'config', 'data', 'flops', 'monitors', 'optim', 'profiling', 'sharding',
                           'step'},
    'train': LEAVES | {'best', 'checkpoint', 'config', 'environment', 'experiment', 'failures', 'flops', 'graft',
                       'guards', 'metrics', 'origin', 'profiling', 'step'},
    'describe': LEAVES | {'config', 'data', 'experiment', 'flops', 'pictures'},
    'weights': LEAVES | {'checkpoint', 'config', 'data', 'experiment', 'metrics', 'models', 'step'},
    'main': LEAVES | {'data', 'describe', 'processes', 'train'},
}
TOOLS = set(ALLOWED)


def imports(path: pathlib.Path) -> set[str]:
    """Absolute module names, each with the names imported from it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path}: relative import'
            found |= {f'{node.module}.{alias.name}' for alias in node.names}
    return found


def part(path: pathlib.Path) -> str:
    return path.relative_to(ROOT / 'ssl_jax').parts[0].removesuffix('.py')


@pytest.mark.parametrize('path', [p for p in PRODUCT if p.is_relative_to(ROOT / 'ssl_jax') and p.name != '__init__.py'],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_import_direction(path):
    own = part(path)
    allowed = (TOOLS if own == 'tools' else ALLOWED[own]) | {own}
    used = {name.split('.')[1] for name in imports(path) if name.startswith('ssl_jax.')}
    assert used <= allowed, f'{path.name} imports {sorted(used - allowed)}'


def test_data_never_imports_jax():
    for path in PRODUCT:
        if path.is_relative_to(ROOT / 'data_prep') or path.is_relative_to(ROOT / 'ssl_jax/data'):
            roots = {name.split('.')[0] for name in imports(path)}
            assert not roots & {'jax', 'flax', 'optax', 'orbax'}, path


def test_no_torch_no_tensorflow_no_pickle():
    for path in PRODUCT:
        banned = {'torch', 'tensorflow', 'pickle'}
        assert not {n.split('.')[0] for n in imports(path)} & banned, path
        assert not re.search(r'\bpickle\.loads?\(', path.read_text()), path


@pytest.mark.parametrize('name, pattern', {
    'stateful nnx transforms': r'nnx\.(jit|grad|value_and_grad|scan|vmap|remat|Optimizer|EMA)\b',
    'defaults at the point of use': r'config\.get\(',
    'global random state': r'np\.random\.(?!default_rng|Generator|SeedSequence|PCG64|Philox|RandomState)\w+\(',
    'unfinished code': r'TODO|FIXME|XXX|raise NotImplementedError',
    'swallowed exceptions': r'except( Exception)?:\s*(pass)?\s*$',
}.items())
def test_banned(name, pattern):
    found = [f'{p.relative_to(ROOT)}:{i}' for p in PRODUCT
             for i, line in enumerate(p.read_text().splitlines(), 1) if re.search(pattern, line)]
    assert not found, f'{name}: {found}'


def test_no_utils():
    assert not [p for p in PRODUCT if p.name in ('utils.py', 'helpers.py', 'misc.py')]
