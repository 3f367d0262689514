"""The product of few rows against its fp64 reference."""

from dataclasses import replace

import pytest
import torch
from helpers import DEVICE, assert_precise, randn
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_bamba.ops.gated_norm import Division
from vllm_bamba.ops.skinny_linear import added_linear, divided_linear, divided_warm_ups, skinny_linear
from vllm_bamba.ops.skinny_linear.reference import divided_linear_reference, skinny_linear_reference
from vllm_bamba.ops.skinny_linear.tuning import H100, H200, Launch, Tuning, fitting, tuning_for

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


def division_of(rows: int, parts: int, dtype: torch.dtype) -> Division | None:
    """Sums that are columns of something wider, of rows of very different size; None without columns."""
    if not parts:
        return None
    wide = torch.full((rows, parts + 8), float("nan"), device=DEVICE)
    wide[:, :parts] = (1 + randn(7, rows, parts)).square() * 10.0 ** (torch.arange(rows, device=DEVICE) % 5)[:, None]
    return Division(wide.to(dtype)[:, :parts], 96, 1e-5)


def double(division: Division | None) -> Division | None:
    return division and division._replace(sums=division.sums.double())


@both_ways
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("parts", "dtype"), [(0, None), (1, torch.float32), (128, torch.float32), (12, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize(("rows", "columns"), [(1, 100), (5, 64), (32, 32)])
def test_rows_are_divided_behind_the_map(rows, columns, parts, dtype, gated, launches) -> None:
    x, division = randn(1, rows, 256, dtype=torch.bfloat16), division_of(rows, parts, dtype)
    weight = randn(2, columns * (1 + gated), 256, dtype=torch.bfloat16, scale=0.1)
    y = divided_linear(x, division, weight, launches, gated)
    assert y.shape == (rows, columns)
    exact = divided_linear_reference(x.double(), double(division), weight.double(), gated)
    plain = divided_linear_reference(x, division, weight, gated)
    for row in range(rows):
        assert_precise(y[row], exact[row], plain[row], f"row {row}")


@both_ways
@pytest.mark.parametrize("divided", [False, True], ids=["whole", "divided"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 100), (5, 64), (32, 32), (17, 33)])
def test_a_residual_is_added_and_weighted(rows: int, columns: int, divided: bool, launches: list[Launch]) -> None:
    """What is left of the norm, the division, is what `squares` says."""
    x, weight = randn(1, rows, 256, dtype=torch.bfloat16), randn(2, columns, 256, dtype=torch.bfloat16, scale=0.1)
    residual, norm = randn(3, rows, columns, dtype=torch.bfloat16), 1 + randn(4, columns, dtype=torch.bfloat16)
    division = division_of(rows, 12, torch.bfloat16) if divided else None
    total, weighted, squares = added_linear(x, weight, residual, norm, launches, division)
    exact = divided_linear_reference(x.double(), double(division), weight.double()) + residual.double()
    plain = divided_linear_reference(x, division, weight) + residual
    for row in range(rows):
        assert_precise(total[row], exact[row], plain[row], f"row {row}")
    assert_precise(weighted, total.double() * norm.double(), total * norm, "weighted")
    assert squares.shape == (rows, -(-columns // 32))
    assert_precise(squares.sum(-1), total.double().square().sum(-1), total.float().square().sum(-1), "squares")


@both_ways
def test_maps_with_surroundings_keep_rows_apart(launches: list[Launch]) -> None:
    """A row of NaN, or of zeros, stays where it is."""
    x, weight = randn(1, 9, 128, dtype=torch.bfloat16), randn(2, 64, 128, dtype=torch.bfloat16)
    residual, norm = randn(3, 9, 64, dtype=torch.bfloat16), randn(4, 64, dtype=torch.bfloat16)
    division = division_of(9, 3, torch.float32)
    together = divided_linear(x, division, weight, launches, gated=True)
    sums = added_linear(x, weight, residual, norm, launches, division)
    x[4:6], division.sums[5:7] = float("nan"), float("nan")
    x[8] = 0
    division.sums[8] = 0
    apart, others = divided_linear(x, division, weight, launches, gated=True), [0, 1, 2, 3, 7]
    assert torch.equal(apart[others], together[others])
    assert torch.equal(apart[8], torch.zeros_like(apart[8]))
    for one, other in zip(added_linear(x, weight, residual, norm, launches, division), sums, strict=True):
        assert torch.equal(one[others], other[others])


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


def test_surroundings_that_do_not_fit_are_refused() -> None:
    x, weight = randn(1, 3, 64, dtype=torch.bfloat16), randn(2, 48, 64, dtype=torch.bfloat16)
    residual, norm = randn(3, 3, 48, dtype=torch.bfloat16), randn(4, 48, dtype=torch.bfloat16)
    for other in (residual[:, 1:], residual.t().contiguous().t()):
        with pytest.raises(ValueError, match=r"residual .* and norm \(48,\) do not fit, or have gaps"):
            added_linear(x, weight, other, norm, LAUNCHES)
    for other in (norm[1:], norm.repeat(2)[::2]):
        with pytest.raises(ValueError, match="do not fit, or have gaps"):
            added_linear(x, weight, residual, other, LAUNCHES)
    for given, wide in [
        (x.t().contiguous().t(), weight),
        (x, weight.t().contiguous().t()),
        (x.float(), weight.float()),
    ]:
        with pytest.raises(ValueError, match="must be of bfloat16, rows and weights without gaps"):
            divided_linear(given, division_of(3, 2, torch.float32), wide, LAUNCHES)
    for sums in (residual[:2], residual.t().contiguous().t()):
        with pytest.raises(ValueError, match="must have 3 rows, each without gaps"):
            divided_linear(x, Division(sums, 1, 1.0), weight, LAUNCHES)
    with pytest.raises(ValueError, match="is served by none of"):
        added_linear(x, weight, residual, norm, LAUNCHES[:0])
    with pytest.raises(ValueError, match="is served by none of"):
        divided_linear(x.repeat(11, 1), division_of(33, 2, torch.float32), weight, LAUNCHES)


def test_tables_are_of_a_gpu_and_its_memory() -> None:
    assert tuning_for((9, 0), "NVIDIA H200") is H200
    assert tuning_for((9, 0), "NVIDIA H100 80GB HBM3") is H100
    assert tuning_for((9, 0), "NVIDIA H800") is H100
    for name in ("NVIDIA H20", "NVIDIA H100 NVL", "NVIDIA H100 PCIe", "NVIDIA H800 PCIe", "NVIDIA GH200 480GB"):
        assert tuning_for((9, 0), name) is None
    assert tuning_for((10, 0), "NVIDIA B200") is None


@pytest.mark.parametrize("tuning", [H100, H200], ids=["H100", "H200"])
def test_tables_are_in_ascending_order(tuning) -> None:
    for launches in (tuning.few, tuning.many, tuning.gated):
        assert [o.rows for o in launches] == sorted({o.rows for o in launches})
        # a weight that has any launch has one for all rows that a stream takes for few
        assert (launches[-1].rows, launches[-1].depth) == (tuning.rows, 128)
        assert all(o.depth % 128 == 0 for o in launches)
    assert all(o.rows > tuning.rows for o in tuning.gated_whole)


@pytest.mark.parametrize("tuning", [H100, H200], ids=["H100", "H200"])
def test_a_depth_that_some_launches_do_not_divide_is_served_by_the_others(tuning: Tuning) -> None:
    for depth in (384, 640, 1152):
        launches = fitting(tuning.gated, depth)
        assert launches[-1].rows == tuning.rows
        assert len(launches) < len(tuning.gated)
        for launch in launches:
            assert depth % launch.depth == 0
    x, division = randn(1, 3, 384, dtype=torch.bfloat16), division_of(3, 12, torch.float32)
    weight = randn(2, 64, 384, dtype=torch.bfloat16, scale=0.1)
    calls = divided_warm_ups(weight, 12, tuning.gated, gated=True)
    assert len(calls) == len(fitting(tuning.gated, 384))
    for call in calls:
        call()
    y = divided_linear(x, division, weight, tuning.gated, gated=True)
    exact = divided_linear_reference(x.double(), double(division), weight.double(), gated=True)
    assert_precise(y, exact, divided_linear_reference(x, division, weight, gated=True), "gated")


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


@pytest.mark.gpu
@pytest.mark.parametrize("tuning", [H100, H200], ids=["H100", "H200"])
@pytest.mark.parametrize(
    ("columns", "depth", "kind", "rows"),
    [
        (*shape, rows)
        for rows in (1, 8, 16, 32, 33, 64)
        for shape in (
            (16768, 4096, "divided"), (6144, 4096, "divided"), (28672, 4096, "gated and divided"),
            (4096, 8192, "added and divided"), (4096, 14336, "added"),
        )
    ] + [(28672, 4096, "gated", rows) for rows in (65, 97, 128)],
)  # fmt: skip
def test_full_shapes_with_surroundings(rows: int, columns: int, depth: int, kind: str, tuning: Tuning) -> None:
    """The same of maps with what stands around them, as they are in a layer."""
    if kind == "gated" and not tuning.gated_whole:
        pytest.skip("its table leaves so many rows to PyTorch")
    generator = torch.Generator(DEVICE).manual_seed(rows)
    wide = torch.randn(rows, depth + 256, device=DEVICE, generator=generator).bfloat16().abs()
    weight = (torch.randn(columns, depth, device=DEVICE, generator=generator) / depth**0.5).bfloat16()
    residual = torch.randn(rows, columns, device=DEVICE, generator=generator).bfloat16()
    x, norm, gated = wide[:, :depth], residual[0].contiguous(), "gated" in kind
    division = Division(wide[:, depth:], 256, 1e-5) if "divided" in kind else None
    launches = tuning.launches(columns, depth)
    if gated:
        launches = [*tuning.gated] if division else [*tuning.gated_whole]

    def run() -> tuple[torch.Tensor, ...]:
        if "added" in kind:
            return added_linear(x, weight, residual, norm, launches, division)
        return (divided_linear(x, division, weight, launches, gated),)

    first = run()
    exact = divided_linear_reference(x.double(), double(division), weight.double(), gated)
    plain = divided_linear_reference(x, division, weight, gated)
    if "added" in kind:
        exact, plain = exact + residual.double(), plain + residual
        assert_precise(first[1], first[0].double() * norm.double(), first[0] * norm, "weighted")
        squares = first[0].double().square().sum(-1)
        assert_precise(first[2].sum(-1), squares, squares.float(), "squares")
    for row in range(rows):
        assert_precise(first[0][row], exact[row], plain[row], f"row {row}")
    for _ in range(20):
        assert all(torch.equal(one, other) for one, other in zip(run(), first, strict=True))
