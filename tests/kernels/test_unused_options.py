"""What a forward call does not use costs nothing: it is left out when the kernels are compiled."""

import importlib

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from mambench.harness.static.record import record

FP32 = torch.float32
POINTERS = (
    "D_ptr", "z_ptr", "bias_ptr", "seq_ptr", "kept_ptr", "checkpoints_ptr", "start",
    "z_desc", "final",
)  # fmt: skip
FLAGS = (
    "HAS_D", "HAS_Z", "HAS_BIAS", "SOFTPLUS", "HAS_FIRST", "HAS_START", "HAS_SEQ", "D_DIMS",
    "STORE_FINAL",
)  # fmt: skip


def s6(module):
    op = importlib.import_module(f"mambench.kernels.s6.{module}").selective_scan

    def call(draw, *given):
        like_u, like_B = (1, 2048, 8192), (1, 1, 16, 8192)
        options = {
            "D": lambda: draw(2048, dtype=FP32), "z": lambda: draw(*like_u),
            "delta_bias": lambda: draw(2048, dtype=FP32), "delta_softplus": lambda: True,
            "initial_state": lambda: draw(1, 2048, 16, dtype=FP32),
        }  # fmt: skip
        chosen = {name: options[name]() for name in given}
        A = draw(2048, 16, dtype=FP32)
        op(draw(*like_u), draw(*like_u), A, draw(*like_B), draw(*like_B), **chosen)

    return call


def ssd(module):
    op = importlib.import_module(f"mambench.kernels.ssd.{module}").ssd

    def call(draw, *given):
        like_x, like_B = (1, 8192, 32, 64), (1, 8192, 1, 128)
        options = {
            "D": lambda: draw(32, dtype=FP32), "z": lambda: draw(*like_x),
            "dt_bias": lambda: draw(32, dtype=FP32), "dt_softplus": lambda: True,
            "return_final_states": lambda: True, "dt_limit": lambda: (0.01, 0.3),
            "initial_states": lambda: draw(1, 32, 64, 128, dtype=FP32),
        }  # fmt: skip
        chosen = {name: options[name]() for name in given}
        x, dt, A = draw(*like_x), draw(1, 8192, 32), draw(32, dtype=FP32)
        op(x, dt, A, draw(*like_B), draw(*like_B), 64, **chosen)

    return call


def used(call, *given):
    """Return what the kernels of a call are compiled to take besides what every call has."""
    found = set()
    for launch in record(lambda draw: call(draw, *given), 90):
        found |= {
            name for name in POINTERS if launch.signature.get(name, "constexpr") != "constexpr"
        }
        configured = launch.configuration
        found |= {name for name in FLAGS if configured.get(name, "0") not in ("0", "False", "None")}
    return found


@pytest.mark.parametrize(
    ("family", "module", "option", "taken"),
    [
        *(
            (s6, module, option, taken)
            for module in ("triton_scan", "hopper_op")
            for option, taken in (
                ("D", {"D_ptr", "HAS_D"}), ("z", {"z_ptr", "HAS_Z"}),
                ("delta_bias", {"bias_ptr", "HAS_BIAS"}), ("delta_softplus", {"SOFTPLUS"}),
            )
        ),
        (s6, "triton_scan", "initial_state", {"HAS_FIRST"}),
        (ssd, "triton_ssd", "initial_states", {"HAS_START"}),
        (ssd, "triton_ssd", "z", {"HAS_Z"}),
        (ssd, "triton_ssd", "return_final_states", {"STORE_FINAL"}),
        (ssd, "triton_ssd", "dt_bias", {"bias_ptr", "HAS_BIAS"}),
        (ssd, "hopper_op", "dt_bias", {"bias_ptr"}),
        (ssd, "hopper_op", "initial_states", {"start"}),
        (ssd, "hopper_op", "z", {"z_desc"}),
        (ssd, "hopper_op", "return_final_states", {"final"}),
        *(
            (ssd, module, option, taken)
            for module in ("triton_ssd", "hopper_op")
            for option, taken in (
                ("D", {"D_ptr", "D_DIMS"}),
                ("dt_softplus", {"SOFTPLUS"}),
                ("dt_limit", set()),  # two comparisons of each dt, given or not
            )
        ),
    ],
)  # fmt: skip
def test_an_option_is_compiled_in_only_where_it_is_given(family, module, option, taken):
    call = family(module)
    assert used(call) == set()
    assert taken <= used(call, option) <= taken | {f"{option}_ptr"}
