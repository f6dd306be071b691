"""Adapters train on quantized models: each method on each architecture that peft supports it on."""

import warnings

import pytest
import torch

import qcore
from qcore import BackendError, ConfigError, ModelError, QuantLinear
from qcore.plugins import Plugins
from qcore.testing import tiny_language_model, tiny_tokenizer, tiny_transformer

peft = pytest.importorskip("peft")
from qcore.compat.peft import TrainableLinear, get_peft_model, load_peft_model, prepare  # noqa: E402

RATES = {"lora": 2e-2, "adalora": 0.2, "adaption_prompt": 0.2}
COMMON = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
NEW = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
MODELS = {
    "llama": {**NEW, "num_key_value_heads": 1},
    "mistral": {**NEW, "num_key_value_heads": 1},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 32,
            "max_position_embeddings": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "gpt2": OLD,
    "gpt_neox": NEW,
    "gptj": {**OLD, "rotary_dim": 4},
    "gpt_bigcode": OLD,
    "codegen": {**OLD, "n_head": 4, "rotary_dim": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}  # fmt: skip
LORA = {"lora_alpha": 16, "task_type": "CAUSAL_LM"}
METHODS = {
    "lora": lambda **more: peft.LoraConfig(r=4, **LORA, **more),
    "adalora": lambda **more: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=12, tinit=2, tfinal=4, **LORA, **more
    ),
    "adaption_prompt": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
}
#: peft has no choice of target modules of its own for these
TARGETS = {"codegen": ["qkv_proj"], "gpt_bigcode": ["c_attn"], "gptj": ["q_proj", "v_proj"], "falcon": ["query_key_value"],
           "mistral": ["q_proj", "v_proj"], "gpt_neox": ["query_key_value"], "bloom": ["query_key_value", "dense_4h_to_h"],
           "gpt2": ["c_attn"], "opt": ["q_proj", "v_proj"], "llama": ["q_proj", "v_proj"]}  # fmt: skip
#: AdaptionPrompt of peft knows llama, mistral and gpt2
CASES = [(m, k) for m in MODELS for k in METHODS if k != "adaption_prompt" or m in ("llama", "mistral", "gpt2")]


def quantized(model_type):
    model = tiny_transformer(model_type, **COMMON, **MODELS[model_type])
    return qcore.quantize(model, "rtn", bits=4, group_size=16)


def config_for(model_type, method):
    return METHODS[method]() if method == "adaption_prompt" else METHODS[method](target_modules=TARGETS[model_type])


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 64, (2, 16), generator=torch.Generator().manual_seed(0))


def loss_of(model, ids):
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def train(model, ids, steps=12, rate=2e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for step in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if model.peft_type == peft.PeftType.ADALORA:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(("model_type", "method"), CASES)
def test_training_lowers_the_loss_and_survives_saving_and_disabling(model_type, method, ids, tmp_path):
    torch.manual_seed(0)
    base = quantized(model_type)
    plain, before = logits_of(base, ids), loss_of(base, ids)
    model = get_peft_model(base, config_for(model_type, method))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(("lora_" in name or "adaption_" in name) for name in trainable)
    train(model, ids, rate=RATES[method])
    after = loss_of(model, ids)
    assert after < before - 0.02
    with model.disable_adapter():
        assert torch.equal(logits_of(model, ids), plain)
    model.save_pretrained(tmp_path)
    again = load_peft_model(quantized(model_type), tmp_path)
    assert loss_of(again, ids) == pytest.approx(after, abs=1e-6)


def test_several_adapters_take_turns(ids):
    torch.manual_seed(0)
    base = quantized("llama")
    plain = loss_of(base, ids)
    model = get_peft_model(base, config_for("llama", "lora"), "first")
    train(model, ids)
    first = loss_of(model, ids)
    model.add_adapter("second", config_for("llama", "lora"))
    model.set_adapter("second")
    assert loss_of(model, ids) == pytest.approx(plain)  # an adapter starts by changing nothing
    other = torch.flip(ids, [1])
    train(model, other)
    second = loss_of(model, other)
    assert second < loss_of_with(model, "first", other)
    assert loss_of_with(model, "first", ids) == pytest.approx(first)
    assert model.active_adapter == "first"


def loss_of_with(model, adapter, ids):
    model.set_adapter(adapter)
    return loss_of(model, ids)


def test_gradients_are_those_of_the_dequantized_model(ids):
    torch.manual_seed(0)
    base = quantized("llama")
    exact = tiny_transformer("llama", **COMMON, **MODELS["llama"])
    for name, module in base.named_modules():
        if isinstance(module, QuantLinear):
            exact.get_submodule(name).weight.data = module.weight_source().dequantize()
    models = []
    for model, wrap in ((base, get_peft_model), (exact, peft.get_peft_model)):
        torch.manual_seed(1)
        models.append(wrap(model, METHODS["lora"](target_modules=["q_proj", "down_proj"], init_lora_weights=False)))
        models[-1](input_ids=ids, labels=ids).loss.backward()
    found, expected = ({n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in models)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_gives_the_same_gradients(ids, dtype):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = qcore.quantize(tiny_transformer("llama", **COMMON, **MODELS["llama"]).to(dtype), "rtn", group_size=16)
        model = get_peft_model(prepare(base, checkpointing), METHODS["lora"](target_modules=["q_proj"])).train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_trained_adapter_merges_into_the_float_weights_and_these_are_quantized_again(ids, tmp_path):
    torch.manual_seed(0)
    float_model = tiny_transformer("llama", **COMMON, **MODELS["llama"])
    before = loss_of(float_model, ids)
    model = train(get_peft_model(quantized("llama"), config_for("llama", "lora")), ids)
    model.save_pretrained(tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(float_model, tmp_path / "adapter").merge_and_unload()
    quantized_again = qcore.quantize(merged, "rtn", bits=8, group_size=16)
    assert loss_of(quantized_again, ids) < before - 0.02
    qcore.save(quantized_again, tmp_path / "out")
    assert loss_of(qcore.load(tmp_path / "out"), ids) == pytest.approx(loss_of(quantized_again, ids), abs=1e-3)


def test_a_prepared_model_stays_what_it_was(ids, tmp_path, weights_of):
    model = quantized("llama")
    before, weights = logits_of(model, ids), weights_of(model)
    assert prepare(prepare(model)) is model
    assert all(type(m) is TrainableLinear for m in model.modules() if isinstance(m, QuantLinear))
    assert torch.equal(logits_of(model, ids), before)
    moved = model.to("cpu")
    assert torch.equal(logits_of(moved, ids), before)
    unloaded = get_peft_model(model, config_for("llama", "lora")).unload()
    qcore.save(unloaded, tmp_path / "out")
    again = weights_of(qcore.load(tmp_path / "out"))
    assert again.keys() == weights.keys()
    assert all(weights[name].equal(again[name]) for name in weights)


def test_other_methods_that_adapt_linears_work_too(ids):
    torch.manual_seed(0)
    base = quantized("llama")
    before = loss_of(base, ids)
    config = peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    )
    assert loss_of(train(get_peft_model(base, config), ids, rate=0.2), ids) < before - 0.02


def test_merging_into_quantized_weights_is_refused(ids):
    model = get_peft_model(quantized("llama"), config_for("llama", "lora"))
    with pytest.raises(ModelError, match="merge it into the float model and quantize that"):
        model.merge_and_unload()
    with pytest.raises(ModelError, match="PiSSA"):
        get_peft_model(quantized("llama"), METHODS["lora"](target_modules=["q_proj"], init_lora_weights="pissa"))


def test_an_unknown_target_module_is_named_with_what_there_is():
    with pytest.raises(ConfigError, match=r"no module is called 'q_porj'. Did you mean 'q_proj'"):
        get_peft_model(quantized("llama"), METHODS["lora"](target_modules=["q_porj", "v_proj"]))


def test_a_float_model_needs_no_preparing():
    with pytest.raises(ModelError, match="no quantized linears"):
        prepare(tiny_language_model())


def test_a_backend_without_a_gradient_is_refused():
    reference = type(Plugins().get("backend", "torch_reference"))

    class Graphless(reference):
        name, rank = "graphless", 1000

        def matmul(self, x, buffers, spec):
            return super().matmul(x.detach(), buffers, spec)

    plugins = Plugins()
    plugins.all[0].offers.append(("backend", "graphless", Graphless()))
    model = qcore.quantize(tiny_language_model(), "rtn", group_size=16, plugins=plugins)
    with pytest.raises(BackendError, match=r"backend 'graphless' has no gradient.*backend='torch_reference'"):
        prepare(model)


def test_peft_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(qcore.PluginError, match=r"pip install 'qcore\[peft\]'"):
        get_peft_model(quantized("llama"), None)


def test_training_generates_no_warning_of_ours(ids):
    tokenizer = tiny_tokenizer()
    model = qcore.quantize(tiny_language_model(), "rtn", group_size=16)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted = get_peft_model(model, METHODS["lora"](target_modules=["q_proj"]))
        prompt = tokenizer("The", return_tensors="pt")
        assert adapted.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    assert not [each for each in told if "qcore" in str(each.filename)]
