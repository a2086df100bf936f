"""The train step of a config, compiled for devices that are only described, and variants of it that may fit."""
import copy
import dataclasses
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from launch import estimate, hlo
from launch.chips import GIB, Slice
from launch.estimate import Devices, Estimate
from ssl_jax.errors import UserError
from ssl_jax.experiment import Run, assemble
from ssl_jax.sharding import AXES

# What the compiler says of a program that is too large.
_USED = re.compile(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm')
_UNITS = {'': 1, 'K': 2 ** 10, 'M': 2 ** 20, 'G': 2 ** 30, 'T': 2 ** 40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device.

    Args:
      arguments: state and batch.
      outputs: the new state and metrics; `reused` of them lie where the old state was.
      temporaries: activations and scratch.
      program: its code.
    """
    arguments: int
    outputs: int
    reused: int
    temporaries: int
    program: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.reused + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Result:
    """A compiled step, or why there is none.

    Args:
      mesh, batch, remat, accumulate: of the config; remat is None where the model has none.
      needed: bytes per device, by the compiler.
      limit: bytes that a device has, by the data sheet.
      program, memory, estimate: None where it does not fit.
      model_flops: of one step, all devices together, nothing computed twice.
      seconds: that the compiler took.
    """
    name: str
    slice: Slice
    mesh: Mapping[str, int]
    batch: int
    remat: bool | None
    accumulate: int
    needed: float
    limit: float
    model_flops: float
    steps_per_epoch: int
    seconds: float
    memory: Memory | None = None
    program: hlo.Program | None = None
    devices: Devices | None = None
    estimate: Estimate | None = None

    @property
    def fits(self) -> bool:
        return self.program is not None

    @property
    def images_per_second(self) -> float:
        return self.batch / self.estimate.step if self.estimate else 0.0


def devices(slice_: Slice) -> list[Any]:
    """Descriptions of the devices of a slice.

    Raises:
      UserError: libtpu knows no such slice.
    """
    options = {'chip_config_name': slice_.chip.config} if slice_.chip.config else {}
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=slice_.name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f'--topology={slice_.name!r}: {str(error).splitlines()[0]}') from error


def compile_step(config: ConfigDict, slice_: Slice, devices: Sequence[Any]) -> Result:
    """Compiles the very step of the loop, with the shardings of its arguments.

    Raises:
      UserError: the config does not fit the devices.
    """
    run = assemble(config, '', need_data=False, devices=devices)
    mesh, layout = run.layout.mesh, run.layout
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.batch) for k, x in run.batch.items()}
    flags = jax.ShapeDtypeStruct((mesh.size,), bool, sharding=NamedSharding(mesh, PartitionSpec(AXES)))
    began = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = run.jit_step().lower(run.state, batch, flags)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            used = _USED.search(str(error))
            if used is None:
                raise
            return _result(config, slice_, run, began, needed=float(used[1]) * _UNITS[used[2]])
    sizes = compiled.memory_analysis()
    memory = Memory(sizes.argument_size_in_bytes, sizes.output_size_in_bytes, sizes.alias_size_in_bytes,
                    sizes.temp_size_in_bytes, sizes.generated_code_size_in_bytes)
    program = hlo.parse(compiled.as_text())
    where = Devices(slice_, tuple(tuple(d.coords) for d in mesh.devices.flat), dict(mesh.shape))
    return _result(config, slice_, run, began, needed=memory.total, memory=memory, program=program, devices=where,
                   estimate=estimate.estimate(program, where))


def _result(config, slice_: Slice, run: Run, began: float, **found) -> Result:
    return Result(name=run.experiment.objective['name'], slice=slice_, mesh=dict(run.layout.mesh.shape),
                  batch=run.experiment.batch, remat=_remat(config.objective), accumulate=run.experiment.accumulate,
                  limit=slice_.chip.memory / slice_.chip.devices, model_flops=run.flops_per_step,
                  steps_per_epoch=run.steps_per_epoch, seconds=time.monotonic() - began, **found)


def search(config: ConfigDict, slice_: Slice, devices: Sequence[Any], *, step=compile_step) -> Iterator[Result]:
    """Results for the meshes worth trying, each with the config's batch and twice as many images.

    For each of them without remat, else with it, else with the batch in more and more parts, until it fits.
    """
    for batch in (config.batch, 2 * config.batch):
        for mesh in estimate.meshes(slice_.shape, len(devices), batch):
            for remat, accumulate in attempts(batch, mesh, _remat(config.objective) is not None):
                result = step(changed(config, batch, mesh, remat, accumulate), slice_, devices)
                yield result
                if result.fits:
                    break


def attempts(batch: int, mesh: Mapping[str, int], has_remat: bool) -> list[tuple[bool, int]]:
    """(remat, accumulate), from what is fastest to what needs the least memory."""
    rows = batch // (mesh['data'] * mesh['fsdp'])
    parts = [n for n in (2, 4, 8) if rows % n == 0]
    return [(False, 1), *([(True, 1)] if has_remat else []), *((has_remat, n) for n in parts)]


def changed(config: ConfigDict, batch: int, mesh: Mapping[str, int], remat: bool, accumulate: int) -> ConfigDict:
    """A copy of the config with these values."""
    config = copy.deepcopy(config).unlock()
    config.batch, config.accumulate = batch, accumulate
    config.mesh = ConfigDict((dict(config.mesh) if 'mesh' in config else {}) | dict(mesh))
    for spec in _with_remat(config.objective):
        spec.remat = remat
    return config


def _with_remat(spec: ConfigDict) -> Iterator[ConfigDict]:
    """The parts of an objective's spec that say whether to recompute."""
    for value in spec.values():
        if isinstance(value, ConfigDict):
            if 'remat' in value:
                yield value
            yield from _with_remat(value)


def _remat(spec: ConfigDict) -> bool | None:
    return next((part.remat for part in _with_remat(spec)), None)


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f'{size / GIB:.2f} GiB'
