"""Floating-point operations counted from a jaxpr: no formula per model, and hidden tokens cost what they cost."""
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

# bf16 dense peak per chip in FLOP/s, from the vendors' data sheets. A device that is not here has no MFU.
PEAK_FLOPS = {
    'NVIDIA A100': 312e12, 'NVIDIA H100 PCIe': 756e12, 'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12,
    'NVIDIA L4': 121e12, 'NVIDIA B200': 2250e12, 'Tesla V100': 125e12,
    'TPU v2': 46e12, 'TPU v3': 123e12, 'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5': 459e12, 'TPU v6 lite': 918e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """The device's dense bf16 peak, by the longest matching name; None if unknown (CPUs)."""
    names = [n for n in PEAK_FLOPS if device.device_kind.startswith(n)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def count(function: Callable[..., Any], *args: Any, scope: str = '') -> float:
    """Multiply-adds of matrix products and convolutions, two operations each, in one call of `function`.

    Elementwise work is left out, as is usual for MFU (Chowdhery et al. 2022, appendix B). Scans count their body once
    per iteration, which XLA's own cost analysis does not. Recomputation under `jax.checkpoint` counts: trace the
    function without it for model FLOPs.

    Args:
      args: arrays or shapes.
      scope: count only what lies in the `jax.named_scope` of this name, and its derivatives.
    """
    return _jaxpr(jax.make_jaxpr(function)(*args).jaxpr, scope)


def without_remat(spec: Any) -> Any:
    """A config's spec with every `remat` off: the same model, nothing computed twice."""
    if isinstance(spec, Mapping):
        return {k: False if k == 'remat' else without_remat(v) for k, v in spec.items()}
    return spec


def _jaxpr(jaxpr, scope) -> float:
    return sum(_equation(e, scope) for e in jaxpr.eqns)


def _equation(e, scope) -> float:
    name = e.primitive.name
    if scope in str(e.source_info.name_stack):
        scope = ''   # what is inside lies in it too
    if name == 'dot_general' and not scope:
        (contract, _), _ = e.params['dimension_numbers']
        return 2 * math.prod(e.outvars[0].aval.shape) * math.prod(e.invars[0].aval.shape[i] for i in contract)
    if name == 'conv_general_dilated' and not scope:
        kernel, dims = e.invars[1].aval.shape, e.params['dimension_numbers'].rhs_spec
        per_output = math.prod(kernel) // kernel[dims[0]]
        return 2 * math.prod(e.outvars[0].aval.shape) * per_output / math.prod(e.params['lhs_dilation'])
    inner = [x for value in e.params.values() for x in (value if isinstance(value, (tuple, list)) else (value,))]
    inner = [getattr(x, 'jaxpr', x) for x in inner]
    total = [_jaxpr(x, scope) for x in inner if hasattr(x, 'eqns')]
    if name == 'cond':
        return max(total, default=0.0)
    if name == 'scan':
        return e.params['length'] * sum(total)
    return sum(total)
