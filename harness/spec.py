"""The vocabulary: what a question (a case) is, and how it can end. Imports no torch or triton.

Sizes are spelt out; in shape comments B batch, L seqlen, D d_inner, H nheads, P headdim, N d_state,
G ngroups, Q chunk_size.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

from mambench.harness.metrics import METRICS as METRICS
from mambench.harness.metrics import Metric as Metric
from mambench.harness.metrics import metrics_of as metrics_of

SCHEMA_VERSION = 1


class Family(StrEnum):
    """A set of implementations that compute the same function of the same inputs."""

    S6 = "s6"  # Mamba-1: A is (D, N)
    SSD = "ssd"  # Mamba-2: A is one scalar per head
    ATTENTION = "attention"  # causal softmax attention


class Level(StrEnum):
    """How much is timed around the mixer."""

    OP = "op"  # the mixer's core
    BLOCK = "block"  # projections, convolution, gate, norm and MLP around it


class Pass(StrEnum):
    """What is executed once per sample."""

    FORWARD = "forward"
    BACKWARD = "backward"  # gradients only; the forward that they need is not timed
    TRAINING = "training"  # forward and backward
    PREFILL = "prefill"  # forward that also leaves the decoding state: last state or KV cache
    DECODE = "decode"  # one token; seqlen is the context before it and does not apply to an SSM

    @property
    def needs_grad(self) -> bool:
        """Whether gradients are computed."""
        return self in (Pass.BACKWARD, Pass.TRAINING)

    @property
    def leaves_state(self) -> bool:
        """Whether the pass makes or updates the state that decoding goes on from."""
        return self in (Pass.PREFILL, Pass.DECODE)


class DType(StrEnum):
    """Element type of the problem's activations."""

    FP64 = "fp64"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}[self.value]


class DeviceKind(StrEnum):
    """Where a case runs."""

    CPU = "cpu"
    CUDA = "cuda"


class Outcome(StrEnum):
    """How a case ended; each carries a reason a person can act on, except `ok`."""

    OK = "ok"
    WRONG = "wrong"  # failed the correctness gate; its time is not reported
    ERROR = "error"  # raised
    OOM = "oom"  # out of memory, on the device or over the limit on the host
    TIMEOUT = "timeout"  # exceeded the case's time limit
    CRASHED = "crashed"  # the worker process died
    UNSUPPORTED = "unsupported"  # the implementation declines this problem
    UNAVAILABLE = "unavailable"  # not installed, or not on this device
    SKIPPED = "skipped"  # left out by the time budget or an estimate

    @property
    def failed(self) -> bool:
        """Whether `run --retry-failed` tries it again and the exit code reports it."""
        return self in _FAILED


_FAILED = {Outcome.WRONG, Outcome.ERROR, Outcome.OOM, Outcome.TIMEOUT, Outcome.CRASHED}


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device that a plan is made for; filled by `harness.machine` without importing torch."""

    kind: DeviceKind
    index: int = 0
    name: str  # "NVIDIA H100 80GB HBM3", or the processor's model name
    compute_capability: tuple[int, int] | None = None  # None on the CPU
    memory_bytes: int

    @property
    def torch_name(self) -> str:
        """The string `torch.device` takes."""
        return "cpu" if self.kind is DeviceKind.CPU else f"cuda:{self.index}"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The sizes of a question. A size that does not apply to the family or level is None."""

    family: Family
    level: Level = Level.OP
    batch: int
    seqlen: int | None  # decode: tokens before the one computed; None for an SSM's decode
    d_inner: int  # mixer width: D for s6, nheads * headdim for ssd and attention
    d_model: int | None = None  # block level only
    d_state: int | None = None  # s6 and ssd
    headdim: int | None = None  # ssd and attention
    ngroups: int | None = None  # s6 and ssd
    gated: bool = False  # op level, s6 and ssd: multiply the output by silu(z)

    @property
    def nheads(self) -> int:
        """Number of heads (ssd and attention)."""
        if self.headdim is None:
            raise ValueError(f"family {self.family} has no heads")
        return self.d_inner // self.headdim

    @property
    def nblocks(self) -> int | None:
        """Blocks executed: one transformer layer weighs as much as two Mamba blocks."""
        if self.level is Level.OP:
            return None
        return 1 if self.family is Family.ATTENTION else 2

    @property
    def length(self) -> int:
        """Tokens per sequence; raises ValueError where the question has no length."""
        if self.seqlen is None:
            raise ValueError(f"the state update of family {self.family} has no sequence length")
        return self.seqlen

    @property
    def tokens(self) -> int:
        """Tokens of all sequences; one each where the question has no length."""
        return self.batch * (1 if self.seqlen is None else self.seqlen)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, one key per field."""
        return dict(vars(self))  # flat, so asdict's deep copies would only cost time

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Problem":
        """Rebuild a problem from `to_dict`'s values."""
        kept: dict[str, Any] = {k: v for k, v in values.items() if k in _SIZES}
        kept |= {"family": Family(kept["family"]), "level": Level(kept["level"])}
        return cls(**kept)


_SIZES = frozenset(f.name for f in fields(Problem))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question: an implementation's variant on a problem, in one pass and dtype."""

    implementation: str
    variant: str
    problem: Problem
    pass_: Pass
    dtype: DType

    @cached_property
    def case_id(self) -> str:
        """Twelve hexadecimal digits that are the same on every machine and commit."""
        return digest(self.to_dict())

    @property
    def tokens(self) -> int:
        """Tokens that one execution computes: in decode one per sequence, whatever the context."""
        return self.problem.batch if self.pass_ is Pass.DECODE else self.problem.tokens

    @property
    def kind(self) -> "Case":
        """What it shares with cases that differ in size alone: much of their compilation."""
        return replace(self, problem=replace(self.problem, batch=1, seqlen=1))

    @property
    def label(self) -> str:
        """One line for a person."""
        p = self.problem
        length = [f"L={p.seqlen}"] if p.seqlen is not None else []
        return self._line(f"B={p.batch}", *length)

    @property
    def without_sizes(self) -> str:
        """The same line for all cases of its kind."""
        return self._line()

    def _line(self, *sizes: str) -> str:
        p = self.problem
        widths = [f"d_model={p.d_model}"] if p.d_model else [f"D={p.d_inner}"]
        widths += [f"N={p.d_state}"] if p.d_state else []
        who = f"{self.implementation}:{self.variant} {p.family}/{p.level}"
        return f"{who} {self.pass_} {' '.join([*sizes, *widths])} {self.dtype}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the key of `pass_` is `pass`."""
        return {
            "implementation": self.implementation,
            "variant": self.variant,
            "problem": self.problem.to_dict(),
            "pass": self.pass_.value,
            "dtype": self.dtype.value,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Case":
        """Rebuild a case from `to_dict`'s values."""
        return cls(
            implementation=values["implementation"],
            variant=values["variant"],
            problem=Problem.from_dict(values["problem"]),
            pass_=Pass(values["pass"]),
            dtype=DType(values["dtype"]),
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run measures. Part of an observation's identity, except the limits."""

    seed: int = 0
    target_s: float = 0.5  # seconds of samples wanted per case
    min_samples: int = 5
    max_samples: int = 200
    relative_error: float = 0.01  # stop early when the median's interval is this narrow
    threads: int | None = None  # CPU threads per worker; None: all physical cores
    time_limit_s: float = 60.0  # per case, compilation aside
    compile_limit_s: float = 300.0  # first calls, which may compile
    memory_limit_bytes: int | None = None  # host memory of a worker; None: 80 % of the machine's
    measurements: tuple[str, ...] = ("time", "memory")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Settings":
        """Rebuild settings from `to_dict`'s values."""
        kept: dict[str, Any] = {**values, "measurements": tuple(values["measurements"])}
        return cls(**kept)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a pass must do, from shapes alone (modelled)."""

    model_flop: int
    compulsory_bytes: int
    weight_count: int | None = None
    state_bytes: int | None = None  # kept from token to token (passes prefill and decode)


def digest(value: Any) -> str:
    """Return twelve hexadecimal digits of the value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
