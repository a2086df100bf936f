"""Training on eight devices is training on one. One mesh; all of them, for every objective, take an hour:

SSL_JAX_MESHES=1 pytest tests/test_meshes.py
"""
import json
import os
import subprocess
import sys

import meshes
import pytest
import tiny


def check(name, chosen):
    done = subprocess.run([sys.executable, meshes.__file__, name, *chosen], env=meshes.environment(),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert [json.loads(line)['mesh'] for line in done.stdout.splitlines()] == chosen


def test_one():
    assert len(meshes.MESHES) == 10
    check('mae', ['2x2x2'])


@pytest.mark.skipif('SSL_JAX_MESHES' not in os.environ, reason='takes an hour: set SSL_JAX_MESHES')
@pytest.mark.parametrize('name', tiny.OBJECTIVES)
def test_all(name):
    check(name, meshes.MESHES)
