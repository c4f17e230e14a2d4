"""SSD forward on Hopper, the walk alone at 8,192 tokens: edits of its source that may take what does not grow with the length.

python3 ssd_walk_next.py, from the repository's root, of commit abaca9c; five minutes. Each variant is a copy of the checkout under /tmp. Results of variants named
"wrong: ..." are wrong on purpose, as bounds; the others are held against the checkout's to the bit. $OUT/next.jsonl. "make" as its argument: only the changed
copies; "compile": for sm_90 without a GPU too, with what ptxas says of registers and spills. `ssd_walk_makers.py` has what followed.
"""
import json, math, os, re, shutil, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OUT = Path(os.environ.get("OUT", "/tmp/out")); OUT.mkdir(parents=True, exist_ok=True)
HERE = os.getcwd()
A, K, L, H = "hopper_walk_alone.py", "hopper_walk_kernel.py", "hopper_look_back.py", "hopper_walk.py"
TILES = lambda n: [(A, "_PREFETCHED = gl.constexpr(6)", f"_PREFETCHED = gl.constexpr({n})")]
# The first segments' blocks are there while the launch before is ending, the others' only after it: those ask for both. The last segment walks late.
LATE = [
    (A, "    for item in range(0, gl.minimum(_PREFETCHED, count)):\n        c = gl.where(own > 0, own - 1 - item, item)\n        t = gl.minimum((first + c) * _Q + row, seqlen - 1).to(gl.int64)\n",
     """    half = nsegments // 2
    many = gl.where(segment + half < nsegments - 1, 2 * _PREFETCHED, gl.where(own > 0, _PREFETCHED, 0))
    for item in range(0, many):
        end = (segment + item // _PREFETCHED * half + 1) * work[3]
        c = gl.maximum(end - 1 - item % _PREFETCHED, 0)
        t = gl.minimum(c * _Q + row, seqlen - 1).to(gl.int64)
"""),
    (A, "    b, pair, _segment, _nsegments, first, own, count, sizes = work[1]\n    seqlen, x_ptr", "    b, pair, segment, nsegments, first, own, count, sizes = work[1]\n    seqlen, x_ptr"),
]
# Each pair of heads asks for one tile of B, so that the pairs of a group ask for a segment's 16.
B_AHEAD = [
    (H, "made = (tensors.dt, tensors.A, tensors.dt_bias, scores, tensors.x)", "made = (tensors.dt, tensors.A, tensors.dt_bias, scores, tensors.x, tensors.B)"),
    (H, "(*tensors.dt.stride(), *tensors.x.stride()[:3]), 1", "(*tensors.dt.stride(), *tensors.x.stride()[:3], *tensors.B.stride()[:3]), 1"),
    (H, "made = (None,) * 5\n        strides, extra = (0,) * 6, 0", "made = (None,) * 6\n        strides, extra = (0,) * 9, 0"),
    (K, "scores_ptr, x_ptr, seqlen, dt_min", "scores_ptr, x_ptr, B_ptr, seqlen, dt_min"),
    (K, "x_stride_batch, x_stride_token, x_stride_head,\n    nchunks, segment", "x_stride_batch, x_stride_token, x_stride_head,\n    B_stride_batch, B_stride_token, B_stride_group,\n    nchunks, segment"),
    (K, "scores_ptr, nchunks, x_ptr, (x_stride_batch, x_stride_token, x_stride_head),", "scores_ptr, nchunks, x_ptr, (x_stride_batch, x_stride_token, x_stride_head),\n        B_ptr, (B_stride_batch, B_stride_token, B_stride_group),"),
    (K, '"x_stride_batch", "x_stride_token", "x_stride_head",', '"x_stride_batch", "x_stride_token", "x_stride_head", "B_stride_batch", "B_stride_token", "B_stride_group",'),
    (A, "    LINES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])\n    row = gl.arange(0, _Q, layout=LINES)\n", """    LINES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    row = gl.arange(0, _Q, layout=LINES)
    B_ptr, B_strides = work[2][11], work[2][12]
    mine = pair % pairs_per_group
    if mine < count:
        c = gl.where(own > 0, own - 1 - mine, mine)
        t = gl.minimum((first + c) * _Q + row, seqlen - 1).to(gl.int64)
        start = b.to(gl.int64) * B_strides[0] + (pair // pairs_per_group).to(gl.int64) * B_strides[2]
        for half in gl.static_range(2):
            gl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
                [B_ptr + start + t * B_strides[1] + half * 64], dtype=gl.int32, is_pure=False, pack=1,
            )  # fmt: skip
"""),
]
# What every block needs of each head: a line of A, of the bias and of D, which the tokens' stream may have put out of the L2 cache.
A_AHEAD = [
    (A, "    LINES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])\n    last =", """    LINES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    one = pair // pairs_per_group * heads_per_group + gl.arange(0, 1, layout=LINES)
    _ask(_A + one)
    if _bias is not None:
        _ask(_bias + one)
    if work[0][0] is not None:
        _ask(work[0][0] + one)
    last ="""),
    (A, "@gluon.jit\ndef prefetch_steps", """@gluon.jit
def _ask(where):
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [where], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def prefetch_steps"""),
]
STAMP = """
@gluon.jit
def _stamp(stamps, which: gl.constexpr, k):
    clock = gl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=gl.int64, is_pure=False, pack=1)
    block = (gl.program_id(2) * gl.num_programs(1) + gl.program_id(1)) * gl.num_programs(0) + gl.program_id(0)
    gl.store(stamps + (block * 2 + which) * 128 + k, clock)


@gluon.jit
def _row("""
# 0 and 1: before and after the launch before is over; 2: sums; 3: own state; 4: its flag; 5: looked back; 6: end; 8 on: chunks.
CLOCKS = [
    (K, "\n@gluon.jit\ndef _row(", STAMP),
    (K, "        wait_for_launch_before(FEATURES[2])\n        if work[1][2] < 0:\n            make_scores", "        _stamp(work[0][5], which, 0)\n        wait_for_launch_before(FEATURES[2])\n        _stamp(work[0][5], which, 1)\n        if work[1][2] < 0:\n            make_scores"),
    (K, "    state = _entering(which, tiles, work, head, channel, SIZES, ALONE)\n", "    _stamp(final, which, 2)\n    state = _entering(which, tiles, work, head, channel, SIZES, ALONE)\n    _stamp(final, which, 5)\n"),
    (K, "            FLAT: gl.constexpr = flat_layout(BLOCK_N)\n            left", "            _stamp(_final, which, 3)\n            FLAT: gl.constexpr = flat_layout(BLOCK_N)\n            left"),
    (K, "            publish(flags + segment)\n", "            publish(flags + segment)\n            _stamp(_final, which, 4)\n"),
    (K, "        row = [b, h, (first + c) * _Q, channel]\n", "        row = [b, h, (first + c) * _Q, channel]\n        _stamp(final, which, 8 + c)\n"),
    (K, "    tma.store_wait(0)\n    if final is not None:  # noqa: SIM102 of compile time, the other is not\n        if segment == nsegments - 1:\n", "    tma.store_wait(0)\n    _stamp(final, which, 6)\n    if final is not None:  # noqa: SIM102 of compile time, the other is not\n        if segment == nsegments + 1:\n"),
    ("hopper_ssd.py", "            recording, plan, tensors, prepared, results, scores_dtype", "            recording, plan, tensors, prepared, (results[0], STAMPS), scores_dtype"),
    ("hopper_ssd.py", "_BLOCK_H = 8\n", "_BLOCK_H = 8\nSTAMPS = torch.zeros(160 * 2 * 128, dtype=torch.int64, device='cuda')\n"),
]
# States are read as their flags are seen, not after all flags are. Hangs: each warp counts the flags for itself, and warps that count differently do not meet at the barrier.
IN_ORDER = [
    (L, "@gluon.constexpr_function\ndef flat_layout", '''@gluon.jit
def await_some(flags, count, wanted, ready):
    """Wait until the first `wanted` of `count` flags are set, unless `ready` are; return how many are."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    k = gl.arange(0, _FLAGS, layout=LANES)
    watched = flags + gl.minimum(k, count - 1)
    if ready < wanted:
        while ready < wanted:
            values = gl.inline_asm_elementwise(
                "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [watched], dtype=gl.int32,
                is_pure=False, pack=1,
            )  # fmt: skip
            ready = gl.min(gl.where(values == 0, k, count), axis=0)
        gl.thread_barrier()
    return ready


@gluon.constexpr_function
def flat_layout'''),
    (L, "    await_published(flags, segment)\n    count_readers(flags, segment)\n", "    ready = await_some(flags, segment, gl.minimum(2, segment), segment * 0)\n"),
    (L, "        else:\n            then_own = gl.load", "        else:\n            ready = await_some(flags, segment, gl.minimum(k + 3, segment), ready)\n            then_own = gl.load"),
    (L, "        if not WIDE:\n            next_own = then_own\n            next_decay = then_decay\n    return state", "        if not WIDE:\n            next_own = then_own\n            next_decay = then_decay\n    count_readers(flags, segment)\n    return state"),
]
NO_DT = [(A, "    dt = gl.load(dt_ptr + start + token * stride_token).to(gl.float32)\n", "    dt = A2 * 0.0 + (token & 7).to(gl.float32)\n")]
NO_SUMS = [(K, "        sums_within(which, tiles, work, h, FEATURES[4], _LEAST_MILD if MILD else None)\n", "        if seqlen_is_negative(work):\n            sums_within(which, tiles, work, h, FEATURES[4], _LEAST_MILD if MILD else None)\n"),
           (K, "@gluon.jit\ndef _row(", "@gluon.jit\ndef seqlen_is_negative(work):\n    return work[2][3] < 0\n\n\n@gluon.jit\ndef _row(")]
NO_LOOK = [(K, "        if segment > 0:\n            state = look_back", "        if segment > 1000:\n            state = look_back"),
           ("hopper_walk_producer.py", "        if segment == nsegments - 1:\n            for which", "        if segment == nsegments + 1:\n            for which")]
# A mild chunk's outputs wait in one of two tiles, the other of which a steep chunk's weights take; that the chunk before the last is written out is known at
# the barrier which gives a stage back, so that none is needed before the outputs.
TURNS = [
    (K, "    which: gl.constexpr, tiles, out_desc, row, state, skip, stage, c, middle,\n", "    which: gl.constexpr, turn, tiles, out_desc, row, state, skip, stage, c, middle,\n"),
    (K, "    out_tile = outs.index(which)\n", "    out_tile = outs.index(which * 2 + turn)\n"),
    (K, "        tma.store_wait(0)\n        gl.thread_barrier()\n        y = warpgroup_mma_wait(1, deps=(y,))\n        y = y * since_middle", "        y = warpgroup_mma_wait(1, deps=(y,))\n        y = y * since_middle"),
    (K, "        weights_tile = all_weights.index(which)\n", "        weights_tile = outs.index(which * 2 + 1 - turn)\n        tma.store_wait(0)\n        gl.thread_barrier()\n"),
    (K, "        fence_async_shared()\n        tma.store_wait(0)\n        x = x_tile", "        fence_async_shared()\n        x = x_tile"),
    (K, "    ahead = 0.0  # log2", "    turn = count * 0\n    ahead = 0.0  # log2"),
    (K, "                state = _chunk(\n                    which, tiles, out_desc, row, state, skip, stage, c, middle, SIZES", "                state = _chunk(\n                    which, turn, tiles, out_desc, row, state, skip, stage, c, middle, SIZES"),
    (K, "                    which, tiles, out_desc, row, state, skip, steep, c, 0.0", "                    which, turn, tiles, out_desc, row, state, skip, steep, c, 0.0"),
    (K, "                which, tiles, out_desc, row, state, skip, stage, c, 0.0", "                which, turn, tiles, out_desc, row, state, skip, stage, c, 0.0"),
    (K, "        mbarrier.arrive(empty.index(stage), count=1)\n    tma.store_wait(0)\n", "        tma.store_wait(1)\n        mbarrier.arrive(empty.index(stage), count=1)\n        turn = 1 - turn\n    tma.store_wait(0)\n"),
    (K, "    weights = gl.allocate_shared_memory(dtype, [2, _Q, _Q], x_desc.layout)\n    outs = gl.allocate_shared_memory(dtype, [2, _Q, _P], x_desc.layout)\n", "    outs = gl.allocate_shared_memory(dtype, [4, _Q, _P], x_desc.layout)\n    weights = outs\n"),
]
NO_STORE_WAIT = [(K, "        tma.store_wait(0)\n        gl.thread_barrier()\n        y = warpgroup_mma_wait(1, deps=(y,))\n        y = y * since_middle", "        y = warpgroup_mma_wait(1, deps=(y,))\n        y = y * since_middle")]
NO_FENCES = [(L, 'gl.atomic_add(flag, 1, sem="release", scope="gpu")', 'gl.atomic_add(flag, 1, sem="relaxed", scope="gpu")'),
             (L, '    watched = flags + gl.minimum(gl.arange(0, _FLAGS, layout=LANES), count - 1)\n    seen = 0\n    while seen == 0:\n        values = gl.inline_asm_elementwise(\n            "ld.acquire', '    watched = flags + gl.minimum(gl.arange(0, _FLAGS, layout=LANES), count - 1)\n    seen = 0\n    while seen == 0:\n        values = gl.inline_asm_elementwise(\n            "ld.relaxed')]
FOUR_READ = [(L, "    last = segment - 1\n    own = gl.load(slots)", "    segment = gl.minimum(segment, 4)\n    last = segment - 1\n    own = gl.load(slots)")]
V = {"checkout": [], "8 tiles of x": TILES(8), "12 tiles of x": TILES(12), "B too": B_AHEAD, "for late ones": LATE, "A, bias and D": A_AHEAD, "A, B too": A_AHEAD + B_AHEAD, "A, B too, 8 tiles of x": A_AHEAD + B_AHEAD + TILES(8), "states in order": IN_ORDER, "outputs in turns": TURNS, "in turns, A, B too": TURNS + A_AHEAD + B_AHEAD, "wrong: stores not waited for": NO_STORE_WAIT, "all": IN_ORDER + A_AHEAD + B_AHEAD + LATE, "all, 8 tiles of x": IN_ORDER + A_AHEAD + B_AHEAD + LATE + TILES(8), "all, in turns": IN_ORDER + A_AHEAD + B_AHEAD + LATE + TURNS, "clocks": CLOCKS, "clocks of all": CLOCKS + IN_ORDER + A_AHEAD + B_AHEAD + LATE,
     "wrong: dt not loaded": NO_DT, "wrong: no sums": NO_SUMS, "wrong: no look back": NO_LOOK, "wrong: no fences": NO_FENCES, "wrong: four states read": FOUR_READ}


def make(name):
    to = Path("/tmp/next_" + re.sub(r"\W", "_", name))
    if not to.exists():
        shutil.copytree(HERE, to, ignore=shutil.ignore_patterns(".git", ".venv", ".peers", "published", "runs"), symlinks=True)
        shutil.copytree(Path(HERE) / "published/experiments", to / "published/experiments")
        for file, a, b in V[name]:
            p = to / "kernels/ssd" / file; s = p.read_text(); assert s.count(a) == 1, (name, a, s.count(a)); p.write_text(s.replace(a, b))
    return str(to)


SIZES = [(1, 8192), (1, 4096), (1, 2048)]  # batch, length, and heads if not 32


def setup():
    global torch, S, prepared, replay_us, inputs
    sys.path.insert(0, "published/experiments")
    from parts import load_package, replay_us, ssd_inputs as inputs
    load_package()
    import torch
    from mambench.kernels import prepared
    from mambench.kernels.ssd import hopper_ssd as S
    torch.set_grad_enabled(False)


def forward(case):
    config = S.Config(look_back=True, alone=True)
    plan = S.plan_hopper(case["x"], case["B"], dt_softplus=True, dt_limit=(0.0, math.inf), config=config, keep=False)
    ops = S.Operands.laid_out(*(case.get(k) for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")))
    return lambda: S.run_forward(prepared.Recording(None), plan, ops, return_final_states=False, keep=False, config=config)


def one(mode, name):
    """What runs in a variant's copy."""
    if mode == "compile":
        Path("/tmp/next_inventory.py").write_text("from mambench.kernels.inventory import Entry, _ssd_hopper\nENTRIES = (Entry(name='walk', call=lambda draw: _ssd_hopper(draw, train=False, gated=False), architectures=(90,)),)\n")
        found = f"/tmp/next_{os.getpid()}.json"
        subprocess.run([sys.executable, "-P", "mambench/_start.py", "harness.static.child", found, "--inventory", "/tmp/next_inventory.py"], check=True)
        print(f"{name:38}", [{k: r.get(k) for k in ("kernel", "registers", "stack_bytes", "shared_bytes", "instructions", "error") if r.get(k) is not None} for r in json.loads(Path(found).read_text())["kernels"]]); return
    setup()
    if mode == "first":
        out = forward(inputs(1, 8192, 32))()[0]; torch.save(out.cpu(), f"/tmp/next_{re.sub(r'[^0-9a-z]', '_', name.lower())}.pt"); return
    if name.startswith("clocks"):
        call = forward(inputs(1, 8192, 32)); rows = []
        for i in range(8):
            for _ in range(4): call()
            torch.cuda.synchronize()
            t = S.STAMPS.view(160, 2, 128)[:144].view(9, 16, 2, 128).double()  # scores' and segments' blocks, pair, which
            s = (t - t[1:, :, :, 1].min()) / 1e3
            rows.append([[round(float(s[g, :, :, k].median()), 1) for k in (0, 1, 2, 3, 4, 5, *range(8, 24, 3), 6)] for g in range(9)])
        m = torch.tensor(rows).median(0).values
        for g in range(9): print(f"{name} segment {g - 1}: there, begun, sums, own, set, looked; chunks; end", [round(float(v), 1) for v in m[g]], flush=True)
        return
    row = {str((B, n, *H)): round(replay_us(forward(inputs(B, n, *(H or [32]))), 0.02), 2) for B, n, *H in SIZES}
    row["8192 again"] = round(replay_us(forward(inputs(1, 8192, 32)), 0.02), 2)
    print(f"{name:38}", json.dumps(row), flush=True)
    with open(OUT / "next.jsonl", "a") as f: f.write(json.dumps({"name": name, **row}) + "\n")


def part(mode, name, limit):
    env = dict(os.environ, TRITON_CACHE_DIR="/tmp/tc_next_" + re.sub(r"\W", "_", name))
    try: done = subprocess.run([sys.executable, SCRIPT, mode, name], timeout=limit, capture_output=True, text=True, cwd=make(name), env=env); said = done.stdout + (done.stderr[-900:] if done.returncode else "")
    except subprocess.TimeoutExpired as e: said = f"{mode} {name}: timeout " + (e.stdout or b"").decode()
    if said: print(said.rstrip(), flush=True)


def main(script):
    """Run what a script's arguments ask of V."""
    global SCRIPT
    SCRIPT = os.path.abspath(script)
    mode, name = [*sys.argv[1:], "", ""][:2]
    if name: one(mode, name); return
    for n in V: make(n)
    if mode == "make": return
    if mode == "compile": [part("compile", n, 300) for n in V]; return
    begin = time.time()
    with ThreadPoolExecutor(12) as pool: list(pool.map(lambda n: part("first", n, 90), V))
    import torch
    path = lambda n: f"/tmp/next_{re.sub(r'[^0-9a-z]', '_', n.lower())}.pt"
    want = torch.load(path("checkout"))
    print("compiled", round(time.time() - begin), "same bits:", {n: torch.equal(torch.load(path(n)), want) if Path(path(n)).exists() else None for n in V}, flush=True)
    for again in range(2):
        for n in V:
            if not (again and n.startswith(("wrong", "clocks"))): part("time", n, 20)
    print("seconds", round(time.time() - begin), flush=True)


if __name__ == "__main__":
    main(__file__)
