"""The Triton kernel of decode attention: programs share a head's cache, and the last of them to finish puts their parts together."""

# Triton reads this function's source, so annotations are those it knows.
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "parts"])
def attend(
    query, key, value, mask, out, sums, tops, arrived, tokens, scale, parts, q_row, q_head, k_row, k_head, k_token,
    v_row, v_head, v_token, m_row, m_token, o_row, o_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """out[row, head] = softmax2(scale · query · keyᵀ) · value, over the tokens that the mask [row, tokens] shows.

    A program has one head of the cache, GROUP heads of the query, and every parts-th block of tokens: those that are seen, at the
    beginning mostly, fall to all alike. sums: float32 [rows · HEADS, parts, GROUP, BLOCK_D] not yet divided; tops: [.., GROUP, 2]
    the largest score and the sum of weights; PARTS: a power of two from parts on; arrived: int32 [rows · HEADS], zero before and after. softmax2: of powers of two.
    """
    DTYPE: tl.constexpr = query.dtype.element_ty
    here, part = tl.program_id(0), tl.program_id(1)
    row, head = (here // HEADS).to(tl.int64), here % HEADS
    g, d, t = tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK)
    inside = (g[:, None] < GROUP) & (d[None, :] < D)
    q = tl.load(query + row * q_row + (head * GROUP + g[:, None]) * q_head + d[None, :], mask=inside, other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for block in range(part, tl.cdiv(tokens, BLOCK), parts):
        token = block * BLOCK + t
        seen = tl.load(mask + row * m_row + token * m_token, mask=token < tokens, other=0) != 0
        if tl.max(seen.to(tl.int32), 0) > 0:
            there = (token[:, None] < tokens) & (d[None, :] < D)
            k = tl.load(
                key + row * k_row + head * k_head + token[:, None] * k_token + d[None, :], mask=there, other=0.0
            )
            v = tl.load(
                value + row * v_row + head * v_head + token[:, None] * v_token + d[None, :], mask=there, other=0.0
            )
            score = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            shrunk = tl.exp2(top - higher)
            weights = weights * shrunk + tl.sum(weight, 1)
            acc = tl.dot(weight.to(DTYPE), v, acc * shrunk[:, None])
            top = higher
    place = (here * parts + part) * GROUP + g
    tl.store(sums + place[:, None] * BLOCK_D + d[None, :], acc, mask=(g[:, None] < GROUP) & (d[None, :] < BLOCK_D))
    tl.store(tops + place * 2, top, mask=g < GROUP)
    tl.store(tops + place * 2 + 1, weights, mask=g < GROUP)
    tl.debug_barrier()  # every thread's sums before this program's arrival
    if tl.atomic_add(arrived + here, 1, sem="acq_rel") == parts - 1:
        tl.debug_barrier()
        other = tl.arange(0, PARTS)
        for one in tl.static_range(GROUP):  # all parts of a head at once: their reads wait together
            place_of = (here * parts + other) * GROUP + one
            top_of = tl.load(tops + place_of * 2, mask=other < parts, other=float("-inf"), cache_modifier=".cg")
            weight_of = tl.load(tops + place_of * 2 + 1, mask=other < parts, other=0.0, cache_modifier=".cg")
            at = sums + place_of[:, None] * BLOCK_D + d[None, :]
            sum_of = tl.load(
                at, mask=(other[:, None] < parts) & (d[None, :] < BLOCK_D), other=0.0, cache_modifier=".cg"
            )
            share = tl.exp2(top_of - tl.max(top_of, 0))
            total = tl.sum(share * weight_of, 0)
            result = tl.sum(share[:, None] * sum_of, 0) / total
            tl.store(out + row * o_row + (head * GROUP + one) * o_head + d, result.to(DTYPE), mask=d < D)
        tl.store(arrived + here, 0)
