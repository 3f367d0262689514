"""One decode step of a whole mixer in one Triton kernel; symbols and equations in ../README.md.

A program serves some heads of one row. It convolves their channels of x, and B and C, which it shares with the other
programs of the row, without waiting for anybody: inputs of the convolution stand in a ring of `WIDTH` entries indexed
by the token's position, of which a step reads all but the one that it writes.
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
def fold(
    state, after, a, position, ring_x, ring_b, ring_dt, p, n, B_STRIDE: tl.constexpr, REPLAY: tl.constexpr
):  # fmt: skip
    """A checkpoint and the ring's tokens: the state `after` time after the newest of them.

    One outer product after the other, which needs no registers but the state's. Entries whose dt is 0 are empty: what
    they hold may be NaN. Time is added up from the newest token on, so that recent ones lose nothing.
    """
    state *= tl.exp(a * (tl.sum(tl.load(ring_dt + tl.arange(0, REPLAY)), 0) + after))
    for age in range(1, REPLAY):  # the entry of `position` itself is empty
        index = (position + REPLAY - age) % REPLAY
        dt = tl.load(ring_dt + index)
        first = tl.where(dt > 0, 0, 1 << 20)  # element to load
        x = tl.load(ring_x + index * p.shape[0] + p, mask=p >= first, other=0).to(tl.float32)
        b = tl.load(ring_b + index * B_STRIDE + n, mask=n >= first, other=0).to(tl.float32)
        state += (dt * tl.exp(a * after) * x)[:, None] * b[None, :]
        after += dt
    return state


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
def load_state(ssm, scale, rows, tile, QUANTISED: tl.constexpr):
    """A head's state in fp32, [HEAD_DIM, STATE]; `rows` are its channels."""
    state = tl.load(ssm + tile).to(tl.float32)
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
        for i in tl.static_range(HEADS_PER_PROGRAM):
            tl.store(out + (first_head + i) * HEAD_DIM + p, tl.zeros([HEAD_DIM], out.dtype.element_ty))
        if GATED:
            tl.store(out + inner + 2 * part + tl.arange(0, 2), tl.zeros([2], out.dtype.element_ty))
        return
    position = tl.load(lengths + row) - 1
    conv += slot * conv_stride
    ssm += slot * ssm_stride
    if QUANTISED:
        scale += slot * scale_stride
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
        k = tl.arange(0, REPLAY)
        is_new = k == REPLAY - 1
        index = (position + 1 + k) % REPLAY  # oldest first
        if not PLAIN:
            bs = tl.load(ring_b + index[:, None] * bc + n[None, :]).to(tl.float32)
            bs_c = tl.sum(bs * c[None, :], 1)  # [REPLAY], of use where a head has a token
            b_c = tl.sum(b * c, 0)
            if leads:
                tl.store(ring_b + position % REPLAY * bc + n, b.to(ring_b.dtype.element_ty))

    squares = 0.0
    for i in tl.static_range(HEADS_PER_PROGRAM):
        head = first_head + i
        rows, tile = tile_of(head, p, n)
        state = load_state(ssm, scale, rows, tile, QUANTISED)  # [HEAD_DIM, STATE]
        x_new = tl.load(xbc + rows)
        x = convolve(x_new, conv, conv_weight, conv_bias, rows, position, channels, WIDTH, BIAS)  # [HEAD_DIM]
        tl.store(newest + rows, x_new)
        a = tl.load(a_ptr + head)
        dt = tl.load(projected + inner + channels + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
        dt = tl.minimum(tl.maximum(softplus(dt), dt_low), dt_high)
        input = dt * x
        if PLAIN:
            if REPLAY > 0:
                dts, xs = ring_dt + head * REPLAY, ring_x + head * REPLAY * HEAD_DIM
                if tl.sum(tl.load(dts + k), 0) > 0:  # tokens of larger batches, not yet in the checkpoint
                    state = fold(state, 0 * a, a, position, xs, ring_b, dts, p, n, bc, REPLAY)
                    tl.store(dts + k, tl.zeros([REPLAY], tl.float32))
            state = state * tl.exp(dt * a) + input[:, None] * b[None, :]
            y = tl.sum(state * c[None, :], 1)
            store_state(state, ssm, scale, rows, tile, position, QUANTISED)
        else:
            dts, xs = ring_dt + head * REPLAY, ring_x + head * REPLAY * HEAD_DIM
            waiting = tl.where(is_new, 0, tl.load(dts + index))
            live = waiting > 0
            after = tl.cumsum(waiting, 0, reverse=True) - waiting + dt  # time since each of them
            weight = waiting * tl.exp(a * after) * tl.where(live, bs_c, 0)
            past = tl.load(xs + index[:, None] * HEAD_DIM + p[None, :], mask=live[:, None], other=0).to(tl.float32)
            y = tl.exp(a * (tl.sum(waiting, 0) + dt)) * tl.sum(state * c[None, :], 1)
            y += tl.sum(weight[:, None] * past, 0) + input * b_c
            if (position + head) % REPLAY == REPLAY - 1:  # one head in REPLAY a step
                state = fold(state, dt, a, position, xs, ring_b, dts, p, n, bc, REPLAY) + input[:, None] * b[None, :]
                store_state(state, ssm, scale, rows, tile, position, QUANTISED)
                tl.store(dts + k, tl.zeros([REPLAY], tl.float32))
            else:
                tl.store(xs + position % REPLAY * HEAD_DIM + p, x.to(ring_x.dtype.element_ty))
                tl.store(dts + position % REPLAY, dt)
        y += tl.load(d_ptr + head).to(tl.float32) * x
        if GATED:
            y *= silu(tl.load(projected + rows).to(tl.float32))
            squares += tl.sum(y * y, 0)
            y *= tl.load(norm_weight + rows).to(tl.float32)
        tl.store(out + rows, y.to(out.dtype.element_ty))
    if GATED:
        high, low = in_two(squares, out.dtype.element_ty)
        tl.store(out + inner + 2 * part, high)
        tl.store(out + inner + 2 * part + 1, low)
