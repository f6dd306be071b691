"""Codes to the words of files: the compiled functions give the bits that torch's operations give, in every layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qcore_plugins import cpu_library
from qcore_plugins.exporters import codes

from qcore import BackendError, CheckpointError

needs_library = pytest.mark.skipif(cpu_library.unavailable() is not None, reason="the CPU library is not built")


@st.composite
def layouts(draw):
    """(layout, bits, out, columns), whatever a layout can hold."""
    layout = draw(st.sampled_from(codes.LAYOUTS))
    bits = 4 if layout == "interleaved" else draw(st.integers(1, 8))
    out = draw(st.integers(1, 70))
    columns = draw(st.integers(1, 700))
    if layout == "interleaved":
        out = 8 * draw(st.integers(1, 40))
    if layout == "down":
        columns = 32 * draw(st.integers(1, 40))
    return layout, bits, out, columns


def drawn(bits, out, columns):
    return torch.randint(0, 2**bits, (out, columns), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)


def check(layout, bits, out, columns):
    given_codes = drawn(bits, out, columns)
    words = codes.pack(given_codes, bits, layout)
    assert torch.equal(words, codes._pack(given_codes, bits, layout))
    assert torch.equal(codes.unpack(words, bits, layout, out, columns), given_codes)
    assert torch.equal(codes._unpack(words, bits, layout, columns), given_codes)


@needs_library
@given(layouts())
def test_compiled_and_torch_agree(shape):
    check(*shape)


@needs_library
@pytest.mark.parametrize(("layout", "bits"), [("along", 3), ("down", 2), ("down", 3), ("down", 4), ("interleaved", 4)])
def test_what_goes_past_the_cache(layout, bits):
    check(layout, bits, 2056, 2080)  # beyond LARGE of codes.c, with an edge on both sides
    check(layout, bits, 4100 if layout != "interleaved" else 4104, 1056)  # rows of words that begin unaligned


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(cpu_library, "serves", lambda tensor: False)
    for layout, bits in (("along", 3), ("down", 3), ("interleaved", 4)):
        check(layout, bits, 64, 96)


@needs_library
def test_views_are_taken():
    whole = drawn(4, 64, 128)
    assert torch.equal(codes.pack(whole[::2, ::2], 4, "down"), codes._pack(whole[::2, ::2], 4, "down"))
    words = codes.pack(whole, 4, "along")
    assert torch.equal(codes.unpack(words[::2], 4, "along", 32, 128), whole[::2])


def test_words_must_have_the_shape_of_their_codes():
    words = codes.pack(drawn(4, 64, 128), 4, "down")
    for wrong in (words[:-1], words[:, :-1], words.long(), words[None]):
        with pytest.raises(CheckpointError, match=r"packed codes are .* expected int32 \[16, 64\]"):
            codes.unpack(wrong, 4, "down", 64, 128)


@needs_library
@pytest.mark.parametrize(
    "wrong", [{"bits": 9}, {"layout": 3}, {"out": 0}, {"columns": 33, "layout": 1}, {"ldc": 31}, {"words": 0}]
)
def test_the_library_refuses_what_it_cannot_do(wrong):
    held, room = drawn(4, 8, 40), torch.zeros(8, 40, dtype=torch.int32)
    values = {
        "bits": 4,
        "layout": 0,
        "out": 8,
        "columns": 32,
        "codes": held.data_ptr(),
        "ldc": 40,
        "words": room.data_ptr(),
    }
    with pytest.raises(BackendError, match="qc_pack_codes failed"):
        cpu_library.CPU.call(cpu_library.load(), "qc_pack_codes", *{**values, **wrong}.values())
    unpacked = {key: {**values, **wrong}[key] for key in ("bits", "layout", "out", "columns", "words", "codes", "ldc")}
    with pytest.raises(BackendError, match="qc_unpack_codes failed"):
        cpu_library.CPU.call(cpu_library.load(), "qc_unpack_codes", *unpacked.values())
