"""What the metadata's builder says of states inside of prefills; vLLM's own rule for them without slots is vLLM's."""

from types import SimpleNamespace

import pytest
import torch

from vllm_bamba import state_metadata
from vllm_bamba.state_metadata import InnerStateBuilder, InnerStateMetadata

UNIT = 16
TABLE = torch.arange(1, 1 + 4 * 30, dtype=torch.int32).view(4, 30)  # block of each unit of each of four requests


def build(rows: dict[int, tuple[int, int]], hash_block_size: int | None = 8) -> InnerStateMetadata | None:
    """Of a batch of `rows`, request -> tokens before and new ones; those with one new token decode and come first."""
    cache = SimpleNamespace(hash_block_size=hash_block_size)
    builder = InnerStateBuilder(SimpleNamespace(cache_config=cache), SimpleNamespace(block_size=UNIT))
    new = torch.tensor([0] + [tokens for _, tokens in rows.values()]).cumsum(0)
    batch = SimpleNamespace(
        query_start_loc=new,
        query_start_loc_cpu=new,
        seq_lens_cpu_upper_bound=torch.tensor([before + tokens for before, tokens in rows.values()]),
        block_table_tensor=TABLE[list(rows)],
    )
    return builder.build(batch, [row for row, (_, tokens) in enumerate(rows.values()) if tokens > 1])


@pytest.fixture(autouse=True)
def with_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_metadata, "active", lambda config: True)


def test_each_prefill_keeps_its_last_unit_in_the_block_of_that_unit() -> None:
    made = build({0: (40, 1), 2: (0, 50), 1: (32, 30), 3: (33, 20)})
    assert made is not None
    assert made.offsets == [48, 16, 0]  # the last one starts inside of the unit before its last
    assert made.state_indices.tolist() == [TABLE[2, 2], TABLE[1, 2], 0]
    assert made.lengths.tolist() == [48, 48, 33]
    assert made.inputs.tolist()[:2] == [[45, 46, 47], [63, 64, 65]]  # of the batch's prefill tokens


def test_another_group_of_layers_has_blocks_of_its_own() -> None:
    made = build({2: (0, 50), 3: (33, 20)})
    assert made is not None
    other = made.regather_state_indices(TABLE[[2, 3]] + 500)
    assert other.state_indices.tolist() == [TABLE[2, 2] + 500, 0]
    assert other.inputs is made.inputs


@pytest.mark.parametrize("rows", [{0: (0, 16)}, {0: (33, 15)}, {0: (16, 16), 1: (40, 8)}])
def test_where_no_prefill_passes_a_unit_nothing_is_kept(rows: dict[int, tuple[int, int]]) -> None:
    assert build(rows) is None


def test_while_memory_is_profiled_nothing_is_kept() -> None:
    assert build({0: (0, 50)}, hash_block_size=None) is None
