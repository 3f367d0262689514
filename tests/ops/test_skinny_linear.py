"""The product of few rows against its fp64 reference."""

from dataclasses import replace

import pytest
import torch
from helpers import DEVICE, assert_precise, randn
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_bamba.ops.skinny_linear import skinny_linear
from vllm_bamba.ops.skinny_linear.reference import skinny_linear_reference
from vllm_bamba.ops.skinny_linear.tuning import H100, H200, Launch, Tuning, tuning_for

LAUNCHES = [
    Launch(rows=16, columns=32, depth=64, num_stages=2, num_warps=2),
    Launch(rows=32, columns=64, depth=128, num_stages=3, num_warps=4),
]
DESCRIBED = [replace(launch, described=True) for launch in LAUNCHES]
both_ways = pytest.mark.parametrize("launches", [LAUNCHES, DESCRIBED], ids=["pointers", "described"])


def check(x: torch.Tensor, weight: torch.Tensor, launches: list[Launch]) -> torch.Tensor:
    y = skinny_linear(x, weight, launches)
    assert y.shape == (len(x), len(weight))
    assert y.dtype == x.dtype
    exact = skinny_linear_reference(x.double(), weight.double())
    plain = skinny_linear_reference(x, weight)
    for row in range(len(x)):
        assert_precise(y[row], exact[row], plain[row], f"row {row}")
    return y


@both_ways
@pytest.mark.parametrize("columns", [1, 32, 100])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32])
def test_product_is_the_reference(rows: int, columns: int, launches: list[Launch]) -> None:
    x, weight = randn(1, rows, 256, dtype=torch.bfloat16), randn(2, columns, 256, dtype=torch.bfloat16)
    check(x, weight, launches)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("gap", [8, 3])
@pytest.mark.parametrize("weight_at", [0, 1])
def test_rows_are_parts_of_longer_ones(gap: int, rows: int, weight_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows do not lie at multiples of 16 bytes no descriptor can describe them, but for a single one."""
    made = []
    monkeypatch.setattr(
        "vllm_bamba.ops.skinny_linear.TensorDescriptor", lambda *args: made.append(1) or TensorDescriptor(*args)
    )
    x, memory = randn(1, rows, 128, dtype=torch.bfloat16), randn(2, 48 * 128 + 1, dtype=torch.bfloat16)
    weight = memory[weight_at : weight_at + 48 * 128].view(48, 128)
    wide = torch.full((rows, 128 + gap), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    wide[:, :128] = x
    y = check(wide[:, :128], weight, DESCRIBED)
    assert len(made) == (2 if (gap == 8 or rows == 1) and weight_at == 0 else 0)
    assert torch.equal(y, skinny_linear(x, weight, LAUNCHES))


@both_ways
def test_rows_do_not_depend_on_each_other(launches: list[Launch]) -> None:
    """Nor do rows that are not there change anything."""
    x, weight = randn(1, 9, 128, dtype=torch.bfloat16), randn(2, 48, 128, dtype=torch.bfloat16)
    together = skinny_linear(x, weight, launches)
    x[4:] = float("nan")
    assert torch.equal(skinny_linear(x, weight, launches)[:4], together[:4])
    assert torch.equal(skinny_linear(x[:4], weight, launches), together[:4])


@pytest.mark.parametrize("rows", [0, 33])
def test_other_numbers_of_rows_go_to_pytorch(rows: int) -> None:
    x, weight = randn(1, rows, 128, dtype=torch.bfloat16), randn(2, 48, 128, dtype=torch.bfloat16)
    assert torch.equal(skinny_linear(x, weight, LAUNCHES), torch.nn.functional.linear(x, weight))


def test_what_no_launch_serves_goes_to_pytorch() -> None:
    """A sum that no depth divides, weights with gaps or turned, another dtype."""
    x = randn(1, 3, 96, dtype=torch.bfloat16)
    wide, turned = randn(2, 48, 192, dtype=torch.bfloat16), randn(3, 96, 48, dtype=torch.bfloat16)
    for given, weight in [(x, wide[:, :96].contiguous()), (x[:, :64], wide[:, :64]), (x, turned.t())]:
        assert torch.equal(skinny_linear(given, weight, LAUNCHES), torch.nn.functional.linear(given, weight))
    given, weight = randn(1, 3, 128), randn(2, 48, 128)
    assert torch.equal(skinny_linear(given, weight, LAUNCHES), torch.nn.functional.linear(given, weight))


def test_what_does_not_fit_is_refused() -> None:
    x, weight = randn(1, 3, 64, dtype=torch.bfloat16), randn(2, 48, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"x \(3, 64\) of torch.bfloat16 and weight \(48, 128\)"):
        skinny_linear(x, weight)
    with pytest.raises(ValueError, match="do not fit"):
        skinny_linear(x.float(), weight[:, :64])


def test_tables_are_of_a_gpu_and_its_memory() -> None:
    assert tuning_for((9, 0), "NVIDIA H200") is H200
    assert tuning_for((9, 0), "NVIDIA GH200 480GB") is H200
    assert tuning_for((9, 0), "NVIDIA H100 80GB HBM3") is H100
    assert tuning_for((9, 0), "NVIDIA H800") is H100
    for name in ("NVIDIA H20", "NVIDIA H100 NVL"):
        assert tuning_for((9, 0), name) is None
    assert tuning_for((10, 0), "NVIDIA B200") is None


@pytest.mark.parametrize("tuning", [H100, H200], ids=["H100", "H200"])
def test_tables_are_in_ascending_order(tuning) -> None:
    for launches in (tuning.few, tuning.many):
        assert [o.rows for o in launches] == sorted({o.rows for o in launches})


@pytest.mark.gpu
@pytest.mark.parametrize("tuning", [H100, H200], ids=["H100", "H200"])
@pytest.mark.parametrize("rows", [1, 8, 16, 32, 33, 64])
@pytest.mark.parametrize(
    ("columns", "depth"),
    [
        *((16768, 4096), (4096, 8192), (28672, 4096), (4096, 14336), (6144, 4096)),
        *((8512, 4096), (1288, 4096), (32064, 4096), (4096, 896)),  # of 2, 16, 4 and 16 ranks
    ],
)
def test_full_shapes(rows: int, columns: int, depth: int, tuning: Tuning) -> None:
    """Bamba-9B's, with the launches of each table: precise, and bitwise the same every time."""
    generator = torch.Generator(DEVICE).manual_seed(rows)
    wide, weight = (torch.randn(n, depth, device=DEVICE, generator=generator).bfloat16() for n in (rows, columns))
    x, launches = torch.nn.functional.pad(wide, (0, 256))[:, :depth], tuning.launches(columns, depth)
    first = skinny_linear(x, weight, launches)
    exact = skinny_linear_reference(x.double(), weight.double())
    plain = skinny_linear_reference(x, weight)
    for row in range(rows):
        assert_precise(first[row], exact[row], plain[row], f"row {row}")
    for _ in range(20):
        assert torch.equal(skinny_linear(x, weight, launches), first)
