"""Softplus and sums of a chunk's log-decay in Gluon, as `triton_parts` has them in Triton."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import PropagateNan

from mambench.kernels.ssd import triton_parts

LOG2_E = gl.constexpr(triton_parts.LOG2_E.value)
LEAST_LOG2_DECAY = gl.constexpr(triton_parts.LEAST_LOG2_DECAY.value)
LEAST_A2 = gl.constexpr(triton_parts.LEAST_A2.value)
_ALL = gl.constexpr(PropagateNan.ALL)


@gluon.jit
def softplus(x):
    """log(1 + exp(x)), as `triton_parts.softplus`."""
    e = gl.exp2(-gl.abs(x) * LOG2_E)
    s = e / (2.0 + e)
    s2 = s * s
    series = 1.0 / 15.0
    series = series * s2 + 1.0 / 13.0
    series = series * s2 + 1.0 / 11.0
    series = series * s2 + 1.0 / 9.0
    series = series * s2 + 1.0 / 7.0
    series = series * s2 + 1.0 / 5.0
    series = series * s2 + 1.0 / 3.0
    series = series * s2 + 1.0
    return gl.maximum(x, 0.0, propagate_nan=_ALL) + 2.0 * s * series


@gluon.jit
def add(a, b):
    """Return a + b, for scans."""
    return a + b
