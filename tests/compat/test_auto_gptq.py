"""The snippets of AutoGPTQ's README run with the import lines and the names of models and data changed, and nothing else."""

import json
import logging
from functools import partial

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, TextGenerationPipeline

import qcore
from qcore import ConfigError, ModelError
from qcore.compat.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig, get_gptq_peft_model
from qcore.compat.auto_gptq.eval_tasks import LanguageModelingTask, SequenceClassificationTask, TextSummarizationTask
from qcore.compat.auto_gptq.modeling import BaseGPTQForCausalLM


@pytest.fixture
def examples(tokenizer):
    return [tokenizer("qcore is a model quantization library, and this is a sentence to calibrate on.")]


def test_quick_tour(opt_folder, tmp_path, caplog, capsys):
    """README, "Quantization and Inference": quantize, save twice, load to the first GPU, generate, pipeline."""
    caplog.set_level(logging.WARNING)
    pretrained_model_dir = str(opt_folder)
    quantized_model_dir = str(tmp_path / "opt-125m-4bit")

    tokenizer = AutoTokenizer.from_pretrained(pretrained_model_dir, use_fast=True)
    examples = [
        tokenizer(
            "auto-gptq is an easy-to-use model quantization library with user-friendly apis, based on GPTQ algorithm."
        )
    ]
    quantize_config = BaseQuantizeConfig(bits=4, group_size=128, desc_act=False)
    model = AutoGPTQForCausalLM.from_pretrained(pretrained_model_dir, quantize_config)
    model.quantize(examples)
    model.save_quantized(quantized_model_dir)
    model.save_quantized(quantized_model_dir, use_safetensors=True)
    with torch.no_grad():
        expected = model(torch.tensor([[5, 6, 7]])).logits

    model = AutoGPTQForCausalLM.from_quantized(quantized_model_dir, device="cuda:0")
    print(tokenizer.decode(model.generate(**tokenizer("auto_gptq is", return_tensors="pt").to(model.device))[0]))
    pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    print(pipeline("auto-gptq is")[0]["generated_text"])

    printed = capsys.readouterr().out
    assert printed.startswith("auto_gptq is")
    assert "\nauto-gptq is" in printed
    found = qcore.inspect(quantized_model_dir)
    assert {(layer["bits"], layer["group_size"], layer["act_order"]) for layer in found["layers"]} == {(4, 128, False)}
    with torch.no_grad():
        again = model(torch.tensor([[5, 6, 7]], device=model.device)).logits.cpu()
    assert torch.allclose(again, expected, atol=1e-2)  # float16 is computed in float32 on a CPU, on both sides
    if not torch.cuda.is_available():
        assert "there is no GPU here; the CPU is used" in caplog.text


class OPTGPTQForCausalLM(BaseGPTQForCausalLM):
    """README, "Customize Model"."""

    layers_block_name = "model.decoder.layers"
    outside_layer_modules = [
        "model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_out",
        "model.decoder.project_in", "model.decoder.final_layer_norm",
    ]  # fmt: skip
    inside_layer_modules = [
        ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"],
        ["self_attn.out_proj"],
        ["fc1"],
        ["fc2"],
    ]


def test_customize_model(opt_folder, examples, tmp_path):
    model = OPTGPTQForCausalLM.from_pretrained(opt_folder, BaseQuantizeConfig(bits=4, group_size=32))
    model.quantize(examples)
    report = qcore.report(model.model)
    assert report["adapter"] == "OPTGPTQForCausalLM"
    assert [layer["name"].removeprefix("model.decoder.layers.0.") for layer in report["layers"][:6]] == [
        name for group in OPTGPTQForCausalLM.inside_layer_modules for name in group
    ]
    model.save_quantized(tmp_path / "out")
    assert OPTGPTQForCausalLM.from_quantized(tmp_path / "out").quantize_config.bits == 4


def test_a_customized_model_that_leaves_linears_out_is_refused(opt_folder, examples):
    class Partial(OPTGPTQForCausalLM):
        inside_layer_modules = [["self_attn.q_proj"]]

    with pytest.raises(ModelError, match="fc1"):
        Partial.from_pretrained(opt_folder, BaseQuantizeConfig(group_size=32)).quantize(examples)


def test_evaluation_on_downstream_tasks(gptj_folder, tmp_path, monkeypatch):
    """README, "Evaluation on Downstream Tasks"; the data set is a folder laid out as on the hub."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tweets"
    (folder / "english").mkdir(parents=True)
    rows = [
        {"text": text, "label": label} for label, text in enumerate(["It rains.", "It is Monday.", "The sun shines!"])
    ]
    (folder / "english" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: english\n  data_dir: english\n---\n")

    MODEL = str(gptj_folder)
    DATASET = str(folder)
    TEMPLATE = "Question:What's the sentiment of the given text? Choices are {labels}.\nText: {text}\nAnswer:"
    ID2LABEL = {0: "negative", 1: "neutral", 2: "positive"}
    LABELS = list(ID2LABEL.values())

    def ds_refactor_fn(samples):
        text_data = samples["text"]
        label_data = samples["label"]
        new_samples = {"prompt": [], "label": []}
        for text, label in zip(text_data, label_data):  # noqa: B905 (as it stands in the README)
            new_samples["prompt"].append(TEMPLATE.format(labels=LABELS, text=text))
            new_samples["label"].append(ID2LABEL[label])
        return new_samples

    model = AutoGPTQForCausalLM.from_pretrained(MODEL, BaseQuantizeConfig())
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    task = SequenceClassificationTask(
        model=model,
        tokenizer=tokenizer,
        classes=LABELS,
        data_name_or_path=DATASET,
        prompt_col_name="prompt",
        label_col_name="label",
        **{
            "num_samples": 1000,
            "sample_max_len": 1024,
            "block_max_len": 2048,
            "load_fn": partial(datasets.load_dataset, name="english"),
            "preprocess_fn": ds_refactor_fn,
            "truncate_prompt": False,
        },
    )
    first = task.run()
    consistent = task.run(generation_config=GenerationConfig(num_beams=3, num_return_sequences=3, do_sample=True))
    for found in (first, consistent):
        assert set(found) == {"acc"}
        assert found["acc"] in [pytest.approx(right / 3) for right in range(4)]


def test_the_other_tasks_give_results_under_their_old_names(gptj_folder, tokenizer):
    model = AutoGPTQForCausalLM.from_pretrained(gptj_folder, BaseQuantizeConfig())
    data = [{"text": "The cat sat on the mat.", "summary": " a cat"}]
    settings = {"data_name_or_path": data, "prompt_col_name": "text", "label_col_name": "summary"}
    perplexity = LanguageModelingTask(model, tokenizer, **settings).run()
    assert perplexity == {"ppl": pytest.approx(qcore.evaluate(
        model, task="language_modeling", tokenizer=tokenizer, **settings)["perplexity"])}  # fmt: skip
    rouge = TextSummarizationTask(model, tokenizer, **settings).run(GenerationConfig(max_new_tokens=5))
    assert {kind: set(parts) for kind, parts in rouge.items()} == {
        f"rouge-{n}": {"r", "p", "f"} for n in ("1", "2", "l")
    }


def test_a_folder_is_only_written_over_where_qcore_wrote_it(opt_folder, examples, tmp_path):
    model = AutoGPTQForCausalLM.from_pretrained(opt_folder, BaseQuantizeConfig(group_size=32))
    with pytest.raises(ModelError, match="no quantized linears"):
        model.save_quantized(tmp_path / "early")
    model.quantize(examples)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(qcore.CheckpointError, match="exists already"):
        model.save_quantized(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    with pytest.raises(ModelError, match="quantized already"):
        model.quantize(examples)


def test_push_to_hub_uploads_what_is_saved_or_saves_first(opt_folder, examples, tmp_path, monkeypatch):
    """README, both of its commented examples."""
    import huggingface_hub

    calls = []

    class Hub:
        def __init__(self, token):
            calls.append(token)

        def create_repo(self, repo_id, **settings):
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, **settings):
            calls.append(settings)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    model = AutoGPTQForCausalLM.from_pretrained(opt_folder, BaseQuantizeConfig(group_size=32))
    model.quantize(examples)
    with pytest.raises(ConfigError, match="nothing is saved yet"):
        model.push_to_hub("me/opt", use_auth_token=True)
    quantized_model_dir, commit_message = str(tmp_path / "out"), "hello"
    model.save_quantized(quantized_model_dir)
    model.push_to_hub("me/opt", commit_message=commit_message, use_auth_token=True)
    uploaded = {"repo_id": "me/opt", "folder_path": quantized_model_dir, "commit_message": "hello", "create_pr": False}
    assert calls == [True, uploaded]
    other = str(tmp_path / "other")
    model.push_to_hub(
        "me/opt", save_dir=other, use_safetensors=True, commit_message=commit_message, use_auth_token=True
    )
    assert calls[3] == {**uploaded, "folder_path": other}
    assert (tmp_path / "other" / "model.safetensors").is_file()
    AutoGPTQForCausalLM.from_quantized(other).push_to_hub("me/opt", commit_message=commit_message)
    assert calls[5] == {**uploaded, "folder_path": other}


def test_every_option_of_from_quantized_is_taken(opt_folder, examples, tmp_path):
    """The keywords of AutoGPTQ 0.7; those that choose kernels have no effect."""
    model = AutoGPTQForCausalLM.from_pretrained(
        opt_folder,
        BaseQuantizeConfig(group_size=32),
        max_memory=None,
        trust_remote_code=False,
        torch_dtype=torch.float32,
    )
    assert model.model.dtype == torch.float32
    model.quantize(examples, batch_size=1, use_triton=False, use_cuda_fp16=True, autotune_warmup_after_quantized=False,
                   cache_examples_on_gpu=True)  # fmt: skip
    model.save_quantized(tmp_path / "out", safetensors_metadata={"by": "me"})
    loaded = AutoGPTQForCausalLM.from_quantized(
        tmp_path / "out", device_map=None, max_memory=None, device="cpu", low_cpu_mem_usage=True, use_triton=True,
        inject_fused_attention=False, inject_fused_mlp=False, use_cuda_fp16=True, quantize_config=None, model_basename="model",
        use_safetensors=True, trust_remote_code=False, warmup_triton=False, trainable=True, disable_exllama=None,
        disable_exllamav2=False, use_marlin=False, use_tritonv2=False, torch_dtype="float32", cache_dir=None, revision=None,
    )  # fmt: skip
    loaded.warmup_triton()
    loaded.enable_trainable_mode()
    loaded.disable_trainable_mode()
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-2)


def test_adapters_under_their_old_names(opt_folder, examples, tmp_path):
    """Its examples/peft: train on all linears, save, load to infer."""
    peft = pytest.importorskip("peft")
    from qcore.compat.auto_gptq.peft_utils import GPTQAdaLoraConfig, GPTQLoraConfig

    assert (GPTQLoraConfig, GPTQAdaLoraConfig) == (peft.LoraConfig, peft.AdaLoraConfig)
    model = AutoGPTQForCausalLM.from_pretrained(
        opt_folder, BaseQuantizeConfig(group_size=32), torch_dtype=torch.float32
    )
    model.quantize(examples)
    model.save_quantized(tmp_path / "out")
    peft_config = GPTQLoraConfig(r=4, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM", inference_mode=False)
    adapted = get_gptq_peft_model(model, peft_config=peft_config, auto_find_all_linears=True, train_mode=True)
    assert sum(hasattr(module, "lora_A") for module in adapted.modules()) == 12
    ids = torch.tensor([[5, 6, 7, 8]])
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        losses.append(adapted(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    adapted.save_pretrained(tmp_path / "adapter")
    model = AutoGPTQForCausalLM.from_quantized(tmp_path / "out", torch_dtype="float32")
    again = get_gptq_peft_model(model, model_id=str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, adapted(ids).logits, atol=1e-2)


def test_the_config_round_trips_and_reads_both_places(tmp_path, opt_folder, examples):
    config = BaseQuantizeConfig(bits=3, group_size=32, desc_act=False, damp_percent=0.02)
    config.save_pretrained(tmp_path)
    assert BaseQuantizeConfig.from_pretrained(tmp_path) == config
    model = AutoGPTQForCausalLM.from_pretrained(opt_folder, config)
    model.quantize(examples)
    model.save_quantized(tmp_path / "out")
    (tmp_path / "out" / "quantize_config.json").unlink(missing_ok=True)
    assert BaseQuantizeConfig.from_pretrained(tmp_path / "out").group_size == 32
    assert qcore.report(model.model)["params"]["damp_percent"] == 0.02
    with pytest.raises(qcore.CheckpointError, match="neither"):
        BaseQuantizeConfig.from_pretrained(opt_folder)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda f, e: AutoGPTQForCausalLM.from_pretrained(f, BaseQuantizeConfig(), use_tritn=True), "Did you mean 'use_triton'"),
        (lambda f, e: AutoGPTQForCausalLM.from_quantized(f, bits=3), "no option 'bits'"),
        (lambda f, e: AutoGPTQForCausalLM.from_quantized(), "needs model_name_or_path"),
        (lambda f, e: AutoGPTQForCausalLM.from_quantized(f, torch_dtype="flaot16"), "torch_dtype='flaot16': expected"),
        (lambda f, e: get_gptq_peft_model(None, train_mode=True), "needs a peft_config"),
        (lambda f, e: get_gptq_peft_model(None), "needs model_id"),
        (lambda f, e: AutoGPTQForCausalLM.from_pretrained(f, BaseQuantizeConfig()).quantize([{"ids": [1, 2]}]), "only input_ids"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_said_so(opt_folder, examples, call, says):
    with pytest.raises(ConfigError, match=says):
        call(opt_folder, examples)
