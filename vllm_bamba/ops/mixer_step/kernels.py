"""One decode step of a whole mixer in Triton; symbols and equations in ../README.md.

Without rings `step_kernel` does it at once and writes the state. With them `prepare_kernel` does what a row needs once
and folds the rings that are full, unless FOLD is off; `replay_kernel` behind it is left with a head's state and ring,
which it asks for before anything else: it has to keep the memory busy. With EARLY it does so while `prepare_kernel` is
at work (programmatic dependent launch).

Inputs of the convolution stand in a ring indexed by the token's position, with one entry more than a step reads, the
one that it writes: programs of a row share B and C without waiting for each other. Rows with drafted tokens have
kernels of their own, `draft_kernels.py`.
"""

import triton
import triton.language as tl

# what differs from batch to batch and is no reason to compile a kernel again
of_any_batch = triton.jit(
    do_not_specialize=["slots_stride", "tables_stride"],
    do_not_specialize_on_alignment=["slots", "lengths", "query_start_loc", "continues"],
)


@triton.jit
def silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) with a small relative error everywhere: log1p(e) = 2 atanh(e / (2 + e)), a series in t <= 1/3."""
    e = tl.exp(-tl.abs(x))
    t = e / (2 + e)
    s = t * t
    series = 1 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9 + s * (1 / 11 + s / 13)))))
    return tl.maximum(x, 0) + 2 * t * series


@triton.jit
def convolve(
    new, conv, weight, bias, channels, position, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """SiLU of the convolution at one position, rounded as it would be on its way through memory."""
    k = tl.arange(0, 4)[:, None]  # oldest first
    ring = conv + (position + 1 + k) % WIDTH * CHANNELS + channels[None, :]
    old = tl.load(ring, mask=k < WIDTH - 1, other=0)
    window = tl.where(k == WIDTH - 1, new[None, :], old).to(tl.float32)  # [4, channels]
    taps = tl.load(weight + k * CHANNELS + channels[None, :], mask=k < WIDTH, other=0).to(tl.float32)
    y = tl.sum(window * taps, 0)
    if BIAS:
        y += tl.load(bias + channels).to(tl.float32)
    return silu(y).to(new.dtype).to(tl.float32)


@triton.jit
def product(x, b, PARTS: tl.constexpr, sums):
    """sums + x b in fp32 on tensor cores, [M, K] times [K, N] in bf16; x in parts, so that every product is exact.

    Three parts hold an fp32 number, two one in fp16.
    """
    left, right = x.to(tl.float32), b.to(tl.bfloat16)
    for _ in tl.static_range(PARTS):
        high = left.to(tl.bfloat16)
        left -= high.to(tl.float32)
        sums = tl.dot(high, right, sums)
    return sums


@triton.jit
def as_columns(vector, PARTS: tl.constexpr):
    """A vector [K] in parts of bf16, a column each of [K, 8]: tensor cores take no narrower matrix."""
    column = tl.arange(0, 8)[None, :]
    columns = tl.zeros([vector.shape[0], 8], tl.bfloat16)
    left = vector.to(tl.float32)
    for i in tl.static_range(PARTS):
        part = left.to(tl.bfloat16)
        left -= part.to(tl.float32)
        columns = tl.where(column == i, part[:, None], columns)
    return columns


@triton.jit
def times_vector(x, vector):
    """x [M, K] times a vector [K], in fp32 as it comes."""
    return tl.sum(x.to(tl.float32) * vector.to(tl.float32)[None, :], 1)


INTEGER_PARTS = tl.constexpr(3)


@triton.jit
def store_as_integers(vector, parts, unit, n):
    """Three integers of at most 127 for each number of a vector [n]: it is their sum in units of 1, 1/254 and 1/254^2.

    So rounded to 2^-23 of its largest number. Goes to `parts`, int8 [INTEGER_PARTS, n], and the first unit to `unit`.
    """
    largest = tl.max(tl.abs(vector), 0)
    first = tl.where(largest > 0, largest, 1) / 127
    tl.store(unit, first)
    left = vector / first
    for i in tl.static_range(INTEGER_PARTS):
        part = tl.floor(left + 0.5)
        left = (left - part) * 254
        tl.store(parts + i * n.shape[0] + n, part.to(tl.int8))


@triton.jit
def times_integers(x, parts, unit, n):
    """int8 [M, n] times the vector of `store_as_integers`, in fp32 [M, 8], to be added up; sums of integers are exact.

    The parts are columns, as in `as_columns`; `unit` is the first one's.
    """
    column = tl.arange(0, 8)[None, :]
    columns = tl.load(parts + column * n.shape[0] + n[:, None], mask=column < INTEGER_PARTS, other=0)
    units = tl.where(column == 0, 1, tl.where(column == 1, 1 / 254, 1 / 254 / 254)) * unit
    return tl.dot(x, columns, out_dtype=tl.int32).to(tl.float32) * units


@triton.jit
def fold(
    state, a, newest, ring_x, ring_b, ring_dt, p, n,
    HEAD_DIM: tl.constexpr, B_STRIDE: tl.constexpr, REPLAY: tl.constexpr, DRAFTS: tl.constexpr,
):  # fmt: skip
    """A checkpoint and the ring's tokens: the state behind the newest of them, at position `newest`.

    Entries whose dt is 0 are empty: what they hold may be NaN. The oldest DRAFTS may be of tokens that were taken back.
    Time is added up from the newest token on, so that recent ones lose nothing.
    """
    TOKENS: tl.constexpr = REPLAY if REPLAY > 16 else 16  # the least that tensor cores take
    k = tl.arange(0, TOKENS)
    index = (newest + 1 + k) % REPLAY  # oldest first
    times = tl.load(ring_dt + index, mask=(k < REPLAY) & (k >= DRAFTS), other=0)
    live = times > 0
    since = tl.cumsum(times, 0, reverse=True) - times
    # loaded without waiting for the times
    x = tl.load(ring_x + index[None, :] * HEAD_DIM + p[:, None]).to(tl.float32)
    b = tl.load(ring_b + index[:, None] * B_STRIDE + n[None, :])
    x, b = tl.where(live[None, :], x, 0), tl.where(live[:, None], b, 0)
    x *= (times * tl.exp(a * since))[None, :]
    state *= tl.exp(a * tl.sum(times, 0))
    if ring_b.dtype.element_ty == tl.bfloat16:
        return product(x, b, 3, state)
    added = tl.zeros_like(state)  # tensor cores cut sums off where fp32 would round
    for i in tl.range(TOKENS):
        of_x = tl.sum(tl.where((k == i)[None, :], x, 0), 1)
        of_b = tl.sum(tl.where((k == i)[:, None], b.to(tl.float32), 0), 0)
        added += of_x[:, None] * of_b[None, :]
    return state + added


@triton.jit
def in_two(value, dtype: tl.constexpr):
    """Two numbers of a low precision whose sum is nearly an fp32 number: 16 of 24 bits of it in bf16."""
    high = value.to(dtype)
    return high, (value - high.to(tl.float32)).to(dtype)


@triton.jit
def tile_of(first, p, n):
    """Channels from `first` on, [P], and where each value of their state stands, [P, STATE]."""
    rows = first + p
    return rows, rows[:, None] * n.shape[0] + n[None, :]


# 1.5 * 2^23: a float of this size is a whole number, and its last bits are that number's
WHOLE = tl.constexpr(12582912.0)
WHOLE_BITS = tl.constexpr(0x4B400000)


@triton.jit
def widened(stored, scale, rows, QUANTISED: tl.constexpr):
    """A stored state in fp32, [channels, STATE]; `rows` are its channels."""
    if stored.dtype == tl.int8:  # in additions: a GPU converts four times slower than it adds
        state = (stored.to(tl.int32) + WHOLE_BITS).to(tl.float32, bitcast=True) - WHOLE
    else:
        state = stored.to(tl.float32)
    if QUANTISED:
        state *= tl.load(scale + rows)[:, None]
    return state


@triton.jit
def hashed(seed, index):
    """32 bits that look random: the finaliser of MurmurHash3 over an index and a seed."""
    h = index.to(tl.uint32) ^ (seed.to(tl.uint32) * 0x9E3779B1)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def noise(seed, rows, n):
    """Numbers of size 1/2 and less that look random, [rows, n], any two independent: sums of a row's and a column's.

    Short of 1/2 by 2^-14, which is more than a scaled state can be too large by.
    """
    h = hashed(seed, rows)[:, None] + hashed(seed, n | 0x40000000)[None, :]
    from_1_to_2 = ((h >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    return from_1_to_2 * (1 - 1 / 8192) - 1.5 * (1 - 1 / 8192)


@triton.jit
def rounded_at_random(value, noise, dtype: tl.constexpr):
    """Values, down or up to a number of the dtype, int8 or e4m3; on average what they were.

    Between e4m3's numbers are steps of 1/8 of the power of two below, and of 2^-9 from zero to 2^-6.
    """
    if dtype == tl.int8:
        rounded = ((value + noise) + WHOLE).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        exponent = tl.maximum((value.to(tl.int32, bitcast=True) >> 23) & 0xFF, 127 - 6)
        step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
        rounded = (tl.floor(value / step + 0.5 + noise) * step).to(dtype)
    return rounded


@triton.jit
def store_state(state, ssm, scale, rows, tile, n, position, QUANTISED: tl.constexpr):
    """Write a head's state; 8 bits with a scale a row, rounded up or down at random so that nothing is lost on average.

    The random numbers depend on the position in the text and in the state alone: the same request gives the same.
    """
    dtype: tl.constexpr = ssm.dtype.element_ty
    if QUANTISED:
        LARGEST: tl.constexpr = 127 if dtype == tl.int8 else 448
        largest = tl.max(tl.abs(state), 1)
        tl.store(scale + rows, largest / LARGEST)
        state *= (LARGEST / tl.maximum(largest, 1e-30))[:, None]  # what is smaller is as good as zero
        tl.store(ssm + tile, rounded_at_random(state, noise(position, rows, n), dtype))
    else:
        tl.store(ssm + tile, state.to(dtype))


@triton.jit
def fold_in_slot(
    head, p, n, position, a_ptr, ssm, scale, ring_x, ring_b, ring_dt,
    HEAD_DIM: tl.constexpr, OF_GROUP: tl.constexpr, B_STRIDE: tl.constexpr, REPLAY: tl.constexpr,
    DRAFTS: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """`fold` channels p of a head, of OF_GROUP in a group, in front of a position; the pointers are the slot's."""
    rows, values = tile_of(head * HEAD_DIM, p, n)
    ring_x += head * REPLAY * HEAD_DIM
    ring_b += head // OF_GROUP * n.shape[0]
    ring_dt += head * REPLAY
    state = widened(tl.load(ssm + values), scale, rows, QUANTISED)
    a = tl.load(a_ptr + head)
    state = fold(state, a, position - 1, ring_x, ring_b, ring_dt, p, n, HEAD_DIM, B_STRIDE, REPLAY, DRAFTS)
    store_state(state, ssm, scale, rows, values, n, position, QUANTISED)


@triton.jit
def gate_and_norm(projected, norm_weight, rows, GATED: tl.constexpr):
    """What `store_gated` wants of a head's channels."""
    if GATED:
        gate, norm = tl.load(projected + rows), tl.load(norm_weight + rows)
    else:
        gate, norm = rows, rows  # nobody looks at them
    return gate, norm


@triton.jit
def store_gated(y, gate, norm, out, rows, sums, GATED: tl.constexpr):
    """Store y of a head's channels, gated and weighted if asked to, and at `sums` the sum of squares of what is gated.

    The sum is two numbers of the output's precision.
    """
    if GATED:
        y *= silu(gate.to(tl.float32))
        high, low = in_two(tl.sum(y * y, 0), out.dtype.element_ty)
        tl.store(out + sums, high)
        tl.store(out + sums + 1, low)
        y *= norm.to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty))


@triton.jit
def store_padding(out, rows, sums, GATED: tl.constexpr):
    """What is added up over ranks and scaled later must be finite."""
    zero = tl.zeros([rows.shape[0]], out.dtype.element_ty)
    tl.store(out + rows, zero)
    if GATED:
        tl.store(out + sums + tl.arange(0, 2), tl.zeros([2], out.dtype.element_ty))


@triton.jit
def where_from(slots, slots_stride, lengths, row):
    """A row's slot and its token's position, asked for at the same time."""
    slot, length = tl.load(slots + row * slots_stride), tl.load(lengths + row)
    return slot.to(tl.int64), length - 1


@triton.jit
def time_step(dt, dt_bias, low, high):
    return tl.minimum(tl.maximum(softplus(dt.to(tl.float32) + dt_bias.to(tl.float32)), low), high)


@of_any_batch
def step_kernel(
    projected, out, conv_weight, conv_bias, a_ptr, d_ptr, dt_bias, norm_weight, slots, lengths,
    conv, ssm, scale,
    projected_stride, out_stride, slots_stride, conv_stride, ssm_stride, scale_stride,
    dt_low, dt_high,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr, WIDTH: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """A whole step that writes the state; a program a head and row."""
    head, row = tl.program_id(0), tl.program_id(1)
    inner: tl.constexpr = HEADS * HEAD_DIM
    bc: tl.constexpr = GROUPS * STATE
    channels: tl.constexpr = inner + 2 * bc
    p, n = tl.arange(0, HEAD_DIM), tl.arange(0, STATE)
    rows, values = tile_of(head * HEAD_DIM, p, n)
    out += row * out_stride
    slot, position = where_from(slots, slots_stride, lengths, row)
    if slot == 0:
        store_padding(out, rows, inner + 2 * head, GATED)
        return
    conv += slot * conv_stride
    ssm += slot * ssm_stride
    if QUANTISED:
        scale += slot * scale_stride
    kept = tl.load(ssm + values)
    projected += row * projected_stride
    xbc = projected + inner
    newest = conv + position % WIDTH * channels
    group = head // (HEADS // GROUPS)

    b_channels = inner + group * STATE + n
    b_new, c_new = tl.load(xbc + b_channels), tl.load(xbc + b_channels + bc)
    b = convolve(b_new, conv, conv_weight, conv_bias, b_channels, position, channels, WIDTH, BIAS)
    c = convolve(c_new, conv, conv_weight, conv_bias, b_channels + bc, position, channels, WIDTH, BIAS)
    if head % (HEADS // GROUPS) == 0:  # one for the group
        tl.store(newest + b_channels, b_new)
        tl.store(newest + b_channels + bc, c_new)
    x_new = tl.load(xbc + rows)
    x = convolve(x_new, conv, conv_weight, conv_bias, rows, position, channels, WIDTH, BIAS)
    tl.store(newest + rows, x_new)

    a = tl.load(a_ptr + head)
    dt = time_step(tl.load(xbc + channels + head), tl.load(dt_bias + head), dt_low, dt_high)
    state = widened(kept, scale, rows, QUANTISED) * tl.exp(dt * a) + (dt * x)[:, None] * b[None, :]
    y = tl.sum(state * c[None, :], 1) + tl.load(d_ptr + head).to(tl.float32) * x
    gate, norm = gate_and_norm(projected, norm_weight, rows, GATED)
    store_gated(y, gate, norm, out, rows, inner + 2 * head, GATED)
    store_state(state, ssm, scale, rows, values, n, position, QUANTISED)


@triton.jit
def is_folded(head, position, PERIOD: tl.constexpr, FOLD: tl.constexpr):
    """Whether a head's ring is folded in front of the token at this position: every PERIOD tokens, or never."""
    return ((head + position) % PERIOD == 0) & FOLD


@of_any_batch
def prepare_kernel(
    projected, convolved, factors, c_parts, conv_weight, conv_bias, a_ptr, d_ptr, dt_bias, slots, lengths,
    conv, ssm, scale, ring_x, ring_b, ring_dt,
    projected_stride, slots_stride,
    conv_stride, ssm_stride, scale_stride, ring_x_stride, ring_b_stride, ring_dt_stride,
    dt_low, dt_high,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr, WIDTH: tl.constexpr,
    REPLAY: tl.constexpr, FOLD: tl.constexpr, BIAS: tl.constexpr, QUANTISED: tl.constexpr,
    EARLY: tl.constexpr, INTEGERS: tl.constexpr, PERIOD: tl.constexpr, FOLDED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, FOLD_DIM: tl.constexpr,
):  # fmt: skip
    """What a replayed step needs beside states. A row has programs of two kinds, which need not wait for each other:

    - with FOLD, one for each FOLD_DIM channels of a head whose ring is full, as `fold_turns` says: fold it;
    - one for each BLOCK_HEADS heads of a group: convolve B and C, and find the heads' factors.

    Rings stay as they are: the step itself empties the folded ones and adds the new tokens.

    `convolved` is [tokens, B | C]. `factors` is fp32 [tokens, ring | decay | new | dt | units]: what the x of each ring
    entry counts for, HEADS x REPLAY; how far each head's checkpoint has decayed; what its new x counts for; its time
    step; with INTEGERS each group's unit of `c_parts`, int8 [tokens, groups, INTEGER_PARTS, STATE], which are C. HEADS
    numbers each, so that every token begins at a multiple of 16 bytes.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    part, row = tl.program_id(0), tl.program_id(1)
    inner: tl.constexpr = HEADS * HEAD_DIM
    bc: tl.constexpr = GROUPS * STATE
    channels: tl.constexpr = inner + 2 * bc
    FOLDS: tl.constexpr = FOLDED * (HEAD_DIM // FOLD_DIM) if FOLD else 0
    HEAD_BLOCKS: tl.constexpr = (HEADS // GROUPS + BLOCK_HEADS - 1) // BLOCK_HEADS  # of a group
    slot, position = where_from(slots, slots_stride, lengths, row)
    if slot == 0:
        return
    conv += slot * conv_stride
    ring_b += slot * ring_b_stride
    ring_dt += slot * ring_dt_stride
    xbc = projected + row * projected_stride + inner
    n = tl.arange(0, STATE)

    if part < FOLDS:
        full = part % FOLDED * PERIOD + (PERIOD - position % PERIOD) % PERIOD  # one that `is_folded`
        if full < HEADS:
            p = part // FOLDED * FOLD_DIM + tl.arange(0, FOLD_DIM)
            ssm += slot * ssm_stride
            if QUANTISED:
                scale += slot * scale_stride
            ring_x += slot * ring_x_stride
            fold_in_slot(
                full, p, n, position, a_ptr, ssm, scale, ring_x, ring_b, ring_dt,
                HEAD_DIM, HEADS // GROUPS, bc, REPLAY, 0, QUANTISED,
            )  # fmt: skip
    else:
        group, of_group = (part - FOLDS) // HEAD_BLOCKS, (part - FOLDS) % HEAD_BLOCKS
        own = inner + group * STATE + n
        at = row * 2 * bc + group * STATE + n
        stores = of_group == 0  # one for the group
        b_new, c_new = tl.load(xbc + own), tl.load(xbc + own + bc)
        b = convolve(b_new, conv, conv_weight, conv_bias, own, position, channels, WIDTH, BIAS)
        c = convolve(c_new, conv, conv_weight, conv_bias, own + bc, position, channels, WIDTH, BIAS)
        if stores:
            newest = conv + position % WIDTH * channels + own
            tl.store(newest, b_new)
            tl.store(newest + bc, c_new)
            tl.store(convolved + at, b.to(convolved.dtype.element_ty))
            tl.store(convolved + at + bc, c.to(convolved.dtype.element_ty))

        k = tl.arange(0, REPLAY)
        index = (position + 1 + k) % REPLAY  # oldest first; the last is the new token's
        is_old = k < REPLAY - 1
        past = ring_b + index[:, None] * bc + group * STATE + n[None, :]
        past = tl.load(past, mask=is_old[:, None], other=0).to(tl.float32)
        b_c = tl.sum(past * c[None, :], 1)
        in_group = of_group * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        some = in_group < HEADS // GROUPS
        head = group * (HEADS // GROUPS) + in_group
        a, bias = tl.load(a_ptr + head, mask=some, other=0), tl.load(dt_bias + head, mask=some, other=0)
        dt = time_step(tl.load(xbc + channels + head, mask=some, other=0), bias, dt_low, dt_high)
        unfolded = some & ~is_folded(head, position, PERIOD, FOLD)
        entries = head[:, None] * REPLAY + index[None, :]
        times = tl.load(ring_dt + entries, mask=unfolded[:, None] & is_old[None, :], other=0)  # [heads, REPLAY]
        since = tl.cumsum(times, 1, reverse=True) - times + dt[:, None]
        factors += row * HEADS * (REPLAY + 4)
        if INTEGERS:
            c_parts += (row * GROUPS + group) * INTEGER_PARTS * STATE
            if stores:
                store_as_integers(c, c_parts, factors + (REPLAY + 3) * HEADS + group, n)
        # B of an empty entry may be NaN
        counts = tl.where(times > 0, times * tl.exp(a[:, None] * since) * b_c[None, :], 0)
        tl.store(factors + entries, counts, mask=some[:, None])
        factors += HEADS * REPLAY
        tl.store(factors + head, tl.exp(a * (tl.sum(times, 1) + dt)), mask=some)
        skip = tl.load(d_ptr + head, mask=some, other=0).to(tl.float32)
        tl.store(factors + HEADS + head, dt * tl.sum(b * c, 0) + skip, mask=some)
        tl.store(factors + 2 * HEADS + head, dt, mask=some)


@of_any_batch
def replay_kernel(
    projected, convolved, factors, c_parts, out, conv_weight, conv_bias, norm_weight, slots, lengths,
    conv, ssm, scale, ring_x, ring_b, ring_dt,
    projected_stride, out_stride, slots_stride,
    conv_stride, ssm_stride, scale_stride, ring_x_stride, ring_b_stride, ring_dt_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr, WIDTH: tl.constexpr,
    REPLAY: tl.constexpr, FOLD: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    QUANTISED: tl.constexpr, EARLY: tl.constexpr, INTEGERS: tl.constexpr, PERIOD: tl.constexpr,
):  # fmt: skip
    """The step behind `prepare_kernel`: reads a checkpoint and its ring, adds the token to the ring.

    With EARLY it starts while that one is at work, and ahead of its wait leaves alone what that one writes.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    inner: tl.constexpr = HEADS * HEAD_DIM
    bc: tl.constexpr = GROUPS * STATE
    channels: tl.constexpr = inner + 2 * bc
    TOKENS: tl.constexpr = REPLAY if REPLAY > 16 else 16  # the least that tensor cores take
    p, n, k = tl.arange(0, HEAD_DIM), tl.arange(0, STATE), tl.arange(0, TOKENS)
    rows, values = tile_of(head * HEAD_DIM, p, n)
    out += row * out_stride
    slot, position = where_from(slots, slots_stride, lengths, row)
    if slot == 0:
        if EARLY:
            tl.extra.cuda.gdc_wait()  # all must: who comes behind this kernel comes behind `prepare_kernel` by that
        store_padding(out, rows, inner + 2 * head, GATED)
        return
    folded = is_folded(head, position, PERIOD, FOLD)
    if EARLY and FOLD:  # noqa: SIM102  the compiler decides this one, each program the next
        if folded:
            tl.extra.cuda.gdc_wait()
    kept = tl.load(ssm + slot * ssm_stride + values)  # [HEAD_DIM, STATE]
    ring_dt += slot * ring_dt_stride + head * REPLAY + k
    ring_x += slot * ring_x_stride + head * REPLAY * HEAD_DIM
    projected += row * projected_stride
    conv += slot * conv_stride
    x_new = tl.load(projected + inner + rows)
    gate, norm = gate_and_norm(projected, norm_weight, rows, GATED)
    if QUANTISED:
        of_row = tl.load(scale + slot * scale_stride + rows)
    live = tl.load(ring_dt, mask=k < REPLAY, other=0) > 0  # what other entries hold may be NaN
    past = tl.load(ring_x + k[None, :] * HEAD_DIM + p[:, None], mask=live[None, :], other=0)
    x = convolve(x_new, conv, conv_weight, conv_bias, rows, position, channels, WIDTH, BIAS)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    STORED: tl.constexpr = ssm.dtype.element_ty
    STATE_PARTS: tl.constexpr = 3 if tl.float32 == STORED else 2 if tl.float16 == STORED else 1
    X_PARTS: tl.constexpr = 1 if ring_x.dtype.element_ty == tl.bfloat16 else 3
    BF16: tl.constexpr = convolved.dtype.element_ty == tl.bfloat16  # tensor cores cut sums off where fp32 would round
    group = head // (HEADS // GROUPS)
    factors += row * HEADS * (REPLAY + 4)
    counts = tl.load(factors + head * REPLAY + k, mask=k < REPLAY, other=0)
    b = convolved + row * 2 * bc + group * STATE + n
    factors += HEADS * REPLAY + head
    decay, new = tl.load(factors), tl.load(factors + HEADS)
    if INTEGERS:
        parts = c_parts + (row * GROUPS + group) * INTEGER_PARTS * STATE
        unit = tl.load(factors - head + 3 * HEADS + group)
        y = times_integers(kept, parts, unit * decay, n)
    elif BF16:
        zeros = tl.zeros([HEAD_DIM, 8], tl.float32)
        y = product(kept, as_columns(tl.load(b + bc), 1), STATE_PARTS, zeros) * decay
    else:
        y = times_vector(kept, tl.load(b + bc))[:, None] * decay
    if QUANTISED:
        y *= of_row[:, None]
    if BF16:
        y = product(past, as_columns(counts, 3), X_PARTS, y)
    else:
        y += times_vector(past, counts)[:, None]
    y = tl.sum(y, 1) + new * x
    store_gated(y, gate, norm, out, rows, inner + 2 * head, GATED)

    tl.store(conv + position % WIDTH * channels + rows, x_new)
    entry = position % REPLAY
    tl.store(ring_x + entry * HEAD_DIM + p, x.to(ring_x.dtype.element_ty))
    times = tl.where(k == entry, tl.load(factors + 2 * HEADS), 0)
    tl.store(ring_dt, times, mask=tl.where(folded, k < REPLAY, k == entry))
    if head % (HEADS // GROUPS) == 0:  # one for the group
        tl.store(ring_b + slot * ring_b_stride + entry * bc + group * STATE + n, tl.load(b))
