"""What can be asked of the decode step, and the slots that follow from it.

Options of the engine, in vLLM's `additional_config`:

| key | default | meaning |
|---|---|---|
| `bamba_fused_step` | see below | decode with kernels of our own instead of vLLM's operators |
| `bamba_replay` | 16 | tokens after which a state is written; 0: after every one. One of 0, 8, 16, 32 |
| `bamba_state_dtype` | see below | `"int8"`, `"fp8"` (e4m3): 8 bits, scaled by channel |
| `bamba_prefill_graphs` | true | short prefills as CUDA graphs, with either step, where vLLM has piecewise ones |

The step is on by default on the GPUs that its tests and its tables are from, compute capability 9.0, with bf16
activations, unless the checkpoint is quantised or blocks go to other engines or to the host. Elsewhere it can be asked
for. Drafted tokens of speculative decoding cost it no states, but it takes them back without prefix caching only, and
from a ring of more than twice as many: with caching, or more than 7 drafts and `bamba_replay` as it is, it is not the
default.

Where the step is on by default, states are in int8, the fastest precision that predicts as fp32 does
(benchmarks/bench_accuracy.py), unless `--mamba-ssm-cache-dtype` or `--mamba-cache-dtype` is given. Elsewhere these
decide.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm import envs
from vllm.platforms import current_platform

from vllm_bamba import logger
from vllm_bamba.compat import moves_blocks
from vllm_bamba.options import given_options
from vllm_bamba.prefix.options import active, unit_of
from vllm_bamba.state import EIGHT_BITS, SlotFormat, mixer_shard, state_dtypes, state_shapes

if TYPE_CHECKING:
    from vllm.config import CacheConfig, VllmConfig

    from vllm_bamba.config import BambaShape
    from vllm_bamba.ops.skinny_linear.tuning import Tuning

REPLAYS = (0, 8, 16, 32)


@dataclass(frozen=True)
class StepOptions:
    """What `additional_config` says of the decode step.

    Attributes:
        best: whether the fused step can serve, and was shown to be right and fast here.
    """

    fused: bool = False
    replay: int = 16
    eight_bits: torch.dtype | None = None
    prefill_graphs: bool = True
    best: bool = False

    @classmethod
    def of(cls, vllm_config: VllmConfig, shape: BambaShape) -> StepOptions:
        """Read and check; what is not said is decided by GPU and model.

        Raises:
            ValueError: an option has a name or a value that makes no sense.
        """
        given = given_options(vllm_config)
        fused, replay = given.get("bamba_fused_step"), given.get("bamba_replay", cls.replay)
        dtype, graphs = given.get("bamba_state_dtype"), given.get("bamba_prefill_graphs", cls.prefill_graphs)
        if not isinstance(fused, bool | None):
            raise ValueError(f"additional_config: bamba_fused_step is {fused!r}, expected true or false.")
        if not isinstance(graphs, bool):
            raise ValueError(f"additional_config: bamba_prefill_graphs is {graphs!r}, expected true or false.")
        if replay not in REPLAYS or isinstance(replay, bool):
            raise ValueError(f"additional_config: bamba_replay is {replay!r}, expected one of {REPLAYS}.")
        if dtype not in (None, *EIGHT_BITS):
            raise ValueError(
                f"additional_config: bamba_state_dtype is {dtype!r}, expected one of {[*EIGHT_BITS]}; other dtypes are "
                "set with --mamba-ssm-cache-dtype."
            )
        best = _is_best(vllm_config, shape, replay)
        if fused is None:
            fused = best
        if not fused and {"bamba_replay", "bamba_state_dtype"} & given.keys():
            raise ValueError("additional_config: bamba_replay and bamba_state_dtype need bamba_fused_step: true.")
        if dtype is None and fused and best and _leaves_precision_open(vllm_config.cache_config):
            dtype = "int8"
        return cls(fused, replay, EIGHT_BITS[dtype] if dtype else None, graphs, best)


def _leaves_precision_open(cache: CacheConfig) -> bool:
    """Whether the user has not said in which precision states are kept."""
    return cache.mamba_ssm_cache_dtype == "auto" and cache.mamba_cache_dtype == "auto"


def _is_best(vllm_config: VllmConfig, shape: BambaShape, replay: int) -> bool:
    """As `StepOptions.best`."""
    return (
        current_platform.is_cuda()
        and current_platform.is_device_capability((9, 0))
        and vllm_config.model_config.dtype == torch.bfloat16
        and vllm_config.model_config.quantization is None
        and not moves_blocks(vllm_config)
        and _obstacle(vllm_config, shape, replay) is None
    )


def skinny_tuning(vllm_config: VllmConfig) -> Tuning | None:
    """How products of few rows are launched on this GPU.

    None where there is no table for it, weights are not in bf16, or the user asked for another way: batch-invariant
    kernels or a linear backend.
    """
    if (
        not current_platform.is_cuda()
        or envs.VLLM_BATCH_INVARIANT
        or vllm_config.kernel_config.linear_backend != "auto"
        or vllm_config.model_config.dtype != torch.bfloat16
    ):
        return None
    from vllm_bamba.ops.skinny_linear.tuning import tuning_for  # needs Triton

    capability = current_platform.get_device_capability()
    return tuning_for((capability.major, capability.minor), current_platform.get_device_name()) if capability else None


def is_all_kernels(vllm_config: VllmConfig, shape: BambaShape) -> bool:
    """Whether the model will be kernels of ours from end to end, which leaves torch.compile nothing to fuse.

    That is so where the fused step is the default and `stream.py` serves all linear layers: one rank, no adapters, no
    biases and no weights on the host, on a GPU that `skinny_linear` has a table for. A weight whose sizes no launch
    fits takes vLLM's way all the same. Nobody has seen pipeline stages so.
    """
    options, biased = (
        StepOptions.of(vllm_config, shape),
        shape.attention_bias or shape.mlp_bias or shape.mamba_proj_bias,
    )
    return (
        options.fused
        and options.best
        and linears_stand_alone(vllm_config)
        and vllm_config.parallel_config.pipeline_parallel_size == 1
        and vllm_config.offload_config.uva.cpu_offload_gb == 0
        and not biased
        and skinny_tuning(vllm_config) is not None
    )


def linears_stand_alone(vllm_config: VllmConfig) -> bool:
    """Whether linear layers have neither other ranks to add up with nor adapters."""
    return vllm_config.parallel_config.tensor_parallel_size == 1 and vllm_config.lora_config is None


def check_step(vllm_config: VllmConfig, shape: BambaShape) -> None:
    """Check that the chosen decode step can serve; where states are in int8 by default, the log says so.

    Raises:
        ValueError: it cannot, or neither step can; the message says what to change.
    """
    options = StepOptions.of(vllm_config, shape)
    if not options.fused and vllm_config.speculative_config is not None and current_platform.is_cpu():
        raise ValueError(
            "speculative decoding of Bamba needs a GPU: vLLM's CPU convolution cannot take rejected tokens back. "
            "Leave --speculative-config out."
        )
    if _replays_prompts(vllm_config):
        raise ValueError(
            "speculative decoding on Model Runner V1: its full CUDA graphs take prompts of as many tokens for drafted "
            "ones, and write states of other requests. Use Model Runner V2, with another method in "
            "--speculative-config or without VLLM_USE_V2_MODEL_RUNNER=0, or --compilation-config "
            '\'{"cudagraph_mode": "PIECEWISE"}\', or --enforce-eager.'
        )
    obstacle = _obstacle(vllm_config, shape, options.replay, options.eight_bits)
    if options.fused and obstacle:
        raise ValueError(
            f"additional_config: bamba_fused_step cannot be used here: {obstacle}. Change that, or leave out "
            "bamba_fused_step, bamba_replay and bamba_state_dtype."
        )
    if options.eight_bits and "bamba_state_dtype" not in given_options(vllm_config):
        logger.info("SSM states are kept in int8; --mamba-ssm-cache-dtype says otherwise.")


def _replays_prompts(vllm_config: VllmConfig) -> bool:
    """Whether graphs of drafted tokens are replayed for prompts of as many: Model Runner V1 goes by numbers alone."""
    if (
        vllm_config.num_speculative_tokens == 0
        or not current_platform.is_cuda()
        or vllm_config.use_v2_model_runner
        or vllm_config.model_config.enforce_eager
    ):
        return False
    mode = vllm_config.compilation_config.cudagraph_mode
    return mode is None or mode.has_full_cudagraphs()  # None: vLLM has yet to choose


def _obstacle(
    vllm_config: VllmConfig, shape: BambaShape, replay: int, eight_bits: torch.dtype | None = None
) -> str | None:
    """Why the fused step cannot serve, None where it can; `replay` matters with drafts only."""
    drafts, mamba = vllm_config.num_speculative_tokens, vllm_config.mamba_config
    fitting = [str(tokens) for tokens in REPLAYS if tokens > 2 * drafts]
    sizes = {"mamba_d_head": shape.mamba_head_dim, "mamba_d_state": shape.mamba_state}
    odd = [
        f"{name} = {size} is no power of two from 16 on"
        for name, size in sizes.items()
        if size & (size - 1) or size < 16
    ]
    reasons = {
        " and ".join(odd): bool(odd),
        "fp8 states need a GPU of compute capability 8.9 or later": eight_bits == torch.float8_e4m3fn
        and current_platform.is_cuda()
        and not current_platform.has_device_capability(89),
        "speculative decoding takes tokens back, for which states must not be cached (--no-enable-prefix-caching)": (
            vllm_config.speculative_config is not None and vllm_config.cache_config.enable_prefix_caching
        ),
        f"{drafts} drafted tokens do not fit bamba_replay {replay} ({' and '.join(fitting) or 'none'} would do)": (
            drafts > 0 and replay <= 2 * drafts
        ),
        "--mamba-backend asks for other kernels": mamba.backend.name != "TRITON",
        "--enable-mamba-cache-stochastic-rounding is for vLLM's (8-bit states are rounded so anyway)": (
            mamba.enable_stochastic_rounding
        ),
        "there is no NVIDIA GPU": not current_platform.is_cuda() and os.environ.get("TRITON_INTERPRET") != "1",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def anchors_slots(vllm_config: VllmConfig, replay: int) -> bool:
    """Whether slots of the fused step, with rings of `replay` tokens, are anchored: see `SlotFormat`.

    Model Runner V2 asks `model_state.py`, which has the rings folded, at the end of every unit of prefix slots.
    """
    return active(vllm_config) and vllm_config.use_v2_model_runner and replay >= unit_of(vllm_config)


def slot_format(vllm_config: VllmConfig, shape: BambaShape) -> SlotFormat | None:
    """How slots are laid out for the fused step; None where vLLM's operators take it."""
    options = StepOptions.of(vllm_config, shape)
    if not options.fused:
        return None
    cache, dtype = vllm_config.cache_config, vllm_config.model_config.dtype
    conv_dtype, state_dtype = state_dtypes(dtype, cache)
    shard = mixer_shard(shape, vllm_config.parallel_config.tensor_parallel_size)
    state_dtype = options.eight_bits or state_dtype
    anchored = anchors_slots(vllm_config, options.replay)
    drafts = vllm_config.num_speculative_tokens
    return SlotFormat(shard, shape.conv_width, conv_dtype, state_dtype, options.replay, anchored, drafts)


def slot_shapes(vllm_config: VllmConfig, shape: BambaShape) -> tuple[tuple[int, ...], ...]:
    """Shapes of the two tensors of a slot on one rank, as vLLM allocates them."""
    if form := slot_format(vllm_config, shape):
        return form.shapes()
    return state_shapes(shape, vllm_config.parallel_config.tensor_parallel_size, vllm_config.num_speculative_tokens)


def slot_dtypes(vllm_config: VllmConfig, shape: BambaShape) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the two tensors of `slot_shapes`."""
    if form := slot_format(vllm_config, shape):
        return form.dtypes()
    return state_dtypes(vllm_config.model_config.dtype, vllm_config.cache_config)
