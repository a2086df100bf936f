"""Compiles the train step of a config for TPUs that need not be there, and says what it would need and take.

    python -m launch.aot --config=configs/mae_vitl.py --topology=v5e:16x16 [--config.key.key=value ...]
    python -m launch.aot --config=configs/mae_vitl.py --topology=v5e:16x16 --suggest

Topologies: v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4 and other sides. It needs the package libtpu
(`pip install 'ssl_jax[tpu]'`) and no data set where the config has `data.planned`. Predicted times are what the data
sheets allow, every instruction at the full rate of the matrix units or of the memory and nothing overlapped with
communication: a measured step takes longer, by what the compiler does not reach.
"""
import importlib.metadata
import importlib.util
import os
import sys
import time

from absl import app, flags

from launch.chips import Slice
from ssl_jax.errors import MISTAKE, UserError
from ssl_jax.main import parse

_TOPOLOGY = flags.DEFINE_string('topology', None, 'Chip and sides of the slice, such as v5e:16x16.')
_SUGGEST = flags.DEFINE_bool('suggest', False, 'Try meshes, remat, accumulation and twice the batch; rank what '
                            'fits.')
_SCALING = flags.DEFINE_bool('scaling', False, 'Also: bytes moved with 8 to 1024 chips and the same work for each.')
_PRICE = flags.DEFINE_float('price', None, 'Of a chip-hour, in any currency.', lower_bound=0)

# libtpu must neither look for hardware nor for other processes that have it.
ENVIRONMENT = {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
               'TPU_WORKER_HOSTNAMES': 'localhost', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1', 'TPU_STDERR_LOG_LEVEL': '3',
               'TPU_MIN_LOG_LEVEL': '3', 'TF_CPP_MIN_LOG_LEVEL': '3'}


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, also where the step does not fit; 2 after one line on what the user can mend."""
    app.define_help_flags()
    try:
        config, _ = parse(argv)
        if _TOPOLOGY.value is None:
            raise UserError('--topology is missing: expected chip and sides such as v5e:16x16')
        slice_ = Slice.named(_TOPOLOGY.value)
        if importlib.util.find_spec('libtpu') is None:
            raise UserError("compiling for TPUs needs the package libtpu: pip install 'ssl_jax[tpu]'")
        os.environ.update(ENVIRONMENT)
        # With jax, which reads the environment.
        from launch import compiled, report

        print(f'{_TOPOLOGY.value}, jax {importlib.metadata.version("jax")}, '
              f'libtpu {importlib.metadata.version("libtpu")}', flush=True)
        devices = compiled.devices(slice_)
        if _SUGGEST.value:
            began = time.monotonic()
            tried = []
            for result in compiled.search(config, slice_, devices):
                tried.append(result)
                print(f'{time.monotonic() - began:7.0f} s  {report.row(result)}', file=sys.stderr, flush=True)
            print('\n'.join(report.ranking(tried)))
        else:
            print('\n'.join(report.text(compiled.compile_step(config, slice_, devices), price=_PRICE.value,
                                        scaling=_SCALING.value)))
    except (UserError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return MISTAKE
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv))
