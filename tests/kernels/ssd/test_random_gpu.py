"""Random SSD problems against the loop in float64, on a GPU: with a backward, and without."""

import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

# headdim, d_state, groups, heads: each is compiled for, and a length once for 1, once for multiples
# of 16 and once for the rest: so lengths are free, but mostly odd.
SIZES = (
    (64, 128, 1, 2), (40, 24, 3, 3), (128, 16, 8, 8), (64, 128, 2, 2), (40, 24, 1, 1),
    (128, 16, 1, 3),
)  # fmt: skip
# What is added to dt before softplus, the decay A, and what x is multiplied with.
STEPS = {"usual": 0.0, "tiny": -20.0, "large": 8.0, "huge": 60.0}
DECAYS = {"usual": None, "near 0": -1e-7, "strong": -1e3, "zero": 0.0}
INPUTS = {"usual": 1.0, "zero": 0.0, "huge": 1e4}
# Gradients that are sums over batch and time, of a few values each: now and then nearly all of a
# sum cancels, and its relative error says nothing. So one of them may be four times further off, if
# over all trials together they are as exact as the rest.
SUMS = ("grad_A", "grad_D", "grad_dt_bias")
ALONE = 4
# As SIZES, for the launches that serve where no backward follows.
FORWARD_SIZES = (
    (64, 128, 1, 16), (64, 64, 2, 32), (128, 32, 1, 9), (64, 16, 4, 8), (40, 24, 3, 3),
    (64, 128, 1, 33),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Trial:
    shape: dict[str, int]
    steps: str = "usual"
    decay: str = "usual"
    scale: str = "usual"

    @property
    def tame(self) -> bool:
        return {self.steps, self.decay, self.scale} == {"usual"}


def trials(sizes=SIZES, count=200, longest=2**8) -> list[Trial]:
    draw = random.Random(7)
    found = []
    for seed in range(count):
        headdim, d_state, ngroups, nheads = sizes[seed % len(sizes)]
        seqlen = 2 * int((longest / 2) ** draw.uniform(0, 1)) + 1
        shape = {
            "batch": draw.randint(1, 3), "seqlen": seqlen if seed % 25 else draw.choice((1, 128)),
            "ngroups": ngroups, "nheads": nheads, "headdim": headdim, "d_state": d_state,
            "seed": seed,
        }  # fmt: skip
        kinds = {"steps": STEPS, "decay": DECAYS, "scale": INPUTS} if seed // len(sizes) % 2 else {}
        found.append(
            Trial(shape=shape, **{name: draw.choice(tuple(of)) for name, of in kinds.items()})
        )
    return found


def op(name):
    if name == "triton":
        from mambench.kernels.ssd.triton_ssd import ssd
    else:
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        from mambench.kernels.ssd.hopper_op import ssd
    return ssd


def inputs_of(cases, trial):
    """Draw float64 inputs on the GPU whose values bf16 can hold."""
    drawn = cases.draw(**trial.shape, dtype="bfloat16")
    drawn["dt_bias"] += STEPS[trial.steps]
    drawn["x"] = (drawn["x"] * INPUTS[trial.scale]).bfloat16().double()
    decay = DECAYS[trial.decay]
    if decay is not None:
        drawn["A"] = torch.full_like(drawn["A"], decay).float().double()
    if trial.scale == "zero":
        drawn["initial_states"].zero_()
    return {name: value.cuda() for name, value in drawn.items()}


def wrong(cases, function, trial, sums=None):
    """Return what is off by name: outputs always; gradients if tame, else what is not finite.

    In extreme problems gradients that underflow have no relative error to judge. To `sums` the
    squares of the errors and of the values of tame trials are added, by name.
    """
    exact = inputs_of(cases, trial)
    case = {"dtype": "bfloat16"}
    leaves = {name: value.clone().requires_grad_() for name, value in exact.items()}
    want = cases.evaluate(
        lambda **given: cases.loop(**given, dt_softplus=True), leaves, case, final=True
    )
    got = cases.evaluate(
        lambda **given: function(
            **given, chunk_size=64, dt_softplus=True, return_final_states=True
        ),
        cases.cast(exact, torch.bfloat16, "cuda"), case, final=True,
    )  # fmt: skip
    bound, found = cases.tolerance("bfloat16"), {}
    for name, value in got.items():
        exact_value = want[name].detach().cpu()
        error = cases.relative_error(value, exact_value)
        judged = trial.tame or not name.startswith("grad_")
        allowed = ALONE * bound if name in SUMS else bound
        if not (error <= allowed if judged else bool(value.isfinite().all())):
            found[name] = error
        if sums is not None and trial.tame and name in SUMS:
            energy = float(exact_value.square().sum())
            errors, values = sums.get(name, (0.0, 0.0))
            sums[name] = (errors + error * error * energy, values + energy)
    return found


@pytest.mark.parametrize("name", ["triton", "hopper"])
def test_two_hundred_shapes(cases, name):
    function, found, sums = op(name), {}, {}
    drawn = trials()
    torch.zeros(1, device="cuda").requires_grad_().sum().backward()
    with ThreadPoolExecutor(len(SIZES)) as pool:  # compile the sizes side by side
        list(pool.map(lambda trial: wrong(cases, function, trial), drawn[: 2 * len(SIZES)]))
    for trial in drawn:
        if error := wrong(cases, function, trial, sums):
            found[str(trial)] = error
    assert found == {}
    pooled = {name: (errors / values) ** 0.5 for name, (errors, values) in sums.items()}
    assert pooled.keys() == set(SUMS)
    assert max(pooled.values()) <= cases.tolerance("bfloat16"), pooled


def off_forward(cases, function, trial):
    """Return the errors of outputs that are off, where no backward follows."""
    exact = inputs_of(cases, trial)
    narrow = cases.cast(exact, torch.bfloat16, "cuda")
    with torch.no_grad():
        want = cases.loop(**exact, dt_softplus=True)
        got = function(**narrow, chunk_size=64, dt_softplus=True, return_final_states=True)
    found = [cases.relative_error(*pair) for pair in zip(got, (w.cpu() for w in want), strict=True)]
    return [error for error in found if not error <= cases.tolerance("bfloat16")]


def served_by(trial):
    """Return which launches `ssd` of Hopper chooses for a trial without a backward."""
    from mambench.kernels.ssd import hopper_ssd

    shape = trial.shape
    x = torch.empty(
        *(shape[k] for k in ("batch", "seqlen", "nheads", "headdim")),
        dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    B = x.new_empty(*x.shape[:2], shape["ngroups"], shape["d_state"])
    plan = hopper_ssd.plan_hopper(x, B, dt_softplus=True, dt_limit=(0.0, math.inf), keep=False)
    config = hopper_ssd.choose(plan, keep=False)
    if config.fused or plan.nsegments == 1:
        return "helper" if config.fused else "one segment"
    return "alone" if config.alone else "others"


@pytest.mark.parametrize("name", ["triton", "hopper"])
def test_sixty_shapes_without_a_backward(cases, name):
    function = op(name)
    drawn = trials(FORWARD_SIZES, 60, 2**12)
    with ThreadPoolExecutor(len(FORWARD_SIZES)) as pool:
        list(pool.map(lambda t: off_forward(cases, function, t), drawn[: len(FORWARD_SIZES)]))
    errors = {str(trial): off_forward(cases, function, trial) for trial in drawn}
    assert {trial: error for trial, error in errors.items() if error} == {}
    if name == "hopper":
        assert {"helper", "alone"} <= {served_by(trial) for trial in drawn}


def test_a_decay_that_is_a_little_off_is_noticed(cases):
    def off(*, A, **rest):
        return op("triton")(A=A * 1.2, **rest)

    tame = [trial for trial in trials() if trial.tame and trial.shape["seqlen"] > 64]
    assert all(wrong(cases, off, trial) for trial in tame[:3])
