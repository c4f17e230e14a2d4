"""Runs one PTX kernel on the CPU, a block at a time: a check of GPU kernels where there is no GPU.

A block that waits for a counter hands over to the next, so that all blocks are on the machine at
once, and as far apart as the kernel allows; where none of them gets on, they wait for each other
for ever: `Deadlock`.

All threads of a block advance together, one numpy array of thread values per register, so branches
must go one way for the whole block. Global accesses must fall inside an argument's tensor, shared
ones inside the block's allocation. A `Hazard` is raised when two warps touch the same shared word
without a barrier in between and one of them writes. Only the instructions of the kernels under
test are known; any other raises `NotImplementedError`.
"""

import functools
import re
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

import numpy as np
import torch

WARP = 32
_PATIENCE = 5000  # rounds in which no block ends
_TYPES = {
    "f32": np.float32, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f16": np.float16,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "pred": np.bool_,
}  # fmt: skip
_DTYPES = {kind: np.dtype(value) for kind, value in _TYPES.items()}
_BINARY: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "min": np.fmin, "max": np.fmax, "mul": np.multiply,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "div": lambda a, b: a / b if a.dtype.kind == "f" else np.trunc(a / b).astype(a.dtype),
    "rem": lambda a, b: np.fmod(a, b),
}  # fmt: skip
_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "neu": np.not_equal, "ltu": np.less, "gtu": np.greater,
}  # fmt: skip
_UNARY = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": lambda a: np.float32(1) / a, "abs": np.abs,
    "neg": np.negative, "not": np.invert,
}  # fmt: skip


# Instructions whose result is computed from registers alone.
_COMPUTED = {
    *("mov", "shl", "shr", "selp", "bfe", "fma", "mul", "mad", "shf"), *_UNARY,
}  # fmt: skip


class Hazard(Exception):
    """Two warps used a shared word without a barrier between them, and one wrote it."""


class Deadlock(Exception):
    """Every block that has not ended waits for another."""


@functools.lru_cache(maxsize=1 << 16)
def _split(text: str) -> list[str]:
    """Split operands at the commas outside brackets and braces; the list is not to be changed."""
    return [p.strip() for p in re.split(r",(?![^\[{]*[\]}])", text) if p.strip()]


class Instruction(NamedTuple):
    """An instruction, and what its execution asks of it again and again."""

    predicate: str
    opcode: str
    operands: list[str]
    name: str
    parts: list[str]  # of the opcode, after its name
    kind: str  # the last of them
    is_polled: bool  # a load that may be repeated until it finds something else
    is_packed: bool  # a move between a register and its halves
    applied: Callable[..., np.ndarray] | None  # to two operands, where that is all

    @classmethod
    def of(cls, predicate: str, opcode: str, operands: list[str]) -> "Instruction":
        name, *parts = opcode.split(".")
        kind = parts[-1] if parts else ""
        is_polled = opcode.startswith(("ld.relaxed", "ld.acquire"))
        is_packed = name == "mov" and ("{" in operands[0] or "{" in operands[1])
        if name in ("ld", "st"):
            parts = [p for p in parts if p not in ("acquire", "relaxed", "gpu", "cg")]
        applied = _BINARY.get(name) if not {"wide", "hi"} & set(parts) else None
        applied = _COMPARE[parts[0]] if name == "setp" else applied
        return cls(predicate, opcode, operands, name, parts, kind, is_polled, is_packed, applied)


@functools.lru_cache(maxsize=8)
def parse(ptx: str) -> tuple[list[Instruction], dict[str, int]]:
    """Return every instruction, and the labels' positions."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    body = ptx[ptx.index(".reqntid") :].split("\n", 1)[1]
    for raw in re.sub(r"//.*", "", body[: body.index("$L__func_end0")]).split("\n"):
        line = raw.strip()
        if line.startswith("."):
            continue
        if label := re.match(r"(\$[\w]+):", line):
            labels[label.group(1)] = len(code)
            continue
        if not re.search(r"[{}]\s*$", line) or ";" in line:
            line = re.sub(r"^{", "", line)
        for piece in line.split(";"):
            statement = piece.strip()
            if not statement or statement in "{}" or statement.startswith("."):
                continue
            predicate, opcode, rest = re.match(
                r"(?:@(!?[\w%]+)\s+)?([\w.:]+)\s*(.*)", statement
            ).groups()  # pyright: ignore[reportOptionalMemberAccess]
            code.append(Instruction.of(predicate or "", opcode, _split(rest)))
    return code, labels


class Block:
    """One thread block: registers, shared memory, and the tensors it may touch."""

    def __init__(
        self,
        ptx: str,
        arguments: Sequence[torch.Tensor | int],
        *,
        threads: int,
        shared_bytes: int,
        block: int,
        blocks: int = 1,
    ) -> None:
        self.code, self.labels = parse(ptx)
        self.threads, self.warp = threads, np.arange(threads) // WARP
        self.lane = np.arange(threads) % WARP
        self.all = np.ones(threads, np.bool_)
        self.constants: dict[tuple[str, str], np.ndarray] = {}
        self.memory = {
            t.data_ptr(): t.detach().contiguous().view(torch.uint8).reshape(-1).numpy()
            for t in arguments
            if isinstance(t, torch.Tensor)
        }
        for t in arguments:
            if isinstance(t, torch.Tensor) and not t.is_contiguous():
                raise ValueError("arguments must be contiguous")
        self.shared = np.full(shared_bytes, 0xFF, np.uint8)
        words = shared_bytes // 4 + 1
        self.epoch = 0
        self.writer, self.reader = np.full(words, -1), np.full(words, -1)
        self.write_epoch, self.read_epoch = np.full(words, -1), np.full(words, -1)
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": np.arange(threads, dtype=np.uint32),
            "%laneid": (np.arange(threads) % WARP).astype(np.uint32),
            "%ctaid.x": np.full(threads, block, np.uint32),
            "%nctaid.x": np.full(threads, blocks, np.uint32),
            "global_smem": np.zeros(threads, np.uint32),
        }
        self.parameters = [
            t.data_ptr() if isinstance(t, torch.Tensor) else int(t) for t in arguments
        ]

    # -- registers

    def get(self, operand: str, kind: str) -> np.ndarray:
        """Return an operand's value in every thread, as a type; not to be written to."""
        dtype = _DTYPES[kind]
        value = self.registers.get(operand)
        if value is not None:
            if value.dtype is dtype:
                return value
            return value.view(dtype) if value.itemsize == dtype.itemsize else value.astype(dtype)
        value = self.constants.get((operand, kind))
        if value is None:
            if operand[0] == "!":
                return ~self.get(operand[1:], kind)
            value = self.constants[operand, kind] = self.constant(operand, dtype)
            value.setflags(write=False)
        return value

    def constant(self, operand: str, dtype: np.dtype) -> np.ndarray:
        """Return a number, in every thread."""
        if operand.startswith("0f"):
            return np.full(self.threads, int(operand[2:], 16), np.uint32).view(dtype)
        number = int(operand, 0) & ((1 << (8 * dtype.itemsize)) - 1)
        unsigned = np.dtype(f"u{dtype.itemsize}")
        return np.full(self.threads, number, unsigned).view(dtype)

    def put(self, name: str, value: np.ndarray, active: np.ndarray | None) -> None:
        """Write a register in the active threads."""
        if active is not None and name in self.registers:
            old = self.registers[name]
            value = np.where(active, value.view(old.dtype), old)
        self.registers[name] = value

    # -- memory

    def track(self, address: np.ndarray, size: int, write: bool) -> None:
        """Record accesses to shared words, and refuse two warps' without a barrier."""
        threads = self.warp[: len(address)]
        for piece in range(0, size, 4):
            word = (address.astype(np.int64) + piece) // 4
            if size < 4:
                continue  # half words of one word may belong to two warps
            clash = (self.write_epoch[word] == self.epoch) & (self.writer[word] != threads)
            if write:
                clash |= (self.read_epoch[word] == self.epoch) & (self.reader[word] != threads)
            if clash.any():
                raise Hazard(f"shared byte {4 * int(word[clash][0])} in epoch {self.epoch}")
            if write:
                self.write_epoch[word], self.writer[word] = self.epoch, threads
            else:
                several = (self.read_epoch[word] == self.epoch) & (self.reader[word] != threads)
                self.read_epoch[word] = self.epoch
                self.reader[word] = np.where(several, -2, threads)

    def where(self, address: np.ndarray, size: int, space: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the buffer that holds addresses, and the byte positions in it (threads, size)."""
        steps = np.arange(size)
        if space == "shared":
            at = address.astype(np.int64)
            if at.size and (at.min() < 0 or at.max() + size > self.shared.size):
                raise IndexError("shared access outside the block's allocation")
            return self.shared, at[:, None] + steps
        for base, buffer in self.memory.items():
            at = address.astype(np.int64) - base
            if at.size == 0 or (at.min() >= 0 and at.max() + size <= buffer.size):
                if at.size and (address.astype(np.int64) % size).any():
                    raise IndexError(f"misaligned access of {size} bytes")
                return buffer, at[:, None] + steps
        raise IndexError("global access outside every tensor")

    def address(self, operand: str, space: str) -> np.ndarray:
        """Evaluate [register + constant]."""
        name, _, constant = operand.strip("[] ").replace(" ", "").partition("+")
        kind = "u32" if space == "shared" else "u64"
        bits = 8 * np.dtype(_TYPES[kind]).itemsize
        return self.get(name, kind) + _TYPES[kind](int(constant or 0) % (1 << bits))

    def load(self, operand: str, size: int, space: str, active: np.ndarray) -> np.ndarray:
        """Load size bytes in every active thread; (threads, size) bytes."""
        result = np.zeros((self.threads, size), np.uint8)
        address = self.address(operand, space)[active]
        if space == "shared":
            self.track_active(address, size, False, active)
        buffer, at = self.where(address, size, space)
        result[active] = buffer[at]
        return result

    def store(self, operand: str, data: np.ndarray, space: str, active: np.ndarray) -> None:
        """Store (threads, size) bytes from the active threads."""
        address = self.address(operand, space)[active]
        if space == "shared":
            self.track_active(address, data.shape[1], True, active)
        buffer, at = self.where(address, data.shape[1], space)
        buffer[at] = data[active]

    def track_active(self, address: np.ndarray, size: int, write: bool, active: np.ndarray) -> None:
        """Track accesses of the active threads only."""
        warp, self.warp = self.warp, self.warp[active]
        try:
            self.track(address, size, write)
        finally:
            self.warp = warp

    # -- execution

    def run(self) -> Generator[None, None, int]:
        """Run to the end, with a stop where a counter is read again; returns the instructions."""
        position, executed, polled = 0, 0, -1
        while True:
            instruction = self.code[position]
            predicate, name = instruction.predicate, instruction.name
            active = self.get(predicate, "pred") if predicate else None
            executed += 1
            position += 1
            if name == "ret":
                return executed
            if instruction.is_polled:
                if position == polled:
                    yield
                polled = position
            if name == "bra":
                if active is not None and active.any() != active.all():
                    raise NotImplementedError("a branch that diverges")
                if active is None or active[0]:
                    position = self.labels[instruction.operands[0]]
            elif instruction.applied is not None:
                _, _, (target, a, b, *_), _, _, kind, *_ = instruction
                value = instruction.applied(self.get(a, kind), self.get(b, kind))
                self.put(target, value, active)
            elif name in _COMPUTED and not instruction.is_packed:
                self.put(instruction.operands[0], self.value(instruction), active)
            else:
                self.step(instruction, active)

    def step(self, instruction: Instruction, active: np.ndarray | None) -> None:
        """Execute one instruction that is no branch."""
        _, _, operands, name, parts, kind, _, is_packed, _ = instruction
        threads = self.all if active is None else active
        if name == "bar":
            self.epoch += 1
        elif name == "fence":
            pass  # what a block writes, the others see at once
        elif name == "red":
            self.count(operands, threads)
        elif name in ("ld", "st"):
            self.access(name, parts, operands, threads, active)
        elif name == "cp":
            self.copy(parts, operands, threads)
        elif name in ("ldmatrix", "stmatrix"):
            self.matrix(name, parts, operands)
        elif name == "shfl":
            self.shuffle(parts, operands, active)
        elif is_packed:
            self.pack(kind, operands)
        elif name == "cvt":
            self.convert(parts, operands, active)
        else:
            raise NotImplementedError(instruction.opcode)

    def value(self, instruction: Instruction) -> np.ndarray:
        """Compute the result of an arithmetic instruction."""
        _, _, operands, name, parts, kind, *_ = instruction
        a = self.get(operands[1], kind)
        if name == "mov":
            return a
        if name in _UNARY:
            return _UNARY[name](a).astype(a.dtype)
        if name in ("shl", "shr"):
            shift = self.get(operands[2], "u32").astype(a.dtype)
            return a << shift if name == "shl" else a >> shift
        b = self.get(operands[2], kind)
        if name == "selp":
            return np.where(self.get(operands[3], "pred"), a, b)
        if name == "bfe":
            return self.bit_field(a, operands)
        if name == "fma":
            c = self.get(operands[3], kind)
            return (a.astype(np.float64) * b + c).astype(np.float32)
        if name in ("mul", "mad"):
            product = a * b
            if "wide" in parts:
                wide = np.int64 if kind == "s32" else np.uint64
                product = a.astype(wide) * b.astype(wide)
            if "hi" in parts:
                wide = [int(x) * int(y) >> 8 * a.itemsize for x, y in zip(a, b, strict=True)]
                product = np.array(wide, a.dtype)
            if name == "mul":
                return product
            wide_kind = kind[0] + "64" if "wide" in parts else kind
            return product + self.get(operands[3], wide_kind)
        if name == "shf" and parts[:2] == ["l", "wrap"]:
            shift = self.get(operands[3], "u32") & np.uint32(31)
            joined = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
            return ((joined << shift.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
        raise NotImplementedError(instruction.opcode)

    def bit_field(self, a: np.ndarray, operands: list[str]) -> np.ndarray:
        """bfe: bits [start, start + length), sign-extended for a signed type."""
        start, length = int(operands[2], 0), int(operands[3], 0)
        unsigned, signed = (np.dtype(f"{sign}{a.itemsize}") for sign in "ui")
        mask = unsigned.type((1 << length) - 1)
        field = (a.view(unsigned) >> unsigned.type(start)) & mask
        if a.dtype == unsigned:
            return field
        up = signed.type(8 * a.itemsize - length)
        return (field.view(signed) << up) >> up

    def access(
        self, name: str, parts: list[str], operands: list[str], threads: np.ndarray,
        active: np.ndarray | None,
    ) -> None:  # fmt: skip
        """ld and st of param, global and shared, of one or several elements."""
        dtype = np.dtype(_TYPES[parts[-1]])
        if parts[0] == "param":
            index = int(re.search(r"_param_(\d+)", operands[1]).group(1))  # pyright: ignore
            mask = (1 << (8 * dtype.itemsize)) - 1
            value = np.full(self.threads, self.parameters[index] & mask, dtype)
            self.put(operands[0], value, None)
            return
        registers, memory = operands if name == "ld" else operands[::-1]
        names = _split(registers.strip("{} "))
        if name == "ld":
            data = self.load(memory, len(names) * dtype.itemsize, parts[0], threads)
            columns = np.ascontiguousarray(data).view(dtype)
            for i, register in enumerate(names):
                self.put(register, columns[:, i].copy(), active)
        else:
            columns = np.stack([self.get(r, parts[-1]) for r in names], 1)
            self.store(memory, np.ascontiguousarray(columns).view(np.uint8), parts[0], threads)

    def count(self, operands: list[str], threads: np.ndarray) -> None:
        """red.add of a constant to one counter, by some of the threads."""
        address = self.address(operands[0], "global")[threads]
        buffer, at = self.where(address, 4, "global")
        added = np.uint32(int(operands[1], 0))
        for place in at:
            buffer[place] = (buffer[place].view(np.uint32) + added).view(np.uint8)

    def copy(self, parts: list[str], operands: list[str], threads: np.ndarray) -> None:
        """cp.async with a source size (zero fill); done at once, its commit and wait do nothing."""
        if "shared" not in parts:
            return
        size = int(operands[2], 0)
        source = self.get(operands[3], "u32") if len(operands) > 3 else np.full(self.threads, size)
        data = np.zeros((self.threads, size), np.uint8)
        full = threads & (source == size)
        if not np.isin(source, (0, size)).all():
            raise NotImplementedError("cp.async of part of its size")
        data[full] = self.load(operands[1], size, "global", full)[full]
        self.store(operands[0], data, "shared", threads)

    def shuffle(self, parts: list[str], operands: list[str], active: np.ndarray | None) -> None:
        """shfl.sync up and idx over whole warps, with the optional predicate."""
        if active is not None:
            raise NotImplementedError("a predicated shuffle")
        target, _, flag = operands[0].partition("|")
        value, by = self.get(operands[1], "b32"), self.get(operands[2], "s32")
        base = np.arange(self.threads) - self.lane
        if "up" in parts:
            inside = self.lane >= by
            source = base + np.where(inside, self.lane - by, self.lane)
        elif "bfly" in parts:
            inside = np.ones(self.threads, np.bool_)
            source = base + (self.lane ^ by)
        elif "idx" in parts:
            inside = np.ones(self.threads, np.bool_)
            source = base + (by & 31)
        else:
            raise NotImplementedError("shfl." + ".".join(parts))
        self.put(target, value[source], None)
        if flag:
            self.put(flag, inside, None)

    def pack(self, kind: str, operands: list[str]) -> None:
        """mov between a register and its halves."""
        half = {"b32": "b16", "b64": "b32"}[kind]
        if "{" in operands[0]:
            halves = np.ascontiguousarray(self.get(operands[1], kind)).view(_TYPES[half])
            for i, name in enumerate(_split(operands[0].strip("{} "))):
                self.put(name, halves.reshape(self.threads, 2)[:, i].copy(), None)
        else:
            pair = [self.get(o, half) for o in _split(operands[1].strip("{} "))]
            joined = np.ascontiguousarray(np.stack(pair, 1)).view(_TYPES[kind])
            self.put(operands[0], joined.reshape(-1), None)

    def convert(self, parts: list[str], operands: list[str], active: np.ndarray | None) -> None:
        """cvt between integers, and between fp32 and the 16-bit floats."""
        to, source = parts[-2], parts[-1]
        if to in ("bf16x2", "f16x2"):
            dtype = torch.bfloat16 if to == "bf16x2" else torch.float16
            high, low = (
                torch.from_numpy(self.get(o, "f32").copy()).to(dtype).view(torch.int16).numpy()
                for o in operands[1:3]
            )
            value = np.ascontiguousarray(np.stack([low, high], 1)).view(np.uint32).reshape(-1)
        elif to == "bf16":
            single = torch.from_numpy(self.get(operands[1], "f32").copy()).to(torch.bfloat16)
            value = single.view(torch.int16).numpy().view(np.uint16)
        elif source == "bf16":
            value = (self.get(operands[1], "u16").astype(np.uint32) << 16).view(np.float32)
        else:
            value = self.get(operands[1], source).astype(_TYPES[to])
        self.put(operands[0], value, active)

    def matrix(self, name: str, parts: list[str], operands: list[str]) -> None:
        """ldmatrix and stmatrix of 8x8 b16 matrices, plain or transposed."""
        count = next(int(p[1:]) for p in parts if re.fullmatch(r"x\d", p))
        memory, registers = operands if name == "stmatrix" else operands[::-1]
        names = _split(registers.strip("{} "))
        rows = self.address(memory, "shared").reshape(-1, WARP)[:, : 8 * count]
        used = np.tile(np.arange(WARP) < 8 * count, self.threads // WARP)
        self.track_active(rows.reshape(-1), 16, name == "stmatrix", used)
        _, at = self.where(rows.reshape(-1), 16, "shared")
        lane = np.arange(WARP)
        pair = np.arange(2)
        if "trans" in parts:
            r, c = 2 * (lane % 4)[:, None] + pair, (lane // 4)[:, None] + 0 * pair
        else:
            r, c = (lane // 4)[:, None] + 0 * pair, 2 * (lane % 4)[:, None] + pair
        data = self.shared[at].view(np.uint16).reshape(-1, count, 8, 8)
        for i, register in enumerate(names):
            if name == "ldmatrix":
                value = np.ascontiguousarray(data[:, i][:, r, c]).view(np.uint32)
                self.put(register, value.reshape(-1), None)
            else:
                value = np.ascontiguousarray(self.get(register, "b32")).view(np.uint16)
                data[:, i][:, r, c] = value.reshape(-1, WARP, 2)
        if name == "stmatrix":
            self.shared[at] = data.view(np.uint8).reshape(-1, 16)


def launch(
    ptx: str,
    blocks: int,
    arguments: Sequence[torch.Tensor | int],
    *,
    threads: int,
    shared_bytes: int,
) -> int:
    """Run every block of a one-dimensional grid in turn; returns the instructions executed."""
    waiting = {
        b: Block(
            ptx, arguments, threads=threads, shared_bytes=shared_bytes, block=b, blocks=blocks
        ).run()
        for b in range(blocks)
    }
    executed, idle, order = 0, 0, 1
    with np.errstate(all="ignore"):
        while waiting:
            idle += 1
            order = -order  # every other round the last first
            for b, block in list(waiting.items())[::order]:
                try:
                    next(block)
                except StopIteration as end:
                    executed += end.value
                    del waiting[b]
                    idle = 0
            if idle > _PATIENCE:
                raise Deadlock(f"blocks {sorted(waiting)} wait for each other")
    return executed
