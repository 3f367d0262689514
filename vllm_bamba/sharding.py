"""Which rows of the mixer's weights each tensor-parallel rank holds, in plain integers.

The Mamba heads are dealt out in order, and every row that belongs to a head (gate, x, dt, A, D) goes with it. B and C
belong to groups of heads: groups are dealt out too where the tensor-parallel size divides their number; where there
are fewer groups than ranks, each group is copied to all ranks that hold one of its heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass


def check_tensor_parallel(
    size: int,
    *,
    mamba_heads: int,
    mamba_groups: int,
    attention_heads: int,
    key_value_heads: int,
    intermediate_size: int,
) -> None:
    """Raise ValueError, naming the config field, if a model cannot be dealt out to `size` ranks."""
    dealt = {
        "mamba_n_heads": mamba_heads,
        "num_attention_heads": attention_heads,
        "intermediate_size": intermediate_size,
    }
    dealt_or_copied = {"mamba_n_groups": mamba_groups, "num_key_value_heads": key_value_heads}

    def fits(size: int) -> bool:
        return all(count % size == 0 for count in dealt.values()) and all(
            count % size == 0 or size % count == 0 for count in dealt_or_copied.values()
        )

    if fits(size):
        return
    reasons = [f"does not divide {field} = {count}" for field, count in dealt.items() if count % size]
    reasons += [
        f"neither divides {field} = {count} nor is a multiple of it"
        for field, count in dealt_or_copied.items()
        if count % size and size % count
    ]
    possible = [s for s in range(1, min(dealt.values()) + 1) if fits(s)]
    raise ValueError(f"tensor_parallel_size = {size} {', '.join(reasons)}. Possible sizes: {possible}.")


@dataclass(frozen=True)
class MixerShard:
    """One rank's part of a Mamba-2 mixer.

    `heads`, `head_dim`, `groups` and `state` describe the whole model, `rank` of `size` the part.
    """

    heads: int
    head_dim: int
    groups: int
    state: int
    size: int = 1
    rank: int = 0

    @property
    def copies(self) -> int:
        """Ranks that hold each group; 1 where groups are dealt out."""
        return max(1, self.size // self.groups)

    @property
    def local_heads(self) -> int:
        return self.heads // self.size

    @property
    def local_groups(self) -> int:
        return self.groups * self.copies // self.size

    @property
    def local_intermediate(self) -> int:
        """Channels of x on this rank."""
        return self.local_heads * self.head_dim

    @property
    def local_bc(self) -> int:
        """Channels of B, and of C, on this rank."""
        return self.local_groups * self.state

    @property
    def local_conv_channels(self) -> int:
        return self.local_intermediate + 2 * self.local_bc

    @property
    def head_rows(self) -> range:
        """This rank's heads: rows of A, D and dt_bias."""
        return range(self.rank * self.local_heads, (self.rank + 1) * self.local_heads)

    @property
    def intermediate_rows(self) -> range:
        """This rank's channels of x: rows of the norm's weight."""
        return range(self.rank * self.local_intermediate, (self.rank + 1) * self.local_intermediate)

    @property
    def bc_rows(self) -> range:
        """This rank's channels within B, and within C."""
        first = self.rank * self.groups // self.size if self.copies > 1 else self.rank * self.local_groups
        return range(first * self.state, (first + self.local_groups) * self.state)

    @property
    def conv_rows(self) -> list[range]:
        """This rank's rows of the convolution, whose checkpoint order is x | B | C."""
        inner, bc = self.heads * self.head_dim, self.groups * self.state
        return [self.intermediate_rows, _shift(self.bc_rows, inner), _shift(self.bc_rows, inner + bc)]

    @property
    def in_proj_sizes(self) -> list[int]:
        """Rows of gate | x | B | C | dt over all ranks, copied groups counted as often as they are held."""
        inner, bc = self.heads * self.head_dim, self.groups * self.copies * self.state
        return [inner, inner, bc, bc, self.heads]

    @property
    def in_proj_sources(self) -> list[range]:
        """The checkpoint's rows in the order of `in_proj_sizes`: each group `copies` times in a row."""
        inner, bc = self.heads * self.head_dim, self.groups * self.state
        starts = {"B": 2 * inner, "C": 2 * inner + bc}
        copied = [
            range(start + group * self.state, start + (group + 1) * self.state)
            for start in starts.values()
            for group in range(self.groups)
            for _ in range(self.copies)
        ]
        dt = 2 * inner + 2 * bc
        return [range(2 * inner), *copied, range(dt, dt + self.heads)]


def _shift(rows: range, offset: int) -> range:
    return range(rows.start + offset, rows.stop + offset)


def scaled(rows: Sequence[range], factor: int) -> list[range]:
    """Row ranges of a tensor that holds one row for every `factor` rows (block scales, packed weights).

    Raises:
        ValueError: a range does not start and end on such a row.
    """
    if any(r.start % factor or r.stop % factor for r in rows):
        raise ValueError(
            f"the checkpoint quantises in_proj in blocks of {factor} rows, which cross the borders of gate, x, B, C "
            "and dt; serve it with a tensor_parallel_size of at most mamba_n_groups."
        )
    return [range(r.start // factor, r.stop // factor) for r in rows]
