"""SSD forward on Hopper, the walk alone at 8,192 tokens: what the blocks that make scores wait for, and what else is asked of the cache ahead.

python3 ssd_walk_makers.py, from the root of the repository at commit 79debcd; two minutes. Variants and arguments as in ssd_walk_next.py; then shapes with few heads to a group,
whose scores few blocks make, under each way of dividing the work ("groups" alone: only these, of any commit since). $OUT/next.jsonl, $OUT/groups.jsonl.
"""
import json, math, os, sys
from pathlib import Path
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import ssd_walk_next as walk

A, K = walk.A, walk.K
TILES = lambda n: [(A, "_PREFETCHED = gl.constexpr(8)", f"_PREFETCHED = gl.constexpr({n})")]
# As before: each chunk's scores are seen to be stored before the next are made.
ONE_BY_ONE = [
    (A, "    _count_made(work, start, 2 * step)\n", ""),
    (A, "            gl.store(tile + (j * _Q)[:, None] + i[None, :], scores.to(tile.dtype.element_ty))\n", "            gl.store(tile + (j * _Q)[:, None] + i[None, :], scores.to(tile.dtype.element_ty))\n            publish(_counter(work) + chunk // work[3])\n"),
    (A, "from mambench.kernels.ssd.hopper_rows import (\n", "from mambench.kernels.ssd.hopper_look_back import publish\nfrom mambench.kernels.ssd.hopper_rows import (\n"),
]
# As before: each lane loads its own eight tokens, which lie in as many lines.
BY_LANE = [
    (A, "    LOADED: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])\n", "    LOADED: gl.constexpr = ROWS\n"),
    (A, "    rows.index(which * 3).store(dt)\n    gl.thread_barrier()\n    dt = rows.index(which * 3).load(ROWS)\n", ""),
]
NO_TILES = [
    (K, "        if work[1][2] < 0:\n            prefetch_for_scores(which, work, SIZES[1])\n        elif which == 0:\n            prefetch_steps(work, SIZES[0], FEATURES[0])\n", "        if which == 0:\n            if work[1][2] >= 0:\n                prefetch_steps(work, SIZES[0], FEATURES[0])\n"),
    (A, "        if item + _SCORES_AHEAD < count:\n            _prefetch_for_scores(which, work, chunk + _SCORES_AHEAD * step, N)\n", ""),
]
AHEAD = lambda n: [(A, "_SCORES_AHEAD = gl.constexpr(8)", f"_SCORES_AHEAD = gl.constexpr({n})")]
# As before: a stage is given back when its scores are stored.
KEPT = [
    (A, "            mbarrier.arrive(empty.index(stage), count=1)\n            scores = gl.where(", "            scores = gl.where("),
    (A, "        else:\n            mbarrier.arrive(empty.index(stage), count=1)\n        chunk += step\n", "        mbarrier.arrive(empty.index(stage), count=1)\n        chunk += step\n"),
]
CLOCKS = [*walk.CLOCKS, (K, "            make_scores(which, tiles, work, SIZES[1], SIZES[3])\n", "            make_scores(which, tiles, work, SIZES[1], SIZES[3])\n            _stamp(work[0][5], which, 6)\n")]
walk.V = {"checkout": [], "scores counted one by one": ONE_BY_ONE, "no tiles ahead for scores": NO_TILES, "16 chunks ahead": AHEAD(16), "4 chunks ahead": AHEAD(4),
          "stages kept": KEPT, "dt by lane": BY_LANE, "10 tiles of x": TILES(10), "clocks": CLOCKS}
walk.SIZES = [(1, 8192), (1, 4096), (1, 2048), (1, 8192, 16), (1, 4096, 8)]
SHAPES = [  # batch, length, heads, groups
    *((1, n, 16, 1) for n in (2048, 4096, 8192, 16384)), *((1, n, 8, 1) for n in (1024, 2048, 4096, 8192)), *((1, n, 4, 1) for n in (1024, 2048, 4096)), *((1, n, h, 1) for n in (576, 768) for h in (4, 8, 16, 32)),
    *((1, n, 32, G) for G in (8, 4, 2) for n in (1024, 2048, 4096, 8192)), *((1, n, 64, 8) for n in (1024, 2048, 4096)), (1, 2048, 128, 8), (2, 2048, 32, 8), (2, 4096, 16, 1),
    (4, 1024, 32, 8), (4, 2048, 8, 1), (4, 2048, 16, 1), (1, 8192, 32, 1), (1, 4096, 24, 1), (1, 4096, 12, 1), (1, 8192, 24, 1), (1, 8192, 24, 3), *((1, n, 80, 1) for n in (1024, 2048)), *((1, n, 32, 1) for n in (1024, 2048, 4096)), (1, 2048, 24, 1), (1, 16384, 8, 1),
]


def groups():
    walk.setup()
    from mambench.kernels.ssd import hopper_config as sizes
    S = walk.S
    for B, L, H, G in SHAPES:
        case, row, per = walk.inputs(B, L, H, G=G), {}, sizes.pairs(H // G, 64)
        ops = S.Operands.laid_out(*(case.get(k) for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")))
        for way, config in {"chosen": None, "alone": S.Config(look_back=True, alone=True), "two": S.Config(look_back=True), "fused": S.Config(fused=True)}.items():
            plan = S.plan_hopper(case["x"], case["B"], dt_softplus=True, dt_limit=(0.0, math.inf), config=config, keep=False)
            if way == "chosen":
                is_ = S.choose(plan, keep=False); row["is"] = "fused" if is_.fused else "alone" if is_.alone else "two" if is_.look_back else "four"
            elif way == "alone": row |= {"segment": plan.segment_chunks, "each makes": -(-plan.nchunks // per)}
            if plan.nsegments > 32 or (way == "alone" and plan.segment_chunks > 16): continue
            run = lambda: S.run_forward(walk.prepared.Recording(None), plan, ops, return_final_states=False, keep=False, config=config)
            row[way] = round(walk.replay_us(run, 0.01), 2)
        print("groups", B, L, H, G, json.dumps(row), flush=True)
        with open(walk.OUT / "groups.jsonl", "a") as f: f.write(json.dumps([B, L, H, G, row]) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["groups"]: walk.main(__file__)
    if sys.argv[1:] in ([], ["groups"]): groups()
