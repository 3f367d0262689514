"""Triton kernels on a machine without a GPU: its interpreter, made to compute with bf16 as GPUs do, and faster.

Triton's interpreter cuts fp32 off towards zero where it makes bf16 of it. A GPU rounds to nearest even, and a state
that is stored every step shows the difference. And it keeps bf16 numbers as 16-bit integers, which is what it then
multiplies in `tl.dot`.

Half of its time goes into two things that nobody needs here: whether integers overflow, which a GPU does not ask, and
the exchange of Triton's functions for its own, which every call of a function in a kernel repeats.
"""

import dataclasses
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch


def use_interpreter_without_a_gpu() -> None:
    """To be called before a kernel is defined."""
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "0":
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    if hasattr(convert, "__wrapped__"):
        return
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang, [tl, tl.core])

    def rounded(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            values = torch.from_numpy(np.array(data, dtype=np.float32, order="C"))
            return values.bfloat16().view(torch.int16).numpy().view(np.uint16)
        if source == tl.bfloat16 and target == tl.float32:
            return np.array(data).view(np.uint16).astype(np.uint32) << 16
        return convert(data, source, target, mode)

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle(
            rounded(operand.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32
        )

    multiply = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: multiply(self, widened(a), widened(b), *rest)
    rounded.__wrapped__ = convert  # type: ignore[attr-defined]
    interpreter._convert_float = rounded


def _once_a_launch(patch: Callable[[Any], Any], languages: list[ModuleType]) -> Callable[[Any], Any]:
    """`patch` exchanges the functions of those `languages` that a function sees; a kernel's own call undoes it."""
    patched: set[str] = set()

    def patch_once(function: Any) -> Any:
        globals_ = function.__globals__.values()
        seen = {language.__name__ for language in languages if any(value is language for value in globals_)}
        if patched and seen <= patched:
            return None  # asked for by a function in a kernel, which has no use for it
        launches = not patched
        scope = patch(function)
        patched.update(seen)
        if launches:
            undo = scope.restore
            scope.restore = lambda: (patched.clear(), undo())
        return scope

    return patch_once
