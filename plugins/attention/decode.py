"""Attention of one new token against a static cache, on GPUs: what a captured step of generation computes between its products.

transformers' own way there is a kernel made for prompts, which reads the cache to its full length. Ours (decode_kernel.py, Triton)
shares the cache out to all processors and reads only blocks that the mask shows. It stands in for "sdpa" alone, in models that
are made fast; whatever else they ask for, a prompt for one, still goes to "sdpa".
"""

from __future__ import annotations

import importlib.util
import logging
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qcore import hookimpl

log = logging.getLogger(__name__)

NAME = "qcore_decode"  # as transformers knows it
DTYPES = (torch.float16, torch.bfloat16)
MOST_DIMENSIONS = 256  # of a head
BLOCK = 64  # tokens of the cache that a program reads at a time
PROGRAMS = 4  # aimed at for each of the GPU's processors
MOST_PARTS = 32  # programs that share a head


@cache
def _kernel() -> Any:
    from .decode_kernel import attend

    return attend


# ---- the op ----------------------------------------------------------------------------------------------------------

_arrived: dict[tuple[int, int], Tensor] = {}  # (device, stream) -> counters, zero between products


def _counters(device: torch.device, count: int) -> Tensor:
    """At least `count` zeros; each stream has its own."""
    key = (device.index or 0, torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else (-1, 0)
    found = _arrived.get(key)
    if found is None or found.numel() < count:
        found = _arrived[key] = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
    return found


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@torch.library.custom_op("qcore::decode_attention", mutates_args=())
def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return [rows, 1, heads, d]: softmax(scale · query · keyᵀ where mask) · value.

    query [rows, heads, 1, d]; key, value [rows, heads of the cache, tokens, d]; mask bool [rows or 1, 1, 1, tokens], with at least
    one token for each row. Sums in float32; the same input gives the same bits.
    """
    rows, heads, _, dimensions = query.shape
    shared, tokens = key.shape[1:3]
    group = heads // shared
    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    padded_group, padded = (max(16, 1 << (each - 1).bit_length()) for each in (group, dimensions))
    blocks = -(-tokens // BLOCK)
    parts = max(1, min(blocks, MOST_PARTS, PROGRAMS * _processors(query.device) // (rows * shared)))
    places = rows * shared * parts * group
    out = torch.empty(rows, 1, heads, dimensions, dtype=query.dtype, device=query.device)
    sums = torch.empty(places * padded, dtype=torch.float32, device=query.device)
    tops = torch.empty(places * 2, dtype=torch.float32, device=query.device)
    _kernel()[(rows * shared, parts)](
        query, key, value, mask, out, sums, tops, _counters(query.device, rows * shared),
        tokens, scale * math.log2(math.e), parts, query.stride(0), query.stride(1), *key.stride()[:3], *value.stride()[:3],
        mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(3), out.stride(0), out.stride(2),
        GROUP=group, ROWS=padded_group, D=dimensions, BLOCK_D=padded, BLOCK=BLOCK, HEADS=shared,
        PARTS=max(2, 1 << (parts - 1).bit_length()), num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@decode_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], query.shape[3])


# ---- for transformers ------------------------------------------------------------------------------------------------


def _serves(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, extra: dict[str, Any]
) -> bool:
    """Whether the op computes what is asked for."""
    return (
        query.shape[2] == 1
        and mask is not None
        and mask.dtype == torch.bool
        and mask.ndim == 4
        and mask.shape[1:3] == (1, 1)
        and mask.shape[3] == key.shape[2]
        and query.dtype in DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[3] == key.shape[3] == value.shape[3] <= MOST_DIMENSIONS
        and not dropout
        and not query.requires_grad
        and all(extra.get(name) is None for name in ("softcap", "position_bias", "s_aux", "cache"))
    )


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **extra: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Stand in for transformers' sdpa_attention_forward, whose arguments these are."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if _serves(query, key, value, attention_mask, dropout, extra):
        scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        return torch.ops.qcore.decode_attention(query, key, value, attention_mask, scale), None
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **extra
    )
    return found


def why_not(model: Any) -> str | None:
    """Why a model keeps its own attention, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if model.config._attn_implementation != "sdpa":
        return f"its attention is {model.config._attn_implementation!r}, only 'sdpa' is replaced"
    weight = model.get_input_embeddings().weight
    if not weight.is_cuda:
        return f"it is on {weight.device}, not on a GPU"
    return None


@hookimpl
def qcore_model_accelerated(model: Any) -> None:
    """Register with transformers, and let the model take it where it takes "sdpa" now."""
    reason = why_not(model)
    if reason:
        log.info("%s keeps its own attention: %s", type(model).__name__, reason)
        return
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
