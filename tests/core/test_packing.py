import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcore.packing import pack, recycling, roomy, unpack, words_for


@given(st.data(), st.integers(1, 8), st.integers(1, 200))
def test_any_width_and_any_length_comes_back(data, bits, count):
    codes = torch.tensor([data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))])
    words = pack(codes.to(torch.uint8), bits)
    assert words.dtype == torch.int32
    assert words.shape == (1, words_for(count, bits))
    assert torch.equal(unpack(words, bits, count), codes.to(torch.uint8))


@given(st.integers(1, 8), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_words_are_the_dense_little_endian_stream(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count)
    stream = sum(int(code) << (bits * j) for j, code in enumerate(codes))
    expected = stream.to_bytes(4 * words_for(count, bits), "little")
    assert pack(torch.tensor(codes), bits).numpy().tobytes() == expected


@pytest.mark.parametrize(("bits", "code", "word"), [(4, 7, 0x77777777), (8, 0x7F, 0x7F7F7F7F), (2, 1, 0x55555555)])
def test_a_symmetric_zero_makes_the_word_that_gptq_files_hold(bits, code, word):
    packed = pack(torch.full((32,), code), bits)
    assert packed.numpy().view(np.uint32).tolist() == [word] * bits


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (10, [0b11 << 30, 0b1, 0]),  # two low bits end the first word, the high bit starts the second
        (21, [0, 1 << 31, 0b11]),  # one low bit ends the second word, two high bits start the third
    ],
)
def test_three_bit_codes_cross_words_as_in_gptq_files(place, words):
    codes = torch.zeros(32, dtype=torch.uint8)
    codes[place] = 7
    assert pack(codes, 3).numpy().view(np.uint32).tolist() == words


@pytest.mark.parametrize("bits", range(1, 9))
def test_leading_dimensions_are_rows_of_their_own(bits):
    codes = torch.arange(2 * 3 * 37).reshape(2, 3, 37) % 2**bits
    words = pack(codes, bits)
    assert words.shape == (2, 3, words_for(37, bits))
    assert torch.equal(words[1, 2], pack(codes[1, 2], bits))
    assert torch.equal(unpack(words, bits, 37), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transposed_and_strided_tensors_pack_like_their_copies(bits):
    codes = (torch.arange(64 * 40).reshape(64, 40) * 7 % 2**bits).to(torch.uint8)
    assert torch.equal(pack(codes.t(), bits), pack(codes.t().contiguous(), bits))
    words = pack(codes, bits)
    assert torch.equal(unpack(words.t().contiguous().t(), bits, 40), codes)


def test_unused_bits_of_the_last_word_are_zero():
    assert pack(torch.tensor([7, 7, 7]), 3).tolist() == [0b111111111]


@pytest.mark.parametrize("bits", range(1, 9))
def test_tensors_longer_than_a_piece_and_off_the_grain_of_memory_pack_alike(bits):
    codes = (torch.arange(320_001) * 7 % 2**bits).to(torch.uint8)[1:].reshape(2, -1)
    assert torch.equal(unpack(pack(codes, bits), bits, 160_000), codes)
    assert torch.equal(pack(codes, bits)[1], pack(codes[1].clone(), bits))
    column = torch.full((8, 8), -1, dtype=torch.int32)[:, 3:4]
    codes = torch.full((8, 32 // bits), 2**bits - 1).byte()
    assert torch.equal(unpack(column, bits, 32 // bits), codes)
    assert torch.equal(unpack(column[:1], bits, 32 // bits), codes[:1])


def test_memory_is_taken_again_when_the_last_view_of_it_has_gone():
    with recycling():
        first = roomy([2**22], torch.uint8)
        place, view = first.data_ptr(), first.view(torch.int32)[1:]
        del first
        second = roomy([2**22], torch.uint8)
        assert second.data_ptr() != place
        rows = view.numpy()
        del view
        third = roomy([2**20], torch.int32)
        assert third.data_ptr() not in (place, second.data_ptr())
        del rows
        fourth = roomy([2, 2**20 - 8], torch.int16)
        assert (fourth.data_ptr(), fourth.shape, fourth.dtype) == (place, (2, 2**20 - 8), torch.int16)
        far_smaller = roomy([2**17 + 2**21], torch.uint8)
        assert far_smaller.data_ptr() != place
    kept = fourth.fill_(7)  # what outlives the block keeps its memory
    assert all(int(roomy([2**22], torch.uint8).fill_(1)[0]) == 1 for _ in range(3))
    assert bool((kept == 7).all())


def test_small_tensors_and_those_of_other_devices_are_plain():
    with recycling():
        assert roomy([3, 0], torch.int32).shape == (3, 0)
        assert roomy([2**22], torch.uint8, torch.device("meta")).device.type == "meta"
