"""What `launch.aot` prints."""
import collections
from collections.abc import Sequence

from launch import estimate, hlo
from launch.chips import GIB
from launch.compiled import Result

CHIPS = tuple(2 ** n for n in range(3, 11))


def text(result: Result, *, price: float | None = None, scaling: bool = False) -> list[str]:
    """The report on one compiled step, line by line.

    Args:
      price: of a chip-hour.
      scaling: with the table of `estimate.weak_scaling`.
    """
    per_chip = result.slice.chip.devices
    lines = [f'step        {settings(result)}, compiled in {result.seconds:,.0f} s',
             f'memory      {result.needed / GIB:,.2f} of {result.limit / GIB:,.0f} GiB per device: '
             + ('fits' if result.fits else 'DOES NOT FIT')]
    if not result.fits:
        return [*lines, '            remat, accumulation, fsdp or fewer images per chip need less: try --suggest']
    memory, program, times, chip = result.memory, result.program, result.estimate, result.slice.chip
    lines += [f'  {name:<26}{size / GIB:10.3f} GiB' for name, size in (
        ('arguments', memory.arguments), ('outputs beside them', memory.outputs - memory.reused),
        ('temporaries', memory.temporaries), ('program', memory.program))]
    model = result.model_flops / result.slice.chips
    flops = program.flops * per_chip
    lines += [f'FLOPs       {model / 1e12:,.3f} TFLOP of the model per chip and step; the program has '
              f'{flops / 1e12:,.3f}, {flops / model:.2f} times as many',
              '', f'collectives {"kind":<20}{"count":>8}{"GiB moved":>12}{"ms":>10}   per device and step']
    lines += [f'            {kind:<20}{count:>8,}{moved / GIB:>12.4f}{1e3 * seconds:>10.3f}'
              for kind, count, moved, seconds in collectives(result)]
    lines += ['largest     ' + line for line in largest(result)] or ['            none']
    if program.unknown_loops:
        lines.append(f'            {program.unknown_loops} loops of unknown length count once')
    step = times.step
    epoch = result.steps_per_epoch * step * result.slice.chips / 3600
    lines += ['', f'time        {1e3 * step:,.2f} ms per step: compute {1e3 * times.compute:,.2f} (its matrix products '
              f'{1e3 * times.matrices:,.2f}), communication {1e3 * times.communication:,.2f}, nothing overlapped',
              f'            {1e3 * max(times.compute, times.communication):,.2f} ms if all that can be is overlapped',
              f'            {100 * model / (step * chip.flops):.0f} % of the peak of {chip.flops / 1e12:,.0f} TFLOP/s '
              'per chip goes into the model (MFU)',
              f'            {result.images_per_second:,.0f} images/s, '
              f'{result.images_per_second / result.slice.chips:,.1f} per chip',
              f'epoch       {result.steps_per_epoch * step / 60:,.2f} minutes, {epoch:,.2f} chip-hours'
              + (f', {epoch * price:,.2f} at {price:g} per chip-hour' if price is not None else '')]
    return lines + (['', *scaling_table(result)] if scaling else [])


def settings(result: Result) -> str:
    """Mesh, batch, remat and accumulation in words."""
    mesh = ' x '.join(f'{axis} {size}' for axis, size in result.mesh.items())
    return (f'{result.name} on {result.slice.name}, mesh {mesh}, batch {result.batch:,}'
            + (', remat' if result.remat else '')
            + (f' in {result.accumulate} parts' if result.accumulate > 1 else ''))


def collectives(result: Result) -> list[tuple[str, int, float, float]]:
    """(kind, runs, bytes that a device receives, seconds) per step, of each kind that there is."""
    sums = collections.defaultdict(lambda: [0, 0.0, 0.0])
    for c in result.program.collectives:
        for i, value in enumerate((1, c.moved, estimate.seconds(c, result.devices))):
            sums[c.kind][i] += c.count * value
    return [(kind, *sums[kind]) for kind in hlo.KINDS if kind in sums]


def largest(result: Result, count: int = 3) -> list[str]:
    """The collectives that move most."""
    found = sorted(result.program.collectives, key=lambda c: -c.count * c.moved)[:count]
    return [f'{c.kind} of {c.size / 2 ** 20:,.2f} MiB among {len(c.group)}, {c.count} times: {c.source[-60:]}'
            for c in found]


def scaling_table(result: Result) -> list[str]:
    """Bytes moved by the number of chips."""
    scales = estimate.weak_scaling(result.program, result.devices, CHIPS)
    lines = [f'scaling     {"chips":>6}{"slice":>14}{"GiB moved":>12}{"communication":>16}{"of compute":>12}   '
             f'per chip and step, {result.batch / result.slice.chips:g} images per chip']
    lines += [f'            {s.chips:>6}{s.name:>14}{s.moved / GIB:>12.4f}{1e3 * s.communication:>13.3f} ms'
              f'{100 * s.communication / s.compute:>10.1f} %' for s in scales]
    crossing = estimate.crossing(scales)
    taken = 'never takes' if crossing is None else f'from {crossing} chips on takes'
    return [*lines, f'            communication {taken} more than 10 % of compute']


def row(result: Result) -> str:
    """One line on a variant."""
    memory = f'{result.needed / GIB:7.2f} of {result.limit / GIB:.0f} GiB'
    if not result.fits:
        return f'{settings(result)}: {memory}, does not fit'
    return (f'{settings(result)}: {memory}, {1e3 * result.estimate.step:,.1f} ms, '
            f'{result.images_per_second:,.0f} images/s')


def ranking(results: Sequence[Result]) -> list[str]:
    """Those that fit, the fastest per image first; what does not fit is counted."""
    fitting = sorted((r for r in results if r.fits), key=lambda r: (-r.images_per_second, r.needed))
    if not fitting:
        return [f'none of {len(results)} variants fits: take more chips, or fewer images']
    lines = [f'{i + 1:>3}. {row(r)}' for i, r in enumerate(fitting)]
    best = fitting[0]
    flags = [f'--config.mesh.{axis}={size}' for axis, size in best.mesh.items()]
    flags += [f'--config.batch={best.batch}', f'--config.accumulate={best.accumulate}']
    flags += [f'--config.objective.encoder.remat={best.remat}'] if best.remat is not None else []
    return [*lines, f'{len(results) - len(fitting)} of {len(results)} do not fit', 'the first: ' + ' '.join(flags),
            'a recipe tuned at one batch need not learn as well at another']
