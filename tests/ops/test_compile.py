"""Our Triton kernels at Bamba-9B's shape, compiled to machine code for an H100 or H200, which needs no GPU.

The interpreter accepts what the compiler refuses, and a kernel that spills its registers to memory is no good here.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import pytest

from vllm_bamba.ops.mixer_step.tuning import (
    DEFAULT_WARPS,
    DRAFT_WARPS,
    PREPARE,
    PREPARE_AND_FOLD,
    PREPARE_DRAFTS,
    WARPS,
)
from vllm_bamba.ops.skinny_linear.tuning import H100, H200

SHAPE = {"HEADS": 128, "HEAD_DIM": 64, "GROUPS": 1, "STATE": 128, "WIDTH": 4, "DRAFTS": 0, "BIAS": True}
FP32 = {"a_ptr", "scale", "ring_dt", "states", "factors", "products", "squares"}
FLOATS = {"dt_low", "dt_high", "share", "eps", "earlier_eps"}
INT32 = {"slots", "lengths", "query_start_loc", "moves", "groups", "anchor"}
INT64 = {"tables", "offsets", "decays"}
UNALIGNED = {
    "slots",
    "lengths",
    "query_start_loc",
    "continues",
    "slots_stride",
    "tables_stride",
    "rows",
}  # not specialised
SIZES = {"rows", "N", "K"}
STATES = {"fp32": False, "bf16": False, "fp16": False, "i8": True, "fp8e4nv": True}
BLOCKS = {"gate": 8192, "read": 1024, "write": 1024, "move": 1024}
STEP = [{"kernel": "step", "state": state} for state in STATES]
STEP += [
    {"kernel": "replay", "state": state, "REPLAY": 16, "FOLD": fold, "warps": warps}
    for state, size in {"fp32": 4, "bf16": 2, "fp16": 2, "i8": 1, "fp8e4nv": 1}.items()
    for warps in dict.fromkeys((DEFAULT_WARPS, WARPS.get(((9, 0), size), DEFAULT_WARPS)))
    for fold in (True, False)
]
STEP += [{"kernel": "replay", "state": "i8", "REPLAY": 16, "STATE": 16, "INTEGERS": False}]
STEP += [
    {"kernel": kernel, "state": state, "REPLAY": replay, "DRAFTS": drafts}
    for replay, drafts in ((16, 1), (16, 4), (32, 4), (32, 8))
    for kernel in ("prepare_drafts", "replay_drafts")
    for state in ("bf16", "i8")
]
STEP += [
    {"kernel": kernel, "state": state, "REPLAY": 16, "DRAFTS": 4}
    for kernel in ("prepare_drafts", "replay_drafts")
    for state in ("fp32", "fp16", "fp8e4nv")
]
STEP += [
    {"kernel": kernel, "state": state, "REPLAY": 16, "EARLY": False, "INTEGERS": False, "capability": capability}
    | ({"DRAFTS": 4} if kernel.endswith("drafts") else {})
    for kernel in ("prepare", "replay", "prepare_drafts", "replay_drafts")
    for state in ("bf16", "i8")
    for capability in (80, 100)
]
OTHERS = [
    {"kernel": kernel, "state": state, "REPLAY": 16}
    for kernel in ("prepare", "read", "write", "move")
    for state in ("bf16", "i8", "fp8e4nv")
]
OTHERS += [{"kernel": "prepare", "state": state, "REPLAY": 32} for state in ("bf16", "i8")]
OTHERS += [{"kernel": "prepare", "state": state, "REPLAY": 16, "FOLD": False} for state in ("bf16", "i8")]
PRODUCTS = [
    {"kernel": "linear", "state": "bf16", "warps": o.num_warps, "SUMS": width, "GATED": gated, "ADDED": added}
    | ({"sums": "fp32"} if width == 128 else {})
    | {"ROWS": o.rows, "COLUMNS": o.columns, "DEPTH": o.depth, "STAGES": o.num_stages, "DESCRIBED": o.described}
    for tuning in (H100, H200)
    for launches, width, gated, added in (
        (tuning.few, 0, False, False),
        (tuning.few, 128, False, False),
        (tuning.few, 0, False, True),
        (tuning.few, 256, False, True),
        (tuning.many, 0, False, False),
        (tuning.many, 128, False, False),
        (tuning.gated, 128, True, False),
        (tuning.gated_whole, 0, True, False),
    )
    for o in launches
]
ROWS = [
    {"kernel": "gate", "state": "bf16"},
    {"kernel": "add_rms_norm", "state": "bf16", "SUMS": 0, "SUMS_BLOCK": 1, "CHANNELS": 4096, "BLOCK": 4096},
    {"kernel": "add_rms_norm", "state": "bf16", "SUMS": 256, "SUMS_BLOCK": 256, "CHANNELS": 4096, "BLOCK": 4096},
]
CASES = [*STEP, *OTHERS, *PRODUCTS, *ROWS]


@pytest.fixture(scope="module")
def usage() -> list[str]:
    """What the machine code of each case takes, from one process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    here = pathlib.Path(__file__)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(here.parent), str(here.parents[2]), os.environ.get("PYTHONPATH", "")]
    )
    program = "import test_compile as t; print(*[t.compile_one(case) for case in t.CASES], sep='\\0')"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split("\0")


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case.values())) for case in CASES])
def test_compiles_without_spilling(index: int, usage: list[str]) -> None:
    stack, local = (int(re.search(rf"{what}:(\d+)", usage[index])[1]) for what in ("STACK", "LOCAL"))
    assert local == 0, usage[index]
    assert stack == 0, usage[index]


def compile_one(case: dict[str, Any]) -> str:
    """Compile one kernel; returns what its machine code takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vllm_bamba.ops.add_rms_norm.kernels import add_rms_norm_kernel
    from vllm_bamba.ops.gated_norm.kernels import gate_kernel
    from vllm_bamba.ops.mixer_step import fold_turns, tile_of_tokens
    from vllm_bamba.ops.mixer_step.draft_kernels import prepare_drafts_kernel, replay_drafts_kernel
    from vllm_bamba.ops.mixer_step.kernels import prepare_kernel, replay_kernel, step_kernel
    from vllm_bamba.ops.skinny_linear.kernels import linear_kernel
    from vllm_bamba.ops.slot_state.kernels import move_kernel, read_kernel, write_kernel

    kernels = {
        "step": step_kernel,
        "replay": replay_kernel,
        "prepare": prepare_kernel,
        "replay_drafts": replay_drafts_kernel,
        "prepare_drafts": prepare_drafts_kernel,
        "read": read_kernel,
        "write": write_kernel,
        "move": move_kernel,
        "gate": gate_kernel,
        "add_rms_norm": add_rms_norm_kernel,
        "linear": linear_kernel,
    }
    kernel = kernels[case["kernel"]]
    prepare = PREPARE_AND_FOLD if case.get("FOLD", True) else PREPARE
    usual = {"gate": 8, "add_rms_norm": 8, "prepare": prepare.num_warps}
    usual |= {"prepare_drafts": PREPARE_DRAFTS.num_warps, "replay_drafts": DRAFT_WARPS}
    warps = case.get("warps", usual.get(case["kernel"], DEFAULT_WARPS))
    constants = SHAPE | {"QUANTISED": STATES[case["state"]], "GATED": True, "FOLD": True, "ANCHORED": True}
    constants |= {"COLUMNS": 8192, "SUMS": 64, "BLOCK": BLOCKS.get(case["kernel"]), "EARLY": True}
    constants |= {"INTEGERS": case["state"] == "i8"}
    constants |= {"BLOCK_HEADS": prepare.heads, "FOLD_DIM": prepare.folded}
    if case.get("DRAFTS"):
        constants |= {"TOKENS": tile_of_tokens(case["DRAFTS"]), "FOLD_DIM": PREPARE_DRAFTS.folded}
    constants |= {name: value for name, value in case.items() if name.isupper()}
    if constants.get("REPLAY"):
        constants |= fold_turns(constants["HEADS"], constants["REPLAY"], constants["DRAFTS"])
    signature, fixed, hints = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], fixed[(i,)] = "constexpr", constants[name]
        elif case.get("DESCRIBED") and name in ("x", "weight"):
            signature[name] = f"tensordesc<bf16[{case['ROWS' if name == 'x' else 'COLUMNS']}, {case['DEPTH']}]>"
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            element = "i32" if name in INT32 else "fp32" if name in FP32 else "i1" if name == "continues" else "bf16"
            element = case["state"] if name == "ssm" else "i64" if name in INT64 else case.get(name, element)
            element = "i8" if name == "c_parts" else element
            signature[name] = "i32" if name.endswith("_stride") or name in SIZES else f"*{element}"
            if name not in UNALIGNED:
                hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=hints)
    binary = triton.compile(
        source,
        target=GPUTarget("cuda", case.get("capability", 90), 32),
        options={"num_warps": warps},
    )
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
