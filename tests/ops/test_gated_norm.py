"""The gated norm against its reference, the reference against Transformers'."""

import pytest
import torch
from helpers import DEVICE, DTYPES, assert_precise, inside, randn
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated

from vllm_bamba.ops.gated_norm import Division, divide_later, gate_for_later, gated_rms_norm
from vllm_bamba.ops.gated_norm.reference import gated_rms_norm_reference

CHANNELS, EPS = 96, 1e-5


def inputs(tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, gate = (randn(seed, tokens, CHANNELS, dtype=dtype, scale=2.0) for seed in (1, 2))
    return x, gate, 1 + 0.3 * randn(3, CHANNELS, dtype=dtype)


def alone(sums: torch.Tensor) -> torch.Tensor:
    """One rank: nothing to add."""
    return sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
def test_norm_is_the_reference(tokens: int, dtype: torch.dtype) -> None:
    x, gate, weight = inputs(tokens, dtype)
    y = gated_rms_norm(x, inside(gate), weight, EPS, CHANNELS, alone)
    assert y.dtype == dtype
    exact = gated_rms_norm_reference(x.double(), gate.double(), weight.double(), EPS)
    plain = gated_rms_norm_reference(x, gate, weight, EPS)
    for t in range(tokens):
        assert_precise(y[t], exact[t], plain[t], f"token {t}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_one_mean(ranks: int, dtype: torch.dtype) -> None:
    """Each rank holds some channels, of unequal size, and the mean runs over those of all."""
    x, gate, weight = inputs(5, dtype)
    x = (x * torch.linspace(0.1, 3, CHANNELS, device=DEVICE)).to(dtype)
    parts = [t.chunk(ranks, -1) for t in (x, gate, weight)]
    sums: list[torch.Tensor] = []

    def collect(partial: torch.Tensor) -> torch.Tensor:
        assert partial.shape == (5, 1)
        assert partial.dtype == torch.float32
        sums.append(partial)
        return partial

    for part in zip(*parts, strict=True):
        gated_rms_norm(*part, EPS, CHANNELS, collect)
    total = torch.stack(sums).sum(0)
    y = torch.cat([gated_rms_norm(*part, EPS, CHANNELS, lambda _: total) for part in zip(*parts, strict=True)], -1)
    exact = gated_rms_norm_reference(x.double(), gate.double(), weight.double(), EPS)
    assert_precise(y, exact, gated_rms_norm_reference(x, gate, weight, EPS), "y")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
def test_the_division_may_follow_a_linear_map(tokens: int, dtype: torch.dtype) -> None:
    x, gate, weight = inputs(tokens, dtype)
    map_ = randn(4, CHANNELS, 32, dtype=dtype, scale=0.1)
    out = inside(torch.full((tokens, CHANNELS + 6), float("nan"), dtype=dtype, device=DEVICE))
    gate_for_later(inside(x), inside(gate), weight, out)
    y = divide_later(out[:, :CHANNELS] @ map_, Division(out[:, CHANNELS:], CHANNELS, EPS), alone)
    assert y.dtype == dtype
    exact = gated_rms_norm_reference(x.double(), gate.double(), weight.double(), EPS) @ map_.double()
    plain = gated_rms_norm_reference(x, gate, weight, EPS) @ map_
    for t in range(tokens):
        assert_precise(y[t], exact[t], plain[t], f"token {t}")


def test_columns_that_do_not_fit_are_refused() -> None:
    x, gate, weight = inputs(2, torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        gate_for_later(x, gate, weight, torch.empty(2, CHANNELS + 1, device=DEVICE))


def test_a_row_of_zeros_stays_zero() -> None:
    """A padded row must not become NaN."""
    x, gate, weight = inputs(2, torch.float32)
    y = gated_rms_norm(0 * x, gate, weight, EPS, CHANNELS, alone)
    assert torch.equal(y, torch.zeros_like(y))


def test_large_bf16_values_do_not_overflow_their_squares() -> None:
    x, gate, weight = inputs(2, torch.bfloat16)
    y = gated_rms_norm(1e15 * x, gate, weight, EPS, CHANNELS, alone)
    exact = gated_rms_norm_reference(1e15 * x.double(), gate.double(), weight.double(), EPS)
    plain = gated_rms_norm_reference(x, gate, weight, EPS)
    assert_precise(y, exact, plain, "y")


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_reference_is_transformers_norm(eps: float) -> None:
    """Transformers computes in fp32: its distance from the fp64 reference is that of plain fp32 code."""
    x, gate, weight = inputs(7, torch.float32)
    norm = BambaRMSNormGated(CHANNELS, eps).to(DEVICE)
    norm.weight.data.copy_(weight)
    exact = gated_rms_norm_reference(x.double(), gate.double(), weight.double(), eps)
    assert_precise(norm(x, gate).detach(), exact, gated_rms_norm_reference(x, gate, weight, eps), "y")
