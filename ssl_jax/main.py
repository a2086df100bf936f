"""python -m ssl_jax.main --config=configs/<name>.py [--workdir=DIR] [--dry_run] [--config.key.key=value ...]"""
import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from ssl_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'An experiment: a file with get_config().', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; continued if it holds a checkpoint. '
                               'runs/<name of the config> if left out.')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print and draw what would happen, from shapes alone; train nothing.')


def _parse(argv: list[str]) -> tuple[ConfigDict, str]:
    """The config and the run folder that the command line asks for."""
    path = next((a.split('=', 1)[1] for a in argv if a.startswith(('--config=', '-config='))), '').split(':')[0]
    if path and not pathlib.Path(path).is_file():
        raise UserError(f'--config={path}: no such file; the experiments are in configs/')
    try:
        rest = flags.FLAGS(argv)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        # ml_collections hands on the repr of a KeyError, quotes and line breaks escaped, as an AttributeError.
        message = ' '.join(str(error).replace('\\n', ' ').replace('\\', '').strip('"').split())
        what = 'the config has no key ' if isinstance(error, (AttributeError, KeyError)) else ''
        raise UserError(f'command line: {what}{message}') from error
    if rest:
        raise UserError(f'{rest[0]!r} is not a flag: expected --name=value')
    if _CONFIG.value is None:
        raise UserError('--config is missing: expected a file such as configs/quickstart.py')
    if not isinstance(_CONFIG.value, ConfigDict):
        raise UserError(f'--config={path}: get_config() does not return a ConfigDict')
    return _CONFIG.value, _WORKDIR.value or str(pathlib.Path('runs', pathlib.Path(path).stem))


def _join_processes() -> None:
    """One process of several: JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID say which."""
    import jax
    try:
        count, index = int(os.environ['JAX_NUM_PROCESSES']), int(os.environ['JAX_PROCESS_ID'])
    except (KeyError, ValueError) as error:
        raise UserError('JAX_COORDINATOR_ADDRESS is set: expected numbers in JAX_NUM_PROCESSES and JAX_PROCESS_ID '
                        f'too, got {error}') from error
    jax.distributed.initialize(num_processes=count, process_id=index)


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, or 2 after one line on what the user can mend."""
    app.define_help_flags()
    try:
        config, workdir = _parse(argv)
        # After the flags: whoever mistypes one does not wait for these imports.
        import jax

        from ssl_jax.data.embedded import cache_folder
        from ssl_jax.describe import describe
        from ssl_jax.train import train

        logging.set_verbosity(logging.WARNING)
        if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
            jax.config.update('jax_compilation_cache_dir', str(cache_folder() / 'xla'))
        if 'JAX_COORDINATOR_ADDRESS' in os.environ:
            _join_processes()
        if _DRY_RUN.value:
            describe(config, workdir)
        else:
            train(config, workdir)
    except (UserError, OSError) as error:   # an OSError names the file, and what is wrong with it or its disk
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
