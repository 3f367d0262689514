"""Every row of the mixer goes to the rank whose heads need it: plain integers, checked against plain loops."""

import collections
import itertools

import pytest

from vllm_bamba.sharding import MixerShard, check_tensor_parallel, scaled

# heads, head_dim, groups, state, ranks
CASES = [
    (8, 2, 1, 3, 1),
    (8, 2, 1, 3, 2),
    (8, 2, 1, 3, 8),
    (8, 2, 2, 3, 1),
    (8, 2, 2, 3, 2),
    (8, 2, 2, 3, 4),
    (8, 2, 2, 3, 8),
    (8, 3, 4, 2, 2),
    (8, 3, 4, 2, 8),
    (8, 3, 8, 2, 4),
    (12, 2, 3, 2, 3),
    (12, 2, 3, 2, 6),
    (12, 2, 6, 1, 3),
    (128, 64, 1, 128, 4),
    (128, 64, 8, 128, 16),
]


def shards(case: tuple[int, int, int, int, int]) -> list[MixerShard]:
    *sizes, ranks = case
    return [MixerShard(*sizes, size=ranks, rank=rank) for rank in range(ranks)]


def wanted(shard: MixerShard) -> dict[str, list[int]]:
    """The checkpoint's in_proj rows that a rank needs, found by going through its heads one by one."""
    heads_of_rank = [h for h in range(shard.heads) if h * shard.size // shard.heads == shard.rank]
    groups = sorted({h // (shard.heads // shard.groups) for h in heads_of_rank})
    inner, bc = shard.heads * shard.head_dim, shard.groups * shard.state
    channels = [h * shard.head_dim + c for h in heads_of_rank for c in range(shard.head_dim)]
    of_groups = [g * shard.state + n for g in groups for n in range(shard.state)]
    return {
        "gate": channels,
        "x": [inner + c for c in channels],
        "B": [2 * inner + c for c in of_groups],
        "C": [2 * inner + bc + c for c in of_groups],
        "dt": [2 * inner + 2 * bc + h for h in heads_of_rank],
    }


def dealt(shard: MixerShard) -> dict[str, list[int]]:
    """What vLLM's MergedColumnParallelLinear makes of `in_proj_sources`: each part is dealt out evenly."""
    rows = list(itertools.chain(*shard.in_proj_sources))
    assert len(rows) == sum(shard.in_proj_sizes)
    parts, start = {}, 0
    for name, size in zip(("gate", "x", "B", "C", "dt"), shard.in_proj_sizes, strict=True):
        assert size % shard.size == 0, f"vLLM cannot deal {size} rows of {name} to {shard.size} ranks"
        share = size // shard.size
        first = start + shard.rank * share
        parts[name] = rows[first : first + share]
        start += size
    return parts


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_rank_gets_its_heads_and_exactly_the_groups_of_its_heads(case: tuple[int, int, int, int, int]) -> None:
    for shard in shards(case):
        assert dealt(shard) == wanted(shard), f"rank {shard.rank}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_ranks_together_hold_every_row_and_none_twice_but_b_and_c(case: tuple[int, int, int, int, int]) -> None:
    heads, head_dim, groups, state, ranks = case
    holders = collections.Counter(itertools.chain(*(row for shard in shards(case) for row in dealt(shard).values())))
    inner, bc = heads * head_dim, groups * state
    copied = range(2 * inner, 2 * inner + 2 * bc)
    copies = max(1, ranks // groups)
    assert holders == {row: copies if row in copied else 1 for row in range(2 * inner + 2 * bc + heads)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution_holds_the_rows_of_in_projs_x_b_and_c(case: tuple[int, int, int, int, int]) -> None:
    """The convolution's checkpoint rows are x | B | C: in_proj's without the gate before them."""
    for shard in shards(case):
        parts, inner = dealt(shard), shard.heads * shard.head_dim
        expected = [row - inner for name in ("x", "B", "C") for row in parts[name]]
        assert list(itertools.chain(*shard.conv_rows)) == expected
        assert shard.local_conv_channels == len(expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_per_head_and_per_channel_rows_go_with_the_heads(case: tuple[int, int, int, int, int]) -> None:
    """A, D and dt_bias by head; the norm's weight by channel of the gate."""
    for shard in shards(case):
        parts, before_dt = dealt(shard), sum(map(len, shard.in_proj_sources)) - shard.heads
        assert list(shard.intermediate_rows) == parts["gate"]
        copied = 2 * (shard.copies - 1) * shard.groups * shard.state
        assert [before_dt - copied + head for head in shard.head_rows] == parts["dt"]
        assert (shard.local_heads, shard.local_intermediate) == (len(parts["dt"]), len(parts["x"]))
        assert shard.local_bc == len(parts["B"]) == len(parts["C"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_local_heads_find_their_group_by_their_local_number(case: tuple[int, int, int, int, int]) -> None:
    """A kernel takes group `head // (local_heads / local_groups)`: that must be the head's group in the whole model."""
    for shard in shards(case):
        assert shard.local_heads % shard.local_groups == 0
        per_group = shard.local_heads // shard.local_groups
        first_b = 2 * shard.heads * shard.head_dim
        groups_held = [(row - first_b) // shard.state for row in dealt(shard)["B"][:: shard.state]]
        for local, head in enumerate(shard.head_rows):
            assert groups_held[local // per_group] == head // (shard.heads // shard.groups)


@pytest.mark.parametrize(
    ("field", "sizes"),
    [
        ("mamba_n_heads", {"mamba_heads": 6}),
        ("num_attention_heads", {"attention_heads": 2}),
        ("mamba_n_groups", {"mamba_heads": 12, "mamba_groups": 6}),
        ("num_key_value_heads", {"attention_heads": 24, "key_value_heads": 6}),
        ("intermediate_size", {"intermediate_size": 30}),
    ],
)
def test_a_size_that_cannot_be_is_refused_by_field_with_those_that_can(field: str, sizes: dict[str, int]) -> None:
    model = {"mamba_heads": 8, "mamba_groups": 1, "attention_heads": 8, "key_value_heads": 2} | sizes
    model.setdefault("intermediate_size", 48)
    with pytest.raises(ValueError, match=rf"tensor_parallel_size = 4 .*\b{field} = ") as error:
        check_tensor_parallel(4, **model)
    offered = error.value.args[0].split("Possible sizes: [")[1].removesuffix("].").split(", ")
    assert "1" in offered
    for size in range(1, 25):
        if str(size) in offered:
            check_tensor_parallel(size, **model)
        else:
            with pytest.raises(ValueError, match="Possible sizes"):
                check_tensor_parallel(size, **model)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_bamba_9b_runs_on_every_power_of_two_up_to_its_attention_heads(size: int) -> None:
    check_tensor_parallel(
        size, mamba_heads=128, mamba_groups=1, attention_heads=32, key_value_heads=8, intermediate_size=14336
    )


def test_block_scales_follow_their_rows() -> None:
    assert scaled([range(256), range(128, 256), range(512, 640)], 128) == [range(2), range(1, 2), range(4, 5)]


@pytest.mark.parametrize("rows", [[range(100)], [range(64, 256)]], ids=["end", "start"])
def test_a_block_that_crosses_a_border_is_refused(rows: list[range]) -> None:
    with pytest.raises(ValueError, match=r"blocks of 128 rows.*tensor_parallel_size"):
        scaled(rows, 128)
