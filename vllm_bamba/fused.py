"""Mixing with the fused decode step: which slots it keeps, and prefills on vLLM's operators in between.

Options of the engine, in vLLM's `additional_config`:

| key | default | meaning |
|---|---|---|
| `bamba_fused_step` | false | decode with kernels of our own instead of vLLM's operators |
| `bamba_replay` | 16 | tokens after which a state is written; 0: after every one. One of 0, 8, 16, 32 |
| `bamba_state_dtype` | as `--mamba-ssm-cache-dtype` | `"int8"`: 8 bits and a scale for every channel of a head |

The step is off unless asked for: its kernels have been tested and timed alone on an H100, not yet in an engine there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from vllm.platforms import current_platform

from vllm_bamba.ops.causal_conv1d import causal_conv1d_prefill
from vllm_bamba.ops.gated_norm import gate_for_later
from vllm_bamba.ops.ssd_prefill import ssd_prefill
from vllm_bamba.state import DecodePlan, PrefillPlan, SlotFormat, mixer_shard, state_dtypes, state_shapes

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_bamba.config import BambaShape
    from vllm_bamba.mixer import BambaMixer
    from vllm_bamba.ops.mixer_step import StepWeights

REPLAYS = (0, 8, 16, 32)


@dataclass(frozen=True)
class StepOptions:
    """What `additional_config` says of the decode step."""

    KEYS: ClassVar = ("bamba_fused_step", "bamba_replay", "bamba_state_dtype")
    fused: bool = False
    replay: int = 16
    eight_bits: bool = False

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> StepOptions:
        """Read and check.

        Raises:
            ValueError: an option has a value that makes no sense.
        """
        given: dict[str, Any] = vllm_config.additional_config if isinstance(vllm_config.additional_config, dict) else {}
        fused, replay = given.get("bamba_fused_step", cls.fused), given.get("bamba_replay", cls.replay)
        dtype = given.get("bamba_state_dtype")
        if not isinstance(fused, bool):
            raise ValueError(f"additional_config: bamba_fused_step is {fused!r}, expected true or false.")
        if replay not in REPLAYS or isinstance(replay, bool):
            raise ValueError(f"additional_config: bamba_replay is {replay!r}, expected one of {REPLAYS}.")
        if dtype not in (None, "int8"):
            raise ValueError(
                f'additional_config: bamba_state_dtype is {dtype!r}, expected "int8"; other dtypes of the state are '
                "set with --mamba-ssm-cache-dtype."
            )
        if not fused and {"bamba_replay", "bamba_state_dtype"} & given.keys():
            raise ValueError("additional_config: bamba_replay and bamba_state_dtype need bamba_fused_step: true.")
        return cls(fused, replay, dtype == "int8")


def check_step(vllm_config: VllmConfig, shape: BambaShape) -> None:
    """Raise ValueError where the fused step is asked for and cannot serve."""
    if not StepOptions.of(vllm_config).fused:
        return
    sizes = {"mamba_d_head": shape.mamba_head_dim, "mamba_d_state": shape.mamba_state}
    odd = [
        f"{name} = {size} is no power of two from 16 on"
        for name, size in sizes.items()
        if size & (size - 1) or size < 16
    ]
    reasons = {
        " and ".join(odd): bool(odd),
        "speculative decoding takes tokens back": vllm_config.speculative_config is not None,
        "there is no GPU": not current_platform.is_cuda_alike() and os.environ.get("TRITON_INTERPRET") != "1",
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None:
        raise ValueError(f"additional_config: bamba_fused_step cannot be used here: {reason}. Leave it out.")


def slot_format(vllm_config: VllmConfig, shape: BambaShape) -> SlotFormat | None:
    """How slots are laid out for the fused step; None where vLLM's operators take it."""
    options = StepOptions.of(vllm_config)
    if not options.fused:
        return None
    cache, dtype = vllm_config.cache_config, vllm_config.model_config.dtype
    conv_dtype, state_dtype = state_dtypes(dtype, cache)
    shard = mixer_shard(shape, vllm_config.parallel_config.tensor_parallel_size)
    state_dtype = torch.int8 if options.eight_bits else state_dtype
    return SlotFormat(shard, shape.conv_width, conv_dtype, state_dtype, options.replay)


def slot_shapes(vllm_config: VllmConfig, shape: BambaShape) -> tuple[tuple[int, ...], ...]:
    """Shapes of one slot's tensors on one rank, as vLLM is to make them."""
    if form := slot_format(vllm_config, shape):
        return form.shapes()
    return state_shapes(shape, vllm_config.parallel_config.tensor_parallel_size, vllm_config.num_speculative_tokens)


def slot_dtypes(vllm_config: VllmConfig, shape: BambaShape) -> tuple[torch.dtype, torch.dtype]:
    """Their dtypes."""
    if form := slot_format(vllm_config, shape):
        return form.dtypes()
    return state_dtypes(vllm_config.model_config.dtype, vllm_config.cache_config)


class FusedMixing:
    """What a mixer does between its projections, with slots of its own layout.

    Attributes:
        divides_later: whether outputs are gated and weighted, and `sums` more columns say by what to divide them.
    """

    _made: ClassVar[set[tuple[object, ...]]] = set()

    def __init__(self, mixer: BambaMixer, form: SlotFormat, quantised: bool):
        from vllm_bamba.ops.mixer_step import StepWeights, sum_columns  # need Triton

        self.mixer, self.form = mixer, form
        # the kernel reads one tap of many channels at a time; everybody else sees the shape of the checkpoint
        conv = mixer.conv1d
        conv.weight.data = conv.weight.data.t().contiguous().t()
        # the norm's division can wait until after out_proj, unless a bias or a scale of its own stands in between or
        # fp16 is too small for what has not been divided
        self.divides_later = (
            not quantised and not mixer.shape.mamba_proj_bias and mixer.model_config.dtype != torch.float16
        )
        norm = mixer.norm.weight if self.divides_later else None
        self._weights = StepWeights(conv.weight, conv.bias, mixer.A, mixer.D, mixer.dt_bias, norm)
        self.sums = sum_columns(form.shard.local_heads) if self.divides_later else 0

    def decode(self, projected: torch.Tensor, plan: DecodePlan, output: torch.Tensor) -> None:
        from vllm_bamba.ops.mixer_step import mixer_step

        slots = self.form.bind(self.mixer.kv_cache)
        mixer_step(projected, self.weights, self.mixer.shape.time_step_limit, slots, plan, output)

    @property
    def weights(self) -> StepWeights:
        return self._weights._replace(taps=self._weights.taps.t())

    def warm_up(self, projected: torch.Tensor) -> None:
        """Have all kernels made before the first request, for every number of rows; `projected` [tokens, in_proj rows].

        They run on two slots made for it; one layer does it for all that are alike.
        """
        from vllm_bamba.ops.mixer_step import mixer_step
        from vllm_bamba.ops.mixer_step.tuning import tuning_for
        from vllm_bamba.ops.slot_state import read_states, write_states

        mixer, shard, device = self.mixer, self.form.shard, projected.device
        kernels = (self.form, self.divides_later, projected.dtype)
        if kernels in self._made:
            return
        self._made.add(kernels)
        layout = zip(self.form.shapes(), self.form.dtypes(), strict=True)
        slots = self.form.bind(tuple(torch.zeros(2, *shape, dtype=dtype, device=device) for shape, dtype in layout))
        chunk = PrefillPlan.of_one_chunk(mixer.shape.chunk_size, True, device)
        write_states(slots, chunk, read_states(slots, mixer.A, chunk))

        row = projected.new_zeros(1, projected.shape[1])
        output = row.new_empty(1, shard.local_intermediate + self.sums)
        if self.divides_later:
            y, gate = row[:, : shard.local_intermediate].clone(), row[:, : shard.local_intermediate]
            gate_for_later(y, gate, mixer.norm.weight, output)
        one = torch.ones(1, 1, dtype=torch.int32, device=device)
        plan = DecodePlan(1, one, one[0], query_start_loc=None, accepted=None)
        tuning = tuning_for(device, self.form.state_dtype)
        for rows, _ in tuning.launches:
            launch = tuning.launch_for(rows, shard.local_heads // shard.local_groups)
            mixer_step(row, self.weights, mixer.shape.time_step_limit, slots, plan, output, launch)

    def prefill(self, projected: torch.Tensor, plan: PrefillPlan, output: torch.Tensor) -> None:
        from vllm_bamba.ops.slot_state import read_inputs, read_states, write_inputs, write_states

        mixer, slots = self.mixer, self.form.bind(self.mixer.kv_cache)
        first = torch.arange(len(plan.slots), dtype=torch.int32, device=plan.slots.device)
        # a row in front, as vLLM's convolution takes slot 0 for padding
        scratch = F.pad(read_inputs(slots, plan).transpose(1, 2), (0, 0, 0, 0, 1, 0)).transpose(1, 2)
        states = read_states(slots, mixer.A, plan)

        xBC, dt = mixer.split(projected)
        xBC = causal_conv1d_prefill(
            xBC, mixer.conv1d.weight, mixer.conv1d.bias, scratch, replace(plan, slots=first + 1)
        )  # fmt: skip
        x, B, C = mixer.heads(xBC)
        y = x.new_empty(x.shape) if self.divides_later else mixer.y(output)
        limit = mixer.shape.time_step_limit
        ssd_prefill(
            x, dt, mixer.A, B, C, mixer.D, mixer.dt_bias, limit, states, replace(plan, slots=first), y
        )  # fmt: skip
        if self.divides_later:
            gate = projected[:, : mixer.shard.local_intermediate]
            gate_for_later(y.flatten(1), gate, mixer.norm.weight, output)

        write_inputs(slots, plan, scratch[1:])
        write_states(slots, plan, states)
