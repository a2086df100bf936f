"""What TPU chips can do, from public data sheets, and slices of them by name."""
import dataclasses
import math
import re
from collections.abc import Sequence

from ssl_jax.errors import UserError, nearest

GIB = 2 ** 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, not one core.

    Args:
      flops: dense bf16 peak per second.
      memory: of the device, bytes.
      bandwidth: of that memory, bytes per second.
      interconnect: bytes per second out of a chip by all its links together, which is half of what data sheets call
        bidirectional.
      dimensions: of the torus that the chips form.
      devices: that JAX makes of a chip.
      rings: closed where a side of the slice has a multiple of so many chips; else chips form lines.
      pod: the most chips that links of this kind connect.
    """
    flops: float
    memory: int
    bandwidth: float
    interconnect: float
    dimensions: int
    devices: int
    rings: int
    pod: int
    config: str | None = None   # of libtpu, where it is not the usual one

    @property
    def link(self) -> float:
        """Bytes per second of one link one way; two of them for each dimension."""
        return self.interconnect / (2 * self.dimensions)


# The tables of specifications in cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; the interconnect of v4 from Jouppi
# et al. 2023 (arXiv:2304.01433, table 4: 6 links of 50 GB/s).
CHIPS = {
    'v4': Chip(275e12, 32 * GIB, 1200e9, 300e9, 3, 1, 4, 4096, 'megacore'),
    'v5e': Chip(197e12, 16 * GIB, 800e9, 200e9, 2, 1, 16, 256),
    'v5p': Chip(459e12, 95 * GIB, 2765e9, 600e9, 3, 1, 4, 8960),
    'v6e': Chip(918e12, 32 * GIB, 1600e9, 400e9, 2, 1, 16, 256),
    'tpu7x': Chip(2307e12, 192 * GIB, 7380e9, 600e9, 3, 2, 4, 9216),
}
# A message from chip to chip takes about a microsecond (Austin et al. 2025, 'How to Scale Your Model', chapter 3).
HOP = 1e-6


@dataclasses.dataclass(frozen=True)
class Slice:
    """Connected chips: `Slice.named('v5e:16x16')`."""
    name: str
    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def named(cls, text: str) -> 'Slice':
        """A slice by the chip's name and the sides of the slice.

        Raises:
          UserError: not of this form, an unknown chip, sides that do not fit it.
        """
        kind, _, sides = text.partition(':')
        if kind not in CHIPS:
            raise UserError(f'--topology={text!r}: unknown chip {kind!r}{nearest(kind, CHIPS)}')
        chip = CHIPS[kind]
        example = 'x'.join(['4'] * chip.dimensions)
        if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', sides) or sides.count('x') != chip.dimensions - 1:
            raise UserError(f'--topology={text!r}: expected {chip.dimensions} sides, as in {kind}:{example}')
        shape = tuple(map(int, sides.split('x')))
        if math.prod(shape) > chip.pod:
            raise UserError(f'--topology={text!r}: expected at most {chip.pod} chips, got {math.prod(shape)}')
        return cls(text, chip, shape)

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    def ring(self, members: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        """(bytes per second that each of these chips can receive from the others, seconds of latency).

        Args:
          members: coordinates; a flat torus may have a third one. The links of every dimension in which they differ
            are used, both ways round where it closes.
        """
        rate = hops = 0
        for side, places in zip(self.shape, zip(*members)):
            extent = len(set(places))
            if extent > 1:
                closed = extent == side and side % self.chip.rings == 0
                rate += self.chip.link * (2 if closed else 1)
                hops += extent // 2 if closed else extent - 1
        # Devices of one chip exchange by way of its memory.
        return (rate or self.chip.bandwidth), hops * HOP

    def grown(self, chips: int) -> 'Slice | None':
        """A slice of so many of these chips, its sides as equal as powers of 2 can be; None beyond one pod."""
        if chips > self.chip.pod:
            return None
        sides = [1] * len(self.shape)
        for _ in range(chips.bit_length() - 1):
            sides[sides.index(min(sides))] *= 2
        return Slice.named(f'{self.name.partition(":")[0]}:{"x".join(map(str, sorted(sides)))}')
