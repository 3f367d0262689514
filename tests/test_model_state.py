"""Which states Model Runner V2 is asked to move, against vLLM's rule for all requests of a batch."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from vllm_bamba.model import BambaForCausalLM
from vllm_bamba.model_state import BambaModelState
from vllm_bamba.ops import slot_state
from vllm_bamba.sharding import MixerShard
from vllm_bamba.state import SlotFormat

BLOCK, TABLE = 16, 12  # tokens of a state's block, rows of the request table


class VllmsRule:
    """`preprocess_mamba_align_fused_kernel` and the copies behind it, in plain integers."""

    def __init__(self) -> None:
        self.column = dict.fromkeys(range(TABLE), -2)  # of each row's state, before the step
        self.copies: list[tuple[int, int, int]] = []  # row, from, to

    def begin(self, row: int, computed: int) -> None:
        self.column[row] = (computed - 1) // BLOCK

    def step(self, batch: Any, computed: dict[int, int]) -> None:
        starts = batch.query_start_loc.tolist()
        assert len(starts) == batch.num_reqs + 1
        for i, row in enumerate(batch.idx_mapping.tolist()):
            after = computed[row] + starts[i + 1] - starts[i]
            old, new = self.column[row], -(-after // BLOCK) - 1
            if old >= 0 and old != new:
                self.copies.append((row, old, new))
            self.column[row] = new


def model_state(
    monkeypatch: pytest.MonkeyPatch, vllm: Any, align: bool = True, drafts: int = 0, recovers: object = None
) -> BambaModelState:
    """As the runner makes it; `vllm` gets what reaches vLLM's own, which needs a GPU."""

    def init(self: Any, config: Any, model: Any) -> None:
        self._align_mode, self.recoverssm = align, recovers
        self.cache_config = SimpleNamespace(mamba_block_size=BLOCK)

    monkeypatch.setattr(MambaHybridModelState, "__init__", init)
    monkeypatch.setattr(MambaHybridModelState, "preprocess_state", lambda self, batch, *args: vllm.before(batch))
    monkeypatch.setattr(MambaHybridModelState, "postprocess_state", lambda self, *args: vllm.after(*args))
    return BambaModelState(SimpleNamespace(num_speculative_tokens=drafts), torch.nn.Module())


def batch_of(rows: list[int], computed: list[int], new: list[int]) -> Any:
    starts = np.concatenate([[0], np.cumsum(new)])
    return SimpleNamespace(
        num_reqs=len(rows),
        idx_mapping=torch.tensor(rows),
        idx_mapping_np=np.array(rows),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        num_scheduled_tokens=np.array(new, dtype=np.int32),
        num_computed_tokens_np=np.array(computed, dtype=np.int32),
    )


def test_the_model_names_it() -> None:
    assert BambaForCausalLM.get_model_state_cls() is BambaModelState


def test_the_same_states_are_moved_as_with_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    chance, whole, ours, computed = random.Random(1), VllmsRule(), VllmsRule(), dict.fromkeys(range(TABLE), 0)
    asked: list[Any] = []
    state = model_state(monkeypatch, SimpleNamespace(before=asked.append))
    sizes, idle = set(), 0
    for _ in range(600):
        rows = chance.sample(range(TABLE), chance.randint(1, TABLE))
        new = []
        for row in rows:
            if computed[row] == 0 or chance.random() < 0.02:  # another request takes this row of the table
                computed[row] = chance.choice([0, 0, 16, 32, 39])
                whole.begin(row, computed[row])
                ours.begin(row, computed[row])
            prefills = computed[row] == 0 or chance.random() < 0.05
            new.append(chance.randint(1, 50) if prefills else 1)
        batch = batch_of(rows, [computed[row] for row in rows], new)
        whole.step(batch, computed)
        asked.clear()
        state.preprocess_state(batch)
        for moves in asked:
            ours.step(moves, computed)
            sizes.add(moves.num_reqs)
            assert (moves.idx_mapping.dtype, moves.query_start_loc.dtype) == (torch.int64, torch.int32)
        idle += not asked
        for row, tokens in zip(rows, new, strict=True):
            computed[row] += tokens
        assert ours.copies == whole.copies
        assert ours.column == whole.column
    assert len(whole.copies) > 200  # else the test has not seen what it is about
    assert idle > 50
    assert max(sizes) > 2


def test_rings_are_folded_of_sequences_that_have_a_state_and_pass_the_end_of_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form = SlotFormat(MixerShard(4, 16, 1, 16), 4, torch.bfloat16, torch.bfloat16, BLOCK, anchored=True)
    of_conv, (rest,) = form.shapes()
    size = 2 * torch.Size(of_conv).numel()
    pages = torch.zeros(3, 5, size + rest, dtype=torch.int8)

    def mixing(layer: int) -> Any:
        conv = pages[layer, :, :size].view(torch.bfloat16).view(5, *of_conv)
        mixer = SimpleNamespace(A=torch.full((4,), -1.0 - layer))
        return SimpleNamespace(slots=form.bind((conv, pages[layer, :, size:])), mixer=mixer)

    asked: list[Any] = []
    monkeypatch.setattr(slot_state, "move_slots", lambda layers, moves: asked.append((layers, moves.tolist())))
    state = model_state(monkeypatch, SimpleNamespace(before=lambda batch: pytest.fail("vLLM's own copies")))
    monkeypatch.setattr(MambaHybridModelState, "initialize_kv_cache", lambda self, *args: None)
    ways = {name: mixing(i) for i, name in enumerate(("a", "b", "c"))}
    state.anchored, state.device = ways, torch.device("cpu")
    groups = SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(layer_names=names) for names in (["a", "c"], ["attention"], ["b"])]
    )
    tables = [torch.zeros(TABLE, 9, dtype=torch.int32) for _ in range(3)]
    state.initialize_kv_cache(groups, SimpleNamespace(input_block_tables=tables))
    batch = batch_of([5, 3, 8, 1, 2], [16, 0, 31, 15, 40], [1, 20, 1, 1, 30])
    state.preprocess_state(batch)
    ((layers, moves),) = asked
    assert moves == [[0, 16, 0, 1], [4, 40, 2, 4]]
    assert layers.groups.tolist() == [0, 0, 1]
    assert layers.tables.tolist() == [tables[0].data_ptr(), tables[2].data_ptr()]
    assert layers.A.tolist() == [ways[name].mixer.A.data_ptr() for name in ("a", "c", "b")]
    assert (16 * layers.offsets).tolist() == [0, 2 * pages.stride(0), pages.stride(0)]
    state.preprocess_state(batch_of([5, 3], [17, 0], [1, 40]))
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("align", "drafts", "recovers", "takes_back"),
    [(False, 0, None, False), (True, 2, None, True), (True, 0, object(), True)],
    ids=["no caching", "drafts", "vLLM's own way to recover states"],
)
def test_whole_batches_reach_vllm_where_tokens_may_be_taken_back(
    align: bool, drafts: int, recovers: object, takes_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[Any] = []
    after: list[Any] = []
    vllm = SimpleNamespace(before=before.append, after=lambda *args: after.append(args))
    state = model_state(monkeypatch, vllm, align, drafts, recovers)
    batch = batch_of([3], [15], [1])
    state.preprocess_state(batch)
    state.postprocess_state("rows", 1)
    assert before == [batch]
    assert after == ([("rows", 1)] if takes_back else [])
