"""Two CPU devices for the whole suite, compiled programs kept for the session, and small data sets."""
import importlib.metadata
import os
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=2'

# Compiling costs more than running does here. The flags make it a third; other versions may not know them, and XLA
# ends the process at a flag that it does not know.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
if importlib.metadata.version('jaxlib').startswith('0.10.'):
    os.environ['XLA_FLAGS'] += ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'

# Programs compiled once are shared by all tests, their subprocesses and pytest's own workers.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix='ssl_jax_tests_')
    os.environ |= {'JAX_COMPILATION_CACHE_DIR': _cache.name, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2'}

import sys

import pytest
from absl import flags

# grain's worker processes look up an absl flag.
if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])


@pytest.fixture(scope='session')
def real_data():
    """The folder of real data, or a skip."""
    import pathlib
    if not os.environ.get('SSL_JAX_DATA'):
        pytest.skip('needs real data: set SSL_JAX_DATA to its folder')
    return pathlib.Path(os.environ['SSL_JAX_DATA'])
