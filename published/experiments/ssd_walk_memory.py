"""SSD forward on Hopper, the walk that looks back: three consumers a block; lines of x held in the L2 cache between its walks;
blocks that share out whole rows of x and have the L2 cache fetch them ahead. Right, timed, by clocks within, and counted by ncu.

python3 ssd_walk_memory.py, from the repository's root; several minutes on 12 cores. $OUT/ssd_walk_memory.json. It changes the source of the walk as it
was at commit 21d1328.
"""
import csv, json, math, os, shutil, subprocess, sys, time, traceback, importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from parts import load_package, replay_us as replay, ssd_inputs as inputs

ROOT = Path.cwd()
OUT = Path(os.environ.get("OUT", "/tmp/out")); OUT.mkdir(parents=True, exist_ok=True)
INF = math.inf
KERNEL = [None]
STAMPS = [None]


def host3(consumers, registers=None, stages=None, hold=None, keep=1 << 20, coop=None):
    """What replaces pairs, ring and run_walk where a block has so many consumers."""
    import torch
    from dataclasses import replace
    from mambench.kernels.ssd.hopper_launch import rows_of, tiles_of
    def pairs3(heads_per_group, headdim): return -(-heads_per_group * -(-headdim // 64) // consumers)
    def ring3(d_state, dtype, gated, config):
        shape = RING(d_state, dtype, gated, config)
        if not config.look_back: return shape
        bn, item = shape.block_n, dtype.itemsize
        wide = shape.scores_dtype.itemsize if shape.scores_dtype else 0
        stage = consumers * 8192 * (2 if gated else 1) // 2 * item + 2 * 64 * bn * item + consumers * 512 + 4096 * wide
        most = min(stages or config.stages, (232448 - consumers * 4096 * item * (2 if consumers == 2 else 1) - 256) // (stage + 24))
        return replace(shape, stages=most)
    def run_walk3(recording, plan, tensors, prepared, results, *, sizes, constants, narrow):
        cum, cumj, scores = prepared
        out, final = results
        block_n, pdl, device = constants["BLOCK_N"], constants["PDL"], out.device
        npairs = sizes[4] * plan.ngroups
        ends = (plan.batch, npairs, consumers, plan.nsegments - 1)
        dtype = torch.bfloat16 if narrow else torch.float32
        slots = recording.scratch((*ends, 64 * block_n), dtype, device)
        decays = recording.scratch(ends, torch.float32, device)
        flags = recording.flags(math.prod(ends), device)
        D, z = tensors.D, tensors.z
        if STAMPS[0] is not None: final = STAMPS[0]
        arguments = (tiles_of(out, 64), tiles_of(tensors.x, 64), None if z is None else tiles_of(z, 64), tiles_of(tensors.B, block_n), tiles_of(tensors.C, block_n),
                     rows_of(scores, 64, 64), rows_of(cum, 64, 1), rows_of(cumj, 64, 1), D, tensors.initial_states, slots, decays, flags, final, *sizes)
        constants = constants | {"D_DIMS": 0 if D is None else D.dim(), "CONSUMERS": consumers, "REGISTERS": registers or (160 if consumers == 3 else 240)}
        if hold is not None:
            arguments += (tensors.x, tensors.x.stride(0) if plan.batch > 1 else 0, *tensors.x.stride()[1:3], plan.seqlen, keep)
            constants |= {"AHEAD": hold[0], "LET_GO": hold[1]}
        if coop is not None:
            constants |= dict(zip(("COOP", "COOP_LAST", "COOP_BOTH"), coop))
            assert tensors.x.stride(1) == tensors.x.shape[2] * tensors.x.shape[3]
        recording.launch(KERNEL[0], (npairs, plan.batch, plan.nsegments), arguments, constants, num_warps=4, launch_pdl=pdl)
    return pairs3, ring3, run_walk3


STAMP = '''
@gluon.jit
def _stamp(stamps, which: gl.constexpr, k: gl.constexpr, CONSUMERS: gl.constexpr):
    clock = gl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=gl.int64, is_pure=False, pack=1)
    block = (gl.program_id(2) * gl.num_programs(1) + gl.program_id(1)) * gl.num_programs(0) + gl.program_id(0)
    gl.store(stamps + (block * CONSUMERS + which) * 8 + k, clock)


@gluon.jit
def _own_state('''


def consumers(s, body=None):
    """Change the walk's source to any number of consumers; a chunk's body of fewer registers keeps no tile for its weights."""
    def sub(old, new, n=1):
        nonlocal s
        assert s.count(old) == n, (s.count(old), old)
        s = s.replace(old, new)
    sub("    consumers_head,\n    let_next_launch,\n    ring_barriers,\n", "    let_next_launch,\n")
    sub('''@gluon.jit
def _own_state(''', '''@gluon.jit
def ring_barriers(STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    return full, empty


@gluon.jit
def consumers_head(
    pair, which: gl.constexpr, pairs_per_group, heads_per_group, P: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    blocks: gl.constexpr = (P + _P - 1) // _P
    group = pair // pairs_per_group
    v = (pair % pairs_per_group) * CONSUMERS + which
    v = gl.minimum(v, heads_per_group * blocks - 1)
    return group * heads_per_group + v // blocks, (v % blocks) * _P


@gluon.jit
def _own_state(''')
    sub("def _own_state(which: gl.constexpr, tiles, own, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):",
        "def _own_state(which: gl.constexpr, tiles, own, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):")
    sub("_own_state(which, tiles, own, BLOCK_N, STAGES)", "_own_state(which, tiles, own, BLOCK_N, STAGES, CONSUMERS)")
    s = s.replace("stage * 4 + which * 2", "(stage * CONSUMERS + which) * 2")
    s = s.replace("stage * 2 + which", "stage * CONSUMERS + which")
    s = s.replace("* npairs + pair) * 2 + which)", "* npairs + pair) * CONSUMERS + which)")
    s = s.replace("static_range(2)", "static_range(CONSUMERS)")
    s = s.replace("heads_per_group, P)", "heads_per_group, P, CONSUMERS)")
    s = s.replace("    STAGES: gl.constexpr = SIZES[3]\n", "    STAGES: gl.constexpr = SIZES[3]\n    CONSUMERS: gl.constexpr = SIZES[4]\n")
    sub("    BLOCK_N: gl.constexpr = SIZES[2]\n    D_DIMS: gl.constexpr = FEATURES[0]\n    HAS_Z", "    BLOCK_N: gl.constexpr = SIZES[2]\n    CONSUMERS: gl.constexpr = SIZES[4]\n    D_DIMS: gl.constexpr = FEATURES[0]\n    HAS_Z")
    sub("row_bytes: gl.constexpr = (2 * _P + Bs.shape[2]) * itemsize + 4 * 4", "row_bytes: gl.constexpr = (CONSUMERS * _P + Bs.shape[2]) * itemsize + CONSUMERS * 2 * 4")
    sub("z_bytes: gl.constexpr = 2 * _P", "z_bytes: gl.constexpr = CONSUMERS * _P")
    sub("STAGES: gl.constexpr, REGISTERS: gl.constexpr, D_DIMS: gl.constexpr,", "STAGES: gl.constexpr, REGISTERS: gl.constexpr, CONSUMERS: gl.constexpr, D_DIMS: gl.constexpr,")
    s = s.replace("[STAGES * 2, _Q, _P]", "[STAGES * CONSUMERS, _Q, _P]")
    sub("[STAGES * 4, 1, _Q]", "[STAGES * CONSUMERS * 2, 1, _Q]")
    sub("    weights = gl.allocate_shared_memory(dtype, [2, _Q, _Q], x_desc.layout)\n", "")
    sub("    outs = gl.allocate_shared_memory(dtype, [2, _Q, _P], x_desc.layout)\n", "    outs = gl.allocate_shared_memory(dtype, [CONSUMERS, _Q, _P], x_desc.layout)\n    weights = outs  # of a steep chunk, until its outputs are made\n")
    sub("ring_barriers(STAGES)", "ring_barriers(STAGES, CONSUMERS)")
    sub("(P, N, BLOCK_N, STAGES)", "(P, N, BLOCK_N, STAGES, CONSUMERS)")
    sub('''    gl.warp_specialize(
        [
            (_consumer_0, (tiles, sources, work, SIZES, FEATURES)),
            (_consumer_1, (tiles, sources, work, SIZES, FEATURES)),
            (_producer, (tiles, sources, work, SIZES, FEATURES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )''', '''    arguments = (tiles, sources, work, SIZES, FEATURES)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [(_consumer_0, arguments), (_consumer_1, arguments), (_producer, arguments)],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer_0, arguments),
                (_consumer_1, arguments),
                (_consumer_2, arguments),
                (_producer, arguments),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )''')
    sub('''@gluon.jit
def _producer(''', '''@gluon.jit
def _consumer_2(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    _consumer(2, tiles, sources, work, SIZES, FEATURES)


@gluon.jit
def _producer(''')
    if body is None:
        sub("    weights = outs  # of a steep chunk, until its outputs are made\n", "    weights = gl.allocate_shared_memory(dtype, [CONSUMERS, _Q, _Q], x_desc.layout)\n")
        return s
    a, b = s.index("    # What enters the chunk, before the chunk's own part: S C^T."), s.index("@gluon.jit\ndef _consumer(")
    return s[:a] + body + "\n\n" + s[b:]


def hold(s):
    def sub(a,b,n=1):
        nonlocal s
        assert s.count(a)==n,(s.count(a),a)
        s=s.replace(a,b)
    sub('''@gluon.jit
def _producer(''','''@gluon.jit
def _rows(held, b, h, channel, t):
    LANES: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    x_ptr, stride_batch, stride_token, stride_head, seqlen, _keep = held
    rows = gl.minimum(t + gl.arange(0, _Q, layout=LANES), seqlen - 1)
    return x_ptr + (b.to(gl.int64) * stride_batch + h * stride_head + channel) + rows.to(gl.int64) * stride_token


@gluon.jit
def _hold(held, b, pair, t, sizes, P: gl.constexpr, CONSUMERS: gl.constexpr):
    nheads, pairs_per_group, heads_per_group = sizes
    for which in gl.static_range(CONSUMERS):
        h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P, CONSUMERS)
        at = _rows(held, b, h, channel, t)
        gl.inline_asm_elementwise("prefetch.global.L2::evict_last [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _let_go(held, b, pair, t, sizes, P: gl.constexpr, CONSUMERS: gl.constexpr):
    nheads, pairs_per_group, heads_per_group = sizes
    for which in gl.static_range(CONSUMERS):
        h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P, CONSUMERS)
        at = _rows(held, b, h, channel, t)
        gl.inline_asm_elementwise("applypriority.global.L2::evict_normal [$1], 128; mov.u32 $0, 0;", "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _producer(''')
    sub('''    for item in range(0, own + count):
        stage = item % STAGES
        mbarrier.wait(empty''','''    held = work[2]
    keep = gl.minimum(own, held[5])
    if AHEAD > 0:
        for item in range(0, gl.minimum(keep, AHEAD)):
            _hold(held, b, pair, (first + item) * _Q, sizes, P, CONSUMERS)
    for item in range(0, own + count):
        if AHEAD >= 0:
            if item + AHEAD < keep:
                _hold(held, b, pair, (first + item + AHEAD) * _Q, sizes, P, CONSUMERS)
        if AHEAD < -1:
            back = item + AHEAD
            if (back >= 0) & (back < keep):
                _hold(held, b, pair, (first + back) * _Q, sizes, P, CONSUMERS)
        if LET_GO:
            done = item - own - 4
            if (done >= 0) & (done < keep):
                _let_go(held, b, pair, (first + done) * _Q, sizes, P, CONSUMERS)
        stage = item % STAGES
        mbarrier.wait(empty''')
    sub('''    if segment == nsegments - 1:
        for which in gl.static''','''    if LET_GO:
        for done in range(gl.maximum(count - 4, 0), keep):
            _let_go(held, b, pair, (first + done) * _Q, sizes, P, CONSUMERS)
    if segment == nsegments - 1:
        for which in gl.static''')
    sub('''    work = (ends, (b, pair, segment, nsegments, first, own, count, sizes))''','''    held = (x_ptr, x_stride_batch, x_stride_token, x_stride_head, seqlen, keep)
    work = (ends, (b, pair, segment, nsegments, first, own, count, sizes), held)''')
    sub('''    nchunks, segment_chunks, nsegments, nheads, pairs_per_group, heads_per_group,
    PDL''','''    nchunks, segment_chunks, nsegments, nheads, pairs_per_group, heads_per_group,
    x_ptr, x_stride_batch, x_stride_token, x_stride_head, seqlen, keep,
    PDL''')
    sub('''CONSUMERS: gl.constexpr, D_DIMS: gl.constexpr,''','''CONSUMERS: gl.constexpr, D_DIMS: gl.constexpr,
    AHEAD: gl.constexpr, LET_GO: gl.constexpr,''')
    sub('''"pairs_per_group", "heads_per_group",''','''"pairs_per_group", "heads_per_group",
    "x_stride_batch", "x_stride_token", "x_stride_head", "seqlen", "keep",''')
    sub("FEATURES: gl.constexpr = (D_DIMS, HAS_Z, PDL)","FEATURES: gl.constexpr = (D_DIMS, HAS_Z, PDL, AHEAD, LET_GO)")
    sub("    PDL: gl.constexpr = FEATURES[2]\n    itemsize","    PDL: gl.constexpr = FEATURES[2]\n    AHEAD: gl.constexpr = FEATURES[3]\n    LET_GO: gl.constexpr = FEATURES[4]\n    itemsize")
    return s


def coop(s):
    def sub(a,b,n=1):
        nonlocal s
        assert s.count(a)==n,(s.count(a),a)
        s=s.replace(a,b)
    sub('''@gluon.jit
def _producer(''','''@gluon.jit
def _share(held, b, pair, c, sizes, P: gl.constexpr, CONSUMERS: gl.constexpr, LAST: gl.constexpr):
    """Have the L2 cache fetch this block's share of a chunk of all heads, of whole rows."""
    x_ptr, stride_batch, stride_token, _stride_head, seqlen, _keep = held
    SHARE: gl.constexpr = _Q * _P * CONSUMERS
    begin = pair * SHARE
    left = gl.minimum(seqlen - c * _Q, _Q) * (sizes[0] * P) - begin
    at = x_ptr + (b.to(gl.int64) * stride_batch + (c * _Q).to(gl.int64) * stride_token + begin)
    size = gl.minimum(left, SHARE) * 2
    if size > 0:
        if LAST:
            gl.inline_asm_elementwise("{ .reg .b64 p; createpolicy.fractional.L2::evict_last.b64 p, 1.0; cp.async.bulk.prefetch.L2.global.L2::cache_hint [$1], $2, p; mov.u32 $0, 0; }", "=r,l,r", [at, size], dtype=gl.int32, is_pure=False, pack=1)
        else:
            gl.inline_asm_elementwise("cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [at, size], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _producer(''')
    sub('''    wait_for_launch_before(PDL)
''','''    if COOP > 0:
        for c in range(0, gl.minimum(count, COOP)):
            _share(work[2], b, pair, first + c, sizes, P, CONSUMERS, COOP_LAST)
    wait_for_launch_before(PDL)
''')
    sub('''    for item in range(0, own + count):
''','''    for item in range(0, own + count):
        if COOP > 0:
            if item + COOP < own:
                _share(work[2], b, pair, first + item + COOP, sizes, P, CONSUMERS, COOP_LAST)
            elif COOP_BOTH:
                if (item >= own) & (item + COOP < own + count):
                    _share(work[2], b, pair, first + item - own + COOP, sizes, P, CONSUMERS, False)
''')
    sub("AHEAD: gl.constexpr, LET_GO: gl.constexpr,","AHEAD: gl.constexpr, LET_GO: gl.constexpr, COOP: gl.constexpr, COOP_LAST: gl.constexpr, COOP_BOTH: gl.constexpr,")
    sub("PDL, AHEAD, LET_GO)","PDL, AHEAD, LET_GO, COOP, COOP_LAST, COOP_BOTH)")
    sub("    LET_GO: gl.constexpr = FEATURES[4]\n","    LET_GO: gl.constexpr = FEATURES[4]\n    COOP: gl.constexpr = FEATURES[5]\n    COOP_LAST: gl.constexpr = FEATURES[6]\n    COOP_BOTH: gl.constexpr = FEATURES[7]\n")
    return s


FEW_REGISTERS = '''    # What enters the chunk, before the chunk's own part: S C^T.
    if MILD:
        entering = gl.convert_layout(state.to(dtype), LEFT)
        y = warpgroup_mma(entering, C.permute((1, 0)), zero, use_acc=False, is_async=True)
        y = warpgroup_mma_wait(0, deps=(y,))
        x = x_tile.permute((1, 0)).load(LEFT)
        weight = gl.exp2(-cumj.load(gl.SliceLayout(0, LEFT)))
        scaled = (x.to(gl.float32) * weight[None, :]).to(dtype)
        y = warpgroup_mma(scaled, scores_tile, y, is_async=True)
        state = warpgroup_mma(scaled, B, state, is_async=True)
        tma.store_wait(0)
        gl.thread_barrier()
        y = warpgroup_mma_wait(1, deps=(y,))
        y = y * gl.exp2(cum.load(gl.SliceLayout(0, OUT)))[None, :]
    else:
        tma.store_wait(0)
        gl.thread_barrier()
        weights_tile = all_weights.index(which)
        cum_i = cum.load(gl.SliceLayout(0, OUT))
        gap = cum_i[None, :] - cumj.load(gl.SliceLayout(1, OUT))[:, None]
        # For i < j the scores are zero; the gap must only not overflow.
        decays = gl.exp2(gl.minimum(gap, 126.0))
        weights_tile.store((scores_tile.load(OUT).to(gl.float32) * decays).to(dtype))
        fence_async_shared()
        entering = gl.convert_layout(state.to(dtype), LEFT)
        y = warpgroup_mma(entering, C.permute((1, 0)), zero, use_acc=False, is_async=True)
        y = warpgroup_mma_wait(0, deps=(y,))
        y = y * gl.exp2(cum.load(gl.SliceLayout(0, OUT)))[None, :]
        x = x_tile.permute((1, 0)).load(LEFT)
        y = warpgroup_mma(x_tile.permute((1, 0)), weights_tile, y, is_async=True)
        state, scaled = scaled_state(state, x, cum, cumj, LEFT, STATE)
        state = warpgroup_mma(scaled, B, state, is_async=True)
        y = warpgroup_mma_wait(1, deps=(y,))
    if D_DIMS > 0:
        y += x_tile.permute((1, 0)).load(OUT).to(gl.float32) * skip
    if HAS_Z:
        z = zs.index(stage * CONSUMERS + which).permute((1, 0)).load(OUT).to(gl.float32)
        y *= z / (1.0 + gl.exp2(-z * _LOG2_E))
    out_tile.permute((1, 0)).store(y.to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, row, out_tile)
    state = warpgroup_mma_wait(0, deps=(state,))
    if MILD:
        total = cum.slice(_Q - 1, 1).load(gl.SliceLayout(1, STATE))
        state = state * gl.exp2(total)[:, None]
    return state
'''
TWO_AHEAD = [("    look_back,\n", ""), ("\n@gluon.jit\ndef _own_state(", """
from mambench.kernels.ssd.hopper_look_back import await_published, count_readers, state_from_flat


@gluon.jit
def look_back(state, slots, decays, flags, segment, BLOCK_N: gl.constexpr, STATE: gl.constexpr):
    FLAT: gl.constexpr = flat_layout(BLOCK_N)
    SIZE: gl.constexpr = _P * BLOCK_N
    await_published(flags, segment)
    count_readers(flags, segment)
    slots += gl.arange(0, SIZE, layout=FLAT)
    decays += gl.arange(0, 1, layout=gl.SliceLayout(1, STATE))
    last = segment - 1
    own = gl.load(slots)
    log_decay = gl.load(decays)
    for k in range(0, segment):
        next_own = gl.load(slots + gl.minimum(k + 1, last) * SIZE)
        next_decay = gl.load(decays + gl.minimum(k + 1, last))
        own = state_from_flat(own, BLOCK_N, STATE)
        state = state * gl.exp2(log_decay)[:, None] + own.to(gl.float32)
        own = next_own
        log_decay = next_decay
    return state


@gluon.jit
def _own_state(""")]


def sources():
    """The walk's source with two consumers and three, plain, with held lines, and with shares of rows."""
    source = Path(WK.__file__).read_text()
    two, three = consumers(source), consumers(source, FEW_REGISTERS)
    for old, new in TWO_AHEAD:
        assert old in three
        three = three.replace(old, new)
    return {"b2": two, "c": consumers(source, FEW_REGISTERS), "c3": three, "h2": hold(two), "h3": hold(three), "p2": coop(hold(two)), "p3": coop(hold(three))}


CLOCKS = [
    ("\n@gluon.jit\ndef _own_state(", STAMP),
    ("    if own > 0:\n        state, log", "    _stamp(_final, which, 0, CONSUMERS)\n    if own > 0:\n        state, log"),
    ("        FLAT: gl.constexpr = flat_layout(BLOCK_N)\n        left", "        _stamp(_final, which, 1, CONSUMERS)\n        FLAT: gl.constexpr = flat_layout(BLOCK_N)\n        left"),
    ("        publish(flags + segment)\n", "        publish(flags + segment)\n        _stamp(_final, which, 2, CONSUMERS)\n"),
    ("    p = channel + gl.arange(0, _P, layout=gl.SliceLayout(1, OUT))\n    skip = p\n", "    _stamp(final, which, 3, CONSUMERS)\n    p = channel + gl.arange(0, _P, layout=gl.SliceLayout(1, OUT))\n    skip = p\n"),
    ("    tma.store_wait(0)\n    if final is not None:  # noqa: SIM102 of compile time, the other is not\n        if segment == nsegments - 1:\n            offsets, mask = state_tile(head, anew(channel), P, N, BLOCK_N, STATE)\n            gl.store(final + offsets, state, mask=mask)\n",
     "    tma.store_wait(0)\n    _stamp(final, which, 4, CONSUMERS)\n"),
]
def ramp(num):
    at = "({s} * nchunks * 16 + %d * ({s}) * (nsegments - ({s})) * nsegments) // (16 * nsegments)" % num
    return [("    first = segment * segment_chunks\n    count = gl.minimum(segment_chunks, nchunks - first)\n", f"    first = {at.format(s='segment')}\n    count = {at.format(s='(segment + 1)')} - first\n")]
HALVES = [('''        entering = gl.convert_layout(state.to(dtype), LEFT)
        y = warpgroup_mma(entering, C.permute((1, 0)), zero, use_acc=False, is_async=True)
        y = warpgroup_mma_wait(0, deps=(y,))
        x = x_tile.permute((1, 0)).load(LEFT)
        weight = gl.exp2(-cumj.load(gl.SliceLayout(0, LEFT)))
        scaled = (x.to(gl.float32) * weight[None, :]).to(dtype)
        y = warpgroup_mma(scaled, scores_tile, y, is_async=True)
        state = warpgroup_mma(scaled, B, state, is_async=True)
''', '''        HALF: gl.constexpr = BLOCK_N // 2
        halves = gl.permute(gl.reshape(state, [_P, 2, HALF]), (0, 2, 1))
        low, high = gl.split(halves)
        entering = gl.convert_layout(low.to(dtype), LEFT)
        C_low = C.slice(0, HALF, dim=1)
        y = warpgroup_mma(entering, C_low.permute((1, 0)), zero, use_acc=False, is_async=True)
        x = x_tile.permute((1, 0)).load(LEFT)
        weight = gl.exp2(-cumj.load(gl.SliceLayout(0, LEFT)))
        scaled = (x.to(gl.float32) * weight[None, :]).to(dtype)
        y = warpgroup_mma_wait(0, deps=(y,))
        C_high = C.slice(HALF, HALF, dim=1)
        entering = gl.convert_layout(high.to(dtype), LEFT)
        y = warpgroup_mma(entering, C_high.permute((1, 0)), y, is_async=True)
        y = warpgroup_mma(scaled, scores_tile, y, is_async=True)
        state = warpgroup_mma(scaled, B, state, is_async=True)
''')]
X_KEPT = [("        y += x_tile.permute((1, 0)).load(OUT).to(gl.float32) * skip", "        y += gl.convert_layout(x.to(gl.float32), OUT) * skip")]
STEEP = [("_LEAST_MILD = gl.constexpr(-64.0)", '_LEAST_MILD = gl.constexpr(float("inf"))')]
HELD = lambda ahead, go, **more: {"hold": (ahead, go), **more}
SHARED = lambda ahead, last=False, both=False, go=False, hold=-1, **more: {"hold": (hold, go), "coop": (ahead, last, both), **more}
# name: (source, edits, consumers, options)
VARIANTS = {
    "two": ("b2", [], 2, {}), "three": ("c3", [], 3, {}), "three, look back three ahead": ("c", [], 3, {}),
    "three, look back three ahead, first product in halves": ("c", HALVES, 3, {}), "three, look back three ahead, x kept": ("c", X_KEPT, 3, {}),
    "three, look back three ahead, later segments shorter by 1/8": ("c", ramp(2), 3, {}), "three, look back three ahead, later segments shorter by 1/4": ("c", ramp(4), 3, {}),
    "three, look back three ahead, all chunks steep": ("c", STEEP, 3, {}),
    "two, clocks": ("b2", CLOCKS, 2, {}), "three, clocks": ("c3", CLOCKS, 3, {}),
    "two, nothing held": ("h2", [], 2, HELD(-1, False)), "two, held": ("h2", [], 2, HELD(3, False)), "two, held, let go": ("h2", [], 2, HELD(3, True)),
    "two, 8 chunks held, let go": ("h2", [], 2, HELD(3, True, keep=8)), "two, 12 chunks held, let go": ("h2", [], 2, HELD(3, True, keep=12)),
    "two, held once used, let go": ("h2", [], 2, HELD(-4, True)), "two, 12 chunks held once used, let go": ("h2", [], 2, HELD(-4, True, keep=12)),
    "three, held, let go": ("h3", [], 3, HELD(3, True)),
    "two, shares 4 ahead": ("p2", [], 2, SHARED(4)), "two, shares 8 ahead": ("p2", [], 2, SHARED(8)), "two, shares 16 ahead": ("p2", [], 2, SHARED(16)),
    "two, shares 8 ahead in both walks": ("p2", [], 2, SHARED(8, both=True)), "two, shares 8 ahead, held, let go": ("p2", [], 2, SHARED(8, last=True, go=True)),
    "two, shares 8 ahead, held once used, let go": ("p2", [], 2, SHARED(8, go=True, hold=-4)),
    "two, shares 8 ahead, 12 chunks held once used, let go": ("p2", [], 2, SHARED(8, go=True, hold=-4, keep=12)),
    "three, shares 6 ahead": ("p3", [], 3, SHARED(6)),
}


def setup():
    global torch, S, prepared, cases, flags, W, WK, RING, ORIGINAL
    import torch
    sys.path.insert(0, str(ROOT / "tests/kernels/ssd"))
    load_package()
    from mambench.kernels import flags, prepared
    from mambench.kernels.ssd import hopper_ssd as S, hopper_walk as W, hopper_walk_kernel as WK
    import ssd_cases as cases
    torch.set_grad_enabled(False)
    RING = S.ring; ORIGINAL = (S.pairs, S.ring, S.run_walk)


MADE = {}
BEGIN = time.time()
WANT = {}


def use(name):
    """Have the walk be a variant: "" is as it is in the checkout."""
    if not name: S.pairs, S.ring, S.run_walk = ORIGINAL; return
    which, edits, consumers, options = VARIANTS[name]
    if name not in MADE:
        source = sources()[which]
        for old, new in edits:
            if old not in source: raise ValueError(f"{name}: not in the source: {old}")
            source = source.replace(old, new)
        stem = f"v_walk_memory_{list(VARIANTS).index(name)}"; path = OUT / f"{stem}.py"
        if not path.exists() or path.read_text() != source: path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"mambench.kernels.ssd.{stem}", path)
        made = importlib.util.module_from_spec(spec); sys.modules[spec.name] = made; spec.loader.exec_module(made)
        MADE[name] = made.walk_kernel
    KERNEL[0] = MADE[name]
    S.pairs, S.ring, S.run_walk = host3(consumers, **options)


def segments_for(B, L, H, consumers):
    blocks = -(-H // consumers) * B
    chunks = -(-L // 64)
    count = min(132 // blocks, max(1, chunks // 2), 32)
    per = -(-chunks // max(1, count))
    return -(-chunks // per)


def forward(case, config, final=False):
    plan = S.plan_hopper(case["x"], case["B"], dt_softplus=True, dt_limit=(0.0, INF), config=config, keep=False)
    ops = S.Operands.laid_out(*(case.get(k) for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")))
    return lambda: S.run_forward(prepared.Recording(None), plan, ops, return_final_states=final, keep=False, config=config)


LOOKS = lambda **k: S.Config(look_back=True, **k)
PARTS = {"now": ("", {}), **{n: (n, {}) for n in VARIANTS if " 12 chunks" not in n and " 8 chunks" not in n}, "three, final": ("three", {"start": True})}


def compile_part(part):
    name, extra = PARTS[part]
    if "dtype" in extra: extra = extra | {"dtype": getattr(torch, extra["dtype"])}
    use(name)
    if "clocks" in part: STAMPS[0] = torch.zeros(132 * 3 * 8, dtype=torch.int64, device="cuda")
    if "start" in extra: forward(inputs(1, 2048, 6, **extra), LOOKS(segments=4), final=True)()
    else: forward(inputs(1, 8192, 32), LOOKS(segments=12 if name and VARIANTS[name][2] == 3 else 8))()
    torch.cuda.synchronize()


COUNTED = ["", "two, held, let go", "two, 12 chunks held, let go", "two, held once used, let go", "three", "three, held, let go", "two, shares 8 ahead"]


def count():
    case = inputs(1, 8192, 32)
    for name in COUNTED:
        use(name)
        call = forward(case, LOOKS(segments=12 if name.startswith("three") else 8))
        for _ in range(2): call(); torch.cuda.synchronize()


def main_timing():
    found = {}
    def note(label, value):
        found[label] = value; print(f"{time.time() - BEGIN:5.1f} {label:26}", json.dumps(value) if not isinstance(value, str) else value, flush=True)
        (OUT / "ssd_walk_memory.json").write_text(json.dumps(found, indent=1))
    def tried(label, make):
        try: note(label, make())
        except Exception as e: note(label, "FAILED " + repr(e)[:300]); traceback.print_exc()
    def time_of(name, B, L, H, segments=None, **extra):
        use(name); consumers = VARIANTS[name][2] if name else 2
        return round(replay(forward(inputs(B, L, H, **extra), LOOKS(segments=segments or segments_for(B, L, H, consumers)) if name else LOOKS())), 2)
    def right(name):
        use(name); got = {}
        list_ = (("31 heads", dict(B=1, L=700, H=31, start=True), 8), ("gated, ragged, groups", dict(B=2, L=555, H=8, G=2, start=True, z=True), 5),
                 ("steep and mild", dict(B=1, L=777, H=7, A=300.0, start=True), 4), ("P 128", dict(B=1, L=500, H=4, P=128, start=True), 3), ("fp16", dict(B=1, L=700, H=4, dtype=torch.float16, start=True), 12))
        for label, given, segments in list_:
            case = inputs(**given)
            if label not in WANT: WANT[label] = cases.loop(**{k: v.double() for k, v in case.items() if torch.is_tensor(v)}, dt_softplus=True)
            want = WANT[label]
            call = forward(case, LOOKS(segments=segments), final=True); o, e, _ = call(); torch.cuda.synchronize()
            got[label] = [float(f"{float((a.double() - b).norm() / b.norm()):.3g}") for a, b in zip((o, e), want)]
            again = [call() for _ in range(20)]; torch.cuda.synchronize(); got[label].append(all(torch.equal(a[0], o) and torch.equal(a[1], e) for a in again))
        got["flags left"] = sum(int(t.abs().sum()) for t in flags._streams.values()) + sum(int(k.zeros.abs().sum()) for k in flags._graphs.values())
        case = inputs(1, 8192, 32); a = forward(case, LOOKS(segments=12))(); same = [forward(case, LOOKS(segments=12))()[0] for _ in range(20)]; torch.cuda.synchronize()
        use(""); b = forward(case, S.Config())()[0]
        got["8192 from four launches"] = [float((a[0].float() - b.float()).norm() / b.float().norm()), all(torch.equal(x, a[0]) for x in same)]
        return got
    def clocks(name, consumers, segments):
        use(name); case = inputs(1, 8192, 32); blocks = -(-32 // consumers)
        STAMPS[0] = torch.zeros(segments * blocks * consumers * 8, dtype=torch.int64, device="cuda")
        call = forward(case, LOOKS(segments=segments)); got = []
        for _ in range(30):
            call(); torch.cuda.synchronize()
            s = STAMPS[0].view(segments, blocks, consumers, 8).double().cpu(); got.append((s - s[..., 0].min()) / 1e3)
        STAMPS[0] = None; s = torch.stack(got[10:]).median(0).values
        return {f"segment {i}": [[round(float(s[i, ..., k].min()), 1), round(float(s[i, ..., k].mean()), 1), round(float(s[i, ..., k].max()), 1)] for k in range(5)] for i in range(segments)}
    tried("clocks of two", lambda: clocks("two, clocks", 2, 8))
    tried("clocks of three", lambda: clocks("three, clocks", 3, 12))
    for name in ("", *VARIANTS, ""):
        if "clocks" not in name: tried(name or "now", lambda: {L: time_of(name, 1, L, 32) for L in (8192, 2048, 4096, 16384, 32768)})
    tried("right", lambda: right("three"))
    tried("131072", lambda: {n or "now": time_of(n, 1, 131072, 32) for n in ("", "three", "two, held once used, let go")})


def main():
    begin = time.time()
    def part(name):
        t = time.time()
        try: done = subprocess.run([sys.executable, __file__, "compile", name], timeout=120, capture_output=True, text=True); code = done.returncode; said = done.stderr[-500:] if code else ""
        except subprocess.TimeoutExpired: code, said = "timeout", ""
        if code: print(f"compiled {name}: {code} {time.time() - t:.0f} s {said}", flush=True)
    with ThreadPoolExecutor(12) as pool: list(pool.map(part, PARTS))
    print("compiled in", round(time.time() - begin), "s", flush=True)
    try: subprocess.run([sys.executable, __file__, "time"], timeout=400)
    except subprocess.TimeoutExpired: print("the timing ran past its limit", flush=True)
    ncu = shutil.which("ncu") or "/usr/local/cuda/bin/ncu"
    command = [ncu, "--csv", "--cache-control", "none", "--clock-control", "none", "-k", "regex:walk_kernel", "--metrics", "dram__bytes_read.sum,dram__bytes_write.sum,lts__t_bytes.sum,gpu__time_duration.sum", sys.executable, __file__, "count"]
    try:
        said = subprocess.run(command, timeout=120, capture_output=True, text=True).stdout
        (OUT / "counted.csv").write_text(said); rows = list(csv.DictReader(said[said.index('"ID"'):].splitlines()))
        counted = {}
        for r in rows: counted.setdefault(int(r["ID"]), {})[r["Metric Name"]] = r["Metric Value"] + " " + r["Metric Unit"]
        for i, v in counted.items(): print("counted", COUNTED[i // 2] if i // 2 < len(COUNTED) else "?", json.dumps(v), flush=True)
    except Exception as e: print("not counted:", repr(e)[:300], flush=True)
    print("seconds", round(time.time() - begin), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        setup()
        if sys.argv[1] == "compile": compile_part(sys.argv[2])
        elif sys.argv[1] == "count": count()
        else: main_timing()
    else: main()
