"""python -m ssl_jax.main --config=configs/<name>.py [--workdir=DIR] [--dry_run] [--config.key.key=value ...]"""
import os
import pathlib
import sys
import traceback

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from ssl_jax import processes
from ssl_jax.errors import MISTAKE, STOPPED, Stopped, UserError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'An experiment: a file with get_config().', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; continued if it holds a checkpoint. '
                               'runs/<name of the config> if left out.')
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'Print and draw what would happen, from shapes alone; train nothing.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0 of several, with --processes and '
                                   '--process. SLURM, Open MPI and TPUs say so themselves.')
_PROCESSES = flags.DEFINE_integer('processes', None, 'How many processes there are.')
_PROCESS = flags.DEFINE_integer('process', None, 'Which of them this is, counted from 0.')
_START_TIMEOUT = flags.DEFINE_integer('start_timeout', 300, 'Seconds to wait for the other processes.', lower_bound=1)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer('heartbeat_timeout', 100, 'Seconds without a sign of life of a process after '
                                          'which the others end.', lower_bound=1)


def parse(argv: list[str], *, required: bool = True) -> tuple[ConfigDict | None, str | None]:
    """The config and the run folder that the command line asks for; None without --config unless it is `required`."""
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
        if not required:
            return None, _WORKDIR.value
        raise UserError('--config is missing: expected a file such as configs/quickstart.py')
    if not isinstance(_CONFIG.value, ConfigDict):
        raise UserError(f'--config={path}: get_config() does not return a ConfigDict')
    return _CONFIG.value, _WORKDIR.value or str(pathlib.Path('runs', pathlib.Path(path).stem))


def start() -> None:
    """Joins the other processes, as the flags say, and keeps compiled programs for the next run."""
    import jax

    from ssl_jax.data.embedded import cache_folder
    logging.set_verbosity(logging.WARNING)
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        jax.config.update('jax_compilation_cache_dir', str(cache_folder() / 'xla'))
    processes.start(coordinator=_COORDINATOR.value, processes=_PROCESSES.value, process=_PROCESS.value,
                    start_timeout=_START_TIMEOUT.value, heartbeat_timeout=_HEARTBEAT_TIMEOUT.value)


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, 2 after one line on what the user can mend, 75 if asked to end early (and saved)."""
    app.define_help_flags()
    try:
        config, workdir = parse(argv)
        # After the flags: whoever mistypes one does not wait for these imports.
        from ssl_jax.describe import describe
        from ssl_jax.train import train

        start()
        if _DRY_RUN.value:
            describe(config, workdir)
        else:
            train(config, workdir)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return STOPPED
    except (UserError, OSError) as error:   # an OSError names the file, and what is wrong with it or its disk
        print(f'error: {error}', file=sys.stderr)
        return processes.leave(MISTAKE)
    except Exception as error:
        if processes.lost_another(error):
            print(f'error: another process is lost: {str(error).splitlines()[0]}', file=sys.stderr)
        else:
            traceback.print_exc()
        return processes.leave(1)
    return 0


if __name__ == '__main__':
    status = main(sys.argv)
    if status == MISTAKE:
        processes.end(status)   # after the one line, what still writes would only add that it cannot
    sys.exit(status)
