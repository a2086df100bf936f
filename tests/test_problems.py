"""Problems stop or are kept, and packages that are missing are asked for."""
import sys
import types

import pytest

from data_prep.extras import need
from data_prep.problems import Problems
from ssl_jax.errors import UserError


def test_problems_stop_or_are_kept():
    with pytest.raises(UserError, match='^row 3: no date$'):
        Problems('stop').add('row 3', 'no date')
    problems = Problems('skip')
    problems.add('row 3', 'no date')
    problems.add('a.png', 'missing')
    assert problems.found == (('row 3', 'no date'), ('a.png', 'missing')) and Problems('stop').found == ()
    with pytest.raises(UserError, match="on_error='ignore': expected stop or skip"):
        Problems('ignore')


def test_a_missing_package_is_asked_for_and_its_own_failure_is_not_hidden(monkeypatch, tmp_path):
    assert isinstance(need('json.decoder', extra='x', what='y'), types.ModuleType)
    with pytest.raises(UserError, match=r"^reading FITS needs nonesuch: pip install 'ssl_jax\[fits\]'$"):
        need('nonesuch.io.fits', extra='fits', what='reading FITS')
    (tmp_path / 'lacking.py').write_text('import another_nonesuch\n')
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
    with pytest.raises(ModuleNotFoundError, match='another_nonesuch'):
        need('lacking', extra='x', what='y')
