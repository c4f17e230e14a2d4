"""Peak bytes of a training step beside its inputs, counted from what our operations allocate.

On the meta device nothing is computed and nothing launched, but every tensor is allocated and freed
as on a GPU. The peers' formulas are written from their sources; published runs say that they hold.
"""

import importlib
import json
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton.experimental.gluon")

from mambench.harness import suite
from mambench.harness.spec import DeviceKind, Family, Level, Pass
from mambench.kernels.s6 import hopper_backward, hopper_memory, hopper_wide_memory

OURS = {"s6": "selective_scan", "ssd": "ssd"}
PROCESSORS = 132
CHUNK = 256  # of mamba_ssm's SSD
PUBLISHED = Path(__file__).parents[2] / "published" / "h100-training" / "results.jsonl"


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there were at once."""

    def __init__(self, given):
        super().__init__()
        self._given = {t.untyped_storage()._cdata for t in given}
        self._alive = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._alive = {ref: n for ref, n in self._alive.items() if not ref.expired()}
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._given:
                    self._alive[StorageWeakRef(storage)] = storage.nbytes()
        self.peak = max(self.peak, self.now())
        return result

    def now(self):
        """Return the bytes that are alive."""
        return sum(n for ref, n in self._alive.items() if not ref.expired())


@pytest.fixture
def unlaunched(monkeypatch):
    """Plan for an H100 and launch nothing."""
    from mambench.kernels import prepared
    from mambench.kernels.s6 import hopper_backward, hopper_scan
    from mambench.kernels.ssd import hopper_grad, hopper_ssd, triton_launch, triton_ssd_backward

    ssd = importlib.import_module("mambench.kernels.ssd.hopper_op")
    known = (hopper_scan._calls, hopper_backward._calls, ssd._calls, ssd._gradients)
    caches = [hopper_ssd._planned.cache_clear, *(each.clear for each in known)]
    monkeypatch.setattr(prepared.Recording, "launch", lambda *_, **__: None)
    for module in (hopper_backward, hopper_grad, hopper_ssd, triton_launch, triton_ssd_backward):
        monkeypatch.setattr(module, "multiprocessors", lambda device: PROCESSORS)
    monkeypatch.setattr(hopper_scan, "_multiprocessors", lambda device: PROCESSORS)
    monkeypatch.setattr(triton_launch, "has_wgmma", lambda device: True)
    for clear in caches:
        clear()
    yield
    for clear in caches:
        clear()


DEVICE = {"name": "meta"}


def leaf(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype, device=DEVICE["name"]).requires_grad_()


def s6_step(*, batch, seqlen, d_inner, d_state, ngroups=1, retain=False):
    """Run a training step of the selective scan; returns what `peak` does."""
    from mambench.kernels.s6.hopper_op import selective_scan

    rows, shared = (batch, d_inner, seqlen), (batch, ngroups, d_state, seqlen)
    wide = {"dtype": torch.float32}
    given = (
        leaf(*rows), leaf(*rows), leaf(d_inner, d_state, **wide), leaf(*shared), leaf(*shared),
        leaf(d_inner, **wide), None, leaf(d_inner, **wide),
    )  # fmt: skip
    return peak(lambda: selective_scan(*given, delta_softplus=True), given, retain)


def ssd_step(*, batch, seqlen, nheads, headdim, d_state, ngroups=1, retain=False):
    """Run a training step of the SSD; returns what `peak` does."""
    from mambench.kernels.ssd.hopper_op import ssd

    tokens, shared = (batch, seqlen, nheads), (batch, seqlen, ngroups, d_state)
    wide = {"dtype": torch.float32}
    x, dt, A = leaf(*tokens, headdim), leaf(*tokens), leaf(nheads, **wide)
    B, C, D, bias = leaf(*shared), leaf(*shared), leaf(nheads, **wide), leaf(nheads, **wide)
    given = (x, dt, A, B, C, D, bias)
    return peak(
        lambda: ssd(x, dt, A, B, C, CHUNK, D=D, dt_bias=bias, dt_softplus=True), given, retain
    )


def peak(forward, given, retain):
    """Return the most bytes held in a step, those between its passes, and torch's count (or 0)."""
    given = [t for t in given if t is not None]
    grad = torch.empty_like(given[0])
    cuda = torch.cuda if grad.is_cuda else None
    before = 0
    if cuda:
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
    with Held([*given, grad]) as held:
        out = forward()
        between = held.now()
        gradients = torch.autograd.grad(out, given, grad, retain_graph=retain)
    assert all(g is not None for g in gradients)
    return held.peak, between, cuda.max_memory_allocated() - before if cuda else 0


def mamba_ssm_scan_bytes(*, batch, seqlen, d_inner, d_state, ngroups=1, itemsize=2):
    """Return the peak of mamba_ssm's selective scan, not gated (selective_scan.cpp of 2.3.2).

    Forward allocates out and x, (B, D, ceil(L / 2048), 2 N) fp32. Backward allocates du, ddelta,
    dA, dD and dbias, and dB and dC in fp32, of which it makes the results while both are alive.
    """
    return sum(
        mamba_ssm_scan_tensors(
            batch=batch, seqlen=seqlen, d_inner=d_inner, d_state=d_state, ngroups=ngroups,
            itemsize=itemsize,
        )
    )  # fmt: skip


def mamba_ssm_scan_tensors(*, batch, seqlen, d_inner, d_state, ngroups=1, itemsize=2):
    """Return the bytes of what it allocates, in its order; all are alive at the end."""
    rows = itemsize * batch * seqlen * d_inner
    x = 4 * 2 * batch * d_inner * -(-seqlen // 2048) * d_state
    shared = batch * ngroups * d_state * seqlen
    parameters = [4 * d_inner * d_state, 4 * shared, 4 * shared, 4 * d_inner, 4 * d_inner]
    return [rows, x, rows, rows, *parameters, itemsize * shared, itemsize * shared]


def mamba_ssm_ssd_bytes(*, batch, seqlen, nheads, headdim, d_state, ngroups=1, itemsize=2):
    """Return the peak of mamba_ssm's SSD with chunks of 256, not gated (ssd_combined.py).

    It is where the gradient of C B^T is summed over heads or, of long sequences, where the states'
    gradients are passed back, both in fp32.
    """
    chunks = batch * -(-seqlen // CHUNK)
    tokens = itemsize * batch * seqlen * nheads * headdim
    times = 4 * chunks * CHUNK * nheads
    shared = batch * seqlen * ngroups * d_state
    states = itemsize * chunks * nheads * headdim * d_state  # of 16 bits
    scores = 4 * chunks * ngroups * CHUNK**2
    per_group = nheads // ngroups
    splits = -(-per_group // max(1, min(-(-chunks * nheads // PROCESSORS), per_group)))
    saved = tokens + 2 * times  # out, dt and its sums
    given = 2 * itemsize * shared + 2 * itemsize * batch * seqlen * nheads  # dB, dC, ddt; dt again
    again = 2 * times + scores  # dt, its sums and C B^T
    passing = 2 * 2 * states + 2 * states  # states and their gradients; both narrowed
    gradients = tokens + 3 * times + 2 * 4 * shared  # dx; ddt, ddA twice; dB, dC in fp32
    summing = 2 * states + gradients + scores * (splits + 1)
    return saved + given + again + max(passing, summing)


def shapes(family):
    """Return the operations' problems of the suite `training` on a GPU, and some more."""
    found = []
    for sweep in suite.find("training").sweeps:
        ours = OURS[family] in sweep.implementations and sweep.level is Level.OP
        if not ours or Pass.TRAINING not in sweep.passes[DeviceKind.CUDA]:
            continue
        axes = {name: a.resolve(DeviceKind.CUDA, Family(family)) for name, a in sweep.axes.items()}
        found += [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
    assert len(found) >= 2
    more = [{"batch": 8, "seqlen": 2048}, {"seqlen": 1 << 15}, {"batch": 2, "seqlen": 4000}]
    if family == "s6":
        lengths = ((1, 2048), (8, 2048), (1, 8191), (2, 4000))
        more += [
            {"batch": batch, "seqlen": seqlen, "d_state": d_state}
            for d_state in (32, 64, 128, 256)
            for batch, seqlen in lengths
        ] + [{"seqlen": 8192, "d_state": 20}, {"seqlen": 2048, "d_state": 128, "d_inner": 5120}]
    return [sized(shape) for shape in (*found, *(found[0] | other for other in more))]


def sized(shape):
    """Return a suite's sizes as a step takes them."""
    sizes = {"batch": 1, **shape}
    if "headdim" in sizes:
        sizes["nheads"] = sizes.pop("d_inner") // sizes["headdim"]
    return sizes


def named(shape):
    return "-".join(map(str, shape.values()))


def records(implementation):
    """Return sizes and extra bytes of the training steps of a published run."""
    for line in PUBLISHED.read_text().splitlines():
        record = json.loads(line)
        asked = (record["implementation"], record["pass"], record["measurement"])
        if asked == (implementation, "training", "memory"):
            wanted = ["batch", "seqlen", "d_inner", "d_state"]
            wanted += ["headdim"] if record["problem"]["family"] == "ssd" else []
            sizes = {name: record["problem"][name] for name in wanted}
            yield sized(sizes), record["values"]["extra_memory_bytes"]


@pytest.mark.parametrize(
    ("implementation", "formula", "off"),
    [("mamba_ssm_scan", mamba_ssm_scan_bytes, 0.001), ("mamba_ssm_ssd", mamba_ssm_ssd_bytes, 0.02)],
)
def test_the_peers_formulas_hold(implementation, formula, off):
    found = list(records(implementation))
    assert len(found) >= 2
    for sizes, measured in found:
        assert formula(**sizes) == pytest.approx(measured, rel=off)


@pytest.mark.usefixtures("unlaunched")
@pytest.mark.parametrize("shape", shapes("ssd"), ids=named)
def test_the_ssd_takes_no_more_than_mamba_ssm(shape):
    held, _, _ = ssd_step(**shape)
    assert held <= mamba_ssm_ssd_bytes(**shape)


@pytest.mark.usefixtures("unlaunched")
@pytest.mark.parametrize("shape", shapes("s6"), ids=named)
def test_the_scan_takes_no_more_than_mamba_ssm(shape):
    """Its 2 % over outputs and gradients are more than ours, which is what we say."""
    config = hopper_backward.choose(
        d_inner=shape["d_inner"], d_state=shape["d_state"], multiprocessors=PROCESSORS
    )  # fmt: skip
    held, between, _ = s6_step(**shape)
    sizes = {**shape, "ngroups": 1, "itemsize": 2, "gated": False}
    slots = config.resident * PROCESSORS
    if isinstance(config, hopper_wide_memory.WideConfig):
        said = hopper_wide_memory.training_bytes(config, **sizes, resident=slots)
    else:
        said = hopper_memory.training_bytes(
            **sizes, chunk=config.chunk, block=config.block, slots=slots
        )
    assert held == pytest.approx(said, rel=0.002)
    assert held <= mamba_ssm_scan_bytes(**shape)
    states = 4 * shape["batch"] * shape["d_inner"] * shape["d_state"]
    rows = 2 * shape["batch"] * shape["seqlen"] * shape["d_inner"]
    assert between == rows + states * -(-shape["seqlen"] // config.chunk)


@pytest.mark.usefixtures("unlaunched")
def test_kept_states_stay_where_the_graph_does():
    """Freeing them is what saves the memory; and a graph that is retained needs them again."""
    shape = {"batch": 1, "seqlen": 8192, "d_inner": 2048, "d_state": 16}
    freed, retained = (s6_step(**shape, retain=retain)[0] for retain in (False, True))
    assert retained - freed == 4 * 2048 * 16 * 8192 // 64


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("shape", [*shapes("s6"), *shapes("ssd")], ids=named)
def test_torch_on_a_gpu_counts_the_same(shape, monkeypatch):
    """Its allocator rounds up to 512 bytes, and hands out a little more of a large free block.

    The peer's tensors are rounded in the same way: its scan's are allocated here one by one.
    """
    monkeypatch.setitem(DEVICE, "name", "cuda")
    step = ssd_step if "headdim" in shape else s6_step
    step(**shape)  # what is compiled and kept for good
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    counted, _, measured = step(**shape)
    assert counted <= measured <= counted + 8 * (1 << 20)  # a large block is split from 1 MiB on
    if "headdim" not in shape:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        made = [
            torch.empty(n, dtype=torch.uint8, device="cuda")
            for n in mamba_ssm_scan_tensors(**shape)
        ]
        assert measured <= torch.cuda.memory_allocated() - before
        assert len(made) == 11
