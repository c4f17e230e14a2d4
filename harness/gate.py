"""The correctness gate: a case is timed only after its outputs and gradients are proven right.

The rule. Every output, and for a pass with gradients the gradient of every differentiable input, is
compared with the family's float64 reference in the relative L2 norm. The error may be at most twice
the error of the family's independent solution in the case's own dtype, plus a floor:

    error <= 2 * independent_error + floor

It is applied twice: to the whole tensor, and to the worst of its blocks (64 consecutive time steps
of one channel, one head, one weight row), so that a fault confined to one channel or to the last
steps of a long sequence is not averaged away. What counts as a block's own size is at least a tenth
of the typical block beside it in time: a block that happens to be nearly zero has no relative
accuracy.

The floor is `FLOORS[dtype]`, about the rounding of one element. An error over few values is a noisy
number, whoever makes it: below 32 values the floor grows as sqrt(32 / values). And a gradient of
few values, each a sum over the whole sequence, may by chance nearly cancel: when only such ones
exceed their budget, more output gradients are drawn, and sums of squares over all draws are judged.

An operation that updates its state in place (decode) is judged by its output and by the state that
it leaves, of which copies are taken; the state is then put back, and all inputs, the state's
surroundings included, must be what they were.

Besides, no value may be NaN or infinite anywhere, shapes and dtypes must be the declared ones,
inputs must be unchanged, and nothing may be left over from an earlier call. To see that, the
operation runs twice: first on altered inputs while freshly allocated memory is filled with NaN,
then on the true inputs and exactly as it will be timed. After it was timed it is called once more,
and on a GPU what was timed is captured and replayed. `harness.gate_cheats` lists the known ways to
fool a benchmark and what finds each.
"""

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from mambench.harness import gate_cheats
from mambench.harness.gate_candidate import (
    altered_input,
    by_name,
    gradients,
    poisoned_memory,
    run_pass,
    select_results,
    state_restored,
)
from mambench.harness.gate_cheats import RejectedError, Sketch
from mambench.harness.gate_errors import Energies, ErrorPair, judge, measure
from mambench.harness.spec import Case, Pass
from mambench.implementations.problems.base import Sample
from mambench.implementations.workload import Workload

NOISY_VALUES = 1 << 10  # a gradient of at most so many values is judged again if it fails
MAX_DRAWS = 8
HASH_CHUNK = 1 << 22  # elements hashed at once: the hash of an input needs 96 MiB beside it
HASH_PRIME = 0x100000001B3


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """Whether a case may be timed, and what was found."""

    passed: bool
    reason: str | None = None  # names the worst tensor, its error and its budget; None if passed
    errors: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict[str, Mapping[str, float]]
    )  # by tensor
    judged: str = "all"  # what part of the outputs was compared: "all" or "64 channels"
    # Of the results on altered inputs, by which `check_again` knows them.
    sketches: Mapping[str, Sketch] = field(default_factory=dict[str, Sketch])


def check(workload: Workload, case: Case, *, seed: int) -> GateReport:
    """Judge a workload's operation on its inputs, which are the same before and after.

    Everything that is allocated here is released before it returns. Errors that the operation
    raises (out of memory, a failed launch) pass through.
    """
    sample = workload.family.sample(workload.problem, seed=seed)
    workload.reset()
    judged = _description(sample)
    sketches: dict[str, Sketch] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deterministic mode warns about what it cannot do
            pairs = _judge(workload, case, sample, seed, sketches)
    except RejectedError as rejection:
        return GateReport(passed=False, reason=str(rejection), judged=judged)
    finally:
        _release()
    errors = {name: pair.as_dict() for name, pair in pairs.items()}
    worst = max(pairs.values(), key=lambda pair: pair.excess)
    if worst.excess <= 1:
        return GateReport(passed=True, errors=errors, judged=judged, sketches=sketches)
    return GateReport(passed=False, reason=worst.sentence(), errors=errors, judged=judged)


def check_again(workload: Workload, case: Case, report: GateReport, *, seed: int) -> str | None:
    """Call the operation once more, after it was timed; returns what is wrong now, or None.

    What answers from memory once it has been proven right is asked about other inputs here, and
    must answer as it did to the gate. One execution, and no reference. A state that timing has
    moved on is put back first.
    """
    workload.family.reset(workload.problem, workload.inputs, seed=seed)
    sample = workload.family.sample(workload.problem, seed=seed)
    try:
        workload.reset()
        with altered_input(workload):
            results, _ = run_pass(workload, case, sample, seed + 1)
    except RejectedError as rejection:
        return f"after timing: {rejection}"
    except torch.OutOfMemoryError:  # what was timed may still hold its memory
        return None
    finally:
        _release()
    for name, tensor in results.items():
        if name in report.sketches and report.sketches[name].differs(Sketch.of(tensor)):
            return (
                f"{name}: after timing, the same inputs gave another result than before it: a "
                f"result of an earlier call is returned again (cached), or work is left out"
            )
    return None


def check_replay(workload: Workload, execute: Callable[[], object]) -> str | None:
    """Capture what was timed in a CUDA graph; returns what its replay does not do, or None.

    What cannot be captured is checked for what it leaves to other streams. Raises
    NotCapturableError if it is innocent of that.
    """
    from mambench.harness.instruments import cuda_timing

    results: list[object] = []
    try:
        graph = cuda_timing.capture(lambda: results.append(execute()), 1)
    except cuda_timing.NotCapturableError as error:
        results.clear()
        if reason := check_order(workload, execute, str(error)):
            return reason
        raise
    try:
        gate_cheats.require_written_by_replay(
            graph, list(_tensors(results)), workload.inputs.values()
        )
    except RejectedError as rejection:
        return str(rejection)
    finally:
        results.clear()
        graph.reset()
    return None


def check_order(
    workload: Workload, execute: Callable[[], object], not_captured: str | None = None
) -> str | None:
    """Say whether an execution on a GPU leaves work to a stream that does not wait for ours.

    Args:
        workload: whose inputs are altered for a moment.
        execute: what was timed.
        not_captured: what was raised when a graph of it was captured.
    """
    if reason := gate_cheats.unjoined(not_captured):
        return reason
    if next(iter(workload.inputs.values())).device.type != "cuda":
        return None

    def results() -> list[Tensor]:
        with state_restored(workload):
            return list(_tensors(execute()))

    try:
        gate_cheats.require_stream_order(
            results, lambda: altered_input(workload), workload.inputs.values()
        )
    except RejectedError as rejection:
        return str(rejection)
    except torch.OutOfMemoryError:  # two results at once are more than the timing needed
        return None
    return None


def _tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in cast("Sequence[object]", value):
            yield from _tensors(item)


def _judge(
    workload: Workload, case: Case, sample: Sample, seed: int, sketches: dict[str, Sketch]
) -> dict[str, ErrorPair]:
    """Run the candidate and judge each tensor; draw again while only noisy ones fail."""
    dtype, seqlen = case.dtype, _time_steps(workload)
    results, grad_outputs = _run_candidate(workload, case, sample, seed, sketches)
    pairs: dict[str, ErrorPair] = {}
    noisy: dict[str, Energies] = {}
    for name, energies in _measured(workload, case, sample, results, grad_outputs):
        pairs[name] = judge(name, energies, dtype=dtype, seqlen=seqlen)
        if name.startswith("grad_") and energies.size.numel() <= NOISY_VALUES:
            noisy[name] = energies
    for draw in range(1, MAX_DRAWS):
        failed = {name for name, pair in pairs.items() if pair.excess > 1}
        if not failed or not failed <= noisy.keys():
            break
        results, grad_outputs = run_pass(workload, case, sample, seed + draw)
        results = select_results(workload, results, sample)
        for name, energies in _measured(workload, case, sample, results, grad_outputs):
            if name in failed:
                noisy[name] += energies
                pairs[name] = judge(name, noisy[name], dtype=dtype, seqlen=seqlen)
    return pairs


def _measured(
    workload: Workload,
    case: Case,
    sample: Sample,
    results: Mapping[str, Tensor],
    grad_outputs: Sequence[Tensor],
) -> Iterator[tuple[str, Energies]]:
    """Solve the sample in float64 and independently; yield each result's squares and errors."""
    family, problem = workload.family, workload.problem
    narrow = family.select_inputs(problem, workload.inputs, sample)
    wide = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in narrow.items()
    }
    names = family.differentiable(problem) if case.pass_.needs_grad else ()
    solutions: list[dict[str, Tensor]] = []
    for solve, inputs in ((family.reference, wide), (family.independent, narrow)):
        leaves = {name: tensor.detach() for name, tensor in inputs.items()}
        for name in names:
            leaves[name].requires_grad_()
        with torch.set_grad_enabled(bool(names)):
            outputs = solve(problem, leaves, sample)
        named = by_name(family.outputs, outputs, {})
        _require_shapes(results, named)
        grads = gradients(outputs, {name: leaves[name] for name in names}, grad_outputs)
        solutions.append(by_name(family.outputs, outputs, grads))
    reference, independent = solutions
    for name, tensor in results.items():
        yield name, measure(tensor, reference=reference[name], independent=independent[name])


def _run_candidate(
    workload: Workload, case: Case, sample: Sample, seed: int, sketches: dict[str, Sketch]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Run twice; return the sampled results of the second run and the sampled output gradients.

    Of the first run's results, those of enough values are sketched.
    """
    before = _fingerprints(workload.inputs)
    with altered_input(workload):
        try:
            with poisoned_memory():
                first, _ = run_pass(workload, case, sample, seed + 1)
        except RejectedError as rejection:
            raise _explained(rejection, workload, case, sample, seed + 1) from None
    _require_unchanged(before, workload.inputs)
    prints = _fingerprints(first)
    results, grad_outputs = run_pass(workload, case, sample, seed)
    _require_unchanged(before, workload.inputs)
    # Of what is updated in place there are copies, which need not depend on the altered input.
    updated = workload.family.updated(workload.problem, workload.inputs)
    own = {name: tensor for name, tensor in first.items() if name not in updated}
    gate_cheats.require_fresh(own, results, prints, _fingerprints(own), _fingerprints(results))
    del own
    many = {name: tensor for name, tensor in first.items() if tensor.numel() > NOISY_VALUES}
    sketches |= {name: Sketch.of(tensor) for name, tensor in many.items()}
    del first, many
    return select_results(workload, results, sample), grad_outputs


def _explained(
    rejection: RejectedError, workload: Workload, case: Case, sample: Sample, seed: int
) -> RejectedError:
    """Say so if values are NaN because fresh memory was filled with it: they were never written."""
    if "are NaN" not in str(rejection):
        return rejection
    doubt = "never written, or computed as NaN"
    try:
        # What is allocated next is most likely this memory, which is not NaN.
        spare = [torch.zeros_like(t) for t in workload.inputs.values() for _ in range(2)]
        del spare
        run_pass(workload, case, sample, seed)
    except RejectedError:
        return RejectedError(f"{rejection}: {doubt}")
    return RejectedError(f"{rejection}: never written, fresh memory had been filled with NaN")


def _time_steps(workload: Workload) -> int:
    """Return the size that marks an axis as time; 0 in decode, whose results have none."""
    return 0 if workload.case.pass_ is Pass.DECODE else workload.problem.length


def _require_shapes(results: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in expected.items():
        got, wanted = tuple(results[name].shape), tuple(tensor.shape)
        if got != wanted:
            raise RejectedError(f"{name}: shape {got}, expected {wanted}")


def _require_unchanged(before: Mapping[str, int], inputs: Mapping[str, Tensor]) -> None:
    for name, tensor in inputs.items():
        if _fingerprint(tensor) != before[name]:
            raise RejectedError(f"{name}: the operation changed its input")


def _fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: _fingerprint(tensor) for name, tensor in tensors.items()}


def _fingerprint(tensor: Tensor) -> int:
    """Return a 64-bit hash of the tensor's bits and their order."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(integer).flatten()
    weights = torch.arange(1, 2 * min(HASH_CHUNK, bits.numel()), 2, device=tensor.device)
    value = bits.numel()
    for chunk in torch.split(bits, HASH_CHUNK):
        part = int((chunk.to(torch.int64) * weights[: chunk.numel()]).sum())
        value = (value * HASH_PRIME + part) % (1 << 64)
    return value


def _description(sample: Sample) -> str:
    chosen = {"channels": sample.channels, "heads": sample.heads, "rows": sample.rows}
    chosen |= {"sequences": sample.sequences}
    parts = [f"{len(part)} {name}" for name, part in chosen.items() if part is not None]
    return ", ".join(parts) or "all"


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
