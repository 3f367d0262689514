"""Checkpoints and rings to states and back, one program a head and sequence; others move the convolution's inputs.

`move_kernel` takes sequences of all layers to other slots at once.
"""

import triton
import triton.language as tl

from vllm_bamba.ops.mixer_step.kernels import fold, of_any_batch, store_state, tile_of, widened


@triton.jit
def places(
    part, length, WIDTH: tl.constexpr, DRAFTS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Of some channels of the last WIDTH - 1 of `length` inputs: places in a ring, in order, and which exist."""
    channel = part * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, 4)  # no convolution is wider
    entry = (length + 1 + DRAFTS + i) % (WIDTH + DRAFTS)  # that of token length - (WIDTH - 1) + i
    inside = (i < WIDTH - 1)[:, None] & (channel < CHANNELS)[None, :]
    return entry[:, None] * CHANNELS + channel[None, :], i[:, None] * CHANNELS + channel[None, :], inside


@of_any_batch
def read_kernel(
    inputs, states, a_ptr, slots, lengths, query_start_loc, continues, conv, ssm, scale, ring_x, ring_b, ring_dt,
    conv_stride, ssm_stride, scale_stride, ring_x_stride, ring_b_stride, ring_dt_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr,
    REPLAY: tl.constexpr, DRAFTS: tl.constexpr, QUANTISED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`read_slots`, a head or a block of channels of a sequence."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + sequence).to(tl.int64)
    new = tl.load(query_start_loc + sequence + 1) - tl.load(query_start_loc + sequence)
    position = tl.load(lengths + sequence) - new  # of the first new token
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM + 2 * GROUPS * STATE  # of the convolution
    if head >= HEADS:
        in_ring, in_order, inside = places(head - HEADS, position, WIDTH, DRAFTS, CHANNELS, BLOCK)
        inputs += (1 + sequence.to(tl.int64)) * (WIDTH - 1) * CHANNELS
        tl.store(inputs + in_order, tl.load(conv + slot * conv_stride + in_ring, mask=inside), mask=inside)
        return
    p, n = tl.arange(0, HEAD_DIM), tl.arange(0, STATE)
    rows, tile = tile_of(head * HEAD_DIM, p, n)
    states += sequence.to(tl.int64) * HEADS * HEAD_DIM * STATE
    if tl.load(continues + sequence) == 0:
        tl.store(states + tile, tl.zeros([HEAD_DIM, STATE], tl.float32))
        return
    if QUANTISED:
        scale += slot * scale_stride
    state = widened(tl.load(ssm + slot * ssm_stride + tile), scale, rows, QUANTISED)
    if REPLAY > 0:
        ring_x += slot * ring_x_stride + head * REPLAY * HEAD_DIM
        ring_b += slot * ring_b_stride + head // (HEADS // GROUPS) * STATE
        ring_dt += slot * ring_dt_stride + head * REPLAY
        a = tl.load(a_ptr + head)
        state = fold(state, a, position - 1, ring_x, ring_b, ring_dt, p, n, HEAD_DIM, GROUPS * STATE, REPLAY, DRAFTS)
    tl.store(states + tile, state)


@of_any_batch
def write_kernel(
    inputs, states, rows_of, slots, lengths, conv, ssm, scale, ring_dt, anchor_conv, anchor,
    conv_stride, ssm_stride, scale_stride, ring_dt_stride, anchor_conv_stride, anchor_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr,
    REPLAY: tl.constexpr, DRAFTS: tl.constexpr, QUANTISED: tl.constexpr, ANCHORED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`write_slots`, likewise."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    slot, length = tl.load(slots + sequence).to(tl.int64), tl.load(lengths + sequence)
    if slot == 0:
        return
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM + 2 * GROUPS * STATE  # of the convolution
    if head >= HEADS:
        in_ring, in_order, inside = places(head - HEADS, length, WIDTH, DRAFTS, CHANNELS, BLOCK)
        inputs += (1 + sequence.to(tl.int64)) * (WIDTH - 1) * CHANNELS
        last = tl.load(inputs + in_order, mask=inside)
        tl.store(conv + slot * conv_stride + in_ring, last, mask=inside)
        if ANCHORED:
            tl.store(anchor_conv + slot * anchor_conv_stride + in_order, last, mask=inside)
            tl.store(anchor + slot * anchor_stride, length)
        return
    p, n = tl.arange(0, HEAD_DIM), tl.arange(0, STATE)
    rows, tile = tile_of(head * HEAD_DIM, p, n)
    if QUANTISED:
        scale += slot * scale_stride
    state = tl.load(states + tl.load(rows_of + sequence).to(tl.int64) * HEADS * HEAD_DIM * STATE + tile)
    store_state(state, ssm + slot * ssm_stride, scale, rows, tile, n, length, QUANTISED)
    if REPLAY > 0:
        empty = tl.zeros([REPLAY], tl.float32)
        tl.store(ring_dt + slot * ring_dt_stride + head * REPLAY + tl.arange(0, REPLAY), empty)


@triton.jit
def of_layer(tensor, offset):
    """A tensor of the first layer's slots, in another layer, `offset` times 16 bytes away."""
    return tensor + offset * (128 // tensor.dtype.element_ty.primitive_bitwidth)


@of_any_batch
def move_kernel(
    moves, tables, groups, offsets, decays,
    conv, ssm, scale, ring_x, ring_b, ring_dt, anchor_conv, anchor, tables_stride,
    conv_stride, ssm_stride, scale_stride, ring_x_stride, ring_b_stride, ring_dt_stride, anchor_conv_stride,
    anchor_stride, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr,
    REPLAY: tl.constexpr, DRAFTS: tl.constexpr, QUANTISED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`move_slots`, a head or a block of channels of one sequence and layer.

    Nobody reads the anchor of a slot that stays, which another program may just write.
    """
    head, move, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, length = tl.load(moves + move * 4).to(tl.int64), tl.load(moves + move * 4 + 1)
    table = tl.load(tables + tl.load(groups + layer)).to(tl.pointer_type(tl.int32)) + row * tables_stride
    there = tl.load(table + tl.load(moves + move * 4 + 2)).to(tl.int64)
    here = tl.load(table + tl.load(moves + move * 4 + 3)).to(tl.int64)
    offset = tl.load(offsets + layer)
    anchor = of_layer(anchor, offset)
    at_anchor = there != here
    if at_anchor:
        at_anchor = tl.load(anchor + there * anchor_stride) == length  # the sequence may have gone on since
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM + 2 * GROUPS * STATE  # of the convolution
    if head >= HEADS:
        conv, anchor_conv = of_layer(conv, offset), of_layer(anchor_conv, offset)
        in_ring, in_order, inside = places(head - HEADS, length, WIDTH, DRAFTS, CHANNELS, BLOCK)
        if at_anchor:
            last = tl.load(anchor_conv + there * anchor_conv_stride + in_order, mask=inside)
        else:
            last = tl.load(conv + there * conv_stride + in_ring, mask=inside)
        tl.store(anchor_conv + here * anchor_conv_stride + in_order, last, mask=inside)
        if there != here:
            tl.store(conv + here * conv_stride + in_ring, last, mask=inside)
        return
    if head == 0:
        tl.store(anchor + here * anchor_stride, length)
    p, n = tl.arange(0, HEAD_DIM), tl.arange(0, STATE)
    rows, tile = tile_of(head * HEAD_DIM, p, n)
    ssm = of_layer(ssm, offset)
    ring_dt = of_layer(ring_dt, offset) + head * REPLAY
    old_scale, new_scale = scale, scale
    if QUANTISED:
        old_scale = of_layer(scale, offset) + there * scale_stride
        new_scale = of_layer(scale, offset) + here * scale_stride
    kept = tl.load(ssm + there * ssm_stride + tile)
    entries = tl.arange(0, REPLAY)
    times = tl.load(ring_dt + there * ring_dt_stride + entries)
    if at_anchor | (tl.sum(times, 0) == 0):  # nothing to round
        tl.store(ssm + here * ssm_stride + tile, kept)
        if QUANTISED:
            tl.store(new_scale + rows, tl.load(old_scale + rows))
    else:
        a = tl.load(tl.load(decays + layer).to(tl.pointer_type(tl.float32)) + head)
        ring_x = of_layer(ring_x, offset) + there * ring_x_stride + head * REPLAY * HEAD_DIM
        ring_b = of_layer(ring_b, offset) + there * ring_b_stride + head // (HEADS // GROUPS) * STATE
        old_dt = ring_dt + there * ring_dt_stride
        state = widened(kept, old_scale, rows, QUANTISED)
        state = fold(state, a, length - 1, ring_x, ring_b, old_dt, p, n, HEAD_DIM, GROUPS * STATE, REPLAY, DRAFTS)
        store_state(state, ssm + here * ssm_stride, new_scale, rows, tile, n, length, QUANTISED)
    tl.store(ring_dt + here * ring_dt_stride + entries, tl.zeros([REPLAY], tl.float32))
