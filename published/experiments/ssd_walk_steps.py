"""SSD forward on Hopper, the walk alone: who asks the L2 cache for what before the wait for the launch before, and in what order.

python3 ssd_walk_steps.py, from the root of the repository at commit 4e90950; two minutes. Variants and arguments as in ssd_walk_next.py. $OUT/next.jsonl.
"again" as its first argument: those that followed.

Prefetches go the way of loads, a line at a time: 1,024 lines of steps and as many of x for each block stand before the first loads that the sums wait for.
"""
import os, sys
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import ssd_walk_next as walk

A, K = walk.A, walk.K
ASKED = "    last = gl.minimum((first + count) * _Q, seqlen) - 1\n    t = gl.minimum(first * _Q + gl.arange(0, _C * _Q, layout=LINES), last)\n"
LINES = [(A, "    LINES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])\n    last =", "    LINES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])\n    last =")]
# The steps of 16 heads are one sector: each of eight pairs asks for an eighth of a segment's.
SHARED = [
    *LINES,
    (A, ASKED, "    last = gl.minimum((first + count) * _Q, seqlen) - 1\n"),
    (A, "    _prefetch(dt_ptr + start + t.to(gl.int64) * stride_token)\n", """    for part in range(pair % pairs_per_group % 8, 8, gl.minimum(pairs_per_group, 8)):
        t = first * _Q + part * (_C * _Q // 8) + gl.arange(0, _C * _Q // 8, layout=LINES)
        _prefetch(dt_ptr + start + gl.minimum(t, last).to(gl.int64) * stride_token)
"""),
]
# ... in one warp, before x.
FIRST = [
    (K, "        if which == 0:  # noqa: SIM102 of compile time, the other is not\n            if work[1][2] >= 0:\n                prefetch_steps(work, SIZES[0], FEATURES[0])\n", ""),
    (K, "            prefetch_tiles(work, SIZES[0])\n", "            prefetch_steps(work, SIZES[0], FEATURES[0])\n            prefetch_tiles(work, SIZES[0])\n"),
]
# So that the producer asks for its first tiles themselves at once.
BY_CONSUMER = [
    (K, "        if which == 0:  # noqa: SIM102 of compile time, the other is not\n            if work[1][2] >= 0:\n                prefetch_steps(work, SIZES[0], FEATURES[0])\n",
     "        if work[1][2] >= 0:\n            if which == 0:\n                prefetch_steps(work, SIZES[0], FEATURES[0])\n            else:\n                prefetch_tiles(work, SIZES[0])\n"),
    (K, "        if work[1][2] >= 0:\n            prefetch_tiles(work, SIZES[0])\n        wait", "        wait"),
]
# The ring's tiles are fetched as soon as the wait is over.
LATER = [(A, "    for item in range(0, gl.minimum(_PREFETCHED, count)):\n", "    for item in range(3, gl.minimum(_PREFETCHED + 2, count)):\n")]
# Each lane asks for a line of its own: 64 of each head. Tiles that the ring has no place for.
def once(n):
    return LATER + [
        (A, "    LINES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])\n    row = gl.arange(0, _Q, layout=LINES)\n", """    LINES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lane = gl.arange(0, 2 * _Q, layout=LINES)
    h_0, channel_0 = consumers_head(pair, 0, pairs_per_group, heads_per_group, P)
    h_1, channel_1 = consumers_head(pair, 1, pairs_per_group, heads_per_group, P)
    h = gl.where(lane < _Q, h_0, h_1).to(gl.int64)
    start = b.to(gl.int64) * stride_batch + h * stride_head + gl.where(lane < _Q, channel_0, channel_1)
"""),
        (A, """        t = gl.minimum((first + c) * _Q + row, seqlen - 1).to(gl.int64)
        for which in gl.static_range(2):
            h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
            start = b.to(gl.int64) * stride_batch + h.to(gl.int64) * stride_head + channel
            _prefetch(x_ptr + start + t * stride_token)
""", """        t = gl.minimum((first + c) * _Q + lane % _Q, seqlen - 1).to(gl.int64)
        _prefetch(x_ptr + start + t * stride_token)
"""),
        (A, "_PREFETCHED = gl.constexpr(8)", f"_PREFETCHED = gl.constexpr({n - 2})  # + 3, from the fourth on"),
        (A, "gl.minimum(_PREFETCHED + 2, count)", "gl.minimum(_PREFETCHED + 5, count)"),
    ]
walk.SIZES = [(1, 8192), (1, 4096), (1, 2048), (1, 1024), (1, 2048, 80)]
walk.V = {"checkout": [], "steps shared": SHARED, "steps shared, first": SHARED + FIRST, "steps first": LINES + FIRST, "x by a consumer": BY_CONSUMER, "x by a consumer, steps shared": BY_CONSUMER + SHARED,
          "x from the fourth tile": LATER, "x from the fourth tile, steps shared, first": LATER + SHARED + FIRST, "x from the fourth tile, by a consumer, steps shared": LATER + BY_CONSUMER + SHARED, "clocks": walk.CLOCKS, "clocks of steps shared": walk.CLOCKS + SHARED}
if sys.argv[1:] and sys.argv[1] == "again" or os.environ.get("AGAIN"):
    os.environ["AGAIN"] = "1"
    sys.argv[1:] = [a for a in sys.argv[1:] if a != "again"]
    BEST = LATER + BY_CONSUMER + SHARED
    walk.V = {"checkout": [], "x from the fourth tile, by a consumer, steps shared": BEST, **{f"{n} tiles by lanes, by a consumer, steps shared": once(n) + BY_CONSUMER + SHARED for n in (4, 7, 10, 13)}}


if __name__ == "__main__":
    walk.main(__file__)
