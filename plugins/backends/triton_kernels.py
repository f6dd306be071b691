"""The Triton kernels of the `triton` backend: fused dequantize-matmul, and dequantize alone.

A tile of packed weights is [WORDS, SUB, n] int32: CODES * SUB consecutive columns of the weight, n outputs side by side. Word w of
lane r holds the codes of columns r, SUB + r, 2 * SUB + r, … as one stream of bits, so that unpacking code j of every lane gives
SUB consecutive columns, ready for one tensor-core product: nothing is shuffled, no word is read twice. 4 bits: one
word, 8 codes; 8: one, 4; 2: one, 16; 3: three words, 32 codes.

Products are summed in float32. With SPLIT, when several programs share an output tile, each writes its sum, and the last one of an output tile to finish
adds them in order: the same input gives the same bits.
"""

# Triton reads these functions' source, so annotations are those it knows.
import triton
import triton.language as tl


@triton.jit
def _code(w0, w1, w2, j: tl.constexpr, BITS: tl.constexpr):
    """Code j of each lane, uint32."""
    bit: tl.constexpr = j * BITS
    shift: tl.constexpr = bit % 32
    if bit < 32:
        low, high = w0, w1
    elif bit < 64:
        low, high = w1, w2
    else:
        low, high = w2, w2
    code = low >> shift
    if shift + BITS > 32:  # 3 bits: a code that begins in one word and ends in the next
        code = code | (high << (32 - shift))
    return code & ((1 << BITS) - 1)


@triton.jit
def _number(bits, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """What codes in the low 16 bits are as DTYPE, plus _offset: or-ed into the mantissa of 1024 (float16) or 128 (bfloat16)."""
    if tl.float16 == DTYPE:
        return (bits | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
    elif BITS <= 4:
        return (bits | 0x4300).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return (bits & 0xFF).to(tl.float32)


@triton.jit
def _offset(BITS: tl.constexpr, DTYPE: tl.constexpr):
    """What _number adds."""
    offset: tl.constexpr = 1024.0 if tl.float16 == DTYPE else 128.0 if BITS <= 4 else 0.0
    return offset


@triton.jit
def _less_zero(bits, zero, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """code - zero as DTYPE, exactly, for codes in the low 16 bits and zero [n] with _offset added."""
    value = _number(bits, BITS, DTYPE)
    return (value - zero[None, :].to(value.dtype)).to(DTYPE)


@triton.jit
def _weight(code, scale, zero, DTYPE: tl.constexpr):
    """scale * (code - zero) as DTYPE, for codes [SUB, n] and scale, zero [n]."""
    if tl.float16 == DTYPE:
        # 0x6400 is 1024 in half precision, where a step of the mantissa is 1: or-ing a code in adds it, without a conversion
        value = (code | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
        return (value - (zero + 1024.0).to(tl.float16)[None, :]) * scale.to(tl.float16)[None, :]
    return ((code.to(tl.float32) - zero[None, :].to(tl.float32)) * scale[None, :].to(tl.float32)).to(DTYPE)


@triton.jit
def _words(words, tile, lane, n, WORDS: tl.constexpr, SUB: tl.constexpr, stride):
    """The words of a tile, each uint32 [SUB, n]; those that the width has not repeat the first."""
    base = words + tile * (WORDS * SUB) * stride  # fits 32 bits: why_not sees to it
    at = lane[:, None] * stride + n[None, :]
    w0 = tl.load(base + at).to(tl.uint32, bitcast=True)
    w1, w2 = w0, w0
    if WORDS == 3:
        w1 = tl.load(base + SUB * stride + at).to(tl.uint32, bitcast=True)
        w2 = tl.load(base + 2 * SUB * stride + at).to(tl.uint32, bitcast=True)
    return w0, w1, w2


@triton.jit
def _grid(scales, zeros, first, K, group_size, n, stride, ZERO: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Scale and zero [n] of the columns from `first` on, the zero with _offset added."""
    group = tl.minimum(first, K - 1) // group_size
    scale = tl.load(scales + group * stride + n).to(tl.float32)
    zero = tl.full(n.shape, ZERO + _offset(BITS, DTYPE), dtype=tl.float32)
    if ZERO < 0:
        zero = tl.load(zeros + group * stride + n).to(tl.float32) + _offset(BITS, DTYPE)
    return scale, zero


@triton.jit
def _scaled(weight, scale, DTYPE: tl.constexpr):
    """weight times scale [n], rounded once."""
    if tl.float16 == DTYPE:
        return weight * scale.to(tl.float16)[None, :]
    return (weight.to(tl.float32) * scale[None, :]).to(DTYPE)


@triton.jit
def _inputs(x_row, k, M, K, m):
    return tl.load(x_row + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)


@triton.jit(do_not_specialize=["M", "N", "tiles", "group_size"])  # or each shape would be compiled anew
def matmul(
    x, words, scales, zeros, y, sums, arrived, M, N, K, tiles, stride_x, stride, group_size,
    BITS: tl.constexpr, WORDS: tl.constexpr, CODES: tl.constexpr, SUB: tl.constexpr, ZERO: tl.constexpr, RUN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] @ W.T. words: [tiles, WORDS, SUB, stride]; scales, zeros: [groups, stride].

    ZERO: the zero of a symmetric grid, or -1 to read `zeros`. RUN: so many codes of a lane in a row share a group (for widths of
    one word, of either half of its codes). For few tokens their products with code - zero are summed, then take the scale; for
    more, weights take it. sums: float32 [programs along K, M, N]; arrived: int32, one for each output tile, zero before and after.
    """
    LATE: tl.constexpr = BLOCK_M <= 16
    DTYPE: tl.constexpr = x.dtype.element_ty
    MASK: tl.constexpr = (1 << BITS) - 1
    pid_n, pid_k, pid_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, SUB)
    x_row = x + m[:, None].to(tl.int64) * stride_x
    split = tl.num_programs(1)
    share = tl.cdiv(tiles, split)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tile in range(pid_k * share, tl.minimum(tiles, (pid_k + 1) * share)):
        w0, w1, w2 = _words(words, tile, lane, n, WORDS, SUB, stride)
        if WORDS == 1:  # two codes, 16 bits apart, leave their word with one shift and one mask
            HALF: tl.constexpr = CODES // 2
            for j in tl.static_range(HALF):
                low = (tile * CODES + j) * SUB
                high = low + HALF * SUB
                if j % RUN == 0:
                    scale_low, zero_low = _grid(scales, zeros, low, K, group_size, n, stride, ZERO, BITS, DTYPE)
                    scale_high, zero_high = _grid(scales, zeros, high, K, group_size, n, stride, ZERO, BITS, DTYPE)
                    sum_low = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                    sum_high = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                both = (w0 >> (j * BITS)) & (MASK | MASK << 16)
                weight = _less_zero(both & 0xFFFF, zero_low, BITS, DTYPE)
                if LATE:
                    sum_low = tl.dot(_inputs(x_row, low + lane, M, K, m), weight, sum_low)
                else:
                    acc = tl.dot(_inputs(x_row, low + lane, M, K, m), _scaled(weight, scale_low, DTYPE), acc)
                weight = _less_zero(both >> 16, zero_high, BITS, DTYPE)
                if LATE:
                    sum_high = tl.dot(_inputs(x_row, high + lane, M, K, m), weight, sum_high)
                else:
                    acc = tl.dot(_inputs(x_row, high + lane, M, K, m), _scaled(weight, scale_high, DTYPE), acc)
                if LATE and (j + 1) % RUN == 0:
                    acc += sum_low * scale_low[None, :] + sum_high * scale_high[None, :]
        else:
            for j in tl.static_range(CODES):
                first = (tile * CODES + j) * SUB
                if j % RUN == 0:
                    scale, zero = _grid(scales, zeros, first, K, group_size, n, stride, ZERO, BITS, DTYPE)
                    sum_run = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                weight = _less_zero(_code(w0, w1, w2, j, BITS), zero, BITS, DTYPE)
                if LATE:
                    sum_run = tl.dot(_inputs(x_row, first + lane, M, K, m), weight, sum_run)
                else:
                    acc = tl.dot(_inputs(x_row, first + lane, M, K, m), _scaled(weight, scale, DTYPE), acc)
                if LATE and (j + 1) % RUN == 0:
                    acc += sum_run * scale[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    at = m[:, None].to(tl.int64) * N + n[None, :]
    if SPLIT:
        size = tl.full((), M, tl.int64) * N  # a 1 is a constant here, without methods
        tl.store(sums + pid_k * size + at, acc, mask=inside)
        tl.debug_barrier()  # every thread's sums before this program's arrival
        counter = arrived + pid_m * tl.num_programs(0) + pid_n
        if tl.atomic_add(counter, 1, sem="acq_rel") == split - 1:
            tl.debug_barrier()
            total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for part in range(split):
                total += tl.load(sums + part * size + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(y + at, total.to(DTYPE), mask=inside)
            tl.store(counter, 0)
    else:
        tl.store(y + at, acc.to(DTYPE), mask=inside)


@triton.jit(do_not_specialize=["N", "group_size"])
def dequantize(
    words, scales, zeros, weight, N, K, stride, group_size,
    BITS: tl.constexpr, WORDS: tl.constexpr, CODES: tl.constexpr, SUB: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """weight [K, N] from its packed form; one program makes one tile of BLOCK_N outputs."""
    DTYPE: tl.constexpr = weight.dtype.element_ty
    tile = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, SUB)
    w0, w1, w2 = _words(words, tile, lane, n, WORDS, SUB, stride)
    for j in tl.static_range(CODES):
        first = (tile * CODES + j) * SUB
        k = first + lane
        group = tl.minimum(first, K - 1) // group_size
        scale = tl.load(scales + group * stride + n)
        zero = tl.full((BLOCK_N,), ZERO, dtype=tl.float32)
        if ZERO < 0:
            zero = tl.load(zeros + group * stride + n).to(tl.float32)
        value = _weight(_code(w0, w1, w2, j, BITS), scale, zero, DTYPE)
        at = k[:, None].to(tl.int64) * N + n[None, :]
        tl.store(weight + at, value, mask=(k[:, None] < K) & (n[None, :] < N))
