"""What a slot holds, and how vLLM's description of a batch becomes at most one decode and one prefill plan."""

from collections.abc import Iterator

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator, get_conv_state_layout
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionBackend, Mamba2AttentionMetadata
from vllm.v1.attention.selector import get_attn_backend

from vllm_bamba.compat import state_backend
from vllm_bamba.config import BambaShape
from vllm_bamba.state import SlotFormat, channels_first, mixer_shard, plan_batch, state_shapes
from vllm_bamba.state_metadata import StateMetadataBuilder


@pytest.fixture(params=["SD", "DS"])
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How vLLM lays out the convolution's state: its default, inputs first, or channels first."""
    monkeypatch.setenv("VLLM_SSM_CONV_STATE_LAYOUT", request.param)
    get_conv_state_layout.cache_clear()
    yield request.param
    get_conv_state_layout.cache_clear()


def metadata(decodes: int, prefills: list[int], draft: int = 0) -> Mamba2AttentionMetadata:
    """As vLLM's builder describes `decodes` sequences that decode and prefills of these lengths."""
    offsets = torch.tensor([0, *prefills]).cumsum(0).int()
    speculates = bool(draft and decodes)
    return Mamba2AttentionMetadata(
        num_prefills=len(prefills),
        num_prefill_tokens=sum(prefills),
        num_decodes=decodes,
        num_decode_tokens=decodes * (1 + draft),
        num_reqs=decodes + len(prefills),
        has_initial_states_p=torch.tensor([i % 2 == 0 for i in range(len(prefills))]) if prefills else None,
        query_start_loc_p=offsets if prefills else None,
        state_indices_tensor_p=10 + torch.arange(len(prefills)).int() if prefills else None,
        state_indices_tensor_d=1 + torch.arange(decodes * (1 + draft)).int().view(decodes, -1) if decodes else None,
        query_start_loc_d=(1 + draft) * torch.arange(decodes + 1).int() if speculates else None,
        num_accepted_tokens=torch.ones(decodes).int() if speculates else None,
        seq_lens=torch.arange(decodes + len(prefills)).int() + 400,
        cu_chunk_seqlen_p=offsets if prefills else None,
        last_chunk_indices_p=torch.arange(len(prefills)).int() if prefills else None,
        prep_initial_states=bool(prefills),
        chunk_size=256,
        seq_idx_p=torch.arange(len(prefills)).int() if prefills else None,
    )


def test_an_empty_batch_has_no_plan() -> None:
    assert plan_batch(metadata(0, [])) == (None, None)


@pytest.mark.parametrize("draft", [0, 2])
@pytest.mark.parametrize("prefills", [[], [5, 1, 300]], ids=str)
def test_decodes_become_a_decode_plan(prefills: list[int], draft: int) -> None:
    batch = metadata(3, prefills, draft)
    decode, prefill = plan_batch(batch)
    assert decode is not None
    assert (prefill is None) == (not prefills)
    assert decode.num_tokens == 3 * (1 + draft)
    assert decode.slots is batch.state_indices_tensor_d
    assert decode.lengths.tolist() == [400, 401, 402]
    assert decode.query_start_loc is batch.query_start_loc_d
    assert decode.accepted is batch.num_accepted_tokens
    assert (decode.accepted is None) == (draft == 0)


@pytest.mark.parametrize("decodes", [0, 3])
def test_prefills_become_a_prefill_plan(decodes: int) -> None:
    batch = metadata(decodes, [5, 1, 300])
    decode, prefill = plan_batch(batch)
    assert prefill is not None
    assert (decode is None) == (decodes == 0)
    assert prefill.num_tokens == 306
    assert prefill.lengths.tolist() == [400 + decodes, 401 + decodes, 402 + decodes]
    assert prefill.slots is batch.state_indices_tensor_p
    assert prefill.query_start_loc is batch.query_start_loc_p
    assert prefill.continues is batch.has_initial_states_p
    assert prefill.any_continues is True
    assert prefill.chunk_size == 256
    assert prefill.chunk_start_loc is batch.cu_chunk_seqlen_p
    assert prefill.chunk_sequence is batch.seq_idx_p
    assert prefill.last_chunk is batch.last_chunk_indices_p
    assert prefill.conv_metadata is batch


def test_prompts_that_all_begin_say_so() -> None:
    batch = metadata(0, [5])
    batch.prep_initial_states = False
    _, prefill = plan_batch(batch)
    assert prefill is not None
    assert prefill.any_continues is False


def shape(heads: int, head_dim: int, groups: int, state: int, width: int) -> BambaShape:
    """Only what the state depends on; no other field is read."""
    values = dict.fromkeys(BambaShape.__dataclass_fields__) | {
        "mamba_heads": heads,
        "mamba_head_dim": head_dim,
        "mamba_groups": groups,
        "mamba_state": state,
        "conv_width": width,
    }
    return BambaShape(**values)


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [
        ((128, 64, 1, 128, 4), 1),
        ((128, 64, 1, 128, 4), 2),
        ((128, 64, 1, 128, 4), 8),
        ((128, 64, 8, 128, 4), 4),
        ((128, 64, 8, 128, 4), 8),
        ((128, 64, 4, 128, 2), 16),
        ((12, 32, 3, 16, 3), 6),
    ],
    ids=str,
)
def test_slots_have_the_shapes_that_vllm_computes(
    sizes: tuple[int, int, int, int, int], ranks: int, draft: int, layout: str
) -> None:
    heads, head_dim, groups, state, width = sizes
    expected = MambaStateShapeCalculator.mamba2_state_shape(
        tp_world_size=ranks,
        intermediate_size=heads * head_dim,
        n_groups=groups,
        num_heads=heads,
        head_dim=head_dim,
        state_size=state,
        conv_kernel=width,
        num_spec=draft,
    )
    assert state_shapes(shape(*sizes), ranks, draft) == expected
    assert (expected[0][0] == width - 1 + draft) == (layout == "SD"), "the two layouts differ"


@pytest.mark.usefixtures("layout")
def test_the_convolutions_state_is_viewed_with_channels_first() -> None:
    of_slot, _ = state_shapes(shape(8, 4, 1, 3, 4), 2, 0)
    stored = torch.zeros(5, *of_slot)
    viewed = channels_first(stored)
    assert viewed.shape == (5, 8 * 4 // 2 + 2 * 3, 3)
    assert viewed.data_ptr() == stored.data_ptr()


def test_drafts_cost_the_fused_step_as_many_inputs_of_the_convolution_and_nothing_else() -> None:
    shard = mixer_shard(shape(8, 16, 1, 16, 4), 1)
    none, three = (
        SlotFormat(shard, 4, torch.bfloat16, torch.int8, replay=16, drafts=drafts).tensors() for drafts in (0, 3)
    )
    assert three.pop("conv") == ((7, shard.local_conv_channels), torch.bfloat16)
    assert none.pop("conv") == ((4, shard.local_conv_channels), torch.bfloat16)
    assert three == none


def test_each_rank_holds_its_own_part_of_one_shape() -> None:
    parts = [mixer_shard(shape(8, 4, 2, 3, 4), 2, rank) for rank in range(2)]
    assert [part.head_rows for part in parts] == [range(4), range(4, 8)]
    assert [part.bc_rows for part in parts] == [range(3), range(3, 6)]


def test_state_layers_report_the_attention_layers_cache_layouts() -> None:
    """Else a pipeline stage without attention reports other layouts than its neighbours, and no engine starts."""
    with set_current_vllm_config(VllmConfig()):
        attention = get_attn_backend(64, torch.bfloat16, "auto")
        backend = state_backend(64, torch.bfloat16, "auto")
        again = state_backend(64, torch.bfloat16, "auto")
    assert backend is again, "layers of one kind must share one backend"
    assert issubclass(backend, Mamba2AttentionBackend)
    assert backend.is_ssm()
    assert backend.get_builder_cls() is StateMetadataBuilder
    assert backend.supported_kv_cache_layouts() == attention.supported_kv_cache_layouts()
    if attention.supported_kv_cache_layouts() is not None:
        assert backend.supported_kv_cache_layouts() != Mamba2AttentionBackend.supported_kv_cache_layouts()
