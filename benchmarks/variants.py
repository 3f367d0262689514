"""Engines side by side on one GPU: each in a process of its own, answering one request after the other.

| variant | decode step | prefix caching |
|---|---|---|
| `vllm_operators` | this plugin's model on vLLM's operators, with vLLM's scheduler | off |
| `vllm_operators_align` | the same | vLLM's own, in steps of the attention block |
| `vllm_operators_slots` | the same | prefix-aware slots |
| `fused` | our own kernel | off |
| `fused_slots` | the same | prefix-aware slots |
| `fused_every_step` | our own kernel, states written after every token | off |
| `fused_int8`, `fused_fp8` | our own kernel, states of 8 bits | off |
| `fused_int8_ring32` | the same, written every 32 tokens | off |
| `fused_int8_slots` | the same, what nobody asks for on an H100 or H200 | prefix-aware slots |

States are in the precision of activations where a variant does not say 8 bits.
"""

import argparse
import contextlib
import functools
import gzip
import json
import math
import multiprocessing
import pathlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
from rows import dtype_name, dtype_of, progress
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from vllm_bamba.state import SlotFormat

# variant -> what the engine is asked for
VARIANTS: dict[str, dict[str, Any]] = {
    "vllm_operators": {"additional_config": {"bamba_fused_step": False, "bamba_prefix_slots": False}},
    "vllm_operators_align": {
        "enable_prefix_caching": True,
        "additional_config": {"bamba_fused_step": False, "bamba_prefix_slots": False},
    },
    "vllm_operators_slots": {
        "enable_prefix_caching": True,
        "additional_config": {"bamba_fused_step": False, "bamba_prefix_slots": True},
    },
    "fused": {"additional_config": {"bamba_fused_step": True}},
    "fused_slots": {
        "enable_prefix_caching": True,
        "additional_config": {"bamba_fused_step": True, "bamba_prefix_slots": True},
    },
    "fused_every_step": {"additional_config": {"bamba_fused_step": True, "bamba_replay": 0}},
    "fused_int8": {"additional_config": {"bamba_fused_step": True, "bamba_state_dtype": "int8"}},
    "fused_int8_slots": {
        "enable_prefix_caching": True,
        "additional_config": {"bamba_fused_step": True, "bamba_state_dtype": "int8", "bamba_prefix_slots": True},
    },
    "fused_int8_ring32": {
        "additional_config": {"bamba_fused_step": True, "bamba_state_dtype": "int8", "bamba_replay": 32}
    },
    "fused_fp8": {"additional_config": {"bamba_fused_step": True, "bamba_state_dtype": "fp8"}},
}
STATES = 3  # of a caching request: the step's, the one before, and with asynchronous scheduling the one before that
ANCHORED = 2  # of one whose slots are anchored: its prompt's and its own
FREE_AT_START = 0.05  # of a GPU's memory: with its cache given in bytes an engine asks for no more before it loads


def add_engine_arguments(parser: argparse.ArgumentParser, variants: list[str]) -> None:
    """The options that benchmarks of several engines have in common; `variants` are those that run by default."""
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS], default=variants)
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on a GPU, float32 without")
    parser.add_argument("--cache-gib", type=float, help="GiB of cache of each engine (default: what the requests need)")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")
    parser.add_argument("--engine", type=json.loads, default={}, help="more options of vllm.LLM, as JSON")


def engine_options(
    args: argparse.Namespace, name: str, model: str, config: PreTrainedConfig, requests: int, tokens: int, **more: Any
) -> dict[str, Any]:
    """`vllm.LLM`'s arguments for one variant.

    Engines that start at the same time on one GPU must not measure what is free: each would count the others' weights.
    So each is told the bytes of its cache, which vLLM then takes as they are (`gpu_memory_utilization` only says what
    must be free before it loads). A 9B needs its cache, 18.2 GiB of weights, and 2 to 3 GiB for activations, CUDA
    graphs and CUDA itself.

    Args:
        args: with what `add_engine_arguments` added.
        name: one of `VARIANTS`.
        model: folder.
        config: of the model.
        requests: that the cache holds at once.
        tokens: of the longest request, its answer included.
        more: further arguments.
    """
    dtype = dtype_name(dtype_of(args.dtype))
    options: dict[str, Any] = {
        "model": model,
        "load_format": "dummy",
        "dtype": dtype,
        "mamba_ssm_cache_dtype": dtype,
        "max_model_len": tokens + 8,
        "max_num_seqs": requests,
        "enable_prefix_caching": False,
        "enforce_eager": args.eager,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "gpu_memory_utilization": FREE_AT_START,
        "seed": args.seed,
    }
    if not torch.cuda.is_available():
        options["distributed_executor_backend"] = "uni"
    options |= more | args.engine | VARIANTS[name]
    size = int(args.cache_gib * 2**30) if args.cache_gib else cache_bytes(config, options, requests, tokens)
    return {"kv_cache_memory_bytes": size} | options


def cache_bytes(config: PreTrainedConfig, options: Mapping[str, Any], requests: int, tokens: int) -> int:
    """Bytes of a cache in which `requests` requests of `tokens` tokens run at once, at least 64 MiB.

    vLLM's cache is made of blocks of one size. A block holds either the keys and values of a number of tokens in all
    attention layers, or one sequence's state in as many Mamba layers, so that a whole state takes several blocks. The
    tokens are the least multiple of 16 whose keys and values in a layer are as large as a layer's state. At 9B with
    bf16 states that is 528 tokens, 6.2 MiB, and 10 blocks a state; slots of the fused step are larger (608 tokens),
    those of 8 bits smaller (352).

    A request holds the blocks of its tokens and one state, on vLLM's operators one more for each draft; with prefix
    caching up to `STATES`, since a state is not written over: the next begins where a block of states ends, after 16
    tokens with slots, after an attention block without. With slots of the fused step answers stay where they are.

    Args:
        config: of the model; it has an attention layer.
        options: `vllm.LLM`'s arguments.
        requests: that run at once.
        tokens: of the longest.
    """
    attention = len(config.attn_layer_indices)
    groups = -(-(config.num_hidden_layers - attention) // attention)
    head_dim = config.hidden_size // config.num_attention_heads
    token = 2 * config.num_key_value_heads * head_dim * dtype_of(options["dtype"]).itemsize
    block = 16 * math.ceil(state_bytes(config, options) / (16 * token))
    states = 1 if options["additional_config"]["bamba_fused_step"] else 1 + drafts(options)
    if options["enable_prefix_caching"]:
        slots = options["additional_config"].get("bamba_prefix_slots", True)
        most = ANCHORED if anchors(options) else STATES
        states = min(most, -(-tokens // (16 if slots else block)))
    blocks = requests * (-(-tokens // block) + groups * states)
    spare = 8  # vLLM keeps one for padding
    return max((blocks + spare) * attention * block * token, 64 << 20)


def drafts(options: Mapping[str, Any]) -> int:
    """Tokens that are drafted in a step."""
    return options.get("speculative_config", {}).get("num_speculative_tokens", 0)


def anchors(options: Mapping[str, Any]) -> bool:
    """Whether the engine's slots are anchored, as `vllm_bamba.step_options.anchors_slots` has it on a GPU."""
    from vllm_bamba.step_options import StepOptions

    asked = options["additional_config"]
    slots = options["enable_prefix_caching"] and asked.get("bamba_prefix_slots", True)
    return slots and asked["bamba_fused_step"] and asked.get("bamba_replay", StepOptions.replay) >= 16


def state_bytes(config: PreTrainedConfig, options: Mapping[str, Any]) -> int:
    """Bytes of one sequence's state in one layer, as the engine lays it out."""
    from vllm_bamba.config import BambaShape
    from vllm_bamba.state import state_shapes

    dtype, state_dtype = dtype_of(options["dtype"]), dtype_of(options["mamba_ssm_cache_dtype"])
    shapes: tuple[tuple[int, ...], ...] = state_shapes(BambaShape.from_hf(config), 1, drafts(options))
    dtypes = (dtype, state_dtype)
    if options["additional_config"]["bamba_fused_step"]:
        form = fused_format(config, dtype, state_dtype, options["additional_config"], anchors(options), drafts(options))
        shapes, dtypes = form.shapes(), form.dtypes()
    return sum(math.prod(sizes) * kind.itemsize for sizes, kind in zip(shapes, dtypes, strict=True))


def fused_format(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    asked: Mapping[str, Any],
    anchored: bool,
    drafts: int = 0,
) -> "SlotFormat":
    """Slots of the fused step, as `additional_config` asks for them."""
    from vllm_bamba.config import BambaShape
    from vllm_bamba.state import EIGHT_BITS, SlotFormat, mixer_shard
    from vllm_bamba.step_options import StepOptions

    shape, replay = BambaShape.from_hf(config), asked.get("bamba_replay", StepOptions.replay)
    stored = EIGHT_BITS.get(asked.get("bamba_state_dtype", ""), state_dtype)
    return SlotFormat(mixer_shard(shape, 1), shape.conv_width, dtype, stored, replay, anchored, drafts)


@dataclass(frozen=True)
class Answer:
    """What an engine says to one request, which may be a batch of prompts.

    Attributes:
        seconds: of the whole call.
        ttft: milliseconds to each prompt's first token: from when the engine's front end is given the prompt until it
            has the token, so waiting for a turn and the way to the engine's own process and back are in it. Empty
            with `disable_log_stats`.
        cached: tokens of each prompt that were found in the prefix cache.
        tokens: generated for each prompt.
    """

    seconds: float
    ttft: tuple[float, ...]
    cached: tuple[int, ...]
    tokens: tuple[list[int], ...]


def serve(pipe: Connection, options: dict[str, Any]) -> None:
    """An engine that answers (prompts, tokens to generate, profile) until the pipe is closed.

    It runs in a process of its own and first says what is to be known of it.
    """
    from vllm import LLM, SamplingParams

    started = time.perf_counter()
    llm = LLM(**options)
    with contextlib.suppress(BrokenPipeError):
        pipe.send((time.perf_counter() - started, columns(llm.llm_engine.vllm_config)))
    for prompts, tokens, profile in iter(functools.partial(received, pipe), None):
        parameters = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        with profiled(llm) if profile else contextlib.nullcontext():
            begin = time.perf_counter()
            outputs = llm.generate(given, parameters, use_tqdm=False)
            seconds = time.perf_counter() - begin
        pipe.send(
            Answer(
                seconds=seconds,
                ttft=tuple(o.metrics.first_token_latency * 1e3 for o in outputs if o.metrics is not None),
                cached=tuple(o.num_cached_tokens for o in outputs),
                tokens=tuple(list(o.outputs[0].token_ids) for o in outputs),
            )
        )
    llm.llm_engine.engine_core.shutdown()


def columns(config: Any) -> dict[str, str]:
    """Columns of the result rows that the engine's own configuration decides."""
    from vllm_bamba.config import BambaShape
    from vllm_bamba.prefix.options import active
    from vllm_bamba.state import state_dtypes
    from vllm_bamba.step_options import StepOptions

    shape = BambaShape.from_hf(config.model_config.hf_config)
    cache, compilation = config.cache_config, config.compilation_config
    mode = cache.mamba_cache_mode if cache.enable_prefix_caching else "none"
    of_state = state_dtypes(config.model_config.dtype, cache)[1]
    return {
        "state_dtype": dtype_name(StepOptions.of(config, shape).eight_bits or of_state),
        "cache_mode": "slots" if active(config) else mode,
        "details": f"compilation {compilation.mode.name.lower()}; "
        f"CUDA graphs {compilation.cudagraph_mode.name.lower()}",
    }


def received(pipe: Connection) -> Any:
    """What comes through a pipe; None at its end."""
    try:
        return pipe.recv()
    except EOFError:
        return None


@contextlib.contextmanager
def profiled(llm: Any) -> Iterator[None]:
    llm.start_profile()
    yield
    llm.stop_profile()


def profiler_options(folder: pathlib.Path) -> dict[str, Any]:
    """`vllm.LLM`'s arguments for an engine that is asked to profile; it writes to the folder."""
    where = {"torch_profiler_dir": str(folder.absolute()), "torch_profiler_with_stack": False}
    return {"profiler_config": {"profiler": "torch"} | where}


def kernel_milliseconds(folder: pathlib.Path) -> float:
    """Time on the GPU of all kernels in the newest trace of a folder; 0 where there was no GPU.

    Raises:
        SystemExit: there is no trace.
    """
    traces = sorted(folder.glob("*.pt.trace.json*"), key=lambda trace: trace.stat().st_mtime_ns)
    if not traces:
        raise SystemExit(f"{folder}: the engine has left no trace of its profile")
    opened = gzip.open if traces[-1].suffix == ".gz" else open
    with opened(traces[-1], "rt") as file:
        events = json.load(file)["traceEvents"]
    return sum(event["dur"] for event in events if event.get("cat") == "kernel") / 1e3


class Variant:
    """An engine in a process of its own.

    Attributes:
        columns: of its result rows; those that the engine decides are there once it is ready.
    """

    def __init__(self, name: str, options: dict[str, Any]):
        self.name = name
        self.columns = {"variant": name}
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, options))
        self._process.start()
        theirs.close()

    def wait(self) -> float:
        """Wait until it is ready; returns the seconds that the engine took."""
        seconds, decided = self._answer()
        self.columns |= decided
        return seconds

    def generate(self, prompts: list[list[int]], tokens: int, profile: bool = False) -> Answer:
        """`tokens` greedy tokens for each prompt, all prompts at once."""
        self._pipe.send((prompts, tokens, profile))
        return self._answer()

    def _answer(self) -> Any:
        """What the engine says next.

        Raises:
            SystemExit: it has ended instead.
        """
        said = received(self._pipe)
        if said is None:
            raise SystemExit(f"{self.name}: its engine has ended; the reason stands above")
        return said

    def hang_up(self) -> None:
        """Let the engine end."""
        self._pipe.close()

    def join(self) -> None:
        self._process.join()


@contextlib.contextmanager
def running(options: Mapping[str, dict[str, Any]]) -> Iterator[list[Variant]]:
    """Engines by variant, started at the same time and all ready; they end with the context."""
    for name, of_engine in options.items():
        progress(f"{name}: starting with {of_engine['kv_cache_memory_bytes'] / 2**30:.1f} GiB of cache")
    variants = [Variant(name, of_engine) for name, of_engine in options.items()]
    try:
        for variant in variants:
            progress(f"{variant.name} was ready after {variant.wait():.0f} s")
        yield variants
    finally:
        for variant in variants:
            variant.hang_up()
        for variant in variants:
            variant.join()
