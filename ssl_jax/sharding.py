"""Layout: the device mesh, a rule from parameter path to sharding, and host batches as global arrays."""
import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ssl_jax.errors import UserError

Tree = Any

AXES = ('data', 'fsdp', 'tensor')

# Megatron-style (Shoeybi et al. 2019, section 3): the first matrix of a pair splits its outputs, the second its inputs,
# so that only one all-reduce per pair is needed. Dimensions count from the end: stacked layers add one in front.
_TENSOR_RULES = (
    (re.compile(r'(^|/)(qkv|fc1)/(kernel|bias)$'), -1),
    (re.compile(r'(^|/)(proj|fc2)/kernel$'), -2),
)


def path_name(path: tuple) -> str:
    """A jax key path as 'encoder/blocks/attn/qkv/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where arrays live. The schema of `config.mesh`.

    Args:
      data: devices over which only the batch is split; -1 takes what the other axes leave.
      fsdp: devices over which batch, parameters and moments are split (ZeRO-3; Rajbhandari et al. 2020).
      tensor: devices over which attention and MLP kernels are split.
      min_size: a parameter with fewer elements is kept whole on every device.
      rules: ((regex on the parameter path, (mesh axis or None per dimension)), ...), tried before the default;
        the first match wins.
    """
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    min_size: int = 2 ** 14
    rules: tuple[tuple[str, tuple], ...] = ()
    devices: tuple[Any, ...] | None = dataclasses.field(default=None, init=False, repr=False)

    def over(self, devices: Sequence[Any] | None) -> 'Layout':
        """This layout of other devices than those of the machine, also such as are only described; None: of these."""
        other = dataclasses.replace(self)
        object.__setattr__(other, 'devices', None if devices is None else tuple(devices))
        return other

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        sizes, count = [self.data, self.fsdp, self.tensor], len(self.devices or jax.devices())
        wanted = 'x'.join(map(str, sizes))
        if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
            raise UserError(f'config.mesh={wanted} (data x fsdp x tensor): expected positive sizes, '
                            'at most one of them -1')
        if -1 in sizes:
            sizes[sizes.index(-1)] = max(count // -math.prod(sizes), 1)
        if math.prod(sizes) != count:
            raise UserError(f'config.mesh={wanted} (data x fsdp x tensor) does not fit {count} devices: '
                            'expected a product equal to the number of devices')
        # Explicit axes, the default of make_mesh, reject the concatenation of class and patch tokens.
        types = (AxisType.Auto,) * 3
        try:
            return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=self.devices)
        except NotImplementedError:   # a torus of TPUs no product of whose sides is one of the sizes
            split = mesh_utils.create_device_mesh(tuple(sizes), self.devices, allow_split_physical_axes=True)
            return jax.sharding.Mesh(split, AXES, axis_types=types)

    @property
    def batch(self) -> NamedSharding:
        """Axis 0 over data x fsdp."""
        return NamedSharding(self.mesh, PartitionSpec(('data', 'fsdp')))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_parts(self) -> int:
        """A global batch is a multiple of this."""
        return self.mesh.shape['data'] * self.mesh.shape['fsdp']

    def block(self) -> tuple[int, int]:
        """(i, n): this process feeds the i-th of n contiguous blocks of every global batch.

        n is smaller than the process count where the tensor axis spans processes, which then feed the same rows.
        """
        rows = [s[0].indices(self.batch_parts)[:2]
                for s in self.batch.addressable_devices_indices_map((self.batch_parts,)).values()]
        start, stop = min(a for a, _ in rows), max(b for _, b in rows)
        return start // (stop - start), self.batch_parts // (stop - start)

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows as global arrays split over data x fsdp. Allowed under any transfer guard."""
        with jax.transfer_guard('allow'):
            return {k: jax.make_array_from_process_local_data(self.batch, v) for k, v in batch.items()}

    def put_replicated(self, tree: Tree) -> Tree:
        """Host arrays, equal on all processes, as global arrays that every device holds whole; see `put`."""
        with jax.transfer_guard('allow'):
            return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.replicated, np.asarray(x)), tree)

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """The partition of one parameter (or a moment of it: only the end of the path counts)."""
        for pattern, axes in self.rules:
            if re.search(pattern, path):
                if len(axes) > len(shape):
                    raise UserError(f'config.mesh.rules {pattern!r}: {len(axes)} axes for {path} of shape {shape}')
                return PartitionSpec(*axes)
        if math.prod(shape) < self.min_size:
            return PartitionSpec()
        axes: list[str | None] = [None] * len(shape)
        # Splitting the layer axis of a stack would make every scan step gather the whole stack.
        free = list(range(1 if 'blocks' in path.split('/') else 0, len(shape)))
        tensor = self.mesh.shape['tensor']
        for pattern, i in _TENSOR_RULES:
            if tensor > 1 and pattern.search(path) and len(shape) >= -i and shape[i] % tensor == 0:
                axes[len(shape) + i] = 'tensor'
                free.remove(len(shape) + i)
        fsdp = self.mesh.shape['fsdp']
        free = [i for i in free if shape[i] % fsdp == 0]
        if fsdp > 1 and free:
            axes[max(free, key=lambda i: shape[i])] = 'fsdp'
        while axes and axes[-1] is None:
            axes.pop()
        return PartitionSpec(*axes)

    def shardings(self, tree: Tree) -> Tree:
        """A NamedSharding for every leaf of a tree of arrays or shapes."""
        return jax.tree.map_with_path(
            lambda path, x: NamedSharding(self.mesh, self.spec(path_name(path), tuple(x.shape))), tree)
