import pydoc_data.topics

import pytest
import torch

from qcore import CalibrationError, CalibrationRequest
from qcore.plugins import installed
from qcore.testing import tiny_transformer


@pytest.fixture
def request_of(tokenizer):
    """A function that makes a request to a dataset; the float model is a tiny Llama."""

    def make(samples=3, seqlen=12, seed=0, **config):
        small = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip

        def float_model():
            return tiny_transformer("llama", **{**small, **config})

        return CalibrationRequest(tokenizer, samples, seqlen, seed, torch.device("cpu"), float_model)

    return make


@pytest.mark.parametrize("name", sorted(installed().usable("dataset")))
def test_every_dataset_depends_on_the_request_alone(request_of, name):
    dataset = installed().get("dataset", name)
    first, again = (list(dataset.load(request_of())) for _ in range(2))
    assert first == again
    assert first
    assert dataset.description


def test_topics_is_all_the_prose_of_pydoc(request_of):
    (text,) = installed().get("dataset", "topics").load(request_of())
    assert all(topic in text for topic in pydoc_data.topics.topics.values())
    assert len(text) > 400_000


def test_self_samples_finished_sequences_from_the_model(request_of):
    sequences = installed().get("dataset", "self").load(request_of(samples=70))  # more than one round of generation
    assert len(sequences) == 70
    assert {len(ids) for ids in sequences} == {12}
    assert {ids[0] for ids in sequences} == {0}  # the beginning-of-text token
    assert all(0 <= token < 320 for ids in sequences for token in ids)
    assert len({tuple(ids) for ids in sequences}) == 70


def test_self_follows_the_seed_and_leaves_the_global_one_alone(request_of):
    dataset = installed().get("dataset", "self")
    before = torch.get_rng_state()
    first, other = (dataset.load(request_of(seed=seed)) for seed in (0, 1))
    assert first != other
    assert torch.equal(torch.get_rng_state(), before)


def test_self_draws_from_the_whole_distribution_whatever_the_model_prefers(request_of):
    """A generation config with top_k=1 would make every sequence the same."""
    request = request_of()
    model = request.float_model()
    model.generation_config.top_k, model.generation_config.temperature = 1, 0.01
    model.generation_config.repetition_penalty = 5.0
    bent = CalibrationRequest(request.tokenizer, 3, 12, 0, request.device, lambda: model)
    dataset = installed().get("dataset", "self")
    assert dataset.load(bent) == dataset.load(request)


def test_self_needs_a_token_to_start_from(request_of):
    request = request_of(bos_token_id=None, eos_token_id=None)
    bare = CalibrationRequest(None, 1, 8, 0, request.device, request.float_model)
    with pytest.raises(CalibrationError, match="starts from the BOS or EOS token"):
        installed().get("dataset", "self").load(bare)
