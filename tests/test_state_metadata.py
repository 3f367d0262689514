"""What the metadata's builder says of decodes, and of states inside of prefills (without slots vLLM says it)."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import MambaSpec

from vllm_bamba import state_metadata
from vllm_bamba.prefill_graphs import MOST, Run, ShortPrefills
from vllm_bamba.state import plan_batch
from vllm_bamba.state_metadata import InnerStateBuilder, InnerStateMetadata, StateMetadata, StateMetadataBuilder

UNIT = 16
TABLE = torch.arange(1, 1 + 4 * 30, dtype=torch.int32).view(4, 30)  # block of each unit of each of four requests


def build(rows: dict[int, tuple[int, int]], hash_block_size: int | None = 8) -> InnerStateMetadata | None:
    """Of a batch of `rows`, request -> tokens before and new ones; those with one new token decode and come first."""
    cache = SimpleNamespace(hash_block_size=hash_block_size)
    builder = InnerStateBuilder(
        SimpleNamespace(cache_config=cache, speculative_config=None), SimpleNamespace(block_size=UNIT)
    )
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


class TestForGraphs:
    """What graphs read: of a second group of layers against what vLLM's builder makes of the same."""

    DECODES = ((1, 1), (UNIT, 1), (UNIT + 1, 1), (0, 0))  # tokens of each sequence, and new ones; the last row pads

    def builder(
        self,
        kind: type[Mamba2AttentionMetadataBuilder],
        mode: str,
        largest: int = 8,
        graphs: str = "FULL_DECODE_ONLY",
        drafts: int = 0,
        layer: SimpleNamespace | None = None,
        hash_block_size: int | None = None,
    ) -> Mamba2AttentionMetadataBuilder:
        compilation = SimpleNamespace(
            max_cudagraph_capture_size=largest,
            cudagraph_mode=CUDAGraphMode[graphs],
            static_forward_context={"layer": layer or SimpleNamespace(wants_graphs=False)},
        )
        speculative = SimpleNamespace(
            num_speculative_tokens=drafts, parallel_drafting=False, use_eagle_block_drop=lambda: False
        )
        config = SimpleNamespace(
            speculative_config=speculative if drafts else None,
            compilation_config=compilation,
            num_speculative_tokens=drafts,
            scheduler_config=SimpleNamespace(max_num_seqs=8),
            cache_config=SimpleNamespace(
                use_replayssm=False,
                replayssm_buffer_len=0,
                mamba_cache_mode=mode,
                hash_block_size=hash_block_size,
            ),
            mamba_config=SimpleNamespace(backend=None),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            use_v2_model_runner=True,
            model_config=SimpleNamespace(get_mamba_chunk_size=lambda: 256),
        )
        spec = MambaSpec(block_size=UNIT, shapes=((1,),), dtypes=(torch.float32,))
        return kind(spec, ["layer"], config, torch.device("cpu"))

    def batch(self, table: torch.Tensor, rows: tuple[tuple[int, int], ...]) -> CommonAttentionMetadata:
        lengths = torch.tensor([tokens for tokens, _ in rows], dtype=torch.int32)
        new = torch.tensor([0] + [tokens for _, tokens in rows], dtype=torch.int32)
        starts = new.cumsum(0, dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=lengths,
            seq_lens_cpu_upper_bound=lengths,
            max_seq_len=int(lengths.max()),
            num_reqs=len(rows),
            num_actual_tokens=int(new.sum()),
            max_query_len=int(new.max()),
            block_table_tensor=table,
            slot_mapping=torch.zeros(len(rows), dtype=torch.int64),
            is_prefilling=new[1:] > 1,
        )

    def of_two_groups(
        self, mode: str, rows: tuple[tuple[int, int], ...], **graphs: object
    ) -> dict[str, list[tuple[StateMetadata, bool]]]:
        """By vLLM's builder and ours: metadata of the first and of the second group, and if graphs find its slots."""
        columns = 1 if mode == "none" else TABLE.shape[1]
        table = torch.where(torch.tensor([tokens for tokens, _ in rows]).unsqueeze(1) > 0, TABLE, 0)[:, :columns]
        made: dict[str, list[tuple[StateMetadata, bool]]] = {}
        for name, kind in (("vllm", Mamba2AttentionMetadataBuilder), ("ours", StateMetadataBuilder)):
            first, second = (self.builder(kind, mode, **graphs) for _ in range(2))  # type: ignore[arg-type]
            of_first = first.build(0, self.batch(table, rows))
            of_second = second.update_block_table(of_first, table + 500, torch.zeros(0))
            made[name] = [
                (of_group, of_group.state_indices_tensor_d.data_ptr() == builder.state_indices_tensor_d.data_ptr())
                for builder, of_group in ((first, of_first), (second, of_second))
            ]
        return made

    @pytest.mark.parametrize("mode", ["none", "align"])
    @pytest.mark.parametrize(
        ("rows", "graphs", "fetched"),
        [
            (DECODES, {}, True),
            (DECODES, {"largest": 3}, False),
            (DECODES, {"graphs": "PIECEWISE"}, False),
            ((*DECODES[:3], (20, 5)), {}, False),
        ],
        ids=["decodes", "more than graphs take", "no graphs of whole steps", "a prefill among them"],
    )
    def test_slots_of_decodes_stand_where_vllm_puts_them(
        self, mode: str, rows: tuple[tuple[int, int], ...], graphs: dict[str, object], fetched: bool
    ) -> None:
        made = self.of_two_groups(mode, rows, **graphs)
        for (theirs, of_graphs), (mine, of_ours) in zip(made["vllm"], made["ours"], strict=True):
            assert of_ours == of_graphs == fetched
            assert mine.state_indices_tensor_d.tolist() == theirs.state_indices_tensor_d.tolist()
            assert mine.state_indices_tensor_p.tolist() == theirs.state_indices_tensor_p.tolist()
            assert (mine.num_decodes, mine.num_prefills) == (theirs.num_decodes, theirs.num_prefills)
            assert torch.equal(mine.seq_lens, theirs.seq_lens)
            assert (mine.slot_columns is not None) == fetched
        first, second = (of_group.state_indices_tensor_d.tolist() for of_group, _ in made["ours"])
        assert first != second

    def test_with_drafts_each_sequence_has_one_slot_and_any_number_of_tokens(self) -> None:
        """What the fused step reads, where a graph looks that was captured with as many tokens as there can be."""
        builder = self.builder(StateMetadataBuilder, "none", drafts=2)
        table = TABLE[:, :1].clone()
        table[3] = 0
        full, real = (
            self.batch(table, rows).replace(is_prefilling=torch.zeros(4, dtype=torch.bool))
            for rows in (((7, 3),) * 4, ((7, 3), (9, 1), (20, 2), (0, 0)))  # the last row pads
        )
        captured, _ = plan_batch(builder.build_for_cudagraph_capture(full))
        accepted = torch.ones(4, dtype=torch.int32)
        decode, prefill = plan_batch(builder.build(0, real, num_accepted_tokens=accepted))
        assert prefill is None
        assert captured is not None
        assert decode is not None
        assert decode.slots[:, 0].tolist() == table[:, 0].tolist()
        assert decode.lengths.tolist() == [7, 9, 20, 0]
        assert decode.query_start_loc is not None
        assert decode.query_start_loc.tolist() == [0, 3, 4, 6, 6]
        assert (decode.num_tokens, captured.num_tokens) == (6, 12)
        assert decode.slots.data_ptr() == captured.slots.data_ptr()
        assert decode.slots.stride() == captured.slots.stride()

    def test_short_prefills_are_described_behind_decodes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(state_metadata, "current_platform", SimpleNamespace(is_cuda=lambda: True))
        made = SimpleNamespace(made=False)
        layers = [SimpleNamespace(wants_graphs=True, graphs=made) for _ in range(2)]
        first, second = (
            self.builder(StateMetadataBuilder, "align", layer=layer, hash_block_size=8) for layer in layers
        )
        batch = self.batch(TABLE[:3], ((40, 1), (50, 50), (36, 20)))
        assert first.build(0, batch).short is None
        made.made = True
        of_first = first.build(0, batch)
        of_second = second.update_block_table(of_first, TABLE[:3] + 500, torch.zeros(0))
        expected = ShortPrefills(256, torch.device("cpu"))
        expected.fill([Run(0, 50, 48), Run(16, 20, 16)])
        assert of_first.short is first.short is layers[0].short
        assert of_second.short is second.short is layers[1].short
        assert of_first.short.prefills is of_second.short.prefills
        assert torch.equal(of_first.short.prefills.words, expected.words)
        slots = torch.zeros(2, MOST.sequences, dtype=torch.int32)
        slots[:, :2] = torch.stack([TABLE[[1, 2], [3, 2]], TABLE[[1, 2], [2, 1]]])
        assert torch.equal(of_first.short.slots, slots)
        assert torch.equal(of_second.short.slots, slots + 500 * (slots > 0))
        assert first.build(0, self.batch(TABLE[:1], ((40, 1),))).short is None
