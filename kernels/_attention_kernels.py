"""Triton kernels of `masked_attention`: packed tokens, one sequence and one head at a time, nothing padded in memory.

Letters in shapes: T tokens, H heads, D head dimension. "Rows" are tokens of one sequence, seen by one head.

The math (Dao 2023, FlashAttention-2, sections 3.1 and 3.2), with s = scale q k^T and p = softmax(s):
    forward:   out = p v, lse = log sum exp s
    backward:  delta = rowsum(out dout), ds = p (dout v^T - delta), dq = scale ds k, dk = scale ds^T q, dv = p^T dout
Exponentials are taken to base 2, so lse is kept to base 2 as well. A query that may attend to nothing has out = 0 and
lse = +inf: then p = exp2(s - lse) is 0 in the backward pass without a further case, and so it is for rows beyond the
sequence.

Arguments of all kernels: q, k, v, dout [T, H, D] with strides of tokens and heads (x_t, x_h) and a contiguous last
dimension; out, dq, dk, dv [T, H, D] contiguous; lse, delta fp32 [H, T]; key_mask uint8 [T] or None; tiles int32
[programs, 3]: first token, length and first row of what each program does; tokens: T. BLOCK_D: D, rounded up to a
power of two.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(base, rows, columns, stride, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of one head; zeros beyond the sequence and beyond D."""
    inside = rows[:, None] < length
    if D != BLOCK_D:
        inside = inside & (columns[None, :] < D)
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(base, rows, columns, stride, length, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `_load_rows`."""
    inside = rows[:, None] < length
    if D != BLOCK_D:
        inside = inside & (columns[None, :] < D)
    tl.store(base + rows[:, None] * stride + columns[None, :], values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _key_allowed(key_mask, start, keys, length):
    """bool [keys]: keys of this sequence that the mask lets be attended to."""
    allowed = keys < length
    if key_mask is not None:
        allowed = allowed & (tl.load(key_mask + start + keys, mask=allowed, other=0) != 0)
    return allowed


@triton.jit
def _program(tiles):
    """What this program works on: first token, length, first row."""
    entry = tiles + tl.program_id(0) * 3
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit(do_not_specialize=["tiles", "tokens"])
def forward_short(
    q, k, v, key_mask, out, lse, tiles, tokens, scale, q_t, q_h, k_t, k_h, v_t, v_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """out [T, H, D] and lse [H, T] of sequences of at most KEYS tokens. Grid: sequences, H, parts of the queries."""
    start, length, _ = _program(tiles)
    head = tl.program_id(1)
    token = start.to(tl.int64)
    width = tl.num_programs(1) * D
    columns = tl.arange(0, BLOCK_D)
    keys = tl.arange(0, KEYS)
    ks = _load_rows(k + token * k_t + head * k_h, keys, columns, k_t, length, D, BLOCK_D)
    vs = _load_rows(v + token * v_t + head * v_h, keys, columns, v_t, length, D, BLOCK_D)
    key_allowed = _key_allowed(key_mask, start, keys, length)
    q += token * q_t + head * q_h
    out += token * width + head * D
    lse += head.to(tl.int64) * tokens + start
    for row in range(tl.program_id(2) * QUERIES, length, tl.num_programs(2) * QUERIES):
        queries = row + tl.arange(0, QUERIES)
        qs = _load_rows(q, queries, columns, q_t, length, D, BLOCK_D)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee") * (scale * LOG2_E)
        allowed = key_allowed[None, :]
        if CAUSAL:
            allowed = allowed & (keys[None, :] <= queries[:, None])
        s = tl.where(allowed, s, float("-inf"))
        top = tl.max(s, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, 1)
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        result = tl.dot(p.to(vs.dtype), vs, input_precision="ieee") * (1.0 / total)[:, None]
        _store_rows(out, queries, columns, width, length, result, D, BLOCK_D)
        tl.store(lse + queries, tl.where(empty, float("inf"), top + tl.log2(total)), mask=queries < length)


@triton.jit
def _walk_keys(
    acc, top, total, qs, queries, k, v, key_mask, start, length, first, last, scale2, k_t, v_t,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys first to last. WHOLE: every key is allowed for every query, so nothing is compared."""
    columns = tl.arange(0, BLOCK_D)
    for row in range(first, last, KEYS):
        keys = row + tl.arange(0, KEYS)
        ks = _load_rows(k, keys, columns, k_t, length, D, BLOCK_D)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee") * scale2
        if not WHOLE:
            allowed = _key_allowed(key_mask, start, keys, length)[None, :]
            if CAUSAL:
                allowed = allowed & (keys[None, :] <= queries[:, None])
            s = tl.where(allowed, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        vs = _load_rows(v, keys, columns, v_t, length, D, BLOCK_D)
        acc = tl.dot(p.to(vs.dtype), vs, acc * shrink[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def _key_bounds(row, length, key_mask, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr):
    """Where the keys end that need no comparison with these queries, and where the keys end that they may see."""
    last = length
    if CAUSAL:
        last = tl.minimum(length, row + QUERIES)
    whole = last
    if CAUSAL:
        whole = tl.minimum(length, row + 1)
    whole = whole // KEYS * KEYS
    if key_mask is not None:
        whole = 0
    return whole, last


@triton.jit(do_not_specialize=["tiles", "tokens"])
def forward_long(
    q, k, v, key_mask, out, lse, tiles, tokens, scale, q_t, q_h, k_t, k_h, v_t, v_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """out [T, H, D] and lse [H, T] of sequences of any length. Grid: tiles of QUERIES rows, H."""
    start, length, row = _program(tiles)
    if CAUSAL:
        row = (tl.cdiv(length, QUERIES) - 1) * QUERIES - row  # the last rows have most work: they go first
    head = tl.program_id(1)
    token = start.to(tl.int64)
    width = tl.num_programs(1) * D
    columns = tl.arange(0, BLOCK_D)
    queries = row + tl.arange(0, QUERIES)
    k += token * k_t + head * k_h
    v += token * v_t + head * v_h
    qs = _load_rows(q + token * q_t + head * q_h, queries, columns, q_t, length, D, BLOCK_D)
    scale2 = scale * LOG2_E
    acc = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    whole, last = _key_bounds(row, length, key_mask, QUERIES, KEYS, CAUSAL)
    acc, top, total = _walk_keys(
        acc, top, total, qs, queries, k, v, key_mask, start, length, 0, whole, scale2, k_t, v_t,
        D, BLOCK_D, KEYS, CAUSAL, True,
    )  # fmt: skip
    acc, top, total = _walk_keys(
        acc, top, total, qs, queries, k, v, key_mask, start, length, whole, last, scale2, k_t, v_t,
        D, BLOCK_D, KEYS, CAUSAL, False,
    )  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    result = acc * (1.0 / total)[:, None]
    _store_rows(out + token * width + head * D, queries, columns, width, length, result, D, BLOCK_D)
    lse += head.to(tl.int64) * tokens + start
    tl.store(lse + queries, tl.where(empty, float("inf"), top + tl.log2(total)), mask=queries < length)


@triton.jit(do_not_specialize=["tiles", "tokens"])
def backward_short(
    q, k, v, key_mask, out, lse, dout, dq, dk, dv, tiles, tokens, scale, q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv [T, H, D] of sequences of at most KEYS tokens, in one walk over the queries. Grid: sequences, H."""
    start, length, _ = _program(tiles)
    head = tl.program_id(1)
    token = start.to(tl.int64)
    width = tl.num_programs(1) * D
    packed = token * width + head * D
    columns = tl.arange(0, BLOCK_D)
    keys = tl.arange(0, KEYS)
    ks = _load_rows(k + token * k_t + head * k_h, keys, columns, k_t, length, D, BLOCK_D)
    vs = _load_rows(v + token * v_t + head * v_h, keys, columns, v_t, length, D, BLOCK_D)
    key_allowed = _key_allowed(key_mask, start, keys, length)
    q += token * q_t + head * q_h
    dout += token * do_t + head * do_h
    lse += head.to(tl.int64) * tokens + start
    dk_acc = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for row in range(0, length, QUERIES):
        queries = row + tl.arange(0, QUERIES)
        qs = _load_rows(q, queries, columns, q_t, length, D, BLOCK_D)
        dos = _load_rows(dout, queries, columns, do_t, length, D, BLOCK_D)
        outs = _load_rows(out + packed, queries, columns, width, length, D, BLOCK_D)
        delta = tl.sum(outs.to(tl.float32) * dos.to(tl.float32), 1)
        ends = tl.load(lse + queries, mask=queries < length, other=float("inf"))
        allowed = key_allowed[:, None]
        if CAUSAL:
            allowed = allowed & (keys[:, None] <= queries[None, :])
        s = tl.dot(ks, tl.trans(qs), input_precision="ieee") * (scale * LOG2_E)
        p = tl.where(allowed, tl.exp2(s - ends[None, :]), 0.0)
        dv_acc = tl.dot(p.to(dos.dtype), dos, dv_acc, input_precision="ieee")
        dp = tl.dot(vs, tl.trans(dos), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(qs.dtype)
        dk_acc = tl.dot(ds, qs, dk_acc, input_precision="ieee")
        dqs = tl.dot(tl.trans(ds), ks, input_precision="ieee") * scale
        _store_rows(dq + packed, queries, columns, width, length, dqs, D, BLOCK_D)
    _store_rows(dk + packed, keys, columns, width, length, dk_acc * scale, D, BLOCK_D)
    _store_rows(dv + packed, keys, columns, width, length, dv_acc, D, BLOCK_D)


@triton.jit
def _walk_keys_dq(
    acc, qs, dos, ends, delta, queries, k, v, key_mask, start, length, first, last, scale2, k_t, v_t,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """acc + ds k over keys first to last; WHOLE as in `_walk_keys`."""
    columns = tl.arange(0, BLOCK_D)
    for row in range(first, last, KEYS):
        keys = row + tl.arange(0, KEYS)
        ks = _load_rows(k, keys, columns, k_t, length, D, BLOCK_D)
        vs = _load_rows(v, keys, columns, v_t, length, D, BLOCK_D)
        s = tl.dot(qs, tl.trans(ks), input_precision="ieee") * scale2
        p = tl.exp2(s - ends[:, None])
        if not WHOLE:
            allowed = _key_allowed(key_mask, start, keys, length)[None, :]
            if CAUSAL:
                allowed = allowed & (keys[None, :] <= queries[:, None])
            p = tl.where(allowed, p, 0.0)
        dp = tl.dot(dos, tl.trans(vs), input_precision="ieee")
        ds = (p * (dp - delta[:, None])).to(ks.dtype)
        acc = tl.dot(ds, ks, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["tiles", "tokens"])
def backward_long_dq(
    q, k, v, key_mask, out, lse, dout, dq, delta, tiles, tokens, scale, q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dq [T, H, D] and delta [H, T] of sequences of any length. Grid: tiles of QUERIES rows, H."""
    start, length, row = _program(tiles)
    if CAUSAL:
        row = (tl.cdiv(length, QUERIES) - 1) * QUERIES - row  # the last rows have most work: they go first
    head = tl.program_id(1)
    token = start.to(tl.int64)
    width = tl.num_programs(1) * D
    packed = token * width + head * D
    columns = tl.arange(0, BLOCK_D)
    queries = row + tl.arange(0, QUERIES)
    k += token * k_t + head * k_h
    v += token * v_t + head * v_h
    qs = _load_rows(q + token * q_t + head * q_h, queries, columns, q_t, length, D, BLOCK_D)
    dos = _load_rows(dout + token * do_t + head * do_h, queries, columns, do_t, length, D, BLOCK_D)
    outs = _load_rows(out + packed, queries, columns, width, length, D, BLOCK_D)
    deltas = tl.sum(outs.to(tl.float32) * dos.to(tl.float32), 1)
    line = head.to(tl.int64) * tokens + start
    tl.store(delta + line + queries, deltas, mask=queries < length)
    ends = tl.load(lse + line + queries, mask=queries < length, other=float("inf"))
    scale2 = scale * LOG2_E
    acc = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    whole, last = _key_bounds(row, length, key_mask, QUERIES, KEYS, CAUSAL)
    acc = _walk_keys_dq(
        acc, qs, dos, ends, deltas, queries, k, v, key_mask, start, length, 0, whole, scale2, k_t, v_t,
        D, BLOCK_D, KEYS, CAUSAL, True,
    )  # fmt: skip
    acc = _walk_keys_dq(
        acc, qs, dos, ends, deltas, queries, k, v, key_mask, start, length, whole, last, scale2, k_t, v_t,
        D, BLOCK_D, KEYS, CAUSAL, False,
    )  # fmt: skip
    _store_rows(dq + packed, queries, columns, width, length, acc * scale, D, BLOCK_D)


@triton.jit
def _walk_queries(
    dk_acc, dv_acc, ks, vs, keys, key_allowed, q, dout, lse, delta, length, first, last, scale2, q_t, do_t,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dk and dv sums over queries first to last. WHOLE: every key here is allowed for every query."""
    columns = tl.arange(0, BLOCK_D)
    for row in range(first, last, QUERIES):
        queries = row + tl.arange(0, QUERIES)
        qs = _load_rows(q, queries, columns, q_t, length, D, BLOCK_D)
        dos = _load_rows(dout, queries, columns, do_t, length, D, BLOCK_D)
        ends = tl.load(lse + queries, mask=queries < length, other=float("inf"))
        deltas = tl.load(delta + queries, mask=queries < length, other=0.0)
        s = tl.dot(ks, tl.trans(qs), input_precision="ieee") * scale2
        p = tl.exp2(s - ends[None, :])
        if not WHOLE:
            allowed = key_allowed[:, None]
            if CAUSAL:
                allowed = allowed & (keys[:, None] <= queries[None, :])
            p = tl.where(allowed, p, 0.0)
        dv_acc = tl.dot(p.to(dos.dtype), dos, dv_acc, input_precision="ieee")
        dp = tl.dot(vs, tl.trans(dos), input_precision="ieee")
        ds = (p * (dp - deltas[None, :])).to(qs.dtype)
        dk_acc = tl.dot(ds, qs, dk_acc, input_precision="ieee")
    return dk_acc, dv_acc


@triton.jit(do_not_specialize=["tiles", "tokens"])
def backward_long_dkdv(
    q, k, v, key_mask, lse, dout, delta, dk, dv, tiles, tokens, scale, q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """dk and dv [T, H, D] of sequences of any length; delta from `backward_long_dq`. Grid: tiles of KEYS rows, H."""
    start, length, row = _program(tiles)
    head = tl.program_id(1)
    token = start.to(tl.int64)
    width = tl.num_programs(1) * D
    packed = token * width + head * D
    columns = tl.arange(0, BLOCK_D)
    keys = row + tl.arange(0, KEYS)
    q += token * q_t + head * q_h
    dout += token * do_t + head * do_h
    lse += head.to(tl.int64) * tokens + start
    delta += head.to(tl.int64) * tokens + start
    ks = _load_rows(k + token * k_t + head * k_h, keys, columns, k_t, length, D, BLOCK_D)
    vs = _load_rows(v + token * v_t + head * v_h, keys, columns, v_t, length, D, BLOCK_D)
    key_allowed = _key_allowed(key_mask, start, keys, length)
    scale2 = scale * LOG2_E
    first = 0
    whole = 0
    if CAUSAL:
        first = row // QUERIES * QUERIES
        whole = tl.minimum(tl.cdiv(row + KEYS, QUERIES) * QUERIES, length)
    if row + KEYS > length:
        whole = length
    if key_mask is not None:
        whole = length
    dk_acc = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dk_acc, dv_acc = _walk_queries(
        dk_acc, dv_acc, ks, vs, keys, key_allowed, q, dout, lse, delta, length, first, whole, scale2, q_t, do_t,
        D, BLOCK_D, QUERIES, CAUSAL, False,
    )  # fmt: skip
    dk_acc, dv_acc = _walk_queries(
        dk_acc, dv_acc, ks, vs, keys, key_allowed, q, dout, lse, delta, length, whole, length, scale2, q_t, do_t,
        D, BLOCK_D, QUERIES, CAUSAL, True,
    )  # fmt: skip
    _store_rows(dk + packed, keys, columns, width, length, dk_acc * scale, D, BLOCK_D)
    _store_rows(dv + packed, keys, columns, width, length, dv_acc, D, BLOCK_D)
