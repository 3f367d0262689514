"""Which states Model Runner V2 is asked to move, against vLLM's rule for all requests of a batch."""

import contextlib
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.kv_cache_interface import MambaSpec
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
        num_reqs_after_padding=-(-len(rows) // 4) * 4,
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
        kv_cache_groups=[
            SimpleNamespace(layer_names=names, kv_cache_spec=None) for names in (["a", "c"], ["attention"], ["b"])
        ]
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


class Tables:
    """What a scheduler has told a worker: blocks of two groups of Mamba layers, by rows of the request table."""

    GROUPS = (["a", "c"], ["attention"], ["b"])

    def __init__(self, way: str) -> None:
        self.way, self.fresh = way, iter(range(1, 1 << 30))
        self.num_blocks = SimpleNamespace(np=np.zeros((3, TABLE), dtype=np.int32))
        self.blocks: dict[int, list[int]] = {}
        self.input_block_tables = None
        spec = MambaSpec(block_size=BLOCK, shapes=((1,),), dtypes=(torch.float32,))
        groups = [SimpleNamespace(layer_names=n, kv_cache_spec=None if "attention" in n else spec) for n in self.GROUPS]
        self.config, self.attn_groups = SimpleNamespace(kv_cache_groups=groups), [[group] for group in groups]

    def give(self, row: int, tokens: int, new: int) -> None:
        """Room for a step of a request that has so many tokens."""
        blocks = self.blocks.setdefault(row, [])
        missing = -(-(tokens + new) // BLOCK) - len(blocks)
        if self.way == "none":
            blocks[:] = blocks or [next(self.fresh)]
        elif self.way == "anchored" and blocks and missing > 0 and new == 1:
            blocks += 3 * [blocks[-1]]
        elif missing > 0:
            blocks += [0] * (missing - 1) + [next(self.fresh)]
        self.num_blocks.np[[0, 2], row] = len(blocks)
        self.num_blocks.np[1, row] = (tokens + new) // 7

    def describe(self, batch: Any) -> list[int]:
        """Blocks with the states that a step writes."""
        ends = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        columns = [0 if self.way == "none" else (end - 1) // BLOCK for end in ends]
        return [self.blocks[row][column] for row, column in zip(batch.idx_mapping_np, columns, strict=True)]


@pytest.mark.parametrize("way", ["none", "copied", "anchored"])
def test_mamba_layers_are_not_asked_again_only_where_they_would_say_the_same(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, tables, asked, read_by_graphs = random.Random(1), Tables(way), [], {}

    def prepare_attn(self, batch, mode, block_tables, slot_mappings, attn_groups, config, for_capture=False):
        asked.append([name for of in attn_groups for group in of for name in group.layer_names])
        for name in asked[-1]:
            read_by_graphs[name] = [] if batch is dummy else tables.describe(batch)
        if chance.random() < 0.02:
            raise RuntimeError("out of memory")
        return dict.fromkeys(asked[-1])

    state = model_state(monkeypatch, SimpleNamespace(before=lambda batch: None))
    for name, function in {
        "prepare_attn": prepare_attn, "add_request": lambda *args: None, "initialize_kv_cache": lambda *args: None
    }.items():  # fmt: skip
        monkeypatch.setattr(MambaHybridModelState, name, function)
    state.initialize_kv_cache(tables.config, tables)
    dummy, computed, rows, graphs = batch_of([0], [1], [1]), dict.fromkeys(range(TABLE), 0), [0], 0
    for _ in range(4000):
        if chance.random() < 0.05:
            with contextlib.suppress(RuntimeError):
                state.prepare_attn(dummy, CUDAGraphMode.FULL, None, None, tables.attn_groups, None, for_capture=True)
        if chance.random() < 0.1:
            rows = chance.sample(range(TABLE), chance.randint(1, 5))
        for row in rows:
            if computed[row] == 0 or chance.random() < 0.01:
                computed[row] = chance.choice([0, 0, 20])  # tokens whose states another engine has sent
                tables.blocks.pop(row, None)
                state.add_request(row, None)
        new = [chance.randint(2, 40) if computed[row] == 0 else 1 for row in rows]
        for row, tokens in zip(rows, new, strict=True):
            tables.give(row, computed[row], tokens)
        batch = batch_of(rows, [computed[row] for row in rows], new)
        mode = CUDAGraphMode.FULL if max(new) == 1 and chance.random() < 0.95 else CUDAGraphMode.PIECEWISE
        state.preprocess_state(batch)
        with contextlib.suppress(RuntimeError):
            metadata = state.prepare_attn(batch, mode, None, None, tables.attn_groups, None)
            assert metadata.keys() == {"a", "b", "c", "attention"}
            assert all(slots == tables.describe(batch) for slots in read_by_graphs.values())
        for row, tokens in zip(rows, new, strict=True):
            computed[row] += tokens
        graphs += mode == CUDAGraphMode.FULL
    assert all("attention" in names for names in asked)
    spared = sum(names == ["attention"] for names in asked)
    assert spared > 0.5 * graphs
    assert spared < graphs


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
