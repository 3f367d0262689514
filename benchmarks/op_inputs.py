"""Random inputs, state slots and batch plans of an operator's problem."""

import functools
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from shapes import bamba_config

from vllm_bamba.config import BambaShape
from vllm_bamba.state import DecodePlan, PrefillPlan


@dataclass(frozen=True)
class Problem:
    """Sizes of the operator's problem: `tokens` of one prompt, or `tokens` sequences of one token each."""

    shape: BambaShape
    tokens: int
    dtype: torch.dtype
    state_dtype: torch.dtype
    seed: int

    @classmethod
    def of(cls, shape: str, tokens: int, dtype: torch.dtype, state_dtype: torch.dtype, seed: int) -> "Problem":
        return cls(BambaShape.from_hf(bamba_config(shape)), tokens, dtype, state_dtype, seed)

    @functools.cached_property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @functools.cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(size, generator=self._generator, device=self.device, dtype=dtype or self.dtype)

    @property
    def heads(self) -> tuple[int, int]:
        return self.shape.mamba_heads, self.shape.mamba_head_dim

    @property
    def groups(self) -> tuple[int, int]:
        return self.shape.mamba_groups, self.shape.mamba_state

    def recurrence(self) -> tuple[torch.Tensor, ...]:
        """x, dt, A, B, C, D and dt_bias: decay rates from 1 to 16, time steps from about 1e-3 to 0.1."""
        heads = self.shape.mamba_heads
        A = -torch.linspace(1, 16, heads, device=self.device)
        D, dt_bias = (self.normal(heads) for _ in range(2))
        x, dt = self.normal(self.tokens, *self.heads), self.normal(self.tokens, heads)
        B, C = (self.normal(self.tokens, *self.groups) for _ in range(2))
        return x, dt, A, B, C, D, (dt_bias - 4).to(self.dtype)

    def slots(self) -> torch.Tensor:
        """A slot a sequence, in random order as after hours of serving; 0 stays free for padding."""
        return (1 + torch.randperm(self.tokens, generator=self._generator, device=self.device)).int()

    def lengths(self) -> torch.Tensor:
        """Tokens of each sequence, all different: what is done every so many tokens does not fall on one step."""
        return torch.arange(1000, 1000 + self.tokens, dtype=torch.int32, device=self.device)

    def decode_plan(self) -> DecodePlan:
        return DecodePlan(self.tokens, self.slots()[:, None], self.lengths(), None, None)

    def prefill_plan(self) -> PrefillPlan:
        """One new prompt of all tokens."""
        int32 = functools.partial(torch.tensor, dtype=torch.int32, device=self.device)
        chunk = self.shape.chunk_size
        starts = [*range(0, self.tokens, chunk), self.tokens]
        return PrefillPlan(
            num_tokens=self.tokens,
            slots=int32([1]),
            lengths=int32([self.tokens]),
            query_start_loc=int32([0, self.tokens]),
            continues=torch.tensor([False], device=self.device),
            any_continues=False,
            chunk_size=chunk,
            chunk_start_loc=int32(starts),
            chunk_sequence=int32([0] * (len(starts) - 1)),
            last_chunk=int32([len(starts) - 2]),
            conv_metadata=self._conv_metadata(),
        )

    def _conv_metadata(self) -> object:
        from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

        if self.device == "cpu":
            return None
        offsets = torch.tensor([0, self.tokens], dtype=torch.int32)
        nums, batch, chunk = compute_causal_conv1d_metadata(offsets, device=torch.device(self.device))
        return SimpleNamespace(nums_dict=nums, batch_ptr=batch, token_chunk_offset_ptr=chunk)
