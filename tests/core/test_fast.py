"""Fast generation: the same tokens as transformers' own loop, on the CPU, where a step is recorded, compiled or runs as it is."""

import pytest
import torch
import zoo
from torch import nn

import qcore
from qcore import BackendError, ModelError, QuantLinear, fast
from qcore.plugins import Plugins
from qcore.tools.bench import FloatBackend

LEFT_PADDED = torch.tensor([[2, 3, 4, 5, 6, 7], [0, 0, 8, 9, 10, 11]])
MASK = (LEFT_PADDED > 0).long()


@pytest.fixture(autouse=True)
def told_anew():
    fast._tell.cache_clear()


def generate(model, **settings):
    torch.manual_seed(0)
    chosen = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, **settings}
    return model.generate(LEFT_PADDED, attention_mask=MASK, **chosen)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "several returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon/rw", "phi", "qwen3", "mixtral"])
def test_it_gives_the_tokens_of_transformers_own_loop(name):
    model = zoo.build(name)
    expected = {way: generate(model, **settings) for way, settings in WAYS.items()}
    fast.accelerate(model, compiled=False)
    for way, settings in WAYS.items():
        assert torch.equal(generate(model, **settings), expected[way]), way


def test_a_step_is_kept_for_calls_that_fit_it():
    model = zoo.build("llama")
    expected = [generate(model, max_new_tokens=tokens) for tokens in (12, 5)]
    fast.accelerate(model, compiled=False)
    steps = model.generate.args[1]
    assert torch.equal(generate(model), expected[0])
    first = steps._step
    assert torch.equal(generate(model, max_new_tokens=5), expected[1])
    assert steps._step is first
    generate(model, num_beams=2, max_new_tokens=2)  # other rows
    assert steps._step is not first


@pytest.mark.slow  # a C++ compiler runs
def test_a_compiled_step_gives_them_too():
    model = zoo.build("llama", num_hidden_layers=1)
    expected = generate(model)
    fast.accelerate(model, compiled=True)
    assert torch.equal(generate(model), expected)
    step = model.generate.args[1]._step
    assert step._run != step._eager


def test_a_step_that_does_not_compile_runs_as_it_is_and_says_so(monkeypatch, caplog):
    def failing(run, **options):
        def call():
            raise RuntimeError("no compiler\nmore")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    model = zoo.build("llama")
    expected = generate(model)
    fast.accelerate(model, compiled=True)
    assert torch.equal(generate(model), expected)
    assert "torch.compile failed" in caplog.text
    assert "(no compiler)" in caplog.text


def test_it_ends_where_all_sequences_have_ended_and_pads_those_that_ended_before():
    model = zoo.build("llama")
    plain = generate(model, max_new_tokens=30)
    ends = [int(plain[0, 9]), int(plain[1, 14])]
    expected = generate(model, max_new_tokens=30, eos_token_id=ends)
    fast.accelerate(model, compiled=False)
    found = generate(model, max_new_tokens=30, eos_token_id=ends)
    assert expected.shape[1] < 36
    assert torch.equal(found, expected)


class Streamer:
    def __init__(self):
        self.given, self.ended = [], False

    def put(self, value):
        self.given.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_prompt_and_each_token_as_it_is_made():
    model = fast.accelerate(zoo.build("llama"), compiled=False)
    streamer, prompt = Streamer(), LEFT_PADDED[:1]
    end = int(model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, -1])
    output = model.generate(
        prompt, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=end, streamer=streamer
    )
    assert streamer.ended
    assert streamer.given[0] == prompt[0].tolist()
    assert [token for given in streamer.given[1:] for token in given] == output[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"return_dict_in_generate": True, "output_scores": True}, "more than tokens"),
        ({"use_cache": False}, "without a cache"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens= is given"),
    ],
)
def test_what_a_step_cannot_do_transformers_does_and_the_reason_is_logged_once(settings, reason, caplog):
    model = zoo.build("llama")
    prompt = LEFT_PADDED[:1]

    def run():
        found = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, **settings)
        return found if isinstance(found, torch.Tensor) else found.sequences

    expected = run()
    fast.accelerate(model, compiled=False)
    assert torch.equal(run(), expected)
    assert torch.equal(run(), expected)
    assert [reason in record.message for record in caplog.records if record.name == "qcore.fast"] == [True]


@pytest.mark.parametrize("name", ["gemma3_text", "mistral", "gpt_oss", "llama4_text"])
def test_windows_are_kept_within_them_and_beyond(name):
    model = zoo.build(name)
    settings = [{}, {"max_new_tokens": 2}, {"max_new_tokens": 24}, {"num_beams": 2}]
    expected = [generate(model, **each) for each in settings]
    fast.accelerate(model, compiled=False)
    for each, tokens in zip(settings, expected, strict=True):
        assert torch.equal(generate(model, **each), tokens), each


def test_large_float_weights_are_multiplied_by_a_backend_until_they_change(monkeypatch):
    class Halving(FloatBackend):
        def float_product(self, weight):
            asked.append(weight.shape)
            return lambda x: calls.append(x.shape) or nn.functional.linear(x, weight)

    asked, calls = [], []
    monkeypatch.setattr(fast, "LARGE", 320 * 64)
    model = zoo.build("llama")
    expected = generate(model)
    plugins = Plugins([])
    monkeypatch.setattr(plugins, "usable", lambda kind: {"halving": Halving(torch.float32)})
    fast.accelerate(model, plugins=plugins)
    assert torch.equal(generate(model), expected)
    assert set(asked) == {(320, 64)}
    assert calls
    head, x = model.lm_head, torch.randn(1, 64)
    calls.clear()
    head(torch.randn(fast.FEW + 1, 64))  # many tokens
    head(x.requires_grad_())
    assert not calls
    with torch.no_grad():
        head(x)
        assert len(calls) == 1
        head.weight.mul_(2)
        assert torch.equal(head(x), nn.functional.linear(x, head.weight))
    assert len(calls) == 1


def test_a_cache_of_another_kind_is_left_to_transformers(caplog):
    model = zoo.build("lfm2")
    expected = generate(model)
    fast.accelerate(model, compiled=False)
    assert torch.equal(generate(model), expected)
    assert "cache layers of another kind (LinearAttentionLayer" in caplog.text


def test_a_step_whose_code_looks_at_values_runs_as_it_is_and_says_so(caplog):
    model = zoo.build("xglm")
    expected = generate(model)
    fast.accelerate(model)
    assert torch.equal(generate(model), expected)
    assert "the step runs as it is, as its code calls aten._local_scalar_dense.default" in caplog.text


def test_a_model_without_a_static_cache_is_refused():
    with pytest.raises(ModelError, match=r"GPTNeoForCausalLM cannot generate fast: .* Load it without fast=True"):
        fast.accelerate(zoo.build("gpt_neo"))


# ---- loading -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(save_llama, tmp_path_factory):
    """A llama whose q, k and v have biases, and one of whose gates has another grid than its up."""
    folder = tmp_path_factory.mktemp("fast")
    save_llama(folder / "float", attention_bias=True)
    model = qcore.quantize(
        folder / "float", "rtn", group_size=32, overrides=["layers.1.mlp.gate_proj:bits=8"], device="cpu"
    )
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.bias is not None:
            torch.nn.init.normal_(module.bias)
    return qcore.save(model, folder / "quantized")


def test_linears_of_one_input_become_one_product_with_the_same_results(quantized):
    plain, together = qcore.load(quantized, device="cpu"), qcore.load(quantized, device="cpu", fast=True)
    attention, mlp = together.model.layers[1].self_attn, together.model.layers[1].mlp
    assert attention.q_proj.backend.product is attention.k_proj.backend.product is attention.v_proj.backend.product
    assert mlp.gate_proj.backend is plain.model.layers[1].mlp.gate_proj.backend  # its grid is another
    ids = LEFT_PADDED[:1]
    torch.testing.assert_close(together(ids).logits, plain(ids).logits)
    held, merged = (sum(b.numel() for b in model.buffers()) for model in (plain, together))
    assert merged <= held  # nothing is held twice


def test_parts_are_right_in_any_order_for_any_input_and_have_a_gradient(quantized):
    plain, together = qcore.load(quantized, device="cpu"), qcore.load(quantized, device="cpu", fast=True)
    parts, wholes = together.model.layers[0].self_attn, plain.model.layers[0].self_attn
    x, z = torch.randn(3, 64), torch.randn(2, 5, 64)
    calls = [("v_proj", x), ("q_proj", x), ("q_proj", x), ("k_proj", z), ("k_proj", x), ("v_proj", z), ("q_proj", z)]
    for name, value in calls:
        torch.testing.assert_close(getattr(parts, name)(value), getattr(wholes, name)(value))
    parts.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(parts.k_proj(x), wholes.k_proj(x))
    x.requires_grad_()
    grads = [
        torch.autograd.grad(sum((i + 1) * getattr(each, f"{n}_proj")(x).sum() for i, n in enumerate("qkv")), x)[0]
        for each in (parts, wholes)
    ]
    torch.testing.assert_close(*grads)


def test_a_fast_model_is_saved_as_its_separate_linears(quantized, tmp_path):
    again = qcore.save(qcore.load(quantized, device="cpu", fast=True), tmp_path / "again")
    plain = qcore.save(qcore.load(quantized, device="cpu"), tmp_path / "plain")
    for file in plain.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_environment_says_what_auto_means(quantized, monkeypatch):
    monkeypatch.setenv("QCORE_BACKEND", "torch_reference")
    model = qcore.load(quantized, device="cpu")
    assert model.model.layers[0].mlp.up_proj.backend.name == "torch_reference"
    monkeypatch.setenv("QCORE_BACKEND", "cuda")
    with pytest.raises(BackendError, match="cuda: "):
        qcore.load(quantized, device="cpu")
    assert qcore.load(quantized, device="cpu", backend="torch_reference") is not None
