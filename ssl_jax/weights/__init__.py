"""Weights in files: of torch.save, safetensors, NumPy and our own runs, without torch.

Importing this package imports nothing else: each name below comes with the module that it is from.
"""
import importlib

_FROM = {'read': 'files', 'read_tree': 'files', 'flatten': 'files', 'write_pth': 'writing',
         'write_safetensors': 'writing', 'Placeholder': 'torch_pickles'}


def __getattr__(name: str):
    if name not in _FROM:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'{__name__}.{_FROM[name]}'), name)


def __dir__() -> list[str]:
    return sorted(_FROM)
