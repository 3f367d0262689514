"""What a mixer does between its projections: convolution, recurrence and, in part, the gated norm.

`OperatorMixing` calls vLLM's operators one after the other, `FusedMixing` decodes in kernels of our own.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from vllm_bamba.ops.causal_conv1d import causal_conv1d_prefill, causal_conv1d_step
from vllm_bamba.ops.gated_norm import gate_for_later
from vllm_bamba.ops.ssd_prefill import scan, ssd_prefill, warm_up
from vllm_bamba.ops.ssm_step import ssm_step
from vllm_bamba.prefix.policy import PREFILLS
from vllm_bamba.state import DecodePlan, FusedSlots, PrefillPlan, SlotFormat, channels_first
from vllm_bamba.warm_up import Call, warm_ups

if TYPE_CHECKING:
    from vllm_bamba.mixer import BambaMixer
    from vllm_bamba.ops.mixer_step import StepWeights


class Mixing(ABC):
    """How one mixer does that.

    Attributes:
        divides_later: whether outputs are gated and multiplied by the norm's weights, so that only the norm's division
            is left; else the caller gates and normalises them.
        sums: further columns of the output that say by what to divide; 0 unless `divides_later`.
    """

    divides_later = False
    sums = 0

    def __init__(self, mixer: BambaMixer):
        self.mixer = mixer

    @abstractmethod
    def decode(self, projected: torch.Tensor, plan: DecodePlan, output: torch.Tensor) -> None:
        """[tokens, in_proj rows] -> output [tokens, channels + sums]; the sequences' slots move on."""

    @abstractmethod
    def prefill(self, projected: torch.Tensor, plan: PrefillPlan, output: torch.Tensor) -> None:
        """The same for runs of tokens."""

    @abstractmethod
    def warm_up(self, projected: torch.Tensor) -> None:
        """Have all kernels made before the first request; `projected` is like that of requests."""

    def forget_cache(self) -> None:  # noqa: B027  not all remember anything
        """vLLM has bound other memory, or none: keep nothing of what was."""

    def reserve(self, device: torch.device) -> None:
        """Take as much memory as the states of a step's prefills, and give it back: vLLM's profile has no prefills.

        The scan holds two chunks of a short prompt before and after states are passed on, and where it starts from.
        """
        shard = self.mixer.shard
        of_sequence = 5 * shard.local_heads * shard.head_dim * shard.state
        torch.empty(PREFILLS * of_sequence, dtype=torch.float32, device=device)

    def _warm_scan_up(self, projected: torch.Tensor, state_dtype: torch.dtype) -> None:
        shard = self.mixer.shard
        x, B = (shard.local_heads, shard.head_dim), (shard.local_groups, shard.state)
        warm_up(x, B, self.mixer.shape.chunk_size, projected.dtype, state_dtype, projected.device)

    # the parts of a projection, whose gate waits for the norm

    def _split(self, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x | B | C, and dt."""
        shard = self.mixer.shard
        _, xBC, dt = projected.split([shard.local_intermediate, shard.local_conv_channels, shard.local_heads], dim=-1)
        return xBC, dt

    def _heads(self, xBC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [tokens, heads, head_dim], B and C [tokens, groups, state]."""
        shard = self.mixer.shard
        x, B, C = xBC.split([shard.local_intermediate, shard.local_bc, shard.local_bc], dim=-1)
        groups = (shard.local_groups, shard.state)
        return x.unflatten(-1, (shard.local_heads, shard.head_dim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _by_head(self, output: torch.Tensor) -> torch.Tensor:
        """[tokens, channels] as [tokens, heads, head_dim]."""
        return output.view(len(output), self.mixer.shard.local_heads, self.mixer.shard.head_dim)


class OperatorMixing(Mixing):
    """vLLM's operators, on slots as vLLM lays them out."""

    def decode(self, projected: torch.Tensor, plan: DecodePlan, output: torch.Tensor) -> None:
        self._mix(projected, plan, output, causal_conv1d_step, ssm_step)

    def prefill(self, projected: torch.Tensor, plan: PrefillPlan, output: torch.Tensor) -> None:
        self._mix(projected, plan, output, causal_conv1d_prefill, ssd_prefill)

    def _mix(
        self,
        projected: torch.Tensor,
        plan: DecodePlan | PrefillPlan,
        output: torch.Tensor,
        convolve: Callable[..., torch.Tensor],
        recur: Callable[..., None],
    ) -> None:
        mixer = self.mixer
        conv_state, ssm_state = channels_first(mixer.kv_cache[0]), mixer.kv_cache[1]
        xBC, dt = self._split(projected)
        xBC = convolve(xBC, mixer.conv1d.weight, mixer.conv1d.bias, conv_state, plan)
        x, B, C = self._heads(xBC)
        limit, y = mixer.shape.time_step_limit, self._by_head(output)
        recur(x, dt, mixer.A, B, C, mixer.D, mixer.dt_bias, limit, ssm_state, plan, y)

    def warm_up(self, projected: torch.Tensor) -> None:
        self._warm_scan_up(projected, self.mixer.get_state_dtype()[1])


class FusedMixing(Mixing):
    """Decodes in our own kernels, on slots of their layout; prefills on vLLM's operators in between."""

    def __init__(self, mixer: BambaMixer, form: SlotFormat, quantised: bool):
        from vllm_bamba.ops.mixer_step import StepWeights, sum_columns  # need Triton

        super().__init__(mixer)
        self.form = form
        # the kernel reads one tap of many channels at a time; everybody else sees the shape of the checkpoint
        conv = mixer.conv1d
        conv.weight.data = conv.weight.data.t().contiguous().t()
        # the norm's division can wait until after out_proj, unless a bias or a scale of its own stands in between or
        # fp16 is too small for what has not been divided
        self.divides_later = (
            not quantised and not mixer.shape.mamba_proj_bias and mixer.model_config.dtype != torch.float16
        )
        norm = mixer.norm.weight if self.divides_later else None
        self._slots: FusedSlots | None = None
        self._weights = StepWeights(conv.weight, conv.bias, mixer.A, mixer.D, mixer.dt_bias, norm)
        self.sums = sum_columns(form.shard.local_heads) if self.divides_later else 0

    def decode(self, projected: torch.Tensor, plan: DecodePlan, output: torch.Tensor) -> None:
        from vllm_bamba.ops.mixer_step import mixer_step

        mixer_step(projected, self.weights, self.mixer.shape.time_step_limit, self.slots, plan, output)

    @property
    def slots(self) -> FusedSlots:
        """The layer's, in vLLM's cache."""
        if self._slots is None:
            self._slots = self.form.bind(self.mixer.kv_cache)
        return self._slots

    def forget_cache(self) -> None:
        self._slots = None

    @property
    def weights(self) -> StepWeights:
        return self._weights._replace(taps=self._weights.taps.t())

    def warm_up(self, projected: torch.Tensor) -> None:
        """As `Mixing.warm_up`; one layer does it for all alike."""
        self._warm_scan_up(projected, torch.float32)
        kernels = ("mixing", self.form, self.divides_later, projected.dtype)
        warm_ups.start(kernels, lambda: self._warm_ups(projected.new_zeros(1, projected.shape[1])), projected.device)

    def _warm_ups(self, row: torch.Tensor) -> list[Call]:
        return [partial(call, row) for call in (self._warm_slots_up, self._warm_step_up, self._warm_moves_up)]

    def _some_slots(self, device: torch.device) -> FusedSlots:
        """Two, which are no layer's; the first one is padding."""
        layout = zip(self.form.shapes(), self.form.dtypes(), strict=True)
        return self.form.bind(tuple(torch.zeros(2, *shape, dtype=dtype, device=device) for shape, dtype in layout))

    def _warm_slots_up(self, row: torch.Tensor) -> None:
        from vllm_bamba.ops.slot_state import empty_inputs, read_slots, write_slots

        mixer, slots = self.mixer, self._some_slots(row.device)
        chunk = PrefillPlan.of_one_chunk(mixer.shape.chunk_size, True, row.device)
        inputs = empty_inputs(slots, 1)
        states = read_slots(slots, mixer.A, chunk, inputs)
        write_slots(slots, chunk.slots, chunk.lengths, inputs, states, chunk.last_chunk)
        xBC, _ = self._split(row.new_zeros(chunk.num_tokens, row.shape[1]))
        causal_conv1d_prefill(xBC, mixer.conv1d.weight, mixer.conv1d.bias, inputs, chunk)

    def _warm_step_up(self, row: torch.Tensor) -> None:
        from vllm_bamba.ops.mixer_step import mixer_step

        mixer, channels = self.mixer, self.form.shard.local_intermediate
        output = row.new_empty(1, channels + self.sums)
        if self.divides_later:
            gate_for_later(row[:, :channels].clone(), row[:, :channels], mixer.norm.weight, output)
        one = torch.ones(1, 1, dtype=torch.int32, device=row.device)
        starts = torch.arange(2, dtype=torch.int32, device=row.device) if self.form.drafts else None
        plan = DecodePlan(1, one, one[0], starts, accepted=None)
        mixer_step(row, self.weights, mixer.shape.time_step_limit, self._some_slots(row.device), plan, output)

    def _warm_moves_up(self, row: torch.Tensor) -> None:
        from vllm_bamba.ops.slot_state import LayerSlots, move_slots

        if self.form.anchored:
            one = torch.ones(1, 1, dtype=torch.int32, device=row.device)
            move = torch.tensor([[0, 1, 0, 0]], dtype=torch.int32, device=row.device)
            move_slots(LayerSlots.of([self._some_slots(row.device)], [self.mixer.A], [0], [one]), move)

    def prefill(self, projected: torch.Tensor, plan: PrefillPlan, output: torch.Tensor) -> None:
        from vllm_bamba.ops.slot_state import empty_inputs, read_slots, write_slots

        mixer, slots, sequences = self.mixer, self.slots, len(plan.slots)
        inner, kept = plan.inner, sequences if plan.inner is None else 2 * sequences
        inputs = empty_inputs(slots, kept)
        initial = read_slots(slots, mixer.A, plan, inputs) if plan.any_continues else None
        xBC, dt = self._split(projected)
        rows = _rows(kept, projected.device)
        of_inputs = replace(plan, slots=rows[:sequences], inner=inner and replace(inner, slots=rows[sequences:]))
        xBC = causal_conv1d_prefill(xBC, mixer.conv1d.weight, mixer.conv1d.bias, inputs, of_inputs)
        x, B, C = self._heads(xBC)
        y = x.new_empty(x.shape) if self.divides_later else self._by_head(output)
        limit = mixer.shape.time_step_limit
        states, last, of_inner = scan(
            x, dt, mixer.A, B, C, mixer.D, mixer.dt_bias, limit, initial, plan, y, torch.float32
        )  # fmt: skip
        if self.divides_later:
            gate = projected[:, : mixer.shard.local_intermediate]
            gate_for_later(y.flatten(1), gate, mixer.norm.weight, output)
        write_slots(slots, plan.slots, plan.lengths, inputs[: 1 + sequences], states, last)
        if inner is not None:
            write_slots(slots, inner.slots, inner.lengths, inputs[sequences:], states, of_inner)


@functools.cache  # never forgets: graphs read it
def _rows(sequences: int, device: torch.device) -> torch.Tensor:
    """int32 [sequences], the rows of `empty_inputs`; the same for all layers."""
    return torch.arange(1, 1 + sequences, dtype=torch.int32, device=device)
