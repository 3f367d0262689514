"""The recurrence over packed prefills without a GPU: vLLM's C++ kernel.

On a CPU vLLM gives it the Triton kernels' name and arguments; but it wants x, B and C contiguous, and it knows nothing
of states inside of a run.
"""

from dataclasses import replace
from itertools import accumulate, chain, pairwise

import torch

from vllm_bamba.ops.ssd_prefill import kernels
from vllm_bamba.state import PrefillPlan


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    dt_limit: tuple[float, float],
    initial: torch.Tensor | None,
    plan: PrefillPlan,
    out: torch.Tensor,
    state_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `kernels.scan`; a run with an inner state is two."""

    def run(tokens: torch.Tensor, lengths: list[int], initial: torch.Tensor | None) -> torch.Tensor:
        part = replace(plan, query_start_loc=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), inner=None)
        y, of_heads = out.new_empty(len(tokens), *out.shape[1:]), (A, B[tokens], C[tokens], D, dt_bias)
        states, *_ = kernels.scan(x[tokens], dt[tokens], *of_heads, dt_limit, initial, part, y, torch.float32)
        out[tokens] = y
        return states

    if plan.inner is None:
        of_heads = (A, B.contiguous(), C.contiguous(), D, dt_bias)
        states, *_ = kernels.scan(x.contiguous(), dt, *of_heads, dt_limit, initial, plan, out, state_dtype)
        return states, _rows(states), None
    runs = [*pairwise(plan.query_start_loc.tolist())]
    cuts = [start + offset if offset else end for (start, end), offset in zip(runs, plan.inner.offsets, strict=True)]
    first = [range(start, cut) for (start, _), cut in zip(runs, cuts, strict=True)]
    rest = [range(cut, end) for (_, end), cut in zip(runs, cuts, strict=True)]
    inner = run(torch.tensor([*chain(*first)]), [*map(len, first)], initial)
    last, two = inner.clone(), torch.tensor([i for i, tokens in enumerate(rest) if tokens])
    last[two] = run(torch.tensor([*chain(*rest)]), [len(tokens) for tokens in rest if tokens], inner[two])
    rows = _rows(last)
    return torch.cat([last, inner]).to(state_dtype), rows, len(last) + rows


def _rows(states: torch.Tensor) -> torch.Tensor:
    """The C++ kernel gives no other states than those that are asked for."""
    return torch.arange(len(states), dtype=torch.int32)
