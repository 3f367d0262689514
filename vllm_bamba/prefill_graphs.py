"""Short prefills as CUDA graphs.

What a mixer does with a prompt is a dozen kernels. For a few hundred tokens a GPU is done with them long before the
host has launched them for the next layer, so the host decides when the first token comes. vLLM's own graphs of prefills
leave the mixers out. Here they get graphs of their own: one for each layer and each of `SIZES`, for the prefill of a
single sequence, whatever else the batch decodes. What differs from step to step is read from memory that stays where it
is: `LonePrefill` describes the sequence to all layers, the metadata's builder fills it, and a layer's tokens are copied
to and from buffers that all layers share.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_bamba.state import INPUTS, InnerStates, PrefillPlan

SIZES = (32, 64, 128, 256, 512, 1024)  # tokens; longer prefills keep a GPU busy
CONV_BLOCK = 8  # tokens of a program of vLLM's convolution
NOTHING = -1  # what such a program has to do where the sequence has ended
ALIGNMENT = 4  # words: kernels need not be made again for other addresses


class LonePrefill:
    """The prefill of one sequence, at addresses that stay.

    Args:
        chunk_size: tokens of an SSD chunk.
        device: where it is kept.
        most: tokens of the longest.
    """

    def __init__(self, chunk_size: int, device: torch.device, most: int = SIZES[-1]):
        self.chunk_size, self.most = chunk_size, most
        counts = {
            "lengths": 1,
            "query_start_loc": 2,
            "continues": 1,
            "chunk_start_loc": self._chunks(most) + 1,
            "last_chunk": 1,
            "conv_programs": -(-most // CONV_BLOCK),
            "inner_lengths": 1,
            "inner_inputs": INPUTS,
            "chunks": 2,
        }
        self._places, end = {}, 0
        for name, count in counts.items():
            self._places[name] = slice(end, end + count)
            end += -(-count // ALIGNMENT) * ALIGNMENT
        self.words = torch.zeros(end, dtype=torch.int32, device=device)
        self._first_chunk = torch.zeros(self._chunks(most), dtype=torch.int32, device=device)
        self._conv_offsets = torch.arange(counts["conv_programs"], dtype=torch.int32, device=device)

    def fill(self, start: int, tokens: int, inner: int = 0) -> None:
        """Describe the sequence's `tokens` tokens from position `start` on; the state after `inner` of them is kept."""
        cuts = range(-start % self.chunk_size, tokens, self.chunk_size)
        ends = [*sorted({*cuts, inner} - {0}), tokens]
        chunks = [0, *ends]
        blocks = -(-tokens // CONV_BLOCK)
        values = {
            "lengths": [start + tokens],
            "query_start_loc": [0, tokens],
            "continues": [int(start > 0)],
            "chunk_start_loc": chunks + [tokens] * (len(self._first_chunk) + 1 - len(chunks)),
            "last_chunk": [len(ends) - 1],
            "conv_programs": [0] * blocks + [NOTHING] * (len(self._conv_offsets) - blocks),
            "inner_lengths": [start + inner],
            "inner_inputs": [max(inner - i, 0) for i in range(INPUTS, 0, -1)],
            "chunks": [len(ends) - 1, ends.index(inner) if inner else 0],
        }
        words = [0] * len(self.words)
        for name, place in self._places.items():
            words[place] = values[name]
        async_tensor_h2d(words, out=self.words)

    def plan(self, size: int, slots: torch.Tensor) -> PrefillPlan:
        """The same as a plan of `size` tokens, of which those behind the sequence belong to nobody.

        Args:
            size: no less than the sequence's tokens.
            slots: int32 [2], of the sequence and of the state inside of it.
        """
        words = {name: self.words[place] for name, place in self._places.items()}
        count, programs = self._chunks(size), -(-size // CONV_BLOCK)
        of_programs = {
            "batch_ptr": words["conv_programs"][:programs],
            "token_chunk_offset_ptr": self._conv_offsets[:programs],
        }
        of_blocks = {"tot": programs, "mlist": None, "mlist_len": programs, "offsetlist": None}
        return PrefillPlan(
            num_tokens=size,
            slots=slots[:1],
            lengths=words["lengths"],
            query_start_loc=words["query_start_loc"],
            continues=words["continues"].view(torch.bool)[:1],
            any_continues=True,
            chunk_size=self.chunk_size,
            chunk_start_loc=words["chunk_start_loc"][: count + 1],
            chunk_sequence=self._first_chunk[:count],
            last_chunk=words["last_chunk"],
            conv_metadata=SimpleNamespace(nums_dict={CONV_BLOCK: of_blocks | of_programs}, **of_programs),
            inner=InnerStates(
                slots=slots[1:],
                lengths=words["inner_lengths"],
                inputs=words["inner_inputs"][None],
                chunks=words["chunks"],
                offsets=(0,),
            ),
        )

    def _chunks(self, tokens: int) -> int:
        """The most that so many tokens fall into, wherever they start and whatever state is kept inside."""
        return -(-tokens // self.chunk_size) + 2


@cache
def lone_prefill(chunk_size: int, device: torch.device) -> LonePrefill:
    """The one of all layers and steps."""
    return LonePrefill(chunk_size, device)


@cache
def _shared_pool(device: torch.device) -> tuple[tuple[int, int], torch.cuda.Stream]:
    """Memory for what all graphs work with in between: they run one after the other. And the stream they are made on.

    What is free in a pool is given out to the same stream only.
    """
    return torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)


@cache
def _buffer(name: str, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(SIZES[-1], columns, dtype=dtype, device=device)


class PrefillGraphs:
    """One layer's.

    Args:
        prefill: [tokens, in_proj rows], plan, output -> None, the work of the layer.
    """

    def __init__(self, prefill: Callable[[torch.Tensor, PrefillPlan, torch.Tensor], None]):
        self._prefill = prefill
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._captured_for: tuple[int, ...] = ()

    @property
    def made(self) -> bool:
        return bool(self._graphs)

    def capture(
        self, projected: torch.Tensor, output: torch.Tensor, plan: LonePrefill, slots: torch.Tensor, state: torch.Tensor
    ) -> bool:
        """Make the graphs and return true, unless they are there already.

        Args:
            projected, output: like those that `run` will get.
            plan: describes the sequence; what it says is lost.
            slots: int32 [2], as for `LonePrefill.plan`; of all steps to come. What they are is lost, too.
            state: part of the layer's cache; where it has moved, graphs are made anew.
        """
        captured_for = (state.data_ptr(), slots.data_ptr())
        if self._captured_for == captured_for:
            return False
        slots.zero_()  # padding: nobody's state is changed
        given, made = self._buffers(projected, output)
        pool, stream = _shared_pool(projected.device)
        graphs = {}  # those before keep the pool alive until these are made
        for size in SIZES:
            plan.fill(0, size)
            call = (given[:size], plan.plan(size, slots), made[:size])
            self._prefill(*call)  # kernels are made here, not while a graph is
            graph = torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self._prefill(*call)
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
            graphs[size] = graph
        self._graphs, self._captured_for = graphs, captured_for
        return True

    def run(self, projected: torch.Tensor, slots: torch.Tensor, state: torch.Tensor, output: torch.Tensor) -> bool:
        """Do a prefill that `LonePrefill` describes now, [tokens, in_proj rows] -> output; false if there is no graph.

        Args:
            projected: the sequence's tokens.
            slots, state: those for which the graphs were made.
            output: like `projected`.
        """
        tokens = len(projected)
        size = next((size for size in SIZES if size >= tokens), 0)
        if size not in self._graphs or self._captured_for != (state.data_ptr(), slots.data_ptr()):
            return False
        given, made = self._buffers(projected, output)
        given[:tokens].copy_(projected)
        self._graphs[size].replay()
        output.copy_(made[:tokens])
        return True

    def _buffers(self, projected: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = _buffer("projected", projected.shape[1], projected.dtype, projected.device)
        return given, _buffer("output", output.shape[1], output.dtype, output.device)
