"""The evaluation tasks against computations by hand, on a tiny Llama and on a model that answers as it is told."""

import json
import math
import random
import re
import types

import pytest
import torch
from click.testing import CliRunner
from qcore_plugins.tasks import samples
from qcore_plugins.tasks.lm_eval_harness import Harness
from qcore_plugins.tasks.sequence_classification import closest, edit_distance, vote
from transformers import GenerationConfig

import qcore
from qcore import ConfigError, EvaluationError, cli

ROWS = [
    {"prompt": "The assert statement is", "label": " a convenient way"},
    {"prompt": "The break statement", "label": " may only occur in a loop."},
    {"prompt": "Else", "label": " is optional"},
]


class Told(torch.nn.Module):
    """Continues every prompt as told: answers(prompt text) -> texts, one for each returned sequence."""

    def __init__(self, tokenizer, answers):
        super().__init__()
        self.tokenizer, self.answers = tokenizer, answers
        self.embed = torch.nn.Embedding(len(tokenizer), 2)
        self.config = types.SimpleNamespace(max_position_embeddings=256)
        self.asked = []

    def get_input_embeddings(self):
        return self.embed

    def generate(self, input_ids, attention_mask, generation_config):
        self.asked.append((input_ids, attention_mask, generation_config))
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            told = self.answers(self.tokenizer.decode(ids[mask.bool()]))
            assert len(told) == generation_config.num_return_sequences
            rows += [[*ids.tolist(), *self.tokenizer(text)["input_ids"]] for text in told]
        width, end = max(map(len, rows)), self.tokenizer.eos_token_id
        return torch.tensor([row + [end] * (width - len(row)) for row in rows])


def run(model, task, tokenizer, **params):
    return qcore.evaluate(model, task=task, tokenizer=tokenizer, **params)


def test_perplexity_of_labels_is_that_of_a_computation_by_hand(llama, tokenizer):
    nll, count = 0.0, 0
    for row in ROWS:
        prompt, label = (tokenizer(row[key])["input_ids"] for key in ("prompt", "label"))
        log_p = torch.log_softmax(llama(torch.tensor([prompt + label])).logits[0].detach().double(), -1)
        nll -= sum(float(log_p[len(prompt) + k - 1, token]) for k, token in enumerate(label))
        count += len(label)
    for block_max_len in (16, 4096):  # one sample to a batch, and all in one
        found = run(llama, "language_modeling", tokenizer, data_name_or_path=ROWS, block_max_len=block_max_len)
        assert found["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
        assert (found["tokens"], found["samples"], found["truncated"], found["dropped"]) == (count, 3, 0, 0)


def test_plain_text_is_predicted_from_its_second_token_on(llama, tokenizer):
    text = "The quick brown fox jumps over the lazy dog."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    expected = math.exp(llama(ids, labels=ids).loss.item())
    params = {"data_name_or_path": [{"prompt": "x", "text": text}], "prompt_col_name": "text", "label_col_name": None}
    assert run(llama, "language_modeling", tokenizer, **params)["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_results_before_and_after_stand_side_by_side(llama_folder, tmp_path):
    out = qcore.quantize(llama_folder, "rtn", bits=2, group_size=32, output=tmp_path / "out")
    found = qcore.evaluate(out, task="language_modeling", data_name_or_path=ROWS, reference=llama_folder)
    alone = qcore.evaluate(llama_folder, task="language_modeling", data_name_or_path=ROWS)
    assert {f"reference_{name}": value for name, value in alone.items()}.items() <= found.items()
    assert found["perplexity"] != found["reference_perplexity"]


@pytest.mark.parametrize("named", ["label", "labels"])
def test_a_dataloader_of_the_callers_own_is_used_as_it_is(llama, tokenizer, named):
    ids = tokenizer("The assert statement", return_tensors="pt")["input_ids"]
    labels = torch.where(torch.arange(ids.shape[1]) < 2, samples.IGNORED, ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": labels}
    if named != "label":
        batch[named] = batch.pop("label")
    found = run(llama, "language_modeling", tokenizer, dataloader=torch.utils.data.DataLoader([batch], batch_size=None))
    assert found["perplexity"] == pytest.approx(math.exp(llama(ids, labels=labels).loss.item()), rel=1e-5)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_rows_come_from_files(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        path.write_text("prompt,label\n" + "".join(f'"{row["prompt"]}","{row["label"]}"\n' for row in ROWS))
    options = samples.SampleOptions(data_name_or_path=path)
    assert sorted(samples.read_rows(options, "t")) == sorted((row["prompt"], row["label"]) for row in ROWS)


def test_rows_come_from_datasets_and_their_test_split():
    datasets = pytest.importorskip("datasets")
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[:1]), test=datasets.Dataset.from_list(ROWS[1:]))
    options = samples.SampleOptions(data_name_or_path="name", load_fn=lambda name: splits)
    assert sorted(samples.read_rows(options, "t")) == sorted((row["prompt"], row["label"]) for row in ROWS[1:])


def test_rows_are_drawn_by_seed_and_preprocessed_as_columns():
    rows = [{"text": str(number), "label": number % 2} for number in range(50)]

    def refactor(columns, names):
        return {"prompt": columns["text"], "label": [names[label] for label in columns["label"]]}

    params = {"data_name_or_path": rows, "preprocess_fn": refactor, "preprocess_fn_kwargs": {"names": ["even", "odd"]}}
    first, again, other = (
        samples.read_rows(samples.SampleOptions(num_samples=7, seed=seed, **params), "t") for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(first) == 7
    assert all(label == ("odd" if int(text) % 2 else "even") for text, label in first)
    state = random.getstate()
    samples.read_rows(samples.SampleOptions(**params), "t")
    assert random.getstate() == state


def test_batches_hold_no_more_tokens_than_asked_for_and_prompts_stand_on_the_right():
    made = samples.Samples([samples.Sample([7] * length, [1], "a") for length in (9, 3, 5, 3, 8, 1, 4)])
    options = samples.SampleOptions(block_max_len=12)
    found = list(samples.batches(made, options, 0, label_is_read=False))
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(3, 3), (2, 5), (1, 8), (1, 9)]
    assert sum(len(batch["label"]) for batch in found) == 7
    for batch in found:
        assert torch.equal(batch["input_ids"] == 7, batch["attention_mask"].bool())
        assert bool(batch["attention_mask"][:, -1].all())


CLASSES = ["positive", "negative", "neutral"]
REVIEWS = [{"prompt": f"{label}? Answer:", "label": label} for label in CLASSES for _ in range(2)]


def test_accuracy_counts_the_nearest_class(tokenizer):
    model = Told(
        tokenizer, lambda prompt: ["Neutral!" if "negative" in prompt else prompt.split("?")[0].upper() + "\nNext"]
    )
    found = run(model, "sequence_classification", tokenizer, data_name_or_path=REVIEWS, classes=CLASSES)
    assert found["accuracy"] == pytest.approx(4 / 6)
    longest = max(len(tokenizer(name)["input_ids"]) for name in CLASSES)
    assert {asked[2].max_new_tokens for asked in model.asked} == {longest}


def test_several_answers_are_put_to_a_vote(tokenizer):
    model = Told(tokenizer, lambda prompt: ["neutral", prompt.split("?")[0], prompt.split("?")[0]])
    config = GenerationConfig(num_beams=3, num_return_sequences=3, do_sample=True)
    params = {"data_name_or_path": REVIEWS, "classes": CLASSES}
    found = run(model, "sequence_classification", tokenizer, generation_config=config, **params)
    assert found["accuracy"] == 1
    first = Told(tokenizer, lambda prompt: ["neutral"])
    assert run(first, "sequence_classification", tokenizer, **params)["accuracy"] == pytest.approx(2 / 6)
    assert config.max_new_tokens is None  # the caller's own stays as it was


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3, "do_sample": True},
                                      {"num_return_sequences": 2, "do_sample": True, "temperature": 2.0}])  # fmt: skip
def test_a_quantized_model_classifies_repeatably_and_leaves_the_random_state(llama, tokenizer, tokens, settings):
    model = qcore.quantize(llama, "rtn", bits=4, group_size=32)
    params = {"data_name_or_path": REVIEWS, "classes": CLASSES, "generation_config": settings}
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = run(model, "sequence_classification", tokenizer, **params)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert run(model, "sequence_classification", tokenizer, **params) == first
    assert 0 <= first["accuracy"] <= 1


def test_a_template_makes_the_prompts(tokenizer):
    model = Told(tokenizer, lambda prompt: ["positive" if prompt.startswith("Text: positive? Answer:") else "negative"])
    rows = [{"prompt": "positive? Answer:", "label": "Positive "}, {"prompt": "x", "label": "negative"}]
    params = {"classes": ["positive", "negative"], "prompt_template": "Text: {prompt}\nChoices: {classes}"}
    assert run(model, "sequence_classification", tokenizer, data_name_or_path=rows, **params)["accuracy"] == 1


def test_nearest_class():
    assert edit_distance("", "abc") == 3
    assert edit_distance("kitten", "sitting") == 3
    assert closest("negativ", ["positive", "negative"]) == "negative"
    assert closest("negative", ["neg", "negative"]) == "negative"
    assert closest("", ["a", "b"]) == "a"
    assert vote(["b", "a", "b", "a"]) == "b"


def test_rouge_is_that_of_a_computation_by_hand(tokenizer):
    model = Told(tokenizer, lambda prompt: ["The cat sat on the mat"])
    rows = [{"prompt": "Summarize:", "label": "the cat lay on the red mat"}]
    found = run(model, "text_summarization", tokenizer, data_name_or_path=rows, max_new_tokens=40)
    # shared words: the, cat, on, the, mat: 5 of 6 written, 5 of 7 wanted; pairs: "the cat", "on the"
    assert found["rouge1_precision"] == pytest.approx(5 / 6)
    assert found["rouge1_recall"] == pytest.approx(5 / 7)
    assert found["rouge1_f1"] == pytest.approx(2 * 5 / 13)
    assert found["rouge2_precision"] == pytest.approx(2 / 5)
    assert found["rougeL_recall"] == pytest.approx(5 / 7)
    assert model.asked[0][2].max_new_tokens == 40


def test_a_prompt_beyond_the_context_is_cut_or_left_out_and_told(llama, tokenizer):
    rows = [{"prompt": "word " * 400, "label": "positive"}, {"prompt": "short", "label": "positive"}]
    params = {"data_name_or_path": rows, "classes": ["positive", "negative"], "sample_max_len": 2000}
    with pytest.warns(UserWarning, match="1 of 2 samples were cut to 256 tokens, 0 left out"):
        found = run(llama, "sequence_classification", tokenizer, **params)
    assert (found["samples"], found["truncated"], found["dropped"]) == (2, 1, 0)
    with pytest.warns(UserWarning, match="0 of 2 samples were cut to 256 tokens, 1 left out"):
        found = run(llama, "sequence_classification", tokenizer, truncate_prompt=False, **params)
    assert (found["samples"], found["truncated"], found["dropped"]) == (1, 0, 1)


def test_a_label_too_long_is_cut_at_its_end_in_language_modeling(tokenizer):
    rows = [("The prompt", "one two three four five six seven eight nine ten")]
    options = samples.SampleOptions(sample_max_len=12, truncate_prompt=False)
    model = types.SimpleNamespace(config=types.SimpleNamespace(max_position_embeddings=64))
    with pytest.warns(UserWarning, match="1 of 1 samples were cut to 12"):
        (sample,) = samples.tokenize(rows, tokenizer, options, model, "t", None).all
    assert sample.prompt == tokenizer("The prompt")["input_ids"]
    assert (
        sample.prompt + sample.label
        == tokenizer("The prompt")["input_ids"] + tokenizer(rows[0][1])["input_ids"][: len(sample.label)]
    )
    assert len(sample.prompt + sample.label) == 12


@pytest.mark.parametrize(
    ("task", "params", "kind", "says"),
    [
        ("language_modeling", {}, ConfigError, "'language_modeling' needs data"),
        ("language_modeling", {"data_name_or_path": []}, EvaluationError, "is empty"),
        ("language_modeling", {"data_name_or_path": "no/such.jsonl"}, EvaluationError, "is no file"),
        ("language_modeling", {"data_name_or_path": [{"a": "x", "b": "y"}]}, EvaluationError,
         r"no column 'prompt', 'label'; it has 'a', 'b'"),
        ("language_modeling", {"data_name_or_path": 7}, EvaluationError, "given as int are no rows"),
        ("language_modeling", {"data_name_or_path": ROWS, "num_sample": 3}, ConfigError, "Did you mean 'num_samples'"),
        ("language_modeling", {"data_name_or_path": [{"prompt": "a", "label": ""}]}, EvaluationError, "labels are empty"),
        ("sequence_classification", {"data_name_or_path": ROWS, "classes": ["yes", "no"]}, EvaluationError,
         r"is not among the classes \['yes', 'no'\] \(and 2 more\)"),
        ("sequence_classification", {"data_name_or_path": ROWS, "classes": ["yes", "Yes"]}, ConfigError, "all different"),
        ("sequence_classification", {"data_name_or_path": REVIEWS, "classes": CLASSES, "prompt_template": "{text}"},
         ConfigError, r"may use \{prompt\}"),
        ("text_summarization", {"data_name_or_path": [{"prompt": "word " * 400, "label": "x"}], "truncate_prompt": False},
         EvaluationError, "none of the 1 samples fits into 256 tokens"),
        ("sequence_classification", {"dataloader": [], "classes": CLASSES}, EvaluationError, "the dataloader is empty"),
        ("text_summarization", {"dataloader": [{"input_ids": 1}]}, EvaluationError, "batch 1 .* has no attention_mask, label"),
        ("classification", {}, ConfigError, "no task is called 'classification'. Did you mean 'sequence_classification'"),
        ("lm_eval", {}, ConfigError, "needs names behind a colon"),
        ("lm_eval:no_such_task", {"include_defaults": False}, ConfigError, "has no task 'no_such_task'"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_said_so(llama, tokenizer, task, params, kind, says):
    if task.startswith("lm_eval"):
        pytest.importorskip("lm_eval")
    with pytest.raises(kind, match=says):
        run(llama, task, tokenizer, **params)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "nothing to measure on"),
        ({"text": "a", "task": "language_modeling"}, "exclude each other"),
        ({"text": "a", "classes": ["a"]}, "no option 'classes' without a task"),
    ],
)
def test_text_and_tasks_are_told_apart(llama, arguments, says):
    with pytest.raises(ConfigError, match=says):
        qcore.evaluate(llama, **arguments)


def test_a_missing_library_names_the_extra(llama, tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(qcore.PluginError, match=re.escape("pip install 'qcore[eval]'")):
        Harness().run(llama, tokenizer, Harness.Params(), "arc_easy")
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(qcore.PluginError, match=re.escape("pip install 'qcore[eval]'")):
        run(llama, "text_summarization", tokenizer, data_name_or_path=ROWS)


@pytest.fixture
def harness_task(tmp_path):
    """A multiple-choice task of lm-evaluation-harness that needs no network: name, folder, questions."""
    questions = [
        {"q": f"The {word} statement", "choices": [" is", " may", "!"], "gold": 0} for word in ("if", "for", "try")
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "local.yaml").write_text(
        f"task: qcore_local\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.jsonl\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: q\ndoc_to_target: gold\n"
        "doc_to_choice: choices\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    return tmp_path, questions


def test_lm_evaluation_harness_scores_a_quantized_model(llama_folder, harness_task, tmp_path, monkeypatch):
    """By the command, as a user would; the expected accuracy is computed from the model's logits."""
    pytest.importorskip("lm_eval")
    folder, questions = harness_task
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    out = qcore.quantize(llama_folder, "rtn", bits=4, group_size=32, output=tmp_path / "out")
    model = qcore.load(out)
    tokenizer = model.qcore_info.tokenizer

    @torch.no_grad()
    def likelihood(prompt, choice):
        head, tail = tokenizer(prompt)["input_ids"], tokenizer(choice)["input_ids"]
        log_p = torch.log_softmax(model(torch.tensor([head + tail])).logits[0], -1)
        return sum(float(log_p[len(head) + k - 1, token]) for k, token in enumerate(tail))

    answers = [max(range(3), key=lambda i: likelihood(each["q"], each["choices"][i])) for each in questions]
    expected = sum(answer == each["gold"] for answer, each in zip(answers, questions, strict=True)) / 3
    command = ["eval", str(out), "--task", "lm_eval:qcore_local", "--set", f"include_path={folder}"]
    found = CliRunner().invoke(cli.cli, [*command, "--set", "include_defaults=false", "--json"], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["lm_eval:qcore_local"]["qcore_local/acc"] == pytest.approx(expected)
