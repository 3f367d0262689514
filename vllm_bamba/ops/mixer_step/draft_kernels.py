"""A step of sequences with drafted tokens, all tokens of a sequence at once; symbols and equations in ../README.md.

As in `kernels.py` one kernel does what heads share, and folds, and one behind it has a program for each head. Axes of
tiles: j, the step's tokens, the first at `position`; k, entries of a ring, entry k at position + k, modulo its size.
What the ring holds there is from the last lap, so the oldest comes first, and k < DRAFTS may have been taken back.
"""

import triton
import triton.language as tl

from vllm_bamba.ops.mixer_step.kernels import (
    INTEGER_PARTS,
    fold_in_slot,
    in_two,
    of_any_batch,
    product,
    silu,
    tile_of,
    time_step,
    times_vector,
)


@triton.jit
def row_of(slots, slots_stride, lengths, query_start_loc, row):
    """A row's slot, its first token's position, which of the batch that is, and how many it has; if none, slot 0."""
    slot, length = tl.load(slots + row * slots_stride), tl.load(lengths + row)
    first = tl.load(query_start_loc + row)
    tokens = tl.load(query_start_loc + row + 1) - first
    return tl.where(tokens > 0, slot, 0).to(tl.int64), length - tokens, first, tokens


@triton.jit
def convolve_tokens(
    first, stride, conv, weight, bias, channels, j, tokens, position,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, DRAFTS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """SiLU of the convolution at each token, rounded as it would be on its way through memory, and the newest inputs.

    `channels` and `j` lie across each other. Inputs of this step are `stride` apart from `first` on, not in the ring.
    """
    y = tl.load(bias + channels).to(tl.float32) if BIAS else 0.0
    for tap in tl.static_range(WIDTH):  # oldest first
        token = j + (tap + 1 - WIDTH)
        new = tl.load(first + token * stride + channels, mask=(token >= 0) & (j < tokens), other=0)
        window = new
        if tap < WIDTH - 1:
            entry = (position + WIDTH + DRAFTS + token) % (WIDTH + DRAFTS)
            old = tl.load(conv + entry * CHANNELS + channels, mask=(token < 0) & (j < tokens), other=0)
            window = tl.where(token < 0, old, new)
        y += window.to(tl.float32) * tl.load(weight + tap * CHANNELS + channels).to(tl.float32)
    return silu(y).to(new.dtype).to(tl.float32), new


@triton.jit
def store_tokens_as_integers(vectors, parts, parts_stride, unit, unit_stride, j, n, tokens):
    """`store_as_integers` of each token's vector, [tokens, n]."""
    largest = tl.max(tl.abs(vectors), 1)
    first = tl.where(largest > 0, largest, 1) / 127
    tl.store(unit + j * unit_stride, first, mask=j < tokens)
    left = vectors / first[:, None]
    at = parts + j[:, None] * parts_stride + n[None, :]
    for i in tl.static_range(INTEGER_PARTS):
        part = tl.floor(left + 0.5)
        left = (left - part) * 254
        tl.store(at + i * n.shape[0], part.to(tl.int8), mask=(j < tokens)[:, None])


@triton.jit
def in_parts(x):
    """fp32 [K, N] in three parts of bf16, [K, 4 N]: those of all columns, one part behind the other, and zeros."""
    first = x.to(tl.bfloat16)
    left = x - first.to(tl.float32)
    second = left.to(tl.bfloat16)
    third = (left - second.to(tl.float32)).to(tl.bfloat16)
    parts = tl.join(tl.join(first, third), tl.join(second, tl.zeros_like(third)))  # [K, N, 2, 2]
    return tl.reshape(tl.permute(parts, (0, 2, 3, 1)), [x.shape[0], 4 * x.shape[1]])


@triton.jit
def sum_parts(sums):
    """What `in_parts` took apart, [M, 4 N] to [M, N]."""
    return tl.sum(tl.reshape(sums, [sums.shape[0], 4, sums.shape[1] // 4]), 1)


@of_any_batch
def prepare_drafts_kernel(
    projected, convolved, products, c_parts, conv_weight, conv_bias, a_ptr, slots, lengths, query_start_loc,
    conv, ssm, scale, ring_x, ring_b, ring_dt,
    projected_stride, slots_stride,
    conv_stride, ssm_stride, scale_stride, ring_x_stride, ring_b_stride, ring_dt_stride,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr, WIDTH: tl.constexpr,
    REPLAY: tl.constexpr, DRAFTS: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr, QUANTISED: tl.constexpr,
    EARLY: tl.constexpr, INTEGERS: tl.constexpr, PERIOD: tl.constexpr, FOLDED: tl.constexpr, PLACES: tl.constexpr,
    FOLD_DIM: tl.constexpr,
):  # fmt: skip
    """What heads share. A row has programs of two kinds, which need not wait for each other:

    - one for each FOLD_DIM channels of a head whose ring is full, as `fold_turns` says: fold it;
    - one a group: convolve B and C, and multiply them.

    Rings stay as they are: `replay_drafts_kernel` empties the folded ones and adds the new tokens.

    `convolved` is [tokens, B | C]. `products` is fp32 [tokens, groups, REPLAY + TOKENS + 4]: C times B of each ring
    entry and of each token of the step; then, with INTEGERS, the unit of `c_parts`, int8 [tokens, groups,
    INTEGER_PARTS, STATE], which are C.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    part, row = tl.program_id(0), tl.program_id(1)
    inner: tl.constexpr = HEADS * HEAD_DIM
    bc: tl.constexpr = GROUPS * STATE
    channels: tl.constexpr = inner + 2 * bc
    FOLDS: tl.constexpr = FOLDED * PLACES * (HEAD_DIM // FOLD_DIM)
    slot, position, first, tokens = row_of(slots, slots_stride, lengths, query_start_loc, row)
    if slot == 0:
        return
    ring_b += slot * ring_b_stride
    n = tl.arange(0, STATE)

    if part < FOLDS:
        place = part // FOLDED % PLACES
        full = part % FOLDED * PERIOD + (PERIOD - (position + place) % PERIOD) % PERIOD
        if (full < HEADS) & (place < tokens):
            p = part // (FOLDED * PLACES) * FOLD_DIM + tl.arange(0, FOLD_DIM)
            ssm += slot * ssm_stride
            if QUANTISED:
                scale += slot * scale_stride
            ring_x += slot * ring_x_stride
            ring_dt += slot * ring_dt_stride
            fold_in_slot(
                full, p, n, position, a_ptr, ssm, scale, ring_x, ring_b, ring_dt,
                HEAD_DIM, HEADS // GROUPS, bc, REPLAY, DRAFTS, QUANTISED,
            )  # fmt: skip
    else:
        group = part - FOLDS
        ENTRIES: tl.constexpr = REPLAY if REPLAY > 16 else 16  # the least that tensor cores take
        j, k = tl.arange(0, TOKENS), tl.arange(0, ENTRIES)
        entries = (position + k) % REPLAY * bc + group * STATE
        is_old = (k >= DRAFTS) & (k < REPLAY)
        past = tl.load(ring_b + entries[:, None] + n[None, :], mask=is_old[:, None], other=0)
        conv += slot * conv_stride
        there = (j < tokens)[:, None]
        own = inner + group * STATE + n[None, :]
        xbc = projected + first * projected_stride + inner
        b, b_new = convolve_tokens(
            xbc, projected_stride, conv, conv_weight, conv_bias, own, j[:, None], tokens, position,
            channels, WIDTH, DRAFTS, BIAS,
        )  # fmt: skip
        c, c_new = convolve_tokens(
            xbc, projected_stride, conv, conv_weight, conv_bias, own + bc, j[:, None], tokens, position,
            channels, WIDTH, DRAFTS, BIAS,
        )  # fmt: skip
        # sums of one number: without them all warps convolve all that a product wants of each
        b, c = tl.sum(b[:, None, :], 1), tl.sum(c[:, None, :], 1)  # [TOKENS, STATE]

        at = convolved + (first + j[:, None]) * 2 * bc + group * STATE + n[None, :]
        tl.store(at, b.to(convolved.dtype.element_ty), mask=there)
        tl.store(at + bc, c.to(convolved.dtype.element_ty), mask=there)
        newest = conv + (position + j[:, None]) % (WIDTH + DRAFTS) * channels + own
        tl.store(newest, b_new, mask=there)
        tl.store(newest + bc, c_new, mask=there)
        COLUMNS: tl.constexpr = REPLAY + TOKENS + 4
        products += (first * GROUPS + group) * COLUMNS
        if convolved.dtype.element_ty == tl.bfloat16:
            PARTS: tl.constexpr = 1 if ring_b.dtype.element_ty == tl.bfloat16 else 3
            across = tl.trans(c)
            of_ring = product(past, across, PARTS, tl.zeros([ENTRIES, TOKENS], tl.float32))
            of_step = product(b, across, 1, tl.zeros([TOKENS, TOKENS], tl.float32))
            columns = products + j[None, :] * (GROUPS * COLUMNS)
            tl.store(columns + k[:, None], of_ring, mask=(j < tokens)[None, :] & (k < REPLAY)[:, None])
            tl.store(columns + REPLAY + j[:, None], of_step, mask=(j < tokens)[None, :])
        else:  # tensor cores cut sums off where fp32 would round
            for i in tl.static_range(DRAFTS + 1):
                if i < tokens:
                    of_one = tl.sum(tl.where(j[:, None] == i, c, 0), 0)
                    column = products + i * (GROUPS * COLUMNS)
                    tl.store(column + k, times_vector(past, of_one), mask=k < REPLAY)
                    tl.store(column + REPLAY + j, times_vector(b, of_one))
        if INTEGERS:
            c_parts += (first * GROUPS + group) * INTEGER_PARTS * STATE
            units = products + (REPLAY + TOKENS)
            store_tokens_as_integers(c, c_parts, GROUPS * INTEGER_PARTS * STATE, units, GROUPS * COLUMNS, j, n, tokens)


@of_any_batch
def replay_drafts_kernel(
    projected, convolved, products, c_parts, out, conv_weight, conv_bias, a_ptr, d_ptr, dt_bias, norm_weight,
    slots, lengths, query_start_loc,
    conv, ssm, scale, ring_x, ring_b, ring_dt,
    projected_stride, out_stride, slots_stride,
    conv_stride, ssm_stride, scale_stride, ring_x_stride, ring_b_stride, ring_dt_stride,
    dt_low, dt_high,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr, STATE: tl.constexpr, WIDTH: tl.constexpr,
    REPLAY: tl.constexpr, DRAFTS: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    QUANTISED: tl.constexpr, EARLY: tl.constexpr, INTEGERS: tl.constexpr, PERIOD: tl.constexpr,
):  # fmt: skip
    """The step behind `prepare_drafts_kernel`: reads a checkpoint and its ring, adds the tokens to the ring.

    With EARLY it starts while that one is at work, and ahead of its wait leaves alone what that one writes.
    """
    head, row = tl.program_id(0), tl.program_id(1)
    inner: tl.constexpr = HEADS * HEAD_DIM
    bc: tl.constexpr = GROUPS * STATE
    channels: tl.constexpr = inner + 2 * bc
    ENTRIES: tl.constexpr = REPLAY if REPLAY > 16 else 16  # the least that tensor cores take
    p, n, j, k = tl.arange(0, HEAD_DIM), tl.arange(0, STATE), tl.arange(0, TOKENS), tl.arange(0, ENTRIES)
    rows, values = tile_of(head * HEAD_DIM, p, n)
    slot, position, first, tokens = row_of(slots, slots_stride, lengths, query_start_loc, row)
    if slot == 0:
        if EARLY:
            tl.extra.cuda.gdc_wait()  # all must: who comes behind this kernel comes behind the other one by that
        return
    folded = (PERIOD - (head + position) % PERIOD) % PERIOD < tokens  # in front of one of them
    if EARLY:  # noqa: SIM102  the compiler decides this one, each program the next
        if folded:
            tl.extra.cuda.gdc_wait()
    kept = tl.load(ssm + slot * ssm_stride + values)  # [HEAD_DIM, STATE]
    ring_dt += slot * ring_dt_stride + head * REPLAY
    ring_x += slot * ring_x_stride + head * REPLAY * HEAD_DIM
    entry = (position + k) % REPLAY
    end = tl.where(folded, 0, REPLAY)
    times = tl.load(ring_dt + entry, mask=(k >= DRAFTS) & (k < end), other=0)
    live = times > 0  # what other entries hold may be NaN
    projected += first * projected_stride
    of_token = j * projected_stride
    there = j < tokens
    dt = tl.load(projected + inner + channels + head + of_token, mask=there, other=0)
    a, bias, skip = tl.load(a_ptr + head), tl.load(dt_bias + head), tl.load(d_ptr + head).to(tl.float32)
    if QUANTISED:
        of_row = tl.load(scale + slot * scale_stride + rows)
    if GATED:
        gate = tl.load(projected + of_token[None, :] + rows[:, None], mask=there[None, :], other=0)
        norm = tl.load(norm_weight + rows)
    conv += slot * conv_stride
    x, x_new = convolve_tokens(
        projected + inner, projected_stride, conv, conv_weight, conv_bias, rows[:, None], j[None, :], tokens, position,
        channels, WIDTH, DRAFTS, BIAS,
    )  # fmt: skip
    past = tl.load(ring_x + entry[None, :] * HEAD_DIM + p[:, None], mask=live[None, :], other=0)

    # what x of an entry counts for at each token, but for B C: how long its dt has decayed; [entry, token]
    dt = tl.where(there, time_step(dt, bias, dt_low, dt_high), 0)
    elapsed = tl.cumsum(dt, 0)
    decay = tl.exp(a * (tl.sum(times, 0) + elapsed))
    since = tl.cumsum(times, 0, reverse=True) - times
    of_old = times[:, None] * tl.exp(a * (since[:, None] + elapsed[None, :]))
    BF16: tl.constexpr = convolved.dtype.element_ty == tl.bfloat16  # tensor cores cut sums off where fp32 would round
    SPREAD: tl.constexpr = 16 // TOKENS if BF16 and TOKENS < 16 else 1  # tensor cores take no fewer than 16 entries
    i = tl.arange(0, SPREAD * TOKENS)
    is_new = (i % SPREAD == 0)[:, None]
    i = i[:, None] // SPREAD
    dt_i = tl.sum(tl.where(i == j[None, :], dt[None, :], 0), 1)
    since = tl.cumsum(tl.where(i < j[None, :], dt[None, :], 0), 1)
    of_new = tl.where((i < j[None, :]) & is_new, dt_i[:, None] * tl.exp(a * since), 0)

    if EARLY:  # noqa: SIM102
        if folded == 0:  # the others have; without a branch all of the above may come behind the wait
            tl.extra.cuda.gdc_wait()
    group = head // (HEADS // GROUPS)
    COLUMNS: tl.constexpr = REPLAY + TOKENS + 4
    products += (first * GROUPS + group) * COLUMNS
    at = products + j[None, :] * (GROUPS * COLUMNS)
    b_c = tl.load(at + k[:, None], mask=live[:, None] & there[None, :], other=0)
    among = tl.load(at + REPLAY + i, mask=there[None, :], other=0)
    own = tl.load(products + j * (GROUPS * COLUMNS) + REPLAY + j, mask=there, other=0)
    convolved += first * 2 * bc + group * STATE
    if INTEGERS:
        column = tl.arange(0, 4 * TOKENS)  # as `in_parts` has them
        part, token = column // TOKENS, column % TOKENS
        used = (part < INTEGER_PARTS) & (token < tokens)
        at = c_parts + ((first + token) * GROUPS + group) * (INTEGER_PARTS * STATE) + part * STATE
        c = tl.load(at[None, :] + n[:, None], mask=used[None, :], other=0)
        units = tl.load(products + token * (GROUPS * COLUMNS) + REPLAY + TOKENS, mask=used, other=0)
        units *= tl.where(part == 0, 1, tl.where(part == 1, 1 / 254, 1 / 254 / 254))
    elif BF16:
        c = tl.load(convolved + bc + j[None, :] * (2 * bc) + n[:, None], mask=there[None, :], other=0)
    newest = (position + j) % REPLAY
    if head % (HEADS // GROUPS) == 0:  # one for the group
        b = tl.load(convolved + j[:, None] * (2 * bc) + n[None, :], mask=there[:, None], other=0)
        ring_b += slot * ring_b_stride + group * STATE
        tl.store(ring_b + newest[:, None] * bc + n[None, :], b, mask=there[:, None])
    of_old *= b_c
    of_new = tl.where(i < j[None, :], of_new * among, 0)
    STORED: tl.constexpr = ssm.dtype.element_ty
    STATE_PARTS: tl.constexpr = 3 if tl.float32 == STORED else 2 if tl.float16 == STORED else 1
    X_PARTS: tl.constexpr = 1 if ring_x.dtype.element_ty == tl.bfloat16 else 3
    y = tl.zeros([HEAD_DIM, TOKENS], tl.float32)
    if INTEGERS:
        y = sum_parts(tl.dot(kept, c, out_dtype=tl.int32).to(tl.float32) * units[None, :])  # sums of integers are exact
    elif BF16:
        y = product(kept, c, STATE_PARTS, y)
    else:
        for token in tl.static_range(DRAFTS + 1):
            if token < tokens:
                c = tl.load(convolved + token * (2 * bc) + bc + n)
                y = tl.where(j[None, :] == token, times_vector(kept, c)[:, None], y)
    y *= decay[None, :]
    if QUANTISED:
        y *= of_row[:, None]
    if BF16:
        sums = product(past, in_parts(of_old), X_PARTS, tl.zeros([HEAD_DIM, 4 * TOKENS], tl.float32))
        # a draft that is taken back may be infinite, which times 0 is NaN in the tokens before it
        finite = tl.where(tl.abs(x) < float("inf"), x, 0).to(tl.bfloat16)
        if SPREAD == 2:
            finite = tl.reshape(tl.join(finite, tl.zeros_like(finite)), [HEAD_DIM, 2 * TOKENS])
        y += sum_parts(product(finite, in_parts(of_new), 1, sums))
    else:
        for token in tl.static_range(DRAFTS + 1):
            counts = tl.sum(tl.where(j[None, :] == token, of_old, 0), 1)
            counts_new = tl.sum(tl.where(j[None, :] == token, of_new, 0), 1)
            before = tl.where(j[None, :] < token, x, 0)  # those behind may be NaN
            of_one = times_vector(past, counts) + times_vector(before, counts_new)
            y += tl.where(j[None, :] == token, of_one[:, None], 0)
    y += (dt * own + skip)[None, :] * x

    out += first * out_stride + j * out_stride
    if GATED:
        y *= silu(gate.to(tl.float32))
        high, low = in_two(tl.sum(y * y, 0), out.dtype.element_ty)
        tl.store(out + inner + 2 * head, high, mask=there)
        tl.store(out + inner + 2 * head + 1, low, mask=there)
        y *= norm.to(tl.float32)[:, None]
    tl.store(out[None, :] + rows[:, None], y.to(out.dtype.element_ty), mask=there[None, :])

    inputs = (position + j) % (WIDTH + DRAFTS) * channels
    tl.store(conv + inputs[None, :] + rows[:, None], x_new, mask=there[None, :])
    tl.debug_barrier()  # token DRAFTS takes the place of the oldest entry, which all threads must have read
    tl.store(ring_x + newest[None, :] * HEAD_DIM + p[:, None], x.to(ring_x.dtype.element_ty), mask=there[None, :])
    tl.store(ring_dt + newest, dt, mask=there)
    if folded:
        tl.store(ring_dt + entry, tl.zeros([ENTRIES], tl.float32), mask=(k >= tokens) & (k < REPLAY))
