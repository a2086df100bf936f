"""Packages that only some converters need: imported on use, and asked for by name where they are missing."""
import importlib
import types

from ssl_jax.errors import UserError


def need(module: str, *, extra: str, what: str) -> types.ModuleType:
    """Imports and returns `module`, for example need('astropy.io.fits', extra='fits', what='reading FITS').

    Args:
      module: dotted name.
      extra: of ssl_jax that installs its package.
      what: the purpose, which starts the message.
    Raises:
      UserError: the package is not installed, saying how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition('.')[0]
        if error.name is None or error.name.partition('.')[0] != package:
            raise   # it is installed, but lacks something itself: its own message says what
        raise UserError(f"{what} needs {package}: pip install 'ssl_jax[{extra}]'") from error
