"""Short prefills as CUDA graphs.

What a mixer does with prompts is a dozen kernels. For some hundred tokens a GPU is done with them long before the host
has launched them for the next layer, so the host decides when first tokens come. vLLM's own graphs of prefills leave
the mixers out. Here they get graphs of their own: one for each layer and each of `SHAPES`, for the prefills of a step,
whatever else it decodes. What differs from step to step is read from memory that stays where it is: `ShortPrefills`
describes the sequences to all layers, the metadata's builder fills it, and a layer's tokens are copied to and from
buffers that all layers share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_bamba.state import INPUTS, InnerStates, PrefillPlan


class Shape(NamedTuple):
    """The most that a graph takes: sequences, and tokens of all of them."""

    sequences: int
    tokens: int


# in the order in which they are preferred; more keeps a GPU busy
SHAPES = (
    *(Shape(1, tokens) for tokens in (32, 64, 128, 256, 512, 1024, 2048)),
    *(Shape(4, tokens) for tokens in (256, 1024, 2048)),
    *(Shape(8, tokens) for tokens in (512, 2048)),
)
MOST = SHAPES[-1]
CONV_BLOCK = 8  # tokens of a program of vLLM's convolution
NOTHING = -1  # what such a program has to do behind the last sequence
ALIGNMENT = 4  # words: kernels need not be made again for other addresses


def shape_for(sequences: int, tokens: int) -> Shape | None:
    """The shape of the graph for so many sequences with so many tokens in all; None where none is made for them."""
    fitting = (shape for shape in SHAPES if 0 < sequences <= shape.sequences and tokens <= shape.tokens)
    return next(fitting, None)


class Run(NamedTuple):
    """A sequence's part of a step: `tokens` from position `start` on.

    The state after `inner` of them is kept; with 0 none is.
    """

    start: int
    tokens: int
    inner: int = 0


class ShortPrefills:
    """The prefills of a step, at addresses that stay.

    Args:
        chunk_size: tokens of an SSD chunk.
        device: where they are kept.
        most: what has to fit.
    """

    def __init__(self, chunk_size: int, device: torch.device, most: Shape = MOST):
        self.chunk_size, self.most = chunk_size, most
        sequences, chunks, programs = most.sequences, self._chunks(most), self._programs(most)
        self._counts = {
            "lengths": sequences,
            "query_start_loc": sequences + 1,
            "continues": -(-sequences // 4),  # bytes
            "chunk_start_loc": chunks + 1,
            "chunk_sequence": chunks,
            "last_chunk": sequences,
            "conv_sequence": programs,
            "conv_block": programs,
            "inner_lengths": sequences,
            "inner_inputs": sequences * INPUTS,
            "inner_chunks": sequences,
        }
        self._places, end = {}, 0
        for name, count in self._counts.items():
            self._places[name] = slice(end, end + count)
            end += -(-count // ALIGNMENT) * ALIGNMENT
        self.words = torch.zeros(end, dtype=torch.int32, device=device)

    def fill(self, runs: Sequence[Run]) -> None:
        """Describe a step's prefills, in their order."""
        values: dict[str, list[int]] = {name: [] for name in self._counts}
        chunk_sequence, begin = values["chunk_sequence"], 0
        values["query_start_loc"].append(0)
        values["chunk_start_loc"].append(0)
        for i, (start, tokens, inner) in enumerate(runs):
            cuts = range(-start % self.chunk_size, tokens, self.chunk_size)
            ends = [*sorted({*cuts, inner} - {0}), tokens]
            values["inner_chunks"].append(len(chunk_sequence) + ends.index(inner) if inner else 0)
            values["inner_lengths"].append(start + inner)
            values["inner_inputs"] += [max(begin + inner - back, 0) for back in range(INPUTS, 0, -1)]
            chunk_sequence += [i] * len(ends)
            values["chunk_start_loc"] += [begin + end for end in ends]
            values["last_chunk"].append(len(chunk_sequence) - 1)
            blocks = range(-(-tokens // CONV_BLOCK))
            values["conv_sequence"] += [i] * len(blocks)
            values["conv_block"] += blocks
            begin += tokens
            values["query_start_loc"].append(begin)
            values["lengths"].append(start + tokens)
        flags = bytes(start > 0 for start, *_ in runs)
        values["continues"] = [int.from_bytes(flags[i : i + 4], "little") for i in range(0, len(flags), 4)]
        # sequences that are not there have no tokens, and chunks that are not there belong to the last one that is
        behind = {"query_start_loc": begin, "chunk_start_loc": begin, "conv_sequence": NOTHING}
        behind |= {"chunk_sequence": len(runs) - 1, "last_chunk": len(chunk_sequence) - 1}
        words = [0] * len(self.words)
        for name, place in self._places.items():
            words[place] = values[name] + [behind.get(name, 0)] * (self._counts[name] - len(values[name]))
        async_tensor_h2d(words, out=self.words)

    def plan(self, shape: Shape, slots: torch.Tensor) -> PrefillPlan:
        """The same as a plan of a graph's shape, with sequences of no tokens, and tokens that belong to nobody.

        Args:
            shape: no less than there is.
            slots: int32 [2, `most.sequences`], of sequences and of states inside of them; 0 where there is none.
        """
        words = {name: self.words[place] for name, place in self._places.items()}
        (sequences, tokens), chunks, programs = shape, self._chunks(shape), self._programs(shape)
        of_programs = {
            "batch_ptr": words["conv_sequence"][:programs],
            "token_chunk_offset_ptr": words["conv_block"][:programs],
        }
        of_blocks = {"tot": programs, "mlist": None, "mlist_len": programs, "offsetlist": None}
        return PrefillPlan(
            num_tokens=tokens,
            slots=slots[0, :sequences],
            lengths=words["lengths"][:sequences],
            query_start_loc=words["query_start_loc"][: sequences + 1],
            continues=words["continues"].view(torch.bool)[:sequences],
            any_continues=True,
            chunk_size=self.chunk_size,
            chunk_start_loc=words["chunk_start_loc"][: chunks + 1],
            chunk_sequence=words["chunk_sequence"][:chunks],
            last_chunk=words["last_chunk"][:sequences],
            conv_metadata=SimpleNamespace(nums_dict={CONV_BLOCK: of_blocks | of_programs}, **of_programs),
            inner=InnerStates(
                slots=slots[1, :sequences],
                lengths=words["inner_lengths"][:sequences],
                inputs=words["inner_inputs"].view(-1, INPUTS)[:sequences],
                chunks=words["inner_chunks"][:sequences],
                offsets=(0,) * sequences,
            ),
        )

    def _chunks(self, shape: Shape) -> int:
        """The most SSD chunks that a shape's tokens fall into, wherever sequences start and states are kept inside."""
        return -(-shape.tokens // self.chunk_size) + 3 * shape.sequences - 1

    def _programs(self, shape: Shape) -> int:
        """The most programs of vLLM's convolution, a block of tokens each, for a shape's tokens."""
        return -(-shape.tokens // CONV_BLOCK) + shape.sequences - 1


class GroupPrefills(NamedTuple):
    """The prefills of a step as a group of layers has them.

    Attributes:
        prefills: what is the same for all layers.
        slots: int32 [2, `MOST.sequences`], as for `ShortPrefills.plan`; always the same tensor.
    """

    prefills: ShortPrefills
    slots: torch.Tensor


@cache
def short_prefills(chunk_size: int, device: torch.device) -> ShortPrefills:
    """The description that all layers and steps share."""
    return ShortPrefills(chunk_size, device)


@cache
def _shared_pool(device: torch.device) -> tuple[tuple[int, int], torch.cuda.Stream]:
    """Memory for what all graphs work with in between: they run one after the other. And the stream they are made on.

    What is free in a pool is given out to the same stream only.
    """
    return torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)


@cache
def _buffer(name: str, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(MOST.tokens, columns, dtype=dtype, device=device)


class PrefillGraphs:
    """The graphs of one layer, one for each of `SHAPES`.

    Args:
        prefill: [tokens, in_proj rows], plan, output -> None, the work of the layer.
    """

    def __init__(self, prefill: Callable[[torch.Tensor, PrefillPlan, torch.Tensor], None]):
        self._prefill = prefill
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        self._captured_for: tuple[int, ...] = ()

    @property
    def made(self) -> bool:
        return bool(self._graphs)

    def capture(self, projected: torch.Tensor, output: torch.Tensor, short: GroupPrefills, state: torch.Tensor) -> bool:
        """Make the graphs and return true, unless they are there already.

        Args:
            projected, output: like those that `run` will get.
            short: of all steps to come. What it says now is lost.
            state: part of the layer's cache; where it has moved, graphs are made anew.
        """
        prefills, slots = short
        captured_for = (state.data_ptr(), slots.data_ptr())
        if self._captured_for == captured_for:
            return False
        slots.zero_()  # padding: nobody's state is changed
        given, made = self._buffers(projected, output)
        pool, stream = _shared_pool(projected.device)
        graphs = {}  # those before keep the pool alive until these are made
        for shape in reversed(SHAPES):  # the pool gets its largest pieces first
            prefills.fill([Run(0, shape.tokens)])
            call = (given[: shape.tokens], prefills.plan(shape, slots), made[: shape.tokens])
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
            graphs[shape] = graph
        self._graphs, self._captured_for = graphs, captured_for
        return True

    def run(
        self, projected: torch.Tensor, sequences: int, short: GroupPrefills, state: torch.Tensor, output: torch.Tensor
    ) -> bool:
        """Do the prefills that `short` describes now; false if there is no graph for them.

        Args:
            projected: [tokens, in_proj rows], the sequences' one behind the other.
            sequences: how many.
            short, state: those for which the graphs were made.
            output: like `projected`.
        """
        tokens, shape = len(projected), shape_for(sequences, len(projected))
        if shape not in self._graphs or self._captured_for != (state.data_ptr(), short.slots.data_ptr()):
            return False
        given, made = self._buffers(projected, output)
        given[:tokens].copy_(projected)
        self._graphs[shape].replay()
        output.copy_(made[:tokens])
        return True

    def _buffers(self, projected: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = _buffer("projected", projected.shape[1], projected.dtype, projected.device)
        return given, _buffer("output", output.shape[1], output.dtype, output.device)
