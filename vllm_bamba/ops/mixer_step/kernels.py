"""One decode step of a whole mixer, in one or two Triton kernels; symbols and equations in ../README.md.

`step_kernel` does the step. A program serves some heads of one row, one after the other. It convolves their channels
of x, and B and C, which it shares with the other programs of the row, without waiting for anybody: inputs of the
convolution stand in a ring of `WIDTH` entries indexed by the token's position, of which a step reads all but the one
that it writes.

A head's state is asked for before anything that it is combined with is computed, and stays as it is stored until it is
used: registers decide how many programs an SM runs at once, and that how close it comes to the memory's speed.
`fold_kernel` comes behind it where states are replayed: the little that it does would cost the step its registers.
"""

import triton
import triton.language as tl


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
    old = tl.load(conv + (position + 1 + k) % WIDTH * CHANNELS + channels[None, :], mask=k < WIDTH - 1, other=0)
    window = tl.where(k == WIDTH - 1, new[None, :], old).to(tl.float32)  # [4, channels]
    taps = tl.load(weight + k * CHANNELS + channels[None, :], mask=k < WIDTH, other=0).to(tl.float32)
    y = tl.sum(window * taps, 0)
    if BIAS:
        y += tl.load(bias + channels).to(tl.float32)
    return silu(y).to(new.dtype).to(tl.float32)


@triton.jit
def product(x, b, PARTS: tl.constexpr):
    """x b in fp32 on tensor cores: every product of x and b, split into bf16 numbers, is exact.

    x is fp32 [channels, tokens], three parts; b [tokens, STATE] has as many as its precision needs.
    """
    sums = tl.zeros([x.shape[0], b.shape[1]], tl.float32)
    for _ in tl.static_range(3):
        high = x.to(tl.bfloat16)
        x -= high.to(tl.float32)
        rest = b.to(tl.float32)
        for _ in tl.static_range(PARTS):
            part = rest.to(tl.bfloat16)
            rest -= part.to(tl.float32)
            sums = tl.dot(high, part, sums)
    return sums


@triton.jit
def fold(
    state, after, a, newest, ring_x, ring_b, ring_dt, p, n,
    X_STRIDE: tl.constexpr, B_STRIDE: tl.constexpr, REPLAY: tl.constexpr,
):  # fmt: skip
    """A checkpoint and the ring's tokens: the state `after` time after the newest of them, at position `newest`.

    Entries whose dt is 0 are empty: what they hold may be NaN. Time is added up from the newest token on, so that
    recent ones lose nothing.
    """
    TOKENS: tl.constexpr = REPLAY if REPLAY > 16 else 16  # the least that tensor cores take
    PARTS: tl.constexpr = 1 if ring_b.dtype.element_ty == tl.bfloat16 else 3
    k = tl.arange(0, TOKENS)
    index = (newest + 1 + k) % REPLAY  # oldest first
    times = tl.load(ring_dt + index, mask=k < REPLAY, other=0)
    live = times > 0
    since = tl.cumsum(times, 0, reverse=True) - times + after
    x = tl.load(ring_x + index[None, :] * X_STRIDE + p[:, None], mask=live[None, :], other=0).to(tl.float32)
    b = tl.load(ring_b + index[:, None] * B_STRIDE + n[None, :], mask=live[:, None], other=0)
    x *= (times * tl.exp(a * since))[None, :]
    return state * tl.exp(a * (tl.sum(times, 0) + after)) + product(x, b, PARTS)


@triton.jit
def in_two(value, dtype: tl.constexpr):
    """Two numbers of a low precision whose sum is an fp32 number."""
    high = value.to(dtype)
    return high, (value - high.to(tl.float32)).to(dtype)


@triton.jit
def tile_of(head, p, n):
    """A head's channels [HEAD_DIM], and where each value of its state stands [HEAD_DIM, STATE]."""
    rows = head * p.shape[0] + p
    return rows, rows[:, None] * n.shape[0] + n[None, :]


@triton.jit
def widened(stored, scale, rows, QUANTISED: tl.constexpr):
    """A stored state in fp32, [channels, STATE]; `rows` are its channels."""
    state = stored.to(tl.float32)
    if QUANTISED:
        state *= tl.load(scale + rows)[:, None]
    return state


@triton.jit
def noise(seed, index):
    """Numbers in [0, 1) that look random: the finaliser of MurmurHash3 over an index and a seed."""
    h = index.to(tl.uint32) ^ (seed.to(tl.uint32) * 0x9E3779B1)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return ((h ^ (h >> 16)) >> 8).to(tl.float32) * (1 / (1 << 24))


@triton.jit
def store_state(state, ssm, scale, rows, tile, position, QUANTISED: tl.constexpr):
    """Write a head's state; 8 bits with a scale a row, rounded up or down at random so that nothing is lost on average.

    The random numbers depend on the position in the text and in the state alone: the same request gives the same.
    """
    if QUANTISED:
        step = tl.max(tl.abs(state), 1) / 127
        scaled = state / tl.where(step > 0, step, 1)[:, None]
        rounded = tl.floor(scaled + noise(position, tile))
        tl.store(scale + rows, step)
        tl.store(ssm + tile, tl.minimum(tl.maximum(rounded, -127), 127).to(ssm.dtype.element_ty))
    else:
        tl.store(ssm + tile, state.to(ssm.dtype.element_ty))


@triton.jit
def convolved_x(
    xbc, newest, conv, weight, bias, rows, position, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr
):
    """x of some channels [rows]; its newest input goes to the ring."""
    new = tl.load(xbc + rows)
    x = convolve(new, conv, weight, bias, rows, position, CHANNELS, WIDTH, BIAS)
    tl.store(newest + rows, new)
    return x


@triton.jit
def gated(y, projected, norm_weight, out, rows, GATED: tl.constexpr):
    """Store y of some channels, gated and weighted if asked to; returns the sum of squares of what is gated."""
    squares = 0.0
    if GATED:
        y *= silu(tl.load(projected + rows).to(tl.float32))
        squares = tl.sum(y * y, 0)
        y *= tl.load(norm_weight + rows).to(tl.float32)
    tl.store(out + rows, y.to(out.dtype.element_ty))
    return squares


@triton.jit
def step_kernel(
    projected, out, conv_weight, conv_bias, a_ptr, d_ptr, dt_bias, norm_weight, slots, lengths,
    conv, ssm, scale, ring_x, ring_b, ring_dt,
    projected_stride, out_stride, slots_stride,
    conv_stride, ssm_stride, scale_stride, ring_x_stride, ring_b_stride, ring_dt_stride,
    dt_low, dt_high,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr, WIDTH: tl.constexpr,
    REPLAY: tl.constexpr, HEADS_PER_PROGRAM: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, QUANTISED: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1)
    first_head = part * HEADS_PER_PROGRAM
    inner: tl.constexpr = HEADS * HEAD_DIM
    bc: tl.constexpr = GROUPS * STATE
    channels: tl.constexpr = inner + 2 * bc
    p, n = tl.arange(0, HEAD_DIM), tl.arange(0, STATE)
    out += row * out_stride
    projected += row * projected_stride
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    if slot == 0:  # padding: what is added up over ranks and scaled later must be finite
        for i in range(HEADS_PER_PROGRAM):
            rows = (first_head + i) * HEAD_DIM + p
            tl.store(out + rows, tl.zeros([HEAD_DIM], out.dtype.element_ty))
        if GATED:
            sums = inner + 2 * first_head + tl.arange(0, 2 * HEADS_PER_PROGRAM)
            tl.store(out + sums, tl.zeros([2 * HEADS_PER_PROGRAM], out.dtype.element_ty))
        return
    position = tl.load(lengths + row) - 1
    conv += slot * conv_stride
    ssm += slot * ssm_stride
    if QUANTISED:
        scale += slot * scale_stride
    kept = tl.load(ssm + tile_of(first_head, p, n)[1])  # [HEAD_DIM, STATE]
    xbc = projected + inner
    group = first_head // (HEADS // GROUPS)
    leads = first_head % (HEADS // GROUPS) == 0  # writes what the group's programs share

    b_channels = inner + group * STATE + n
    b_new, c_new = tl.load(xbc + b_channels), tl.load(xbc + b_channels + bc)
    b = convolve(b_new, conv, conv_weight, conv_bias, b_channels, position, channels, WIDTH, BIAS)
    c = convolve(c_new, conv, conv_weight, conv_bias, b_channels + bc, position, channels, WIDTH, BIAS)
    newest = conv + position % WIDTH * channels
    if leads:
        tl.store(newest + b_channels, b_new)
        tl.store(newest + b_channels + bc, c_new)
    if REPLAY > 0:
        ring_x += slot * ring_x_stride
        ring_b += slot * ring_b_stride + group * STATE
        ring_dt += slot * ring_dt_stride
        entry = position % REPLAY
    if not PLAIN:
        k = tl.arange(0, REPLAY)
        index = (position + 1 + k) % REPLAY  # oldest first; the last is this token's
        is_new = k == REPLAY - 1
        is_old = k < REPLAY - 1
        ring = ring_b + index[:, None] * bc + n[None, :]
        bs_c = tl.sum(tl.load(ring, mask=is_old[:, None], other=0).to(tl.float32) * c[None, :], 1)
        bs_c = tl.where(is_new, tl.sum(b * c, 0), bs_c)  # [REPLAY], of use where a head has a token
        if leads:
            tl.store(ring_b + entry * bc + n, b.to(ring_b.dtype.element_ty))

    for i in range(HEADS_PER_PROGRAM):
        head = first_head + i
        rows, values = tile_of(head, p, n)
        if HEADS_PER_PROGRAM > 1:
            ahead = tl.load(ssm + values + HEAD_DIM * STATE, mask=i < HEADS_PER_PROGRAM - 1)
        a = tl.load(a_ptr + head)
        dt = tl.load(projected + inner + channels + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
        dt = tl.minimum(tl.maximum(softplus(dt), dt_low), dt_high)
        skip = tl.load(d_ptr + head).to(tl.float32)
        if REPLAY > 0:
            dts = ring_dt + head * REPLAY
            xs = ring_x + head * REPLAY * HEAD_DIM
        if PLAIN:
            x = convolved_x(xbc, newest, conv, conv_weight, conv_bias, rows, position, channels, WIDTH, BIAS)
            state = widened(kept, scale, rows, QUANTISED)
            if REPLAY > 0:  # noqa: SIM102  known when compiling: without a ring there is nothing to load
                if tl.sum(tl.load(dts + tl.arange(0, REPLAY)), 0) > 0:  # not written since
                    state = fold(state, 0 * a, a, position - 1, xs, ring_b, dts, p, n, HEAD_DIM, bc, REPLAY)
                    tl.store(dts + tl.arange(0, REPLAY), tl.zeros([REPLAY], tl.float32))
            state = state * tl.exp(dt * a) + (dt * x)[:, None] * b[None, :]
            y = tl.sum(state * c[None, :], 1) + skip * x
            squares = gated(y, projected, norm_weight, out, rows, GATED)
            store_state(state, ssm, scale, rows, values, position, QUANTISED)
        else:
            times = tl.where(is_new, dt, tl.load(dts + index, mask=is_old, other=0))  # [REPLAY]
            after = tl.cumsum(times, 0, reverse=True) - times  # time since each of them
            live = times > 0
            along = tl.where(live, times * tl.exp(a * after) * bs_c, 0)
            past = xs + index[:, None] * HEAD_DIM + p[None, :]
            past = tl.load(past, mask=(is_old & live)[:, None], other=0).to(tl.float32)
            x = convolved_x(xbc, newest, conv, conv_weight, conv_bias, rows, position, channels, WIDTH, BIAS)
            past = tl.where(is_new[:, None], x[None, :], past)  # [REPLAY, HEAD_DIM]
            y = tl.exp(a * tl.sum(times, 0)) * tl.sum(kept.to(tl.float32) * c[None, :], 1)
            if QUANTISED:
                y *= tl.load(scale + rows)
            y += tl.sum(along[:, None] * past, 0) + skip * x
            squares = gated(y, projected, norm_weight, out, rows, GATED)
            tl.store(xs + entry * HEAD_DIM + p, x.to(ring_x.dtype.element_ty))
            tl.store(dts + entry, dt)
        if GATED:
            high, low = in_two(squares, out.dtype.element_ty)
            tl.store(out + inner + 2 * head, high)
            tl.store(out + inner + 2 * head + 1, low)
        if HEADS_PER_PROGRAM > 1:
            kept = ahead


@triton.jit
def fold_kernel(
    a_ptr, slots, lengths, ssm, scale, ring_x, ring_b, ring_dt,
    slots_stride, ssm_stride, scale_stride, ring_x_stride, ring_b_stride, ring_dt_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr,
    REPLAY: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """Fold the rings that the step has filled, one head in REPLAY of each row; a program a head and row."""
    row = tl.program_id(1)
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    if slot == 0:
        return
    position = tl.load(lengths + row) - 1
    head = tl.program_id(0) * REPLAY + (2 * REPLAY - 1 - position % REPLAY) % REPLAY
    if head >= HEADS:
        return
    p, n = tl.arange(0, HEAD_DIM), tl.arange(0, STATE)
    rows, values = tile_of(head, p, n)
    ssm += slot * ssm_stride
    if QUANTISED:
        scale += slot * scale_stride
    ring_x += slot * ring_x_stride + head * REPLAY * HEAD_DIM
    ring_b += slot * ring_b_stride + head // (HEADS // GROUPS) * STATE
    ring_dt += slot * ring_dt_stride + head * REPLAY
    a = tl.load(a_ptr + head)
    state = widened(tl.load(ssm + values), scale, rows, QUANTISED)
    state = fold(state, 0 * a, a, position, ring_x, ring_b, ring_dt, p, n, HEAD_DIM, GROUPS * STATE, REPLAY)
    store_state(state, ssm, scale, rows, values, position, QUANTISED)
    tl.store(ring_dt + tl.arange(0, REPLAY), tl.zeros([REPLAY], tl.float32))
