import itertools
import json
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qcore import CalibrationError, CalibrationRequest, ConfigError
from qcore.calibration import prepare
from qcore.plugins import Plugins, installed
from qcore.testing import tiny_transformer

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 20
VOCABULARY = 320


def request(tokenizer=None, samples=4, seqlen=16, seed=0, model=None):
    return CalibrationRequest(tokenizer, samples, seqlen, seed, torch.device("cpu"), lambda: model)


def used(source, tokenizer=None, plugins=None, longest=None, **settings):
    return prepare(source, request(tokenizer, **settings), VOCABULARY, plugins or installed(), longest)


def ids_of(calibration):
    return [sequence.ids.tolist() for sequence in calibration.sequences]


def test_text_is_cut_into_full_windows_that_never_overlap(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    windows = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    found = used([TEXT], tokenizer, samples=1000)
    assert ids_of(found) == windows
    assert all(sequence.mask is None for sequence in found.sequences)


def test_documents_are_joined_without_padding(tokenizer):
    pieces = [TEXT[i : i + 40] for i in range(0, len(TEXT), 40)]
    ids = [token for piece in pieces for token in tokenizer(piece)["input_ids"]]
    found = used(pieces, tokenizer, samples=1000)
    assert [token for window in ids_of(found) for token in window] == ids[: len(ids) // 16 * 16]


def test_the_seed_decides_which_windows_are_drawn(tokenizer):
    first, again, other = (used([TEXT], tokenizer, seed=seed) for seed in (0, 0, 1))
    assert len(first.sequences) == 4
    assert ids_of(first) == ids_of(again)
    assert ids_of(first) != ids_of(other)
    assert first.digest == again.digest != other.digest


@pytest.mark.parametrize("source", ["topics", "self"])
def test_global_random_states_are_left_alone(tokenizer, source):
    model = tiny_transformer("llama", vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    used(source, tokenizer, model=model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


def test_the_report_says_what_was_asked_and_what_was_used(tokenizer):
    report = used([TEXT, "", "more"], tokenizer, samples=3, seed=7).report
    assert report["asked"] == {"samples": 3, "seqlen": 16, "seed": 7}
    assert report["used"] == {"samples": 3, "tokens": 48}
    (source,) = report["sources"]
    assert source["source"] == "list"
    assert source["documents"] == 3
    assert source["tokens_found"] == len(tokenizer(TEXT)["input_ids"]) + len(tokenizer("more")["input_ids"])
    assert "short" not in source


def test_too_few_windows_are_said_so(tokenizer):
    report = used(["The quick brown fox jumps over the lazy dog. " * 3], tokenizer, samples=50).report
    assert report["used"]["samples"] < 50
    assert report["sources"][0]["short"].startswith("asked for 50 samples, the text has")


def test_token_ids_stay_as_they_are():
    rows = [[5, 6, 7], torch.tensor([8, 9]), np.array([1, 2, 3, 4]), torch.tensor([[3, 4]])]
    assert ids_of(used(rows)) == [[5, 6, 7], [8, 9], [1, 2, 3, 4], [3, 4]]
    assert ids_of(used(torch.tensor([[1, 2], [3, 4]]))) == [[1, 2], [3, 4]]


def test_long_sequences_are_cut_short_ones_dropped_and_both_counted():
    found = used([list(range(20)), [1], [], [1, 2], [3, 4], [5, 6], [7, 8]])
    assert [len(ids) for ids in ids_of(found)] == [16, 2, 2, 2]
    (source,) = found.report["sources"]
    assert source == {"source": "list", "samples": 4, "dropped_empty": 2, "cut_to_seqlen": 1, "not_needed": 1}


def test_no_more_is_read_of_a_data_loader_than_is_needed():
    """It may have no end; what is empty does not count."""
    read = []

    def batches():
        for number in itertools.count():
            read.append(number)
            yield torch.full((3, 8), number) if number else torch.zeros(3, 0, dtype=torch.int64)

    found = used(batches())
    assert ids_of(found) == [[1] * 8] * 3 + [[2] * 8]
    assert read == [0, 1, 2]
    assert found.report["sources"][0] == {
        "source": "generator", "samples": 4, "dropped_empty": 3, "cut_to_seqlen": 0, "not_needed": 0
    }  # fmt: skip


def test_a_data_loader_that_runs_dry_is_said_so():
    loader = iter([torch.zeros(2, 8, dtype=torch.int64)] * 2)
    found = used(loader, samples=8)
    assert len(found.sequences) == 4
    assert found.report["sources"][0]["short"] == "asked for 8 samples, it ended after 4"
    with pytest.raises(CalibrationError, match="an iterator that was read before has none left"):
        used(loader)


def test_masks_are_honoured_where_given():
    rows = [{"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}, {"input_ids": [5, 6, 7, 8]},
            {"input_ids": [1, 2, 3, 4], "attention_mask": [1, 1, 1, 1]}]  # fmt: skip
    found = used(rows)
    assert [None if s.mask is None else s.mask.tolist() for s in found.sequences] == [
        [True, True, False, False],
        None,
        None,
    ]
    assert found.report["used"]["tokens"] == 10
    assert found.digest != used([{"input_ids": row["input_ids"]} for row in rows]).digest


def test_what_a_tokenizer_returns_for_many_texts_is_taken_with_its_mask(tokenizer):
    encoded = tokenizer(["The quick brown fox", "jumps"], padding=True, return_tensors="pt")
    first, second = used(encoded, seqlen=32).sequences
    assert first.mask is None
    assert second.mask.tolist() == encoded["attention_mask"][1].bool().tolist()


def test_a_sequence_of_padding_alone_is_dropped():
    found = used([{"input_ids": [5, 6], "attention_mask": [0, 0]}, [1, 2]])
    assert ids_of(found) == [[1, 2]]


def test_batches_join_equal_lengths_and_keep_masked_ones_apart():
    masked = {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}
    found = used([[1, 2, 3], [4, 5], masked, [7, 8, 9], masked, [4, 4, 4]], samples=9).batches(2)
    assert [(list(ids.shape), mask is not None) for ids, mask in found] == [
        ([2, 3], False), ([1, 3], False), ([1, 2], False), ([2, 3], True),
    ]  # fmt: skip


def test_a_text_file_is_read(tokenizer, tmp_path):
    file = tmp_path / "prose.txt"
    file.write_text(TEXT, encoding="utf-8")
    assert ids_of(used(str(file), tokenizer)) == ids_of(used(file, tokenizer)) == ids_of(used([TEXT], tokenizer))
    assert used(file, tokenizer).report["sources"][0]["source"] == "prose.txt"


def test_json_lines_hold_strings_or_objects_with_text(tokenizer, tmp_path):
    file = tmp_path / "prose.jsonl"
    file.write_text(f"{json.dumps(TEXT)}\n\n{json.dumps({'text': TEXT, 'other': 1})}\n", encoding="utf-8")
    assert ids_of(used(file, tokenizer)) == ids_of(used([TEXT, TEXT], tokenizer))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{broken", "line 2 is not JSON"),
        ('{"txt": "a"}', 'line 2: expected a string or an object with a "text"'),
        ("3", "line 2"),
    ],
)
def test_a_bad_json_line_is_numbered(tokenizer, tmp_path, line, says):
    file = tmp_path / "prose.jsonl"
    file.write_text(f'"fine"\n{line}\n')
    with pytest.raises(CalibrationError) as error:
        used(file, tokenizer)
    assert says in str(error.value)
    assert "prose.jsonl" in str(error.value)


def test_a_file_that_is_no_text_is_refused(tokenizer, tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CalibrationError, match=r"image.png cannot be read as UTF-8"):
        used(file, tokenizer)


@pytest.mark.parametrize("form", ["text", "mapping"])
def test_a_mixture_divides_the_samples_by_weight(tokenizer, tmp_path, form):
    file = tmp_path / "prose.txt"
    file.write_text(TEXT)
    source = f"topics:3, {file}" if form == "text" else {"topics": 3, str(file): 1}
    found = used(source, tokenizer, samples=8)
    assert [(s["source"], s["samples"]) for s in found.report["sources"]] == [("topics", 6), ("prose.txt", 2)]
    assert found.report["used"]["samples"] == 8


def test_a_dataset_with_a_text_column_is_read_like_the_library_s(tokenizer):
    class Rows(list):
        column_names = ["text", "label"]

    rows = Rows([{"text": TEXT, "label": 0}])
    assert ids_of(used(rows, tokenizer)) == ids_of(used([TEXT], tokenizer))
    Rows.column_names = ["label"]
    with pytest.raises(CalibrationError, match=r"has columns \['label'\]; expected \"text\" or \"input_ids\""):
        used(rows, tokenizer)


def test_seqlen_is_cut_to_what_the_model_takes(tokenizer):
    found = used([TEXT], tokenizer, seqlen=2048, longest=32)
    assert {len(ids) for ids in ids_of(found)} == {32}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ([], "calibration 'list' is empty"),
        (["short"], "less than one window of seqlen=16"),
        ([""], "has 0 tokens"),
        ([[1, VOCABULARY]], f"token id {VOCABULARY}; the model's vocabulary has 0 to {VOCABULARY - 1}"),
        ([[1, -1]], "token id -1"),
        ([[1.5, 2.5]], "expected integers"),
        ([[[1, 2], [3, 4]]], "found torch.int64 [2, 2]"),
        ([[1, 2], "text"], "sequence 1: expected a string or token ids, found str"),
        ([None, [1, 2]], "sequence 0: expected a string or token ids, found NoneType"),
        ([{"attention_mask": [1]}], "expected a string or token ids"),
        ([[1], [2]], "all 2 sequences are empty or of a single token"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "attention_mask has 1 entries for 2 tokens"),
        ([{"input_ids": [1, 2], "attention_mask": [0.0, -1e9]}], "attention_mask holds other values than 0 and 1"),
        ([{"input_ids": [1, 2], "attention_mask": "ones"}], "attention_mask holds other values than 0 and 1"),
        ([{"input_ids": torch.ones(4, 3).long(), "attention_mask": torch.ones(2, 3)}], "2 masks for 4 sequences"),
        ({"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1]]}, "1 masks for 2 sequences"),
        ([{"ids": [1, 2]}], "sequence 0: expected a string or token ids, found a mapping of ids"),
        ("topcs", "neither a dataset nor a file. Did you mean 'topics'"),
        ("no/such/file.txt", "neither a dataset nor a file"),
    ],
)
def test_what_cannot_be_used_is_named(tokenizer, source, says):
    with pytest.raises(CalibrationError) as error:
        used(source, tokenizer)
    assert says in str(error.value)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(CalibrationError, match="needs a tokenizer: pass tokenizer="):
        used([TEXT])


@pytest.mark.parametrize(
    ("source", "settings", "says"),
    [
        ("topics", {"samples": 0}, "samples=0"),
        ("topics", {"seqlen": 1}, "seqlen=1"),
        ("topics:many", {}, "'many' is not a weight"),
        ("topics:1,self:0", {}, "weights must be positive"),
        ({}, {}, "empty"),
        ({"topics": -1}, {}, "positive"),
        ("topics:nan", {}, "positive"),
        ("topics:inf", {}, "positive"),
        ({"topics": "many"}, {}, "many"),
    ],
)
def test_impossible_settings_are_config_errors(tokenizer, source, settings, says):
    with pytest.raises((ConfigError, CalibrationError), match=says):
        used(source, tokenizer, **settings)


@pytest.mark.parametrize(("source", "split"), [("org/texts", "train"), ("org/texts@validation", "validation")])
def test_a_hub_dataset_is_opened_at_its_split(tokenizer, monkeypatch, source, split):
    opened = []

    def load_dataset(name, split):
        opened.append((name, split))
        return [TEXT]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert used(source, tokenizer).report["sources"][0]["source"] == source
    assert opened == [("org/texts", split)]


def test_a_hub_dataset_without_the_library_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="pip install datasets"):
        used("org/name", tokenizer)


def test_a_dataset_plugin_is_found_by_name_and_gets_the_request(tokenizer, plugin):
    source = """
import qcore
class Counting(qcore.CalibrationDataset):
    name = "counting"
    def load(self, request):
        return [list(range(request.seed, request.seed + request.seqlen)) for _ in range(request.samples)]
@qcore.hookimpl
def qcore_calibration_datasets():
    return [Counting()]
"""
    found = used("counting", plugins=Plugins([plugin("counting", source)]), samples=2, seqlen=4, seed=3)
    assert ids_of(found) == [[3, 4, 5, 6]] * 2
