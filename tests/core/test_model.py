import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qcore
from qcore import CheckpointError, ModelError, ModelFolder
from qcore.model import compute_dtype, load_float, load_tokenizer, skeleton, stored_dtype
from qcore.streaming import FolderWeights, ModuleWeights, match_keys
from qcore.testing import tiny_tokenizer, tiny_transformer

CPU = torch.device("cpu")
GPT2 = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}


def edit_weights(folder, change):
    """Rewrite a folder's one weight file: change(tensors) alters the dict in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.fixture
def model_copy(llama_folder, tmp_path):
    return shutil.copytree(llama_folder, tmp_path / "model")


@pytest.fixture(scope="module")
def gpt2_base(tmp_path_factory):
    """A GPT-2 saved without its head: names lack the prefix "transformer."."""
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_transformer("gpt2", **GPT2).transformer.save_pretrained(folder)
    return edit_config(folder, architectures=["GPT2LMHeadModel"])


def test_a_skeleton_takes_no_memory_and_its_weights_come_and_go(llama_folder):
    folder = ModelFolder(llama_folder)
    model = skeleton(folder)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.model.rotary_emb.inv_freq.is_meta
    weights = FolderWeights(model, folder)
    weights.bring("model.layers.1", CPU, torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(name), folder.tensor(name))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    weights.let_go("model.layers.1")
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("late", [False, True])
def test_weights_sent_ahead_are_those_that_are_brought(llama_folder, late):
    folder, gpu = ModelFolder(llama_folder), torch.device("cuda")
    model = skeleton(folder)
    weights = FolderWeights(model, folder)
    weights.expect("model.layers.1", gpu)
    if not late:
        weights._ahead["model.layers.1"].result()
    weights.send("model.layers.1", gpu)
    weights.bring("model.layers.1", gpu, torch.float16)
    for name, parameter in model.model.layers[1].named_parameters():
        assert torch.equal(parameter.cpu(), folder.tensor(f"model.layers.1.{name}").half())


def test_building_a_skeleton_leaves_the_random_state_alone(llama_folder):
    before = torch.get_rng_state()
    skeleton(ModelFolder(llama_folder))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_dtype_of_most_weights_is_the_models(save_llama, tmp_path):
    folder = save_llama(tmp_path / "half", torch.bfloat16)
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()}))
    assert stored_dtype(ModelFolder(folder)) == torch.bfloat16
    assert compute_dtype(torch.bfloat16, CPU) == torch.float32
    assert compute_dtype(torch.float64, CPU) == torch.float64
    assert compute_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_named(model_copy, tmp_path, tokens, value, name):
    edit_weights(model_copy, lambda tensors: tensors[name].view(-1).__setitem__(5, value))
    with pytest.raises(ModelError, match=f"{name} holds 1 values that are NaN or Inf"):
        qcore.quantize(model_copy, "gptq", group_size=32, calibration=tokens, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_named_in_memory_too(llama, tokens):
    llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.weight holds 1 values"):
        qcore.quantize(llama, "rtn", group_size=32)


def test_weights_too_large_for_a_scale_are_named(llama):
    llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e30
    with pytest.raises(ModelError, match=r"model\.layers\.1.*scale of"):
        qcore.quantize(llama, "rtn", group_size=32)


def test_a_tensor_of_another_shape_than_the_config_s_is_named(model_copy, tmp_path):
    edit_weights(model_copy, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    with pytest.raises(CheckpointError) as error:
        qcore.quantize(model_copy, "rtn", output=tmp_path / "out")
    assert "tensor model.norm.weight has shape [65], the model's config asks for [64]" in str(error.value)
    assert list(tmp_path.iterdir()) == [model_copy]


def test_missing_tensors_are_named(model_copy, tmp_path):
    edit_weights(model_copy, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"no tensor for 1 parameters of LlamaForCausalLM: model.layers.2.mlp.up_proj"):
        qcore.quantize(model_copy, "rtn", output=tmp_path / "out")


def test_a_folder_without_float_weights_is_refused(model_copy):
    save_file({"a": torch.zeros(2, dtype=torch.int32)}, model_copy / "model.safetensors")
    with pytest.raises(ModelError, match="holds no floating point weights"):
        qcore.quantize(model_copy, "rtn")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "no_such_model"}, "transformers cannot open"),
        ({"hidden_size": "wide"}, "transformers cannot open"),
        ({"hidden_size": 63}, ""),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 10**15}, ""),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, ""),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "needs Python code from its own repository"),
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
def test_a_config_that_cannot_be_meant_is_refused(model_copy, tmp_path, changes, says, streamed):
    edit_config(model_copy, **changes)
    with pytest.raises(qcore.QcoreError) as error:
        qcore.quantize(model_copy, "rtn", output=tmp_path / "out" if streamed else None)
    assert says in str(error.value)
    assert list(tmp_path.iterdir()) == [model_copy]


def test_an_encoder_decoder_model_is_refused(tmp_path):
    config = {"vocab_size": 32, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32,
              "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    from transformers import BartConfig, BartForConditionalGeneration

    BartForConditionalGeneration(BartConfig(**config)).save_pretrained(tmp_path / "bart")
    with pytest.raises(ModelError, match="encoder-decoder"):
        qcore.quantize(tmp_path / "bart", "rtn", output=tmp_path / "out")


def test_keys_of_a_base_model_and_of_a_wrapper_are_understood():
    model = tiny_transformer("gpt2", **GPT2)
    names = [name for name in model.state_dict() if name != "lm_head.weight"]
    for keys in (names, [name.removeprefix("transformer.") for name in names]):
        matched = match_keys(model, keys)
        assert sorted(matched) == sorted(names)
        assert sorted(matched.values()) == sorted(keys)
    base = model.transformer
    assert match_keys(base, names) == {name.removeprefix("transformer."): name for name in names}


def test_a_tied_head_may_be_absent_and_another_parameter_may_not():
    model = tiny_transformer("gpt2", **GPT2)
    names = set(model.state_dict())
    match_keys(model, names - {"lm_head.weight"})
    with pytest.raises(ModelError, match=r"no tensor for 1 parameters of GPT2LMHeadModel: transformer.ln_f.weight"):
        match_keys(model, names - {"transformer.ln_f.weight"})
    assert "transformer.ln_f.weight" not in match_keys(model, names - {"transformer.ln_f.weight"}, partial=True)


def test_a_base_checkpoint_quantizes_from_folder_to_folder(gpt2_base, tmp_path, tokens):
    assert "h.0.attn.c_attn.weight" in ModelFolder(gpt2_base).tensors
    out = qcore.quantize(gpt2_base, "rtn", bits=8, group_size=32, output=tmp_path / "out")
    quantized, original = qcore.load(out), load_float(ModelFolder(gpt2_base))
    ids = tokens[0][None]
    expected = original(ids).logits
    # 8 bits round weights to within 0.4 % of a group's largest; 2 % of the logits' size bounds two blocks of it
    assert (quantized(ids).logits - expected).norm() < 0.02 * expected.norm()
    assert quantized.lm_head.weight is quantized.transformer.wte.weight
    assert not [name for name in ModelFolder(out).tensors if name.endswith("c_attn.weight") or name.startswith("h.")]


class Pair(nn.Module):
    """Two tied linears and one more, one of them in half precision."""

    def __init__(self):
        super().__init__()
        self.first, self.other = nn.Linear(4, 4).half(), nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.other.weight


def test_weights_in_memory_come_back_as_the_very_same_tensors():
    model = Pair()
    before = dict(model.named_parameters(remove_duplicate=False))
    weights = ModuleWeights(model)
    weights.bring("first", CPU, torch.float32)
    weights.bring("other", CPU, torch.float32)
    assert model.first.weight.dtype == torch.float32
    assert weights.dtype_of("first.weight") == torch.float16
    weights.let_go("first")
    weights.let_go("other")
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is before[name] for name in before)
    assert model.tied.weight is model.other.weight


def test_a_module_that_came_in_half_can_be_let_go():
    model = Pair()
    before = dict(model.named_parameters())
    model.first.bias.data[0] = float("inf")
    weights = ModuleWeights(model)
    with pytest.raises(ModelError, match=r"first.bias"):
        weights.bring("first", CPU, torch.float32)
    weights.let_go("first")
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_threads_that_open_models_at_once_leave_each_other_and_new_modules_alone(llama_folder):
    folder, register = ModelFolder(llama_folder), nn.Module.register_parameter
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda n: skeleton(folder) if n % 3 else load_float(folder), range(16)))
    assert nn.Module.register_parameter is register
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    for number, model in enumerate(models):
        assert model.model.rotary_emb.inv_freq.equal(models[0].model.rotary_emb.inv_freq)
        assert all(parameter.is_meta == bool(number % 3) for parameter in model.parameters())


def test_a_tokenizer_that_is_there_but_cannot_be_read_is_not_just_missing(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is not None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.warns(UserWarning, match=r"has tokenizer\.json, but no tokenizer can be made of it: .*double quotes"):
        assert load_tokenizer(tmp_path) is None


@pytest.mark.filterwarnings("error")
def test_a_folder_without_a_tokenizer_is_nothing_to_warn_of(tmp_path):
    assert load_tokenizer(tmp_path) is None
