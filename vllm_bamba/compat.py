"""Every touch of a vLLM internal that may move: what it is, why it is needed, where it was seen, when it can go.

Imports of vLLM's documented building blocks (`Attention`, the linear layers, `RMSNorm`, `MambaBase`, ...) stand in the
modules that use them; what a model outside vLLM's tree would not normally touch stands here, but for the methods that
`prefix/managers.py`, `prefix/scheduler.py`, `state_metadata.py`, `model_state.py`, `lora.py` and `linear.py` override.

Each was read in 0.32 and 0.33, and run in 0.32 on CPUs and in 0.33 on GPUs, unless it says otherwise.

`MODELS_CONFIG_MAP` (in `register`)
    Checks before weights are loaded. Goes when vLLM has a public hook.
`_LazyRegisteredModel` in `ModelRegistry.models`, `_ModelInfo` and where it is kept (in `registration.py`)
    A first start asks the class what it can do without a second Python for it. Goes when vLLM lets plugins say so.
`CompilationConfig.inductor_compile_config`
    Products between pieces of the model keep their strides: see `keep_strides`. Goes when pieces check their inputs.
`VLLM_USE_BREAKABLE_CUDAGRAPH`, `eager_break_during_capture` around `mamba_mixer2`
    Graphs of prefills without torch.compile: see `cut_graphs_without_compiling`. Run in 0.33 alone. Goes when vLLM asks
    a model's class.
`vllm.v1.sample.ops.topk_topp_sampler.apply_top_k_top_p`
    Its kernels are made while weights are loaded: see `sampler_warm_ups`. Goes when vLLM makes them in threads.
`TRITON_CACHE_DIR`
    Kernels are kept from one start to the next: see `keep_compiled_kernels`. Goes when vLLM sets it in every start.
operator `vllm::mamba_mixer2`
    Opaque to torch.compile and a place where CUDA graphs are cut; calls the layer's `conv_ssm_forward`. Goes when
    plugins can add operators to the list of those places.
`Mamba2AttentionMetadata`, `Mamba2AttentionMetadataBuilder`
    Slots and chunks of the batch. Goes when vLLM documents what a builder has to give.
`MambaPrefillCheckpointBuilder`, `MambaSpec.num_prefill_checkpoint_blocks`, `MambaManager._needs_internal_checkpoint`
    A state inside of a prefill is kept without a step of its own: see `state_metadata.py`. Goes with the slots; vLLM's
    own caching needs the first two of any mixer.
`MambaSpec.num_speculative_blocks`
    0 with the fused step, which takes drafted tokens back inside of a state. Goes when vLLM asks layers how many states
    they need.
`CacheConfig.hash_block_size` (None while memory is profiled), `CommonAttentionMetadata.seq_lens_cpu_upper_bound` and
`.is_prefilling`, `VllmConfig.use_v2_model_runner`
    What the builder reads of a batch, with `regather_state_indices` and `async_tensor_h2d`. Goes with the builder.
`ForwardContext.cudagraph_runtime_mode`, `update_block_table`, `nums_dict` of `causal_conv1d_fn`'s metadata
    Short prefills are graphs of each mixer, captured when vLLM captures its piecewise ones and described at addresses
    that stay: see `prefill_graphs.py`. Goes when vLLM's own graphs of prefills take mixers in.
`get_model_state_cls`, `MambaHybridModelState.initialize_kv_cache`, `.preprocess_state`, `.postprocess_state`,
`num_computed_tokens_np` of V2's batch, `input_block_tables`
    Model Runner V2 moves only states that go on in another block: see `model_state.py`. Run in 0.33; the CPU engine has
    V1 alone. Goes when vLLM's kernels are launched for those states alone.
`MambaHybridModelState.add_request`, `.prepare_attn`, `idx_mapping_np` and `num_reqs_after_padding` of V2's batch,
`num_blocks` of its block tables
    Mamba layers are asked again about a batch of decodes only if something has changed. Likewise run in 0.33 alone.
    Goes when vLLM keeps what it said of a batch.
`vllm.model_executor.layers.mamba.ops`
    The operators underneath ours. Goes operator by operator, as each gets a kernel of its own.
`configs`, `cache` and `cache_results` of its autotuned scan kernels (Triton 3.6 and 3.9)
    A table can fix launches, so that starts need not try them out. Goes with the scan's kernels.
`find_matched_target` (by the name of `mixer.InProjectionLinear`)
    compressed-tensors' target "Linear" is looked for in a layer's class name. Goes when vLLM asks for the base class.
`QuantizationConfig.get_cache_scale_mapper`, `.get_checkpoint_weight_mapper`
    A quantised checkpoint's own names, and tensors that no kernel reads: see `in_vllms_names`. Run on CPUs
    alone. Goes when vLLM maps names before it gives a model its weights.
`modules_to_not_convert` of `AutoAWQConfig`
    Parameters of a mixer itself have vLLM take its projections for unquantised: see `tell_mixers_parts_apart`. Run on
    CPUs alone. Goes when vLLM lists modules whose `weight` is not quantised.
`UnquantizedLinearMethod` and `UnquantizedEmbeddingMethod` as a layer's `quant_method`, `direct_register_custom_op`
    Products of few rows are ours (`linear.py`). Goes when vLLM's own are as fast.
`get_offloader`
    Where vLLM brings a layer's weights when it calls the layer, layers are called one by one: see `moves_layers`. Goes
    when offloaders say what a layer may read.
`torch.ops._C.silu_and_mul`
    vLLM's layer for it cannot be made inside of an operator. Goes when it has a function.
`CacheConfig.mamba_ssm_cache_dtype`
    fp32 states on CPUs: see `choose_state_dtype`. Goes when vLLM's C++ step rounds.
`supported_kv_cache_layouts`
    Pipeline stages without attention must agree with the others. Goes when vLLM intersects the workers' lists.
`Platform.update_block_size_for_backend`, `._find_non_ssm_backends`
    The same stages must lay states out as the others do: see `align_blocks`. Goes when vLLM aligns blocks by the model.
`vllm.lora.ops.torch_ops.lora_ops.bgmv_shrink`
    On CPUs, requests without an adapter got one. Goes with 0.32.
`base_layer` in the names of parameters (in `weights.load_weights`)
    Where adapters are served, vLLM's LoRA layers stand between a module and its weights, which may be reloaded. Goes
    when vLLM reloads what they wrap.
`vllm.lora.utils._all_lora_classes`
    Adapters of `in_proj` where B and C are copied to several ranks. Goes when vLLM asks layers for their wrapper.
`scheduler_cls`, `Scheduler._mamba_block_aligned_split`
    Where prefills stop, and whom the scheduler asks. Goes when vLLM has a public hook.
the same, and `Scheduler.need_mamba_block_aligned_split`
    vLLM pads a prompt of one token with placeholders of drafts, and they stay in its state: see below.
the same, and `MambaManager.cache_blocks`
    vLLM publishes a wrong state where prompts part: see below.
the same, `Scheduler._handle_stopped_request`, `._update_request_as_session`, `._update_after_schedule`,
`SchedulerOutput.preempted_req_ids`, `Request.num_output_placeholders` and `.resumable`
    vLLM goes on with a streaming session from a state that is ahead of its text: see below.
`MambaSpec.state_content_size_bytes`
    vLLM cuts copies of shared attention blocks short: see below.
`Scheduler.schedule`, `._preempt_request`, `._free_request_blocks`, `._update_request_as_session`,
`.reset_prefix_cache`
    Steps that are not run, requests that end or go on with more of a prompt, caches that are emptied. Goes with the
    slots.
`MambaManager.get_num_blocks_to_allocate`, `.allocate_new_blocks`, `BlockPool.is_block_writable`,
`KVCacheManager.create_kv_cache_blocks`, its coordinator's `single_type_managers`
    An answer of anchored slots stays in its block; in 0.32 only simulated, since those need V2. Goes when vLLM lets a
    state's block serve for more than one column.
`KVCacheManager.allocate_slots`, `.cache_blocks`, `.remove_skipped_blocks`, `.empty_kv_cache_blocks`, `.max_model_len`,
its coordinator's `group_block_sizes`, `KVCacheBlocks.get_block_ids`, `Request.num_in_flight_tokens`
    Groups are asked only when they have something to do. Goes when vLLM does not ask each of them for each token.
`KVCacheManager.estimate_cached_tokens`
    Called once a request, before its first token is given out; vLLM's scans all blocks, ours stops at the last one with
    a key. Goes when vLLM's does.
`CacheConfig.kv_offloading_size`
    Becomes a KV connector after the model's checks: see `moves_blocks`. Goes when vLLM makes it before.
`KVCacheSpecRegistry`
    Cache managers of our own; registering is vLLM's way.
`BlockPool`: its queue, its keys, `get_new_blocks`
    Slots go whole, by value. Goes when vLLM takes an eviction policy.
`BaseRenderer.render_chat`, `.render_chat_async`, `InputProcessor.process_inputs`
    Where a chat's system messages end is known where it is rendered, and is wanted in the scheduler. Goes when vLLM
    tells schedulers of messages.
`CacheConfig.mamba_block_size`
    Model Runner V2 counts states by it, and `model_state.py` with it. Goes when it asks the specification.

Four of these work round bugs of vLLM's, which serve wrong tokens:

- *Placeholders in a state.* With drafted tokens, `Scheduler.schedule` pads a new request of one token to those of a
  decode where others decode. It has no state yet and so is a prefill, whose state then has seen the placeholders. It
  can go when `test_fused.py::test_a_prompt_of_one_token_that_comes_while_others_draft` passes with vLLM's scheduler.
- *Wrong state published where prompts part.* With a match unit, `Scheduler._mamba_block_aligned_split` counts the
  stop in blocks from the chunk's start, not from the text's, and `MambaManager` then gives the state of another
  position that position's key. Ours stops exactly there and keys nothing but the state on which a step ends. It can go
  when vLLM's own scheduler passes `test_simulated.py::test_vllm_alone_resumes_from_a_wrong_state` turned round.
- *A state ahead of its text.* `Scheduler._handle_stopped_request` takes back the token that ended a session's answer,
  and with asynchronous scheduling a step that is in flight has put it into the state. Ours computes such sessions
  again. It can go when `test_simulated.py::test_vllm_alone_goes_on_with_a_session_from_a_wrong_state` fails, for
  sessions with drafts when workers keep their states, too.
- *Copies cut short.* `v1.worker.utils.copy_kv_cache_blocks_inplace` copies each address once; the first view of an
  address may be a Mamba layer's, which leaves out the page's padding, and with it the end of an attention block. With
  a specification that counts its padding as content all views are whole. It can go when that function copies pages.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from vllm import envs
from vllm.model_executor.layers.mamba.mamba_mixer2 import mamba_mixer2  # vllm::mamba_mixer2
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    is_conv_state_dim_first,
)
from vllm.model_executor.offloader import NoopOffloader, get_offloader
from vllm.platforms import current_platform
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionBackend, Mamba2AttentionMetadata
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.core.kv_cache_utils import get_block_hash, make_block_hash_with_group_id
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_bamba import logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId, KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheSpec

Spec = TypeVar("Spec", bound="KVCacheSpec")

__all__ = [
    "Mamba2AttentionMetadata",
    "MambaStateCopyFuncCalculator",
    "MambaStateDtypeCalculator",
    "add_key",
    "align_blocks",
    "autotuned_kernels",
    "before_allocation",
    "check_options",
    "choose_state_dtype",
    "cut_graphs_without_compiling",
    "fix_launches",
    "forget_autotuning",
    "free_blocks_in_order",
    "in_vllms_names",
    "is_conv_state_dim_first",
    "keep_compiled_kernels",
    "keep_strides",
    "key_of",
    "measure_system_messages",
    "mix_opaquely",
    "move_to_front",
    "moves_blocks",
    "moves_layers",
    "prepare_lora",
    "register_manager",
    "remove_keys",
    "replace_spec",
    "sampler_warm_ups",
    "set_state_block",
    "silu_and_mul",
    "state_backend",
    "tell_mixers_parts_apart",
]


def moves_layers() -> bool:
    """Whether weights of a layer may be elsewhere until vLLM calls the layer (`--cpu-offload-gb`)."""
    return not isinstance(get_offloader(), NoopOffloader)


def check_options(vllm_config: VllmConfig) -> None:
    """Raise ValueError for vLLM options that this model would otherwise get wrong, or fail with late."""
    if vllm_config.cache_config.use_replayssm:
        raise ValueError("--use-replayssm is a feature of vLLM's own mixer; leave it out for Bamba.")
    offload = vllm_config.offload_config
    if offload.prefetch.offload_group_size > 0 and offload.offload_backend != "uva":
        raise ValueError(
            "weights that are prefetched group by group gave wrong answers for Bamba: leave --offload-group-size out; "
            "--cpu-offload-gb works."
        )
    lora = vllm_config.lora_config
    if lora is not None and lora.fully_sharded_loras and vllm_config.parallel_config.tensor_parallel_size > 1:
        raise ValueError("--fully-sharded-loras does not work with Bamba's in_proj; leave it out.")


def moves_blocks(vllm_config: VllmConfig) -> bool:
    """Whether something outside of the scheduler moves blocks of the cache; true from the first check on.

    vLLM makes a KV connector of `--kv-offloading-size` only after models have been asked for their checks.
    """
    return vllm_config.kv_transfer_config is not None or vllm_config.cache_config.kv_offloading_size is not None


def choose_state_dtype(vllm_config: VllmConfig) -> None:
    """Keep the SSM state in fp32 on CPUs, unless the user chose.

    On CPUs without AVX512-BF16 vLLM's C++ step cuts bf16 states off towards zero. The error of a slow-decay head then
    grows with every token, where rounding would let it average out. Seen in 0.32; goes when the C++ step rounds
    everywhere.
    """
    if current_platform.is_cpu() and vllm_config.cache_config.mamba_ssm_cache_dtype == "auto":
        vllm_config.cache_config.mamba_ssm_cache_dtype = "float32"


def in_vllms_names(
    weights: Iterable[tuple[str, torch.Tensor]], quant_config: QuantizationConfig | None
) -> Iterable[tuple[str, torch.Tensor]]:
    """Rename what formats of quantised checkpoints name in ways of their own, and leave out what no kernel reads.

    Fp8's `k_proj.output_scale`, for example, is the scale of cached keys, and GPTQ's `g_idx` is left out. vLLM's
    `AutoWeightsLoader` does this for models that load their weights with it.
    """
    if quant_config is None:
        return weights
    return (quant_config.get_cache_scale_mapper() | quant_config.get_checkpoint_weight_mapper()).apply(weights)


def tell_mixers_parts_apart(vllm_config: VllmConfig) -> None:
    """Have a list of unquantised modules that names parts of a mixer not name the whole mixer beside them.

    Where an AWQ checkpoint has no such list, vLLM makes one of every module with a tensor in floating point. A mixer is
    one, for A_log, D and dt_bias, and so all that is in it would count as unquantised. A list that names no parts was
    written by hand, and means the mixer.
    """
    quant_config = vllm_config.quant_config
    names = getattr(quant_config, "modules_to_not_convert", None) or ()
    whole = {name for name in names if name.endswith(".mamba") and any(n.startswith(f"{name}.") for n in names)}
    if whole:
        quant_config.modules_to_not_convert = [name for name in names if name not in whole]


_BREAKABLE = "VLLM_USE_BREAKABLE_CUDAGRAPH"
_set_here: set[str] = set()


def cut_graphs_without_compiling(wanted: bool) -> None:
    """Have vLLM find where graphs of prefills are cut while it captures them, instead of by torch.compile.

    vLLM does so for a list of its own models, and for who says so in the environment; what the user said there stays.
    As with those models it then holds for the process and its workers, here until a Bamba is configured that does not
    want it. In 0.32 the places to cut are fixed before there is a configuration: nothing changes.
    """
    if wanted and hasattr(mamba_mixer2, "__wrapped__"):
        if _BREAKABLE not in os.environ:
            os.environ[_BREAKABLE] = "1"
            _set_here.add(_BREAKABLE)
            logger.info("torch.compile has nothing to fuse and is left out; %s=0 brings it back.", _BREAKABLE)
    elif _BREAKABLE in _set_here:
        _set_here.remove(_BREAKABLE)
        os.environ.pop(_BREAKABLE, None)


def sampler_warm_ups(vocab_size: int, device: torch.device) -> list[Callable[[], object]]:
    """Calls that have vLLM's kernels of top-k and top-p made, some each; none where FlashInfer's kernels sample.

    Args:
        vocab_size: columns of logits.
        device: a GPU.
    """
    if envs.VLLM_USE_FLASHINFER_SAMPLER:
        return []
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    # as in vLLM's own warm-up each row has a k and a p; 0.33 wants to be told that none has a p alone
    parameters = inspect.signature(apply_top_k_top_p).parameters
    more = {"has_topp_only_rows": False} if "has_topp_only_rows" in parameters else {}

    def sample(rows: int) -> None:
        logits = torch.zeros(rows, vocab_size, dtype=torch.float32, device=device)
        k = torch.ones(rows, dtype=torch.int32, device=device)
        apply_top_k_top_p(logits, k, torch.ones(rows, dtype=torch.float32, device=device), **more)

    return [functools.partial(sample, rows) for rows in (1, 2, 128)]  # one, few and many rows have their kernels


def keep_strides(vllm_config: VllmConfig) -> None:
    """Have torch.compile hand on products as they are, unless the user chose.

    Inductor may compute a product whose sizes are not multiples of 8 as part of a wider one, if that looks faster when
    the model is compiled. Rows of its result then lie further apart than the next piece of the model was compiled for,
    which looks for a gate there; vLLM has turned off the checks that would notice, and its LoRA kernels, which do
    check, refuse. Seen in 0.33 with torch 2.11: an in_proj of 580 rows, wrong answers of one start in three on a busy
    machine. Goes when pieces check their inputs.
    """
    vllm_config.compilation_config.inductor_compile_config.setdefault("shape_padding", False)


def keep_compiled_kernels() -> None:
    """Have Triton keep all kernels of this process in one folder of vLLM's cache, unless the user has named another.

    By default a first start leaves most of them in a folder of Inductor's, for this configuration alone, and the next
    start, which loads what Inductor made and never calls it, looks for them in Triton's own: it makes them all again.
    A process that has compiled something before looks as if the user had named that folder. Seen in 0.33 with torch
    2.11.
    """
    if current_platform.is_cuda_alike():
        os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(envs.VLLM_CACHE_ROOT, "triton_cache"))


def mix_opaquely(projected: torch.Tensor, mixed: torch.Tensor, layer_name: str) -> None:
    """Call `conv_ssm_forward(projected_states=projected, output=mixed)` of the layer, hidden from torch.compile.

    vLLM's own operator does just that for whatever layer is registered under the name; it is on vLLM's list of
    operators at which piecewise CUDA graphs are cut, which a plugin cannot extend.
    """
    torch.ops.vllm.mamba_mixer2(projected, mixed, _encode_layer_name(layer_name))


def autotuned_kernels(*modules: ModuleType) -> dict[str, Any]:
    """The kernels of these modules that Triton autotunes, by name."""
    from triton.runtime.autotuner import Autotuner

    return {n: kernel for module in modules for n, kernel in vars(module).items() if isinstance(kernel, Autotuner)}


def forget_autotuning(*modules: ModuleType) -> None:
    """Have Triton try the launches of these modules' kernels again."""
    from vllm.model_executor.layers.mamba.ops import triton_helpers

    for kernel in autotuned_kernels(*modules).values():
        kernel.cache_results = False
        kernel.cache.clear()
    getattr(triton_helpers, "_autotuned_configs", {}).clear()  # vLLM's own record, since 0.33


def fix_launches(launches: Mapping[str, Mapping[str, int]], *modules: ModuleType) -> None:
    """Launch autotuned kernels of these modules in one way, without trying others.

    Args:
        launches: tile sizes, num_warps and num_stages, by kernel; one that vLLM no longer has is left out.
        modules: where the kernels are.
    """
    from triton import Config

    kernels = autotuned_kernels(*modules)
    for name in launches.keys() & kernels.keys():
        tile = dict(launches[name])
        options = {option: tile.pop(option) for option in ("num_warps", "num_stages")}
        if all(tile.keys() == config.kwargs.keys() for config in kernels[name].configs):
            kernels[name].configs = [Config(tile, **options)]


def state_backend(head_dim: int, dtype: torch.dtype, kv_cache_dtype: str | None) -> type[AttentionBackend]:
    """vLLM's Mamba-2 metadata backend, with the KV-cache layouts of the attention backend that serves this model.

    Its builder is `state_metadata.StateMetadataBuilder`.

    On vLLM 0.32 and 0.33 every worker reports the layouts that its backends support and all lists must be equal. A
    pipeline stage of Mamba layers alone would report every layout and the engine would not start ("Workers disagree
    on supported KV cache layouts"), although one resolved layout suits all of them.
    """
    return _state_backend(get_attn_backend(head_dim, dtype, kv_cache_dtype))


def align_blocks(vllm_config: VllmConfig, states: type[AttentionBackend]) -> None:
    """Make a state's block as long as an attention block on pipeline stages that have no attention layer, too.

    Each of vLLM's workers makes states' blocks as long as those of the attention that it finds among its own layers. A
    stage without any would keep blocks of 16 tokens beside the others' of several hundred, and vLLM would stop prefills
    by the shorter ones but give their states the keys of the longer. Does nothing where it is done already.

    Args:
        vllm_config: whose `cache_config` is changed.
        states: what `state_backend` gave.
    """
    if vllm_config.cache_config.mamba_page_size_padded is not None:
        return
    platform = type(current_platform)

    class WithAttention(platform):  # type: ignore[valid-type, misc]
        @classmethod
        def _find_non_ssm_backends(cls, vllm_config: VllmConfig) -> list[type[AttentionBackend]]:
            return [states.attention]  # type: ignore[attr-defined]

    WithAttention.update_block_size_for_backend(vllm_config)


@functools.cache
def _state_backend(of_attention: type[AttentionBackend]) -> type[AttentionBackend]:
    from vllm_bamba.state_metadata import StateMetadataBuilder

    class BambaStateBackend(Mamba2AttentionBackend):
        attention = of_attention

        @staticmethod
        def get_builder_cls() -> type[StateMetadataBuilder]:
            return StateMetadataBuilder

        @classmethod
        def supported_kv_cache_layouts(cls) -> Any:
            return cls.attention.supported_kv_cache_layouts()

    return BambaStateBackend


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last dimension, in vLLM's kernel."""
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    torch.ops._C.silu_and_mul(out, x)
    return out


def prepare_lora(wrapper: type) -> None:
    """Have vLLM try `wrapper` before its own LoRA layers, and keep adapters to their rows; safe to call again."""
    from vllm.lora import utils

    if wrapper not in utils._all_lora_classes:
        utils._all_lora_classes = (wrapper, *utils._all_lora_classes)
    if current_platform.is_cpu():
        _mask_rows_without_adapter()


def _mask_rows_without_adapter() -> None:
    """Keep adapters away from requests that asked for none.

    vLLM 0.32's CPU operators take the index of such a row, -1, for the last adapter, so a request without an adapter
    in a batch with others gets one. The path to an adapter of a projection shrinks the input first, and a row of zeros
    shrinks to zeros. Fixed in 0.33; goes with 0.32.
    """
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    shrink = lora_ops.bgmv_shrink
    if hasattr(shrink, "__wrapped__"):
        return

    @functools.wraps(shrink)
    def masked(inputs: Any, weights: Any, output: Any, adapters: Any, scaling: float = 1.0) -> None:
        shrink(inputs * (adapters >= 0)[:, None], weights, output, adapters, scaling)

    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = masked


# prefix caching: vLLM's blocks, their keys and their queue


def register_manager(spec: type[KVCacheSpec], manager: type, like: type[KVCacheSpec]) -> None:
    """Have vLLM manage layers of this specification with `manager`, in one group with those of `like`."""
    KVCacheSpecRegistry._ensure_registered()  # else a process that begins with ours would lack vLLM's own
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=like)


def replace_spec(kind: type[Spec], spec: KVCacheSpec, **changes: Any) -> Spec:
    """The same cache specification as another class, with some fields changed."""
    return kind(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init} | changes)


def set_state_block(vllm_config: VllmConfig, tokens: int) -> None:
    """Tell vLLM of the tokens of a state's block; what it sets itself is the attention block's."""
    vllm_config.cache_config.mamba_block_size = tokens


def key_of(block: KVCacheBlock) -> BlockHash:
    """The hash under which a state block is found, without its group."""
    assert block.block_hash is not None
    return get_block_hash(block.block_hash)


def add_key(pool: BlockPool, block: KVCacheBlock, text: BlockHash, group: int, tokens: int) -> BlockHashWithGroupId:
    """Have a block found by the hash of a text that ends inside it, beside what finds it already; returns the key."""
    key = make_block_hash_with_group_id(text, group)
    pool._insert_block_hash(key, block, num_tokens=tokens)
    return key


def remove_keys(pool: BlockPool, block: KVCacheBlock) -> None:
    """Have nothing find a block any more."""
    pool._maybe_evict_cached_block(block)


def free_blocks_in_order(pool: BlockPool) -> Iterator[KVCacheBlock]:
    """Free blocks, the one that is given out next first."""
    queue = pool.free_block_queue
    block = queue.fake_free_list_head.next_free_block
    while block is not None and block is not queue.fake_free_list_tail:
        yield block
        block = block.next_free_block


def move_to_front(pool: BlockPool, block: KVCacheBlock) -> None:
    """Give this free block out next."""
    pool.free_block_queue.remove(block)
    pool.free_block_queue.prepend_n([block])


def before_allocation(pool: BlockPool, make_room: Callable[[int], None]) -> None:
    """Call `make_room(blocks)` before the pool gives out that many."""
    allocate = pool.get_new_blocks

    def get_new_blocks(num_blocks: int) -> list[KVCacheBlock]:
        make_room(num_blocks)
        return allocate(num_blocks)

    pool.get_new_blocks = get_new_blocks  # type: ignore[method-assign]


# prefix caching: from a chat's messages to the scheduler


@functools.cache
def measure_system_messages(wanted: Callable[[VllmConfig], bool]) -> None:
    """Have requests of chats say, in `extra_args`, how many of their tokens are system messages.

    Changes nothing for engines that are not `wanted`.
    """
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_bamba.prefix.chat import KEY, SystemParts

    render, render_async = BaseRenderer.render_chat, BaseRenderer.render_chat_async
    process = InputProcessor.process_inputs

    def for_any_answer(tok_params: Any) -> Any:  # how long it may get decides nothing about a prompt's beginning
        return tok_params and replace(tok_params, max_output_tokens=0)

    @functools.wraps(render)
    def render_chat(self: Any, chats: Any, chat_params: Any, tok_params: Any = None, **more: Any) -> Any:
        rendered = render(self, chats, chat_params, tok_params, **more)
        if wanted(self.config):
            parts, settings = SystemParts.of(self), (chat_params, for_any_answer(tok_params))
            for probes in parts.probes(chats, settings):
                try:
                    prompts = render(self, probes, chat_params, tok_params, **more)[1]
                except Exception:  # templates may refuse what they like
                    prompts = []
                parts.learn(probes, settings, prompts)
            parts.mark(chats, settings, rendered[1])
        return rendered

    @functools.wraps(render_async)
    async def render_chat_async(self: Any, chats: Any, chat_params: Any, tok_params: Any = None, **more: Any) -> Any:
        rendered = await render_async(self, chats, chat_params, tok_params, **more)
        if wanted(self.config):
            parts, settings = SystemParts.of(self), (chat_params, for_any_answer(tok_params))
            for probes in parts.probes(chats, settings):
                try:
                    prompts = (await render_async(self, probes, chat_params, tok_params, **more))[1]
                except Exception:
                    prompts = []
                parts.learn(probes, settings, prompts)
            parts.mark(chats, settings, rendered[1])
        return rendered

    @functools.wraps(process)
    def process_inputs(self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, request_id, prompt, *args, **kwargs)
        if isinstance(prompt, dict) and KEY in prompt and request.sampling_params is not None:
            request.sampling_params.extra_args = {KEY: prompt[KEY]} | (request.sampling_params.extra_args or {})
        return request

    BaseRenderer.render_chat = render_chat
    BaseRenderer.render_chat_async = render_chat_async
    InputProcessor.process_inputs = process_inputs
