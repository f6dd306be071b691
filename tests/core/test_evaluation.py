import math

import pytest
import torch

import qcore
from qcore import CalibrationError, ConfigError, ModelError
from qcore.evaluation import measure, windows_of
from qcore.testing import TinyModel, tiny_tokens, tiny_transformer

IDS = torch.arange(50) * 7 % 50


def test_windows_do_not_overlap_and_the_incomplete_last_one_is_dropped():
    windows = windows_of(IDS, None, 8)
    assert windows.shape == (6, 8)
    assert torch.equal(windows.flatten(), IDS[:48])
    assert torch.equal(windows_of(IDS.view(5, 10), None, 8), windows)
    assert torch.equal(windows_of(IDS, None, 8, limit=2), windows[:2])


def test_text_is_tokenized_once_as_a_whole(tokenizer):
    text = "The quick brown fox jumps over the lazy dog."
    ids = tokenizer(text)["input_ids"]
    assert windows_of(text, tokenizer, 4).flatten().tolist() == ids[: len(ids) // 4 * 4]


def test_perplexity_is_that_of_a_computation_by_hand():
    model = TinyModel()
    windows = windows_of(IDS, None, 8)
    total = 0.0
    for window in windows:
        logits = model(window[None]).logits[0].double()
        for position in range(7):
            shifted = logits[position] - logits[position].max()
            total -= float(shifted[window[position + 1]] - torch.log(torch.exp(shifted).sum()))
    found = measure(model, windows)
    assert found["perplexity"] == pytest.approx(math.exp(total / (6 * 7)), rel=1e-5)  # float32 logits
    assert (found["windows"], found["seqlen"], found["tokens"]) == (6, 8, 42)
    assert "kl" not in found


def test_kl_is_that_of_a_computation_by_hand():
    model, reference = TinyModel(), TinyModel(seed=1)
    windows = windows_of(IDS, None, 8, limit=2)
    p, r = (torch.softmax(each(windows).logits[:, :-1].double(), -1) for each in (model, reference))
    expected = float((r * (r / p).log()).sum(-1).mean())
    found = measure(model, windows, reference)
    assert found["kl"] == pytest.approx(expected, rel=1e-4)  # float32 log probabilities
    assert found["reference_perplexity"] == pytest.approx(measure(reference, windows)["perplexity"])


def test_a_model_does_not_diverge_from_itself():
    found = measure(TinyModel(), windows_of(IDS, None, 8), TinyModel())
    assert found["kl"] == 0
    assert found["perplexity"] == found["reference_perplexity"]


def test_kl_is_summed_over_more_rows_than_are_compared_at_once():
    model, reference = TinyModel(), TinyModel(seed=1)
    ids = torch.stack(tiny_tokens(4, length=100)).flatten()
    whole = measure(model, windows_of(ids, None, 200), reference)  # 199 positions a window, 64 at once
    p, r = (torch.log_softmax(m(ids.view(2, 200)).logits[:, :-1].double(), -1) for m in (model, reference))
    assert whole["kl"] == pytest.approx(float((r.exp() * (r - p)).sum(-1).mean()), rel=1e-4)


def test_a_hopeless_model_has_infinite_perplexity_rather_than_an_overflow():
    model = TinyModel()
    model.head.weight.mul_(1e6)
    assert measure(model, windows_of(IDS, None, 8))["perplexity"] == math.inf


@pytest.mark.parametrize(
    ("text", "settings", "kind", "says"),
    [
        (IDS, {"seqlen": 51}, CalibrationError, "50 tokens, less than one window of 51"),
        (IDS, {"seqlen": 1}, ConfigError, "seqlen=1"),
        (IDS, {"seqlen": 8, "windows": 0}, ConfigError, "windows=0"),
        ("text", {"seqlen": 2}, ModelError, "needs a tokenizer: pass tokenizer="),
    ],
)
def test_what_cannot_be_evaluated_is_said_so(text, settings, kind, says):
    with pytest.raises(kind, match=says):
        qcore.evaluate(TinyModel(), text, **settings)


def test_windows_beyond_a_model_s_positions_or_vocabulary_are_refused():
    model = tiny_transformer("gpt2", vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    with pytest.raises(ModelError, match="has no embedding for one of 16 tokens, up to id 49, or for its position"):
        measure(model, windows_of(IDS, None, 16))
    with pytest.raises(ModelError, match="up to id 90"):
        measure(model, torch.tensor([[1, 90]]))


def test_a_reference_with_another_vocabulary_is_refused():
    with pytest.raises(ModelError, match="the reference predicts 60 tokens, the model 50"):
        measure(TinyModel(), windows_of(IDS, None, 8), TinyModel(vocabulary=60))


def test_folders_bring_their_own_tokenizer_and_may_be_the_reference(llama_folder, tmp_path):
    quantized = qcore.quantize(llama_folder, "rtn", bits=3, group_size=32, output=tmp_path / "out")
    text = "The quick brown fox jumps over the lazy dog. " * 20
    found = qcore.evaluate(quantized, text, reference=llama_folder, seqlen=32, windows=3)
    assert found["windows"] == 3
    assert found["kl"] > 0
    again = qcore.evaluate(qcore.load(quantized), text, reference=str(llama_folder), seqlen=32, windows=3)
    assert again == found
