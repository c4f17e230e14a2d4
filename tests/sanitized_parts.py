"""What `gpu_sanitize.py` runs: every kernel of the package, on small and odd shapes.

`PARTS` must pass; `PLANTED` has what each tool must find, `IN_ORDER` what racecheck takes for a
race and is none (both: tests/faults/races.py). Every kernel of `kernels/` is launched by some part,
which tests/test_gpu_sanitize.py checks without a GPU. A part returns what it computed, tensors
nested as they come; it is the same, to the bit, however slowly a tool lets the threads run.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from hashlib import sha256
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

HOPPER = "hopper"  # in the name of a part that needs compute capability 9.0


Computed = Any  # tensors, or None, in sequences


def normal(*shape: int) -> Tensor:
    """Return bf16 values on the GPU."""
    return torch.randn(shape).bfloat16().cuda()


def s6(
    module: str, d_state: int, *, batch: int = 2, channels: int = 34, seqlen: int = 75,
    train: bool = True, **more: Tensor,
) -> Computed:  # fmt: skip
    """Run a selective scan with every option, forward and backward unless told not to."""
    groups = 2
    wide, shared = (batch, channels, seqlen), (batch, groups, d_state, seqlen)
    inputs = {
        "u": torch.randn(wide).bfloat16(), "delta": torch.randn(wide).bfloat16(),
        "A": -torch.rand(channels, d_state), "B": torch.randn(shared).bfloat16(),
        "C": torch.randn(shared).bfloat16(), "D": torch.randn(channels),
        "z": torch.randn(wide).bfloat16(), "delta_bias": torch.randn(channels), **more,
    }  # fmt: skip
    scan = operation(f"{module}.selective_scan")
    return passes(
        lambda **t: scan(**t, delta_softplus=True, return_last_state=True), inputs, train=train
    )


def s6_hopper_backward() -> Computed:
    """Run the backward where blocks add up sums in the gradients, and where in scratch memory."""
    return [
        s6("kernels.s6.hopper_op", 16, batch=batch, channels=channels, seqlen=seqlen)
        for batch, channels, seqlen in (
            (2, 256, 512),  # two blocks of 64 channels in each group, a segment for each chunk
            (2, 2048, 512),  # segments of two chunks
            (9, 2048, 128),  # more batch elements than rows of blocks
            (2, 256, 330),  # a last chunk that is cut short
            (2, 150, 330),  # a last block that is cut short, too
        )
    ]


def s6_hopper_wide() -> Computed:
    """Run the backward of more than 16 states over several segments of time."""
    return [
        s6("kernels.s6.hopper_op", d_state, channels=channels, seqlen=seqlen)
        for d_state, channels, seqlen in (
            (32, 256, 512),
            (64, 150, 330),  # a last chunk and a last block that are cut short
            (128, 256, 512),
            (200, 34, 138),
        )
    ]


def s6_hopper_forward() -> Computed:
    """Run the forward with 4, 8 and 16 warps a block, over more than one tile of time."""
    return [
        s6("kernels.s6.hopper_op", 20, channels=channels, seqlen=seqlen, train=False)
        for channels, seqlen in ((34, 75), (500, 530), (1066, 530))
    ]


def s6_hopper_serial() -> Computed:
    """Run the forward of many channels, which goes through time in order."""
    return [
        s6("kernels.s6.hopper_op", d_state, batch=batch, channels=channels, train=train)
        for d_state, batch, channels, train in (
            (16, 8, 2010, False),
            (9, 4, 2002, False),
            (72, 2, 1002, False),
            (16, 4, 2002, True),  # keeps states
        )
    ]


def ssd(
    path: str, headdim: int, d_state: int, *, seqlen: int = 150, heads: int = 6,
    gated: bool = True, per_channel: bool = False, train: bool = True, **options: Any,
) -> Computed:  # fmt: skip
    """Run an SSD with every option, forward and backward unless told not to."""
    batch, groups = 2, 2
    wide, shared = (batch, seqlen, heads, headdim), (batch, seqlen, groups, d_state)
    inputs = {
        "x": torch.randn(wide).bfloat16(), "dt": torch.randn(batch, seqlen, heads).bfloat16(),
        "A": -torch.rand(heads), "B": torch.randn(shared).bfloat16(),
        "C": torch.randn(shared).bfloat16(),
        "D": torch.randn((heads, headdim) if per_channel else (heads,)),
        "dt_bias": torch.randn(heads),
        "initial_states": torch.randn(batch, heads, headdim, d_state),
    }  # fmt: skip
    if gated:
        inputs["z"] = torch.randn(wide).bfloat16()
    op = operation(path)
    given = {"chunk_size": 64, "dt_softplus": True, "return_final_states": True, **options}
    return passes(lambda **t: op(**t, **given), inputs, train=train)


def ssd_ungated(path: str) -> Computed:
    """Run the backward that takes a head's tiles at once: one block of heads, and several."""
    return [
        ssd(path, 40, 24, gated=False, segments=2),
        ssd(path, 64, 128, gated=False, per_channel=True, segments=1),
        ssd(path, 64, 128, gated=False, heads=70, seqlen=700),
    ]


def ssd_packed(gated: bool) -> Computed:
    """Run sequences of different lengths in a row of tokens; one spans chunks and segments."""
    ends = (3, 64, 65, 140, 400)
    seq_idx = torch.zeros(2, 450, dtype=torch.int32)
    for end in ends:
        seq_idx[:, end:] += 1
    sizes = {"seqlen": 450, "gated": gated, "seq_idx": seq_idx.cuda()}
    return [
        ssd("kernels.ssd.triton_ssd.ssd", headdim, d_state, segments=3, **sizes)
        for headdim, d_state in ((40, 24), (64, 128))
    ]


def ssd_fused() -> Computed:
    """Run the forward of one launch, whose blocks look back at earlier ones, and alone."""
    path = "kernels.ssd.hopper_op.ssd"
    sizes = {"seqlen": 450, "train": False}
    return [
        [
            ssd(path, headdim, d_state, **sizes, **more)
            for headdim, d_state in ((40, 24), (64, 128), (128, 128))
            for more in ({}, {"gated": False, "segments": 5})
        ],
        ssd(path, 64, 64, train=False, per_channel=True, segments=1),
    ]


def all_arriving(ptx: str, counts: tuple[int, ...]) -> str:
    """Let every thread arrive at mbarriers where one does for its partition, behind a barrier.

    Racecheck takes an arrival to release the arriving thread's writes alone. `counts`: by what the
    arrivals that the mbarriers wait for grow, over and over in the order in which they are made.
    """
    grown = cycle(counts)
    made = r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\], )(\d+);"
    ptx = re.sub(made, lambda found: f"{found[1]}{int(found[2]) * next(grown)};", ptx)
    return re.sub(r"@%p\d+ (mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];)", r"\1", ptx)


def where_all_arrive(run: Callable[[], Computed], kernel: str, *counts: int) -> Computed:
    """Run something with a kernel compiled so (`all_arriving`), from a cache of its own."""
    from triton.backends.nvidia.compiler import CUDABackend

    make = CUDABackend.make_ptx

    def changed(self: Any, source: Any, metadata: Any, *rest: Any) -> str:
        ptx = make(self, source, metadata, *rest)
        return all_arriving(ptx, counts) if metadata["name"] == kernel else ptx

    with mock.patch.object(CUDABackend, "make_ptx", changed):
        return run()


def ssd_forward() -> Computed:
    """Run the forward without a backward: of two to four launches, and of the walk alone."""
    sizes = {"heads": 66, "seqlen": 1030, "train": False}  # too long for one launch
    path = "kernels.ssd.hopper_op.ssd"
    long = {"heads": 20, "seqlen": 2110, "train": False}  # segments too long for the walk alone
    return [
        [ssd(path, 40, 24, segments=segments, **sizes) for segments in (1, 2, 3)],
        [ssd(path, 64, 32, segments=2, gated=z, **long) for z in (True, False)],
        [ssd(path, 64, 32, segments=2, gated=z, **sizes | {"heads": 60}) for z in (True, False)],
    ]


def state_update() -> Computed:
    """Update states of both families by one token, with several tilings."""
    from mambench.kernels.state_update.config import CONFIGS
    from mambench.kernels.state_update.triton_update import selective_state_update

    batch, heads, d_state = 3, 10, 20
    done: list[Computed] = []
    for headdim in (None, 24):
        places = (heads,) if headdim is None else (heads, headdim)
        x, dt = normal(batch, *places), normal(batch, heads)
        A = -torch.rand((heads, d_state) if headdim is None else (heads,)).cuda()
        B, C = (normal(batch, 2, d_state) for _ in "BC")
        D, bias = (torch.randn(heads).cuda() for _ in "Db")
        options = {"D": D, "z": x, "dt_bias": bias, "dt_softplus": True}
        for config in (None, *CONFIGS[:: 1 if headdim is None else 4]):
            state = normal(batch, *places, d_state)
            out = selective_state_update(state, x, dt, A, B, C, **options, config=config)
            done.append((state, out))
    return done


def around_mixers() -> Computed:
    """Run what blocks run around their mixers, forward and backward, at odd sizes."""
    from mambench.kernels.conv.triton_conv import conv_backward, conv_forward
    from mambench.kernels.elementwise import triton_elementwise as elementwise
    from mambench.kernels.norm.triton_norm import norm_backward, norm_forward

    batch, channels, seqlen = 2, 70, 301
    weight, bias = normal(channels, 4), normal(channels)
    done: list[Computed] = []
    for last in (False, True):
        x = normal(batch, seqlen, channels).mT if last else normal(batch, channels, seqlen)
        dout = (x[:, :40], x[:, 40:55], x[:, 55:]) if last else (x,)
        done.append(conv_forward(x, weight, bias, True))
        more = None if last else normal(*x.shape)
        done.append(conv_backward(x, weight, bias, dout, True, more=more))
    for width in (20, 301, 2048):
        for z in (None, normal(37, width)):
            x, scale, dout = normal(37, width), normal(width), normal(37, width)
            out, rstd = norm_forward(x, scale, z, 1e-5)
            done.append(out.clone())
            how = {"residual": x, "give_out": True, "overwrite": True}
            done.append(norm_backward(x, scale, z, rstd, dout, **how))
    tables, qkv = (normal(seqlen, 1, 1, 24), normal(seqlen, 1, 1, 24)), normal(2, seqlen, 3, 3, 24)
    elementwise.rotate_(qkv, *tables)
    done.append(qkv)
    done.append(elementwise.rotate_back(*(normal(batch, seqlen, 3, 24) for _ in "qkv"), *tables))
    done.append(elementwise.gated_product_backward(normal(37, 602), normal(37, 301)))
    done.append(elementwise.gated_product(normal(37, 602)))
    return done


def measuring() -> Computed:
    """Run what waits, reads clocks and finds a device's ceilings; no clock is returned."""
    from mambench.kernels import ceilings_triton, probes

    probes.spin(probes.new_record(), 1000)
    probes.read_timer(probes.timer_steps(8))
    probes.chain(probes.chain_out(), 3)
    source = torch.randn(3 * probes.BLOCK).cuda()
    target, totals = torch.empty_like(source), source[:3].clone()
    probes.copy(source, target)
    probes.total(source, totals)
    sums = totals.clone()
    for found in (ceilings_triton.exponentials, ceilings_triton.multiply_adds):
        found(totals, 3)
    ceilings_triton.nothing(totals)
    return target, sums


PARTS: dict[str, Callable[[], Computed]] = {
    "s6 triton": lambda: s6("kernels.s6.triton_scan", 16),
    "s6 triton, from a state": lambda: s6(
        "kernels.s6.triton_scan", 20, seqlen=331, initial_state=torch.randn(2, 34, 20)
    ),
    "s6 hopper": lambda: s6("kernels.s6.hopper_op", 20),
    "s6 hopper, 128 states": lambda: s6("kernels.s6.hopper_op", 128),
    "s6 hopper, forward": s6_hopper_forward,
    "s6 hopper, many channels": s6_hopper_serial,
    "s6 hopper, sums in gradients": s6_hopper_backward,
    "s6 hopper, more states": s6_hopper_wide,
    "s6 associative": lambda: s6("kernels.scan_triton", 16),
    "ssd triton": lambda: ssd("kernels.ssd.triton_ssd.ssd", 40, 24, segments=2),
    "ssd triton, ungated": lambda: ssd_ungated("kernels.ssd.triton_ssd.ssd"),
    "ssd triton, packed": lambda: ssd_packed(True),
    "ssd triton, packed, ungated": lambda: ssd_packed(False),
    "ssd hopper": lambda: ssd("kernels.ssd.hopper_op.ssd", 40, 24, segments=2),
    "ssd hopper, widest": lambda: ssd("kernels.ssd.hopper_op.ssd", 64, 128, segments=2),
    "ssd hopper, ungated": lambda: ssd_ungated("kernels.ssd.hopper_op.ssd"),
    "ssd hopper, one launch": ssd_fused,
    "ssd hopper, forward": ssd_forward,
    "ssd associative": lambda: ssd("kernels.scan_triton.state_space_dual", 8, 16),
    "state update": state_update,
    "around mixers": around_mixers,
    "measuring": measuring,
    "ssd hopper, one launch, all arrive": lambda: where_all_arrive(
        ssd_fused, "fused_kernel", 1, 128, 128
    ),
    "ssd hopper, ungated, all arrive": lambda: where_all_arrive(
        # Four stages full and empty; B and C there; scores summed, twice weights made and taken.
        lambda: ssd_ungated("kernels.ssd.hopper_op.ssd"),
        "grad_kernel",
        *(1, 128) * 4,
        1,
        128,
        *(128, 128) * 2,
    ),
    "hand-over by mbarrier, all arrive, hopper": lambda: where_all_arrive(
        races().handed, "handed_kernel", 128
    ),
    "hand-over, hopper": lambda: races().hand_over(),
    "hand-over behind a barrier, hopper": lambda: races().hand_over(barriers=1),
}
# Of each tool what it must find, or it would find nothing elsewhere either.
PLANTED: dict[str, tuple[str, Callable[[], Computed]]] = {
    "planted: partitions that do not wait, hopper": (
        "racecheck", lambda: races().unsynchronised(),
    ),
    "planted: partitions, behind a barrier, hopper": (
        "racecheck", lambda: races().unsynchronised(barriers=1),
    ),
    "planted: mbarrier that is not waited for, all arrive, hopper": (
        "racecheck",
        lambda: where_all_arrive(lambda: races().handed(waits=False), "handed_kernel", 128),
    ),
    "planted: lanes that round a sum differently": ("racecheck", lambda: races().contracted_sum()),
    "planted: read after a barrier of others": ("racecheck", lambda: races().barriers(False)),
    "planted: read past the end": ("memcheck", lambda: races().past_the_end()),
    "planted: read before any write": ("initcheck", lambda: races().never_written()),
    "planted: barrier that nobody made, hopper": ("synccheck", lambda: races().never_made()),
}  # fmt: skip
# One thread arrives for its partition: racecheck runs the part of that name where all do.
ONE_ARRIVES = frozenset({"ssd hopper, one launch", "ssd hopper, ungated"})
# Racecheck reports it all the same.
IN_ORDER: dict[str, Callable[[], Computed]] = {
    "in order: a barrier of some, then of all": lambda: races().barriers(True),
}


def races() -> ModuleType:
    """Import the kernels with races, which are no part of the package."""
    spec = spec_from_file_location("races", Path(__file__).parent / "faults" / "races.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def operation(path: str) -> Callable[..., Any]:
    """Import an operation by its path within the package."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"mambench.{module}"), name)


def passes(op: Callable[..., Any], inputs: dict[str, Tensor], *, train: bool) -> Computed:
    """Run both passes; or the forward alone, twice: the second repeats the first's launches."""
    leaves = {name: t.cuda().requires_grad_(train) for name, t in inputs.items()}
    outputs = op(**leaves)
    if not train:
        return outputs, op(**leaves)
    ones = [torch.ones_like(out) for out in outputs]
    return outputs, torch.autograd.grad(outputs, list(leaves.values()), ones)


def digest(computed: Computed) -> str:
    """Return a hash of every bit of what a part computed."""
    found = sha256()
    for tensor in _tensors(computed):
        bits = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        found.update(bits.numpy().tobytes())
    return found.hexdigest()[:16]


def _tensors(computed: Computed) -> Iterator[Tensor]:
    if isinstance(computed, Tensor):
        yield computed
    elif is_dataclass(computed) and not isinstance(computed, type):
        yield from _tensors(list(vars(computed).values()))
    elif computed is not None:
        for part in computed:
            yield from _tensors(part)
