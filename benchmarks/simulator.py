"""vLLM's real scheduler and cache managers at a model's geometry, with a worker that computes no model.

The worker keeps, for each block, *which text* its content stands for: a chained hash of tokens. It does what vLLM's
model runners do (copies of blocks before a step, a state moved on to the block in which the step ends) and checks,
before anything is computed, that every state and every key that a request builds on belongs to the text before it. So
it says in milliseconds what a request hits and whether that is right.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from transformers import BambaConfig
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_kv_cache_block_sizes
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    is_mamba_prefill_checkpoint_valid,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_bamba.prefix.options import active, attention_spec, configure, state_spec
from vllm_bamba.prefix.policy import inner_position

START = 0  # what no text stands for
WRONG = -1  # what is made of a wrong state


@cache
def _config_folder(max_model_len: int) -> str:
    """A folder with the config of Bamba-9B, small where only weights would notice."""
    folder = tempfile.mkdtemp(prefix="bamba-9b-config-")
    config = BambaConfig(
        vocab_size=512, max_position_embeddings=max_model_len, architectures=["BambaForCausalLM"], num_hidden_layers=32,
        hidden_size=4096, attn_layer_indices=[9, 18, 27], mamba_n_heads=128, mamba_d_head=64, mamba_d_state=128,
    )  # fmt: skip
    config.save_pretrained(folder)
    return str(pathlib.Path(folder))


@dataclass(frozen=True)
class Geometry:
    """What the cache of an engine looks like; the defaults are Bamba-9B with bf16 states.

    Attributes:
        attention_block: tokens of an attention block.
        mamba_groups: cache groups of Mamba layers.
        blocks: blocks of the cache.
        max_tokens: the longest sequence.
        max_batch: tokens of a step.
        max_requests: requests of a step.
    """

    attention_block: int = 528
    mamba_groups: int = 10
    blocks: int = 2000
    max_tokens: int = 32768
    max_batch: int = 8192
    max_requests: int = 64


@dataclass
class Seen:
    """What became of one request."""

    prompt: list[int]
    hit: int = -1  # tokens, when first scheduled
    chunks: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)


class Simulator:
    """An engine without a model.

    Args:
        geometry: of its cache.
        slots: with this plugin's scheduler, and slots where prefixes are cached, or vLLM alone.
        caching: whether prefixes are cached at all.
        anchored: whether the worker's slots are (`vllm_bamba.state.SlotFormat`).
        retention: `--prefix-cache-retention-interval`.
        unit: `--prefix-match-unit`.
        asynchronous: schedule each step before the one before is done.
        share: `bamba_prefix_share`.
        exports: for vLLM alone, whether a prefill also leaves the state inside it that vLLM may ask for, as vLLM's
            own mixer does.
        options: more of `SchedulerConfig`.
    """

    def __init__(
        self, geometry: Geometry = Geometry(), slots: bool = True, unit: int | None = None,
        asynchronous: bool = False, share: float | None = None, exports: bool = True, caching: bool = True,
        anchored: bool = False, retention: int | None = 0, **options: Any,
    ):  # fmt: skip
        init_none_hash(sha256)
        self.asynchronous = asynchronous
        self.geometry = geometry
        block, mode = geometry.attention_block, "align" if caching else "none"
        config = VllmConfig(
            model_config=ModelConfig(
                model=_config_folder(geometry.max_tokens), skip_tokenizer_init=True, dtype="bfloat16",
                max_model_len=geometry.max_tokens,
            ),
            cache_config=CacheConfig(block_size=block, enable_prefix_caching=caching, mamba_cache_mode=mode),
            scheduler_config=SchedulerConfig(
                max_num_seqs=geometry.max_requests, max_num_batched_tokens=geometry.max_batch,
                max_model_len=geometry.max_tokens, enable_chunked_prefill=True, is_encoder_decoder=False,
                async_scheduling=asynchronous, **options,
            ),
            device_config=DeviceConfig("cpu"),
            additional_config={} if share is None else {"bamba_prefix_share": share},
        )  # fmt: skip
        cache = config.cache_config
        cache.block_size, cache.prefix_match_unit = block, unit
        cache.mamba_block_size = block if caching else geometry.max_tokens
        config.scheduler_config.scheduler_cls, config.scheduler_config.async_scheduling = None, asynchronous
        if slots:
            configure(config)
        slots = active(config)
        register_all_kvcache_specs(config)
        page = block * 4096
        states: KVCacheSpec = MambaSpec(
            block_size=cache.mamba_block_size, shapes=((3, 8448), (128, 64, 128)), dtypes=(torch.bfloat16,) * 2,
            page_size_padded=max(page, 2 * (3 * 8448 + 128 * 64 * 128)), mamba_cache_mode=mode,
            num_prefill_checkpoint_blocks=int(exports), prefill_checkpoint_alignment=1 if exports else None,
        )  # fmt: skip
        if slots:
            states = state_spec(states, config)
        attention = attention_spec(
            FullAttentionSpec(block_size=block, num_kv_heads=8, head_size=128, dtype=torch.bfloat16), config
        )
        groups = [KVCacheGroupSpec([f"mamba{i}"], states) for i in range(geometry.mamba_groups)]
        groups.append(KVCacheGroupSpec(["attention"], attention))
        layout = KVCacheConfig(
            num_blocks=geometry.blocks,
            kv_cache_tensors=[],
            kv_cache_groups=groups,
            prefix_cache_retention_interval=retention,
        )
        cache.block_size, cache.num_gpu_blocks = min(block, states.block_size), geometry.blocks
        scheduler_block, hash_block = resolve_kv_cache_block_sizes(layout, config)
        self.scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=layout,
            structured_output_manager=StructuredOutputManager(config),
            block_size=scheduler_block,
            hash_block_size=hash_block,
            log_stats=True,
        )
        if anchored:
            self.scheduler.slots.anchored = True
        self._hasher = get_request_block_hasher(hash_block, sha256) if caching else None
        inner: Callable[[int, int], int] = partial(_vllms_inner_position, unit=hash_block, block=states.block_size)
        if slots:
            inner = partial(inner_position, unit=states.block_size)
        elif not exports:
            inner = _no_inner_position
        self.worker = _Worker(states.block_size, block, geometry.mamba_groups, inner, anchored)
        self.seen: dict[str, Seen] = {}
        self.queries = self.hits = 0  # tokens, as vLLM's metrics count them
        self._running: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    @property
    def wrong(self) -> list[str]:
        """Every use of a state or a key of another text."""
        return self.worker.wrong

    def add(
        self, prompt: Sequence[int], answer: int = 1, shared: int = 0, priority: int = 0, stops: Sequence[int] = (),
        session: str = "",
    ) -> str:  # fmt: skip
        """Queue a request for `answer` tokens; the first `shared` of its prompt are said to be shared.

        A token of `stops` ends the answer, which an asynchronous engine learns a step too late. With the name of a
        `session` that is vLLM's streaming input: it begins with this prompt, or goes on with it after its last answer.
        """
        name = session or f"r{len(self.seen)}"
        self.seen.setdefault(name, Seen(list(prompt)))
        extra = {"bamba_shared_tokens": shared} if shared else None
        request = Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=SamplingParams(
                max_tokens=answer, ignore_eos=True, stop_token_ids=list(stops), extra_args=extra
            ),
            pooling_params=None,
            block_hasher=self._hasher,
            priority=priority,
            resumable=bool(session),
        )
        self.scheduler.add_request(request)
        return name

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """Schedule one step and run it, or, asynchronously, the one before."""
        output = self.scheduler.schedule()
        for request in output.scheduled_new_reqs:
            seen = self.seen[request.req_id]
            if seen.hit < 0:
                seen.hit = request.num_computed_tokens
        begun = {new.req_id for new in output.scheduled_new_reqs} | output.scheduled_cached_reqs.resumed_req_ids
        for name in begun:  # what a reset has dropped is sampled again, and a session's answers are prompts
            request, seen = self.scheduler.requests[name], self.seen[name]
            seen.prompt, seen.answer = list(request.prompt_token_ids), list(request.output_token_ids)
        result = self._run(output)
        if output.num_scheduled_tokens:
            self._running.append((output, result))
        if self._running and (not self.asynchronous or len(self._running) > 1 or not output.num_scheduled_tokens):
            for outputs in self.scheduler.update_from_output(*self._running.popleft()).values():
                if outputs.scheduler_stats is not None:
                    self.queries += outputs.scheduler_stats.prefix_cache_stats.queries
                    self.hits += outputs.scheduler_stats.prefix_cache_stats.hits

    def finish(self, most: int = 20_000) -> None:
        """Run until nothing is left to do."""
        for _ in range(most):
            if not self.scheduler.has_unfinished_requests() and not self._running:
                return
            self.step()
        raise RuntimeError(f"requests are left after {most} steps")

    def ask(self, prompt: Sequence[int], answer: int = 1, shared: int = 0) -> Seen:
        """One request alone, to its end."""
        name = self.add(prompt, answer, shared)
        self.finish()
        return self.seen[name]

    def _run(self, output: SchedulerOutput) -> ModelRunnerOutput:
        names = list(output.num_scheduled_tokens)
        tokens = {name: self._text(name) for name in names}
        starts = self.worker.run(output, tokens)
        sampled = []
        for name in names:
            seen, end = self.seen[name], starts[name] + output.num_scheduled_tokens[name]
            seen.chunks.append(output.num_scheduled_tokens[name])
            known = len(seen.prompt) + len(seen.answer)
            sampled.append([tokens[name][end]] if end >= known else [])
            if end >= known:
                seen.answer.append(tokens[name][end])
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    def _text(self, name: str) -> list[int]:
        """What the worker knows of a request, and the token that it is about to sample."""
        seen = self.seen[name]
        text = seen.prompt + seen.answer
        return [*text, 3 + hash((tuple(text[:8]), len(text), name)) % 500]


def _vllms_inner_position(start: int, end: int, unit: int, block: int) -> int:
    """`inner_position` as vLLM's own caching has it."""
    position = (end - 1) // unit * unit
    return position if is_mamba_prefill_checkpoint_valid(start, end, position, unit, block, 1) else 0


def _no_inner_position(start: int, end: int) -> int:
    return 0


class _Worker:
    """Block tables and the texts that blocks stand for."""

    def __init__(
        self,
        state_block: int,
        attention_block: int,
        mamba_groups: int,
        inner: Callable[[int, int], int],
        anchored: bool,
    ):
        self.state_block, self.attention_block, self.mamba_groups = state_block, attention_block, mamba_groups
        self.inner = inner  # of a step's first token and end: where the state inside is kept, too
        self.anchored = anchored
        self.states: dict[int, int] = {}
        self.anchors: dict[int, tuple[int, int | None]] = {}  # block -> tokens at its anchor, and their text
        self.prefilled: dict[str, int] = {}  # tokens of each request that are no decodes
        self.keys: dict[int, dict[int, int]] = {}  # block -> offset -> text up to that token
        self.tables: dict[str, list[list[int]]] = {}
        self.columns: dict[str, int] = {}
        self.computed: dict[str, int] = {}
        self.texts: dict[str, list[int]] = {}
        self.wrong: list[str] = []

    def run(self, output: SchedulerOutput, tokens: dict[str, list[int]]) -> dict[str, int]:
        """One step; returns where each request's tokens start."""
        self._take(output)
        copies = [(c.src_block_id, c.dst_block_id) for c in output.kv_cache_block_copies or ()]
        copied = [
            (to, self.states.get(source), self.anchors.get(source), dict(self.keys.get(source, {})))
            for source, to in copies
        ]
        for to, state, anchor, keys in copied:
            self.keys[to] = keys
            if state is not None:
                self.states[to] = state
            if anchor is not None:
                self.anchors[to] = anchor
        starts = {}
        moved = []
        spoilt = set()
        for name, count in output.num_scheduled_tokens.items():
            start = starts[name] = self.computed[name]
            source = self.columns.get(name, (start - 1) // self.state_block if start else -1)
            self.columns[name] = column = -(-(start + count) // self.state_block) - 1
            self.prefilled.setdefault(name, len(tokens[name]) - 1)
            for table in self.tables[name][: self.mamba_groups]:
                before = self._before(table[source], table[column], start) if source >= 0 else START
                moved.append((name, table[column], before, start, count, source != column))
        for name in output.num_scheduled_tokens:
            self._extend(name, tokens[name])
            self._attend(name, starts[name], output.num_scheduled_tokens[name])
        for name, block, before, start, count, passes in moved:
            if before != self._at(name, start):
                self.wrong.append(f"{name} continues at {start} from another text's state")
                spoilt.add(name)
            self.states[block] = after = WRONG if name in spoilt else self._at(name, start + count)
            if start < self.prefilled[name]:
                self.anchors[block] = start + count, after
            elif passes:
                self.anchors[block] = start, before
            elif self.anchored and start + count - self.anchors[block][0] > self.state_block:
                self.wrong.append(f"{name} has more tokens than a ring at {start}")
        for name, count in output.num_scheduled_tokens.items():
            self._export(name, starts[name], starts[name] + count, name in spoilt)
            self.computed[name] += count
        return starts

    def _before(self, there: int, here: int, start: int) -> int | None:
        """The text whose state a request finds that has `start` tokens and goes on in another block, or stays."""
        anchor = self.anchors.get(there)
        if self.anchored and there != here and anchor is not None and anchor[0] == start:
            return anchor[1]
        return self.states.get(there)

    def _take(self, output: SchedulerOutput) -> None:
        cached = output.scheduled_cached_reqs
        if output.num_scheduled_tokens:  # Model Runner V1 looks at nothing else of a step without
            for name in output.finished_req_ids | (output.preempted_req_ids or set()) | cached.resumed_req_ids:
                self.columns.pop(name, None)
        for new in output.scheduled_new_reqs:
            self._begin(new.req_id, new.block_ids, new.num_computed_tokens)
        for name, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if name in cached.resumed_req_ids:
                self._begin(name, blocks or (), computed)
            elif blocks is not None:
                for table, more in zip(self.tables[name], blocks, strict=True):
                    table.extend(more)

    def _begin(self, name: str, blocks: Sequence[Sequence[int]], computed: int) -> None:
        self.tables[name] = [list(table) for table in blocks]
        self.computed[name] = computed
        self.texts.pop(name, None)
        self.prefilled.pop(name, None)

    def _extend(self, name: str, tokens: list[int]) -> None:
        text = self.texts.setdefault(name, [START])
        for token in tokens[len(text) - 1 :]:
            text.append(hash((text[-1], token)))

    def _at(self, name: str, position: int) -> int:
        return self.texts[name][position]

    def _export(self, name: str, start: int, end: int, spoilt: bool) -> None:
        position = self.inner(start, end)
        for table in self.tables[name][: self.mamba_groups] if position else ():
            block = table[-(-end // self.state_block) - 2]
            if block:  # not the padding
                self.states[block] = WRONG if spoilt else self._at(name, position)
                self.anchors[block] = position, self.states[block]

    def _attend(self, name: str, start: int, count: int) -> None:
        """Write the step's keys, and read those before it where the step is not a mere decode."""
        table, size = self.tables[name][self.mamba_groups], self.attention_block
        for position in range(start, start + count):
            self.keys.setdefault(table[position // size], {})[position % size] = self._at(name, position + 1)
        first = 0 if count > 1 or start % 64 == 0 else max(0, start - 4)
        for position in range(first, start):
            if self.keys.get(table[position // size], {}).get(position % size) != self._at(name, position + 1):
                self.wrong.append(f"{name} reads other keys at {position}")
                return
