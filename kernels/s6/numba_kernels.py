"""Selective scan (S6) on the CPU: the compiled kernels. `numba_scan` holds their public operation.

For every batch b, channel d and state n, with g the group of d and decay_t = exp(dt_t A[d, n]):

    dt_t = softplus(delta_t + delta_bias)            (softplus where asked for)
    h_t  = decay_t h_{t-1} + dt_t u_t B[b, g, n, t]
    out  = (sum_n C[b, g, n, t] h_t + D u_t) * silu(z_t)

A task is one or more blocks of LANES channels of one batch; threads call the kernels with ranges of
tasks, without holding the interpreter's lock (Numba's own threading doubled the time of compilation
and is not safe in a process that forks). The arithmetic is written with vectors of LANES
elements, a type defined here: the compiler would not find them by itself, because it cannot tell
that the arrays do not overlap. Time is cut into chunks of CHUNK steps, and within a chunk the
states are walked one after the other: the state stays in registers, the chunk's tiles in the
first-level cache. The forward keeps the states at the chunks' beginnings for the backward, which
replays the rest.

All functions are in one file because Numba's cache on disk notices changes only of the file that a
function is in.
"""

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from mambench.kernels.s6.numba_config import CHUNK, LANES

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

# Fusing into multiply-adds is always allowed; reordering only in the sum over a vector's lanes.
_FUSE = ("contract",)


def _jit(**options: Any) -> Any:
    """Return `njit` with a cache on disk, or without one where no folder can be written."""

    def decorate(function: Any) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # "no locator available": neither here nor in the user's cache folder
            return njit(**options)(function)

    return decorate


class Vector(types.Type):
    """LANES floats in registers; + - * with vectors and with scalars of the element type."""

    def __init__(self, element: Any) -> None:
        self.element = element
        super().__init__(name=f"Vector({element}, {LANES})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Any) -> None:
        super().__init__(manager, vector, _vector_ir(vector.element))


def _vector_ir(element: Any) -> Any:
    return ir.VectorType(ir.DoubleType() if element == types.float64 else ir.FloatType(), LANES)


@infer_global(operator.add)
@infer_global(operator.sub)
@infer_global(operator.mul)
class _VectorArithmetic(AbstractTemplate):
    def generic(self, args: Any, kws: Any) -> Any:
        left, right = args
        if isinstance(left, Vector) and right in (left, left.element):
            return signature(left, left, right)
        return None


def _lower_arithmetic(operation: Any, emit: Any) -> None:
    def with_vector(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit(builder)(*args, flags=_FUSE)

    def with_scalar(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit(builder)(args[0], _broadcast(builder, args[1]), flags=_FUSE)

    lower_builtin(operation, Vector, Vector)(with_vector)
    lower_builtin(operation, Vector, types.Float)(with_scalar)


_lower_arithmetic(operator.add, lambda builder: builder.fadd)
_lower_arithmetic(operator.sub, lambda builder: builder.fsub)
_lower_arithmetic(operator.mul, lambda builder: builder.fmul)


def _broadcast(builder: Any, scalar: Any) -> Any:
    vector = ir.VectorType(scalar.type, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.IntType(32)(0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)


def _constant(vector: Any, value: float) -> Any:
    return ir.Constant(vector, [value] * LANES)


def _row_pointer(context: Any, builder: Any, array_type: Any, array: Any, row: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    first = builder.gep(data, [builder.mul(row, row.type(LANES))])
    return builder.bitcast(first, _vector_ir(array_type.dtype).as_pointer())


@intrinsic
def load(typing_context: Any, tile: Any, row: Any) -> Any:
    """Read row `row` of a C-contiguous tile (rows, LANES)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _row_pointer(context, builder, sig.args[0], *args)
        return builder.load(pointer, align=sig.args[0].dtype.bitwidth // 8)

    return Vector(tile.dtype)(tile, types.int64), codegen


@intrinsic
def store(typing_context: Any, tile: Any, row: Any, value: Any) -> Any:
    """Write row `row` of a C-contiguous tile (rows, LANES)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _row_pointer(context, builder, sig.args[0], args[0], args[1])
        builder.store(args[2], pointer, align=sig.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(tile, types.int64, value), codegen


@intrinsic
def total(typing_context: Any, value: Any) -> Any:
    """Add up a vector's lanes."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = args[0].type
        name = f"llvm.vector.reduce.fadd.v{LANES}f{sig.return_type.bitwidth}"
        kind = ir.FunctionType(vector.element, [vector.element, vector])
        function = builder.module.declare_intrinsic(name, fnty=kind)
        return builder.call(function, [vector.element(-0.0), args[0]], fastmath=("reassoc",))

    return value.element(value), codegen


@intrinsic
def exp2(typing_context: Any, value: Any) -> Any:
    """2 ** x."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if sig.return_type.element == types.float64:
            return builder.call(_library(builder, "exp2", args[0].type), args)
        return _exp2_float32(builder, args[0])

    return value(value), codegen


@intrinsic
def softplus(typing_context: Any, value: Any) -> Any:
    """Return log(1 + exp(x))."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        small = _exp_of_minus_abs(builder, args[0])
        log1p = _log1p_float64 if sig.return_type.element == types.float64 else _log1p_float32
        return builder.fadd(_maximum(builder, args[0], 0.0), log1p(builder, small))

    return value(value), codegen


@intrinsic
def sigmoid(typing_context: Any, value: Any) -> Any:
    """1 / (1 + exp(-x))."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        # exp(-|x|) cannot overflow, and neither branch cancels.
        small = _exp_of_minus_abs(builder, args[0])
        one = _constant(small.type, 1.0)
        positive = builder.fcmp_ordered(">=", args[0], _constant(small.type, 0.0))
        return builder.fdiv(builder.select(positive, one, small), builder.fadd(one, small))

    return value(value), codegen


def _library(builder: Any, name: str, vector: Any) -> Any:
    bits = 64 if isinstance(vector.element, ir.DoubleType) else 32
    kind = ir.FunctionType(vector, [vector])
    return builder.module.declare_intrinsic(f"llvm.{name}.v{LANES}f{bits}", fnty=kind)


def _maximum(builder: Any, x: Any, bound: float) -> Any:
    limit = _constant(x.type, bound)
    return builder.select(builder.fcmp_ordered("<", x, limit), limit, x)  # NaN stays


def _polynomial(builder: Any, x: Any, coefficients: tuple[float, ...]) -> Any:
    value = _constant(x.type, coefficients[0])
    for coefficient in coefficients[1:]:
        product = builder.fmul(value, x, flags=_FUSE)
        value = builder.fadd(product, _constant(x.type, coefficient), flags=_FUSE)
    return value


def _exp_of_minus_abs(builder: Any, x: Any) -> Any:
    magnitude = builder.call(_library(builder, "fabs", x.type), [x])
    exponent = builder.fmul(magnitude, _constant(x.type, -LOG2E))
    if isinstance(x.type.element, ir.DoubleType):
        return builder.call(_library(builder, "exp2", x.type), [exponent])
    return _exp2_float32(builder, exponent)


# Least relative error on [-0.5, 0.5] (2e-9) and [0, 1] (5e-9), fitted by reweighted least squares.
_EXP2 = (1.534581159e-4, 1.339993122e-3, 9.618488959e-3, 5.550328777e-2, 2.402264689e-1, LN2, 1.0)
_LOG1P_OVER_X = (
    -3.244021128e-3,
    1.985144411e-2,
    -5.695949996e-2,
    1.060365141e-1,
    -1.530559052e-1,
    1.967593854e-1,
    -2.495413352e-1,
    3.332996240e-1,
    -4.999990242e-1,
    1.0,
)


def _exp2_float32(builder: Any, x: Any) -> Any:
    # Adding 1.5 * 2**23 rounds to an integer, in the mantissa's low bits; the remainder goes
    # through the polynomial, the integer into the exponent. Clamped to [-100, 128]: 2**128 gives
    # infinity; below, 2**-100 is as good as zero and keeps products out of the denormal range,
    # where a processor takes a hundred times as long.
    integers = ir.VectorType(ir.IntType(32), LANES)
    low = _maximum(builder, x, -100.0)
    high = _constant(x.type, 128.0)
    clamped = builder.select(builder.fcmp_ordered(">", low, high), high, low)
    magic = _constant(x.type, 12582912.0)
    shifted = builder.fadd(clamped, magic)
    fraction = builder.fsub(clamped, builder.fsub(shifted, magic))
    bias = ir.Constant(integers, [0x4B400000 - 127] * LANES)
    exponent = builder.sub(builder.bitcast(shifted, integers), bias)
    power = builder.shl(exponent, ir.Constant(integers, [23] * LANES))
    return builder.fmul(_polynomial(builder, fraction, _EXP2), builder.bitcast(power, x.type))


def _log1p_float32(builder: Any, x: Any) -> Any:
    # x times a polynomial keeps the relative accuracy of small values.
    return builder.fmul(_polynomial(builder, x, _LOG1P_OVER_X), x)


def _log1p_float64(builder: Any, x: Any) -> Any:
    # log(w) x / (w - 1) with w = 1 + x as rounded: the rounding of w cancels. W. Kahan's method.
    one = _constant(x.type, 1.0)
    w = builder.fadd(one, x)
    logarithm = builder.call(_library(builder, "log", x.type), [w])
    corrected = builder.fdiv(builder.fmul(logarithm, x), builder.fsub(w, one))
    return builder.select(builder.fcmp_ordered("==", w, one), x, corrected)


# Tiles of a chunk, each (CHUNK, LANES): 0 u, 1 delta + bias, 2 dt, 3 dt u, 4 y; in the backward
# also 5 dy, 6 dx then du, 7 the gradient of dt / ln 2 but for u dx, then ddelta, 8 decay or z.


@_jit()
def _read(source: Any, first: int, width: int, begin: int, steps: int, tile: Any) -> None:
    """Copy a block of channels of (D, L), from `begin`, into a tile."""
    for j in range(width):
        for t in range(steps):
            tile[t, j] = source[first + j, begin + t]


@_jit()
def _write(tile: Any, first: int, width: int, begin: int, steps: int, target: Any) -> None:
    """Copy a tile into a block of channels of (D, L), from `begin`."""
    for j in range(width):
        for t in range(steps):
            target[first + j, begin + t] = tile[t, j]


@_jit()
def _copy_rows(source: Any, target: Any) -> None:
    """Copy (rows, LANES); an assignment of arrays compiles ten times as long."""
    for n in range(source.shape[0]):
        store(target, n, load(source, n))


@_jit()
def _by_lane(source: Any, first: int, width: int, rows: Any) -> None:
    """Transpose channels `first` and on of (channels, rows) into lanes of (rows, LANES)."""
    for j in range(width):
        for n in range(source.shape[1]):
            rows[n, j] = source[first + j, n]


@_jit()
def _channels(block: int, d_inner: int, ngroups: int) -> Any:
    """Return a block's group, first channel and number of channels; no block spans two groups."""
    per_group = d_inner // ngroups
    group_blocks = -(-per_group // LANES)
    group = block // group_blocks
    first = group * per_group + (block % group_blocks) * LANES
    return group, first, min(LANES, (group + 1) * per_group - first)


@_jit()
def _read_inputs(
    u: Any,
    delta: Any,
    first: int,
    width: int,
    lanes: Any,
    use_softplus: bool,
    begin: int,
    steps: int,
    tiles: Any,
) -> None:
    """Fill tiles 0 to 3; lanes beyond the block's channels get values that reach no result."""
    _read(u, first, width, begin, steps, tiles[0])
    _read(delta, first, width, begin, steps, tiles[1])
    bias = load(lanes, 0)
    for t in range(steps):
        raw = load(tiles[1], t) + bias
        dt = softplus(raw) if use_softplus else raw
        store(tiles[1], t, raw)
        store(tiles[2], t, dt)
        store(tiles[3], t, dt * load(tiles[0], t))


@_jit()
def _scan(rate: Any, tiles: Any, B: Any, C: Any, n: int, h: Any, begin: int, steps: int) -> None:
    """Advance state n of every channel by a chunk, adding C h to y."""
    dt, x, y = tiles[2], tiles[3], tiles[4]
    rate_n = load(rate, n)
    state = load(h, n)
    for t in range(steps):
        state = exp2(load(dt, t) * rate_n) * state + load(x, t) * B[n, begin + t]
        store(y, t, load(y, t) + state * C[n, begin + t])
    store(h, n, state)


@_jit()
def _replay(
    rate: Any, tiles: Any, B: Any, C: Any, n: int, kept: Any, h: Any, begin: int, steps: int
) -> None:
    """As `_scan` from the state kept, holding on to decays and, in h, states before every step."""
    dt, x, y, decays = tiles[2], tiles[3], tiles[4], tiles[8]
    rate_n = load(rate, n)
    state = load(kept, n)
    for t in range(steps):
        decay = exp2(load(dt, t) * rate_n)
        store(decays, t, decay)
        store(h, t, state)
        state = decay * state + load(x, t) * B[n, begin + t]
        store(y, t, load(y, t) + state * C[n, begin + t])
    store(h, steps, state)


@_jit()
def _scan_back(
    rate: Any,
    tiles: Any,
    h: Any,
    B: Any,
    C: Any,
    n: int,
    adjoint: Any,
    drate: Any,
    dB: Any,
    dC: Any,
    begin: int,
    steps: int,
) -> None:
    """Walk state n of every channel back over a chunk.

    `adjoint` is the gradient of the state after the chunk, then before it. With q the gradient of
    dt A: tile 6 gathers dx, tile 7 sum_n q rate, drate sum_t q dt.
    """
    dt, x, dy, dx, dlog, decays = tiles[2], tiles[3], tiles[5], tiles[6], tiles[7], tiles[8]
    rate_n = load(rate, n)
    before = load(adjoint, n)
    sum_rate = load(drate, n)
    for back in range(steps):
        t = steps - 1 - back
        dy_t = load(dy, t)
        g = before + dy_t * C[n, begin + t]
        before = load(decays, t) * g
        q = before * load(h, t)
        store(dx, t, load(dx, t) + g * B[n, begin + t])
        store(dlog, t, load(dlog, t) + q * rate_n)
        sum_rate = sum_rate + q * load(dt, t)
        dB[n, begin + t] += total(g * load(x, t))
        dC[n, begin + t] += total(dy_t * load(h, t + 1))
    store(adjoint, n, before)
    store(drate, n, sum_rate)


@_jit()
def _begin_backward(lanes: Any, gated: bool, steps: int, tiles: Any) -> None:
    """Set y to D u, dy to dout silu(z) (tile 5 holds dout, 8 z), and the gradients to zero."""
    skip = load(lanes, 1)
    for t in range(steps):
        u = load(tiles[0], t)
        if gated:
            z = load(tiles[8], t)
            store(tiles[5], t, load(tiles[5], t) * (z * sigmoid(z)))
        store(tiles[4], t, u * skip)
        for j in range(LANES):
            tiles[6, t, j] = 0
            tiles[7, t, j] = 0


@_jit()
def _finish_backward(lanes: Any, use_softplus: bool, steps: int, tiles: Any, dlanes: Any) -> None:
    """Turn tile 6 into du and 7 into ddelta; add to the gradients of delta_bias and D."""
    skip = load(lanes, 1)
    dbias = load(dlanes, 0)
    dskip = load(dlanes, 1)
    ln2 = tiles.dtype.type(LN2)
    for t in range(steps):
        u, dx, dy = load(tiles[0], t), load(tiles[6], t), load(tiles[5], t)
        ddelta = load(tiles[7], t) * ln2 + u * dx
        if use_softplus:
            ddelta = ddelta * sigmoid(load(tiles[1], t))
        dbias = dbias + ddelta
        dskip = dskip + dy * u
        store(tiles[7], t, ddelta)
        store(tiles[6], t, load(tiles[2], t) * dx + dy * skip)
    store(dlanes, 0, dbias)
    store(dlanes, 1, dskip)


@_jit()
def _gate_gradient(steps: int, tiles: Any) -> None:
    """Turn tile 8 from z into dz, given y in 4 and dout in 5."""
    for t in range(steps):
        z = load(tiles[8], t)
        s = sigmoid(z)
        slope = s + z * s - z * s * s
        store(tiles[8], t, load(tiles[5], t) * load(tiles[4], t) * slope)


@_jit(nogil=True)
def forward(
    begin: int,
    end: int,
    u: Any,
    delta: Any,
    rates: Any,
    B: Any,
    C: Any,
    parameters: Any,
    z: Any,
    initial: Any,
    blocks: int,
    use_softplus: bool,
    gated: bool,
    keep: bool,
    out: Any,
    last: Any,
    kept: Any,
) -> None:
    """Write out (B, D, L), last (B, D, N) and, if keep, kept (B, blocks, chunks, N, LANES).

    Does the tasks begin to end of batch * blocks. All arrays are C-contiguous and of one dtype.
    rates (D, N) is A log2(e); parameters (D, 2) holds delta_bias and D; initial (B, D, N) is the
    state before the first step; `blocks` is ngroups times the blocks of LANES channels that a group
    needs. z and kept are not touched where not gated and not keep.
    """
    seqlen, d_state = u.shape[2], rates.shape[1]
    for task in range(begin, end):
        b, block = task // blocks, task % blocks
        group, first, width = _channels(block, u.shape[1], B.shape[1])
        rate = np.zeros((d_state, LANES), u.dtype)
        h = np.zeros((d_state, LANES), u.dtype)
        lanes = np.zeros((2, LANES), u.dtype)
        tiles = np.zeros((5, CHUNK, LANES), u.dtype)
        y = tiles[4]
        _by_lane(rates, first, width, rate)
        _by_lane(parameters, first, width, lanes)
        _by_lane(initial[b], first, width, h)
        skip = load(lanes, 1)
        for chunk in range(-(-seqlen // CHUNK)):
            start = chunk * CHUNK
            steps = min(CHUNK, seqlen - start)
            if keep:
                _copy_rows(h, kept[b, block, chunk])
            _read_inputs(u[b], delta[b], first, width, lanes, use_softplus, start, steps, tiles)
            for t in range(steps):
                store(y, t, load(tiles[0], t) * skip)
            for n in range(d_state):
                _scan(rate, tiles, B[b, group], C[b, group], n, h, start, steps)
            if gated:
                _read(z[b], first, width, start, steps, tiles[0])
                for t in range(steps):
                    gate = load(tiles[0], t)
                    store(y, t, load(y, t) * (gate * sigmoid(gate)))
            _write(y, first, width, start, steps, out[b])
        for j in range(width):
            for n in range(d_state):
                last[b, first + j, n] = h[n, j]


@_jit(nogil=True)
def backward(
    begin: int,
    end: int,
    u: Any,
    delta: Any,
    rates: Any,
    B: Any,
    C: Any,
    parameters: Any,
    z: Any,
    dout: Any,
    dlast: Any,
    kept: Any,
    blocks: int,
    use_softplus: bool,
    gated: bool,
    du: Any,
    ddelta: Any,
    dz: Any,
    drates: Any,
    dparameters: Any,
    dinitial: Any,
    dB: Any,
    dC: Any,
) -> None:
    """Write the gradients of `forward`'s inputs, given those of out (B, D, L) and last (B, D, N).

    Does the tasks begin to end of batch * ngroups * partials. drates (B, D, N), the gradient of A,
    dparameters (B, D, 2) and dinitial (B, D, N), that of the state before the first step, are per
    batch; dB and dC (partials, B, G, N, L), zero on entry, per
    part of a group's channels. The caller adds them up.
    """
    ngroups, partials = B.shape[1], dB.shape[0]
    group_blocks = blocks // ngroups
    seqlen, d_state = u.shape[2], rates.shape[1]
    for task in range(begin, end):
        partial = task % partials
        group = (task // partials) % ngroups
        b = task // (partials * ngroups)
        for part in range(partial, group_blocks, partials):
            block = group * group_blocks + part
            _, first, width = _channels(block, u.shape[1], B.shape[1])
            rate = np.zeros((d_state, LANES), u.dtype)
            adjoint = np.zeros((d_state, LANES), u.dtype)
            drate = np.zeros((d_state, LANES), u.dtype)
            lanes = np.zeros((2, LANES), u.dtype)
            dlanes = np.zeros((2, LANES), u.dtype)
            tiles = np.zeros((9, CHUNK, LANES), u.dtype)
            h = np.zeros((CHUNK + 1, LANES), u.dtype)
            _by_lane(rates, first, width, rate)
            _by_lane(dlast[b], first, width, adjoint)
            _by_lane(parameters, first, width, lanes)
            chunks = -(-seqlen // CHUNK)
            for back in range(chunks):
                chunk = chunks - 1 - back
                start = chunk * CHUNK
                steps = min(CHUNK, seqlen - start)
                _read_inputs(u[b], delta[b], first, width, lanes, use_softplus, start, steps, tiles)
                _read(dout[b], first, width, start, steps, tiles[5])
                if gated:
                    _read(z[b], first, width, start, steps, tiles[8])
                _begin_backward(lanes, gated, steps, tiles)
                for n in range(d_state):
                    _replay(
                        rate,
                        tiles,
                        B[b, group],
                        C[b, group],
                        n,
                        kept[b, block, chunk],
                        h,
                        start,
                        steps,
                    )
                    _scan_back(
                        rate,
                        tiles,
                        h,
                        B[b, group],
                        C[b, group],
                        n,
                        adjoint,
                        drate,
                        dB[partial, b, group],
                        dC[partial, b, group],
                        start,
                        steps,
                    )
                _finish_backward(lanes, use_softplus, steps, tiles, dlanes)
                _write(tiles[6], first, width, start, steps, du[b])
                _write(tiles[7], first, width, start, steps, ddelta[b])
                if gated:
                    _read(z[b], first, width, start, steps, tiles[8])
                    _read(dout[b], first, width, start, steps, tiles[5])
                    _gate_gradient(steps, tiles)
                    _write(tiles[8], first, width, start, steps, dz[b])
            for j in range(width):
                for n in range(d_state):
                    drates[b, first + j, n] = drate[n, j]
                    dinitial[b, first + j, n] = adjoint[n, j]
                for k in range(2):
                    dparameters[b, first + j, k] = dlanes[k, j]
