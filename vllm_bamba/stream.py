"""The residual stream, and what happens to it between two parts of the model: an addition, a norm, a linear map.

`Stream` has vLLM's layers do that, one after the other. With `SkinnyStream` few rows take one kernel a linear map, into
which go the norm before it and what comes behind it (`ops/skinny_linear`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_bamba.compat import silu_and_mul
from vllm_bamba.linear import LIBRARY, SkinnyLinearMethod
from vllm_bamba.ops.gated_norm import Division, divide_later
from vllm_bamba.step_options import linears_stand_alone
from vllm_bamba.warm_up import warm_ups


class Stream:
    """Tokens between two parts of the model.

    Attributes:
        residual: [tokens, hidden].
        normed: the same, normalised for the part that comes next.
    """

    def __init__(self, residual: torch.Tensor, normed: torch.Tensor):
        self.residual = residual
        self.normed = normed

    @classmethod
    def start(cls, hidden_states: torch.Tensor, norm: RMSNorm) -> Stream:
        """What a part behind `norm` gets of [tokens, hidden]."""
        return cls(hidden_states, norm(hidden_states))

    def into(self, linear: nn.Module) -> torch.Tensor:
        """Through one of vLLM's linear layers."""
        return linear(self.normed)[0]

    def into_gated(self, linear: nn.Module, act: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The same, and through `act`: silu(first half) * second half."""
        return act(linear(self.normed)[0])

    def plus(
        self, x: torch.Tensor, linear: nn.Module, norm: RMSNorm | None, division: Division | None = None
    ) -> Stream:
        """Add x, through a linear layer and divided where that is left to do, for a part behind `norm`.

        Without a norm nothing comes next, and `normed` is the sum.
        """
        y, _ = linear(x)
        if division is not None:
            y = divide_later(y, division, tensor_model_parallel_all_reduce)
        if norm is None:
            total = y + self.residual
            return Stream(total, total)
        normed, residual = norm(y, self.residual)
        return Stream(residual, normed)


class SkinnyStream(Stream):
    """The same for weights that `ops/skinny_linear` serves, on one rank.

    For few rows `normed` has still to be divided, by what `squares` says; more rows are normalised in full. How many
    are few is the same everywhere (`Tuning.rows`), so who writes it and who reads it agree.

    Attributes:
        squares: fp32 [tokens, any].
        eps: of the norm.
    """

    def __init__(self, residual: torch.Tensor, normed: torch.Tensor, squares: torch.Tensor, eps: float):
        super().__init__(residual, normed)
        self.squares = squares
        self.eps = eps

    @classmethod
    def start(cls, hidden_states: torch.Tensor, norm: RMSNorm) -> SkinnyStream:
        from vllm_bamba.ops.skinny_linear import squares_of

        (tokens, channels), eps = hidden_states.shape, norm.variance_epsilon
        parts = squares_of(channels)
        by_one = channels * (1 - eps) / parts  # a mean square of 1, eps included: nothing is left to be divided
        squares = hidden_states.new_full((tokens, parts), by_one, dtype=torch.float32)
        return cls(hidden_states, norm(hidden_states), squares, eps)

    def into(self, linear: nn.Module) -> torch.Tensor:
        return torch.ops.vllm_bamba.divided_linear(self.normed, self.squares, linear.weight, self.eps, False)

    def into_gated(self, linear: nn.Module, act: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return torch.ops.vllm_bamba.divided_linear(self.normed, self.squares, linear.weight, self.eps, True)

    def plus(
        self, x: torch.Tensor, linear: nn.Module, norm: RMSNorm | None, division: Division | None = None
    ) -> Stream:
        if norm is None:
            return super().plus(x, linear, norm, division)
        eps = norm.variance_epsilon
        sums, channels, sums_eps = division or (None, 0, 0.0)  # operators take no tuples
        total, normed, squares = torch.ops.vllm_bamba.added_linear(
            x, linear.weight, self.residual, norm.weight, eps, sums, channels, sums_eps
        )
        return SkinnyStream(total, normed, squares, eps)


def stream_for(layers: nn.Module, vllm_config: VllmConfig) -> type[Stream]:
    """What suits a stage's layers: skinny where each linear layer is, without a bias, an adapter or another rank."""
    linears = [layer for layer in layers.modules() if isinstance(layer, LinearBase)]
    skinny = all(type(layer.quant_method) is SkinnyLinearMethod and layer.bias is None for layer in linears)
    return SkinnyStream if skinny and linears_stand_alone(vllm_config) else Stream


def _divided_linear(
    normed: torch.Tensor, squares: torch.Tensor, weight: torch.Tensor, eps: float, gated: bool
) -> torch.Tensor:
    from vllm_bamba.ops.skinny_linear import divided_linear, divided_warm_ups  # these need Triton
    from vllm_bamba.ops.skinny_linear.tuning import first_for, tuning_of

    if tuning := tuning_of(weight.device):
        launches = tuning.gated if gated else tuning.launches(*weight.shape)
        whole = tuning.gated_whole if gated else ()
        columns = squares.shape[1]
        warm_ups.start(
            ("divided_linear", weight.shape, columns, gated),
            lambda: divided_warm_ups(weight, columns, launches, gated) + divided_warm_ups(weight, 0, whole, gated),
            weight.device,
        )
        if 0 < len(normed) <= tuning.rows:
            return divided_linear(normed, Division(squares, normed.shape[1], eps), weight, launches, gated)
        if len(normed) and first_for(whole, *normed.shape):
            return divided_linear(normed, None, weight, whole, gated)
    y = F.linear(normed, weight)
    return silu_and_mul(y) if gated else y


def _added_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    sums: torch.Tensor | None,
    channels: int,
    sums_eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from vllm_bamba.ops.add_rms_norm import add_rms_norm
    from vllm_bamba.ops.skinny_linear import added_linear, added_warm_ups, squares_of
    from vllm_bamba.ops.skinny_linear.tuning import tuning_of

    division = None if sums is None else Division(sums, channels, sums_eps)
    if tuning := tuning_of(weight.device):
        launches = tuning.launches(*weight.shape)
        columns = 0 if sums is None else sums.shape[1]
        kernels = ("added_linear", weight.shape, columns)
        warm_ups.start(kernels, lambda: added_warm_ups(weight, columns, launches), weight.device)
        if 0 < len(x) <= tuning.rows:
            return added_linear(x, weight, residual, norm, launches, division)
    total, normed = add_rms_norm(F.linear(x, weight), residual, norm, eps, division)
    return total, normed, total.new_empty(len(x), squares_of(len(weight)), dtype=torch.float32)


# shapes, not lengths, which would tie what is compiled to a number of tokens


def _like_map(
    normed: torch.Tensor, squares: torch.Tensor, weight: torch.Tensor, eps: float, gated: bool
) -> torch.Tensor:
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    return normed.new_empty(normed.shape[0], columns)


def _like_sum(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from vllm_bamba.ops.skinny_linear import squares_of

    squares = residual.new_empty(residual.shape[0], squares_of(weight.shape[0]), dtype=torch.float32)
    return torch.empty_like(residual), torch.empty_like(residual), squares


# hidden from torch.compile, so that every number of rows has its launch
direct_register_custom_op("divided_linear", _divided_linear, fake_impl=_like_map, target_lib=LIBRARY)
direct_register_custom_op("added_linear", _added_linear, fake_impl=_like_sum, target_lib=LIBRARY)
