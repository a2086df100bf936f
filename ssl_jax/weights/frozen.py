"""An encoder as one file that jax runs without our code: StableHLO with weights and normalisation inside."""
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from ssl_jax.step import Tree

PLATFORMS = ('cpu', 'cuda', 'tpu')
FILE, EXAMPLE = 'encoder.stablehlo', 'load.py'


def freeze(objective: Any, view: Any, params: Tree, aux: Tree, *, image_size: tuple[int, int], channels: int,
           dtype: Any) -> bytes:
    """Serialised program: images (b, H, W, C) as they are stored, for any b -> {'cls': (b, D), 'patches': (b, N, D)}.

    Args:
      objective, view: of a run. Images go through the view's evaluation: resized, cropped and normalised.
      image_size, channels, dtype: of stored images.
    """
    def encode(params, aux, image):
        # Some objectives draw, by an image's index, what is left out of these results.
        batch = view.eval({'image': image[None], 'index': jnp.zeros(1, jnp.int32)})
        features = objective.predict(params, aux, batch)
        return {name: features[name][0] for name in ('cls', 'patches')}

    leaves, structure = jax.tree.flatten(jax.device_get((params, aux)))
    used = _used(encode, params, aux, jax.ShapeDtypeStruct((*image_size, channels), dtype))
    kept = [x if needed else jnp.zeros(x.shape, x.dtype) for x, needed in zip(leaves, used)]
    batch, = export.symbolic_shape('b')
    images = jax.ShapeDtypeStruct((batch, *image_size, channels), dtype)
    # Image by image, so that the models never see a batch whose size is a symbol.
    frozen = jax.vmap(lambda image: encode(*jax.tree.unflatten(structure, kept), image))
    return bytes(export.export(jax.jit(frozen), platforms=PLATFORMS)(images).serialize())


def _used(function: Callable, *arguments: Any) -> list[bool]:
    """Which leaves of the arguments the results depend on: decoders and heads need not be in the file."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    needed = set(map(id, jaxpr.outvars))
    for equation in reversed(jaxpr.eqns):
        if needed & set(map(id, equation.outvars)):
            needed |= set(map(id, equation.invars))
    return [id(x) in needed for x in jaxpr.invars]


def write(folder: str | pathlib.Path, program: bytes, *, image_size: tuple[int, int], channels: int,
          dtype: Any) -> None:
    """Writes the program and a program of a few lines that runs it."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_bytes(program)
    height, width = image_size
    (folder / EXAMPLE).write_text(f'''"""Runs {FILE}: pip install jax flatbuffers (it is packed in the latter)."""
import pathlib

import jax
import numpy as np

encoder = jax.export.deserialize(bytearray(pathlib.Path(__file__).with_name('{FILE}').read_bytes()))
# As many images as you like, with the values of the data set that the encoder was trained on: it normalises them.
images = np.zeros((4, {height}, {width}, {channels}), np.{np.dtype(dtype).name})
features = jax.jit(encoder.call)(images)
print({{name: x.shape for name, x in features.items()}})
''')
