"""Compilation without a GPU: production configurations pass the check, the negative controls fail it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

aot = pytest.importorskip("brainflow.kernels.aot", reason="needs triton")
GOOD = ("values", "small tile", "gather 90", "gather 80", "gather 100", "gather bf16", "loss bf16")


@pytest.fixture(scope="module")
def cases():
    """Everything is compiled once, in a process in which the interpreter is off."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot_cases.py")
    result = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", GOOD)
def test_good_kernels_pass(cases, name):
    case = cases[name]
    assert case["problems"] == []
    assert case["spills"] == 0
    assert 16 <= case["registers"] <= aot.MAX_REGISTERS


@pytest.mark.parametrize("name", ["decoder", "decoder backward"])
def test_the_decoder_multiplies_on_tensor_cores_without_spills(cases, name):
    assert cases[name]["spills"] == 0
    assert cases[name]["tensor cores"]


def test_wide_accesses_of_the_listing_are_those_of_the_machine_code(cases):
    case = cases["gather 90"]
    assert case["loads"]["store"] == {"128": case["sass"]["LDG.128"]}
    assert case["stores"]["out"] == {"128": case["sass"]["STG.128"]}
    assert case["stores"]["out"]["128"] * case["num_warps"] * 32 * 4 == 4 * 1024


def test_bfloat16_rounds_to_nearest(cases):
    assert cases["gather bf16"]["rounds_bf16"]
    assert cases["loss bf16"]["rounds_bf16"]
    assert not cases["gather 90"]["rounds_bf16"]


def test_a_column_mask_as_predicate_fails(cases):
    case = cases["predicate"]
    assert "128" not in case["loads"]["x"]
    assert "x: got loads narrower than 128 bits" in case["error"]
    assert "masked_copy on sm_90" in case["error"]


def test_1023_networks_fail(cases):
    error = cases["gather 1023"]["error"]
    assert "store: got loads narrower than 128 bits" in error
    assert "out: got stores narrower" in error


def test_an_oversized_tile_fails(cases):
    assert cases["oversized tile"]["spills"] > 0
    assert "spills: got" in cases["oversized tile"]["error"]
    assert "registers: got" in cases["oversized tile"]["error"]


def test_signature_holds_what_a_launch_passes(cases):
    case = cases["gather 90"]
    assert list(case["signature"])[:6] == ["store", "starts", "bounds", "scale", "token", "out"]
    assert case["signature"]["out"] == "*fp32"
    assert {"store", "out", "networks"} <= set(case["divisible_by_16"])
    assert "networks" not in cases["gather 1023"]["divisible_by_16"]
    assert case["null_pointers"] >= 0


def test_every_op_declares_configurations_with_unique_names():
    if aot.interpreting():
        pytest.skip("needs the compiler")
    names = [config.name for config in aot.configs()]
    assert len(names) == len(set(names))
    assert {name.split(".")[0] for name in names} >= {"gather_windows", "masked_loss"}


PTX = """
.visible .entry f(.param .u64 f_param_0, .param .u64 f_param_1) {
ld.param.b64 %rd1, [f_param_0];
ld.param.b64 %rd2, [f_param_1];
mad.wide.s32 %rd3, %r1, 4, %rd1;
add.s64 %rd5, %rd4, 16;
add.s64 %rd4, %rd3, 64;
@%p1 ld.global.v4.b32 { %r5, %r6, %r7, %r8 }, [ %rd3 + 0 ];
ld.global.L1::evict_last.b32 { %r5 }, [ %rd5 + 0 ];
ld.global.b64 %rd9, [%rd1];
add.s64 %rd10, %rd2, %rd9;
st.global.v2.b16 [ %rd10 + 0 ], { %rs1, %rs2 };
st.global.b8 [ %rd77 + 0 ], { %rs1 };
}
"""


def test_addresses_are_followed_to_their_parameter():
    loads, stores = aot.accesses(PTX, ["a", "b"])
    assert loads == {"a": {128: 1, 32: 1, 64: 1}}
    assert stores == {"b": {32: 1}, "?": {8: 1}}


def test_under_the_interpreter_ops_run_and_nothing_is_compiled():
    code = """
import torch
from brainflow.kernels import MaskSpec, aot, mask_tokens
x, mask, token = torch.ones(3, 70), MaskSpec.networks(0.5, seed=1), torch.zeros(70)
found, expected = (mask_tokens(x, mask, token, impl=impl) for impl in ("triton", "naive"))
print(torch.equal(found, expected))
try: aot.compile_config(aot.configs()[0], 90)
except RuntimeError as error: print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout.startswith("True\nTRITON_INTERPRET: got 1, expected it unset"), result.stderr[-2000:]
