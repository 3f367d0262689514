"""Checkpoints and rings to states and back, one program a head and sequence."""

import triton.language as tl

from vllm_bamba.ops.mixer_step.kernels import fold, of_any_batch, store_state, tile_of, widened


@of_any_batch
def read_kernel(
    states, a_ptr, slots, lengths, continues, ssm, scale, ring_x, ring_b, ring_dt,
    ssm_stride, scale_stride, ring_x_stride, ring_b_stride, ring_dt_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr,
    REPLAY: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(1)
    p, n = tl.arange(0, HEAD_DIM), tl.arange(0, STATE)
    rows, tile = tile_of(head * HEAD_DIM, p, n)
    states += sequence.to(tl.int64) * HEADS * HEAD_DIM * STATE
    if tl.load(continues + sequence) == 0:
        tl.store(states + tile, tl.zeros([HEAD_DIM, STATE], tl.float32))
        return
    slot = tl.load(slots + sequence).to(tl.int64)
    if QUANTISED:
        scale += slot * scale_stride
    state = widened(tl.load(ssm + slot * ssm_stride + tile), scale, rows, QUANTISED)
    if REPLAY > 0:
        ring_x += slot * ring_x_stride + head * REPLAY * HEAD_DIM
        ring_b += slot * ring_b_stride + head // (HEADS // GROUPS) * STATE
        ring_dt += slot * ring_dt_stride + head * REPLAY
        position, a = tl.load(lengths + sequence), tl.load(a_ptr + head)
        state = fold(state, a, position - 1, ring_x, ring_b, ring_dt, p, n, HEAD_DIM, GROUPS * STATE, REPLAY)
    tl.store(states + tile, state)


@of_any_batch
def write_kernel(
    states, slots, lengths, ssm, scale, ring_dt, ssm_stride, scale_stride, ring_dt_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, STATE: tl.constexpr,
    REPLAY: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    head, sequence = tl.program_id(0), tl.program_id(1)
    p, n = tl.arange(0, HEAD_DIM), tl.arange(0, STATE)
    rows, tile = tile_of(head * HEAD_DIM, p, n)
    slot = tl.load(slots + sequence).to(tl.int64)
    if QUANTISED:
        scale += slot * scale_stride
    state = tl.load(states + sequence.to(tl.int64) * HEADS * HEAD_DIM * STATE + tile)
    store_state(state, ssm + slot * ssm_stride, scale, rows, tile, tl.load(lengths + sequence), QUANTISED)
    if REPLAY > 0:
        empty = tl.zeros([REPLAY], tl.float32)
        tl.store(ring_dt + slot * ring_dt_stride + head * REPLAY + tl.arange(0, REPLAY), empty)
