"""The main job on a real model, as a user does it: quantize `demo`, save, load, compare, generate."""

import email.message
import inspect
import textwrap

import pytest

import qcore

pytestmark = pytest.mark.slow

SETTINGS = {"bits": 4, "group_size": 64, "samples": 8, "seqlen": 256}


@pytest.fixture(scope="module")
def held_out():
    """English that is not in the calibration text: the docstrings of a module of the standard library."""
    texts = [inspect.getdoc(member) for _, member in inspect.getmembers(email.message.Message)]
    return textwrap.dedent("\n\n".join(sorted({text for text in texts if text and len(text) > 80})))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return qcore.quantize("demo", output=tmp_path_factory.mktemp("demo") / "out", **SETTINGS)


def test_gptq_diverges_less_than_rounding_and_generates_english(folder, held_out):
    model = qcore.load(folder)
    settings = {"reference": "demo", "seqlen": 256, "windows": 4}
    found = qcore.evaluate(model, held_out, **settings)
    rounded = qcore.evaluate(qcore.quantize("demo", "rtn", bits=4, group_size=64), held_out, **settings)
    assert found["windows"] == 4
    assert found["kl"] < rounded["kl"]
    assert found["perplexity"] < 2 * found["reference_perplexity"]

    tokenizer = model.qcore_info.tokenizer
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text


def test_the_folder_is_a_fraction_of_the_float_one(folder):
    found = qcore.inspect(folder)
    assert len(found["layers"]) == 30 * 7
    assert found["size"] < 0.5 * found["size_float16"]  # the embedding, a fifth of this small model, stays as it was
    assert found["bits_per_weight"] < 4.5
    assert max(layer["error"] for layer in found["layers"]) < 0.3
    assert found["provenance"]["model"] == "demo"
