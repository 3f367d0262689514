"""The norm of a sum against its fp64 reference."""

import pytest
import torch
from helpers import DEVICE, DTYPES, assert_precise, randn

from vllm_bamba.ops.add_rms_norm import add_rms_norm
from vllm_bamba.ops.add_rms_norm.reference import add_rms_norm_reference
from vllm_bamba.ops.gated_norm import Division

CHANNELS, EPS = 96, 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [0, 1, 12])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_norm_is_the_reference(tokens: int, parts: int, dtype: torch.dtype) -> None:
    """With and without the division of another norm, whose sums are columns of something wider."""
    y, residual = (randn(seed, tokens, CHANNELS, dtype=dtype, scale=2.0) for seed in (1, 2))
    weight, division = 1 + 0.3 * randn(3, CHANNELS, dtype=dtype), None
    if parts:
        wide = torch.full((tokens, parts + 3), float("nan"), dtype=dtype, device=DEVICE)
        wide[:, :parts] = (1 + randn(4, tokens, parts)).square()
        division = Division(wide[:, :parts], 20, 0.1)
    total, normed = add_rms_norm(y, residual, weight, EPS, division)
    assert total.shape == normed.shape == y.shape
    assert total.dtype == normed.dtype == dtype
    exact_division = division and division._replace(sums=division.sums.double())
    exact = add_rms_norm_reference(y.double(), residual.double(), weight.double(), EPS, exact_division)
    plain = add_rms_norm_reference(y, residual, weight, EPS, division)
    for t in range(tokens):
        assert_precise(total[t], exact[0][t], plain[0][t], f"sum of token {t}")
        assert_precise(normed[t], exact[1][t], plain[1][t], f"token {t}")


def test_a_row_of_zeros_stays_zero() -> None:
    """A padded row must not become NaN."""
    y = torch.zeros(2, CHANNELS, device=DEVICE)
    division = Division(torch.zeros(2, 4, device=DEVICE), 20, EPS)
    for made in add_rms_norm(y, y, y[0] + 1, EPS, division):
        assert torch.equal(made, y)


def test_shapes_that_do_not_fit_are_refused() -> None:
    y, weight = randn(1, 2, CHANNELS), randn(2, CHANNELS)
    for residual, norm in [(y[:1], weight), (y, weight[1:]), (randn(1, CHANNELS, 2).t(), weight)]:
        with pytest.raises(ValueError, match="do not fit"):
            add_rms_norm(y, residual, norm, EPS)
    for sums in (y[:1], randn(3, 4, 2).t()):
        with pytest.raises(ValueError, match="must have 2 rows, each without gaps"):
            add_rms_norm(y, y, weight, EPS, Division(sums, 20, EPS))
