"""How long a compiled step would take, from its program and a data sheet."""
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from launch.chips import Slice
from launch.hlo import Collective, Program


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where the devices of a program are.

    Args:
      slice: of which they are the chips.
      places: coordinates of their chips, in the program's order.
      mesh: sizes of the axes of which they are numbered, the last fastest.
    """
    slice: Slice
    places: tuple[tuple[int, ...], ...]
    mesh: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one step.

    Args:
      matrices: products and convolutions, at the peak rate.
      compute: every instruction takes the longer of its products at the peak rate and its bytes at the memory's.
      communication: bytes at the rate of the links that a collective can use, and the hops of a message.
    """
    matrices: float
    compute: float
    communication: float

    @property
    def step(self) -> float:
        """With nothing overlapped; a perfect overlap would leave max(compute, communication)."""
        return self.compute + self.communication


def estimate(program: Program, devices: Devices) -> Estimate:
    """The time of a step by a roofline of each instruction (Williams et al. 2009); no measured rates enter."""
    chip = devices.slice.chip
    flops, bandwidth = chip.flops / chip.devices, chip.bandwidth / chip.devices
    compute = sum(w.count * max(w.flops / flops, w.traffic / bandwidth) for w in program.work)
    return Estimate(program.flops / flops, compute, sum(c.count * seconds(c, devices) for c in program.collectives))


def seconds(collective: Collective, devices: Devices) -> float:
    """Of one run of it."""
    rate, latency = devices.slice.ring([devices.places[i] for i in collective.group])
    return collective.moved * devices.slice.chip.devices / rate + latency


@dataclasses.dataclass(frozen=True)
class Scale:
    """A step on so many chips, with the same work for each of them: bytes that a chip receives, seconds."""
    chips: int
    name: str
    moved: float
    compute: float
    communication: float


def weak_scaling(program: Program, devices: Devices, counts: Sequence[int]) -> list[Scale]:
    """What the program's collectives would be with more or fewer chips of the same kind, and as many images for each.

    Chips are added to the data axis, or where it is 1 to the fsdp axis. Collectives along it move the same array among
    more chips: right for parameters and gradients, not for gathered activations.
    """
    axis = 'data' if devices.mesh['data'] > 1 else 'fsdp'
    number = list(devices.mesh).index(axis)
    compute, scales = estimate(program, devices).compute, []
    for count in counts:
        slice_ = devices.slice.grown(count)
        size = devices.mesh[axis] * count / devices.slice.chips
        if slice_ is None or size < 1:
            continue
        everywhere = list(np.ndindex(slice_.shape))
        moved = communication = 0.0
        for c in program.collectives:
            indices = np.unravel_index(np.asarray(c.group), tuple(devices.mesh.values()))
            if len(set(indices[number])) == 1:
                moved += c.count * c.moved
                communication += c.count * seconds(c, devices)
                continue
            group = round(len(c.group) * size / devices.mesh[axis])
            if group == 1:
                continue
            share = len(c.group) / group if c.kind == 'all-gather' else 1
            operands = tuple(share * size for size in c.operands)
            other = dataclasses.replace(c, operands=operands, group=tuple(range(group)))
            rate, latency = slice_.ring(everywhere)
            moved += other.count * other.moved
            communication += other.count * (other.moved * slice_.chip.devices / rate + latency)
        scales.append(Scale(count, slice_.name, moved * slice_.chip.devices, compute, communication))
    return scales


def crossing(scales: Sequence[Scale], share: float = 0.1) -> int | None:
    """The fewest chips with which communication takes more than this share of compute; None: it does with none."""
    return next((s.chips for s in scales if s.communication > share * s.compute), None)


def meshes(shape: Sequence[int], count: int, batch: int) -> list[dict[str, int]]:
    """Meshes worth trying for `count` devices in a slice of this shape: data alone, fsdp along a side, fsdp alone.

    With fewer images than devices the tensor axis takes what the batch cannot split.
    """
    tensor = count // math.gcd(count, batch)
    rest = count // tensor
    found = {fsdp for fsdp in (1, max(shape), rest) if rest % fsdp == 0}
    return [dict(data=rest // fsdp, fsdp=fsdp, tensor=tensor) for fsdp in sorted(found)]
