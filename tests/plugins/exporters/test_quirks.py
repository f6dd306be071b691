"""Folders as other programs write them, quirks included, made here by loops over words and not by qcore: they load and answer as the weights do.

Each fixture packs the linears of a tiny Llama the way a program does (AutoGPTQ, GPTQModel, auto-round, AutoAWQ, llm-compressor), writes the config
that it writes, and is loaded by `qcore.load`; the logits must be those of the same weights multiplied out.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qcore
from qcore import QuantConfig
from qcore.testing import random_weight

WORD = 32


def shifted(columns, bits, dtype=np.int64):
    """[n, k] values -> [n*bits/32, k] words: each `bits` wide, the first lowest, sums as a program ORs them."""
    fields = columns.reshape(-1, WORD // bits, columns.shape[1]).astype(dtype)
    words = np.zeros((len(fields), columns.shape[1]), dtype)
    for slot in range(WORD // bits):
        words |= fields[:, slot] << dtype(bits * slot)
    return words


def int32(words):
    return torch.from_numpy((words & 0xFFFFFFFF).astype(np.uint32).view(np.int32).copy())


def auto_gptq(name, weight, v2=False):
    """AutoGPTQ's loop: zeros minus one as unsigned 32-bit numbers, shifted and ORed."""
    codes, zeros = weight.codes.numpy().T, weight.zeros.numpy().T.astype(np.int64) - (0 if v2 else 1)
    assert zeros.min() >= 0
    return {
        f"{name}.qweight": int32(shifted(codes, weight.bits)),
        f"{name}.qzeros": int32(shifted(zeros.T, weight.bits).T),
        f"{name}.scales": weight.scales.t().contiguous(),
        f"{name}.g_idx": weight.g_idx.clone(),
    }


def gptqmodel_v1(name, weight):
    """GPTQModel's way to v1: the packed true zeros minus a one in each field, as one number, borrows running through the word."""
    tensors = auto_gptq(name, weight, v2=True)
    ones = sum(1 << shift for shift in range(0, WORD, weight.bits))
    words = tensors[f"{name}.qzeros"].numpy().view(np.uint32).astype(np.int64) - ones
    return {**tensors, f"{name}.qzeros": int32(words)}


def auto_round(name, weight):
    """auto-round's `auto_round:auto_gptq`: AutoGPTQ's tensors without g_idx."""
    return {key: tensor for key, tensor in auto_gptq(name, weight).items() if not key.endswith("g_idx")}


def auto_awq(name, weight):
    """AutoAWQ's loop over eight outputs in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(columns):  # [k, n] -> [k, n/8]
        words = np.zeros((columns.shape[0], columns.shape[1] // 8), np.int64)
        for slot, place in enumerate(order):
            words |= columns[:, place::8].astype(np.int64) << (4 * slot)
        return int32(words)

    return {
        f"{name}.qweight": packed(weight.codes.numpy().T),
        f"{name}.qzeros": packed(weight.zeros.numpy().T),
        f"{name}.scales": weight.scales.t().contiguous(),
    }


def llm_compressor(name, weight):
    """compressed-tensors' pack-quantized: signed values plus 2^(b-1), along the inputs; zero points along the outputs."""
    middle = 2 ** (weight.bits - 1)
    signed, zeros = weight.codes.numpy().astype(np.int64) - middle, weight.zeros.numpy().astype(np.int64) - middle
    tensors = {
        f"{name}.weight_packed": int32(shifted((signed + middle).T, weight.bits).T),
        f"{name}.weight_scale": weight.scales,
        f"{name}.weight_shape": torch.tensor(weight.codes.shape),
    }
    return (
        tensors if weight.sym else {**tensors, f"{name}.weight_zero_point": int32(shifted(zeros + middle, weight.bits))}
    )


class Foreign:
    """A folder that another program made of the tiny Llama: `weights` are its linears as they are meant, `folder` what stands on disk."""

    def __init__(self, source, folder):
        self.source, self.folder, self.weights = source, folder, {}
        shutil.copytree(source, folder)
        self.tensors = load_file(folder / "model.safetensors")
        self.linears = [key.removesuffix(".weight") for key in self.tensors if "proj" in key]

    def put(self, pack, grid, names=".*", change=None, bias=False, act_order=False):
        """Quantize the linears whose names match; `change` alters the weight that is meant before it is packed."""
        for number, name in enumerate(self.linears):
            if not re.search(names, name) or name in self.weights:
                continue
            out, columns = self.tensors[f"{name}.weight"].shape
            weight = random_weight(out, columns, grid, act_order, bias, number)
            self.weights[name] = weight = change(weight) if change else weight
            del self.tensors[f"{name}.weight"]
            self.tensors |= {key: tensor.contiguous() for key, tensor in pack(name, weight).items()}
            if bias:
                self.tensors[f"{name}.bias"] = weight.bias
        return self

    def write(self, quantization, side=None, changed=()):
        """Save it: the config under quantization_config, or only in a side file."""
        save_file(self.tensors, self.folder / "model.safetensors", {"format": "pt"})
        config = json.loads((self.folder / "config.json").read_text()) | dict(changed)
        if side is None:
            config["quantization_config"] = quantization
        else:
            (self.folder / side).write_text(json.dumps(quantization))
        (self.folder / "config.json").write_text(json.dumps(config))
        return self

    def check(self, tokens):
        """qcore's logits are those of the weights multiplied out; every weight comes back as it was meant."""
        _, content = qcore.content.open_content(self.folder)
        assert set(content.layers) == set(self.weights)
        for name, weight in self.weights.items():
            assert weight.difference(content.weight(name)) is None, name
        config = json.loads((self.folder / "config.json").read_text())
        config.pop("quantization_config", None)
        dense = self.folder.with_name("dense")
        shutil.copytree(self.source, dense)
        (dense / "config.json").write_text(json.dumps(config))
        meant = load_file(self.source / "model.safetensors")
        meant |= {f"{name}.weight": weight.dequantize() for name, weight in self.weights.items()}
        meant |= {
            f"{name}.bias": weight.bias.float() for name, weight in self.weights.items() if weight.bias is not None
        }
        save_file(meant, dense / "model.safetensors", {"format": "pt"})
        ids = tokens[0][None]
        model = qcore.load(self.folder, backend="torch_reference", dtype=torch.float32)
        with torch.no_grad():
            expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)(ids).logits
            found = model(ids).logits
        assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.fixture
def foreign(llama_folder, tmp_path):
    return Foreign(llama_folder, tmp_path / "foreign")


GPTQ = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True,
        "true_sequential": True, "quant_method": "gptq"}  # fmt: skip
SYM, ASYM = QuantConfig(bits=4, group_size=32), QuantConfig(bits=4, group_size=32, sym=False)


def zeros_of(value, where=(3, 1)):
    def change(weight):
        weight.zeros[where] = value
        return weight

    return change


def scales_as(dtype=torch.float16, sign=1):
    def change(weight):
        return qcore.QuantizedWeight(
            weight.codes, (weight.scales * sign).to(dtype), weight.zeros, weight.g_idx, weight.config
        )

    return change


@pytest.mark.parametrize("side", [None, "quantize_config.json"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_auto_gptq_v1_with_and_without_its_side_file(foreign, tokens, side, bits, sym):
    grid = QuantConfig(bits=bits, group_size=32, sym=sym)
    foreign.put(auto_gptq, grid).write({**GPTQ, "bits": bits, "sym": sym}, side).check(tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_gptq_wrote_scales_in_the_dtype_of_the_layer(foreign, tokens, dtype):
    foreign.put(auto_gptq, SYM, change=scales_as(dtype)).write(GPTQ).check(tokens)


@pytest.mark.parametrize("label", [True, False])
def test_gptq_with_desc_act_has_groups_out_of_order_whatever_the_label(foreign, tokens, label):
    foreign.put(auto_gptq, ASYM, act_order=True).write({**GPTQ, "sym": False, "desc_act": label}).check(tokens)


def test_gptq_with_desc_act_and_static_groups_has_groups_in_order(foreign, tokens):
    foreign.put(auto_gptq, SYM).write({**GPTQ, "desc_act": True, "static_groups": True}).check(tokens)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_biases_of_quantized_linears(foreign, tokens, method):
    pack, grid = {"gptq": (auto_gptq, SYM), "awq": (auto_awq, ASYM)}[method]
    config = (
        GPTQ
        if method == "gptq"
        else {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    )
    changed = {"attention_bias": True, "mlp_bias": True}
    foreign.put(pack, grid, bias=True).write(config, changed=changed.items()).check(tokens)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptqmodel_v1_with_zero_points_of_zero_whose_borrows_run_through_the_word(foreign, tokens, bits):
    config = {
        **GPTQ,
        "bits": bits,
        "sym": False,
        "checkpoint_format": "gptq",
        "meta": {"quantizer": ["gptqmodel:7.6.0"]},
    }
    grid = QuantConfig(bits=bits, group_size=32, sym=False)
    foreign.put(gptqmodel_v1, grid, change=zeros_of(0)).write(config).check(tokens)


def test_gptqmodel_v2_keeps_true_zero_points(foreign, tokens):
    config = {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2", "format": "gptq_v2"}
    foreign.put(lambda name, weight: auto_gptq(name, weight, v2=True), ASYM, change=zeros_of(0)).write(config).check(
        tokens
    )


def test_gptqmodel_dynamic_gives_some_linears_other_bits_and_leaves_some_in_float(foreign, tokens):
    rules = {
        "-:.*layers\\.0\\..*v_proj": {},
        "+:.*down_proj": {"bits": 8, "group_size": -1},
        ".*layers\\.1\\..*down_proj": {"bits": 2},  # comes too late: the first rule that matches counts
        ".*o_proj": {"group_size": 64},  # without a mark it is a positive rule
    }
    foreign.put(auto_gptq, QuantConfig(bits=8, group_size=-1), "down_proj").put(
        auto_gptq, QuantConfig(bits=4, group_size=64), "o_proj"
    )
    foreign.put(auto_gptq, SYM, r"^(?!.*layers\.0\..*v_proj)").write({**GPTQ, "dynamic": rules}).check(tokens)


def test_auto_round_writes_negative_scales_and_no_g_idx(foreign, tokens):
    config = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32, "sym": True,
              "data_type": "int", "block_name_to_quantize": "model.layers", "autoround_version": "0.16.1"}  # fmt: skip
    foreign.put(auto_round, SYM, change=scales_as(sign=-1)).write(config).check(tokens)


@pytest.mark.parametrize("key", ["model.layers.{}.self_attn.v_proj", r"model\.layers\.\d+\.self_attn\.v_proj"])
def test_auto_round_extra_config_by_name_and_by_pattern(foreign, tokens, key):
    extra = {key.format(number): {"bits": 16, "data_type": "float"} for number in range(foreign_blocks(foreign))}
    extra |= {name: {"bits": 8} for name in foreign.linears if "down_proj" in name}
    config = {"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2", "bits": 4, "group_size": 32, "sym": True,
              "data_type": "int", "extra_config": extra}  # fmt: skip
    foreign.put(auto_round, QuantConfig(bits=8, group_size=32), "down_proj").put(
        auto_round, SYM, "^(?!.*v_proj)"
    ).write(config).check(tokens)


def foreign_blocks(foreign):
    return len({name.split(".")[2] for name in foreign.linears})


@pytest.mark.parametrize("side", [None, "quant_config.json"])
def test_auto_awq_with_modules_to_not_convert(foreign, tokens, side):
    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["v_proj"],
    }
    if side:
        config = {
            "zero_point": True,
            "q_group_size": 32,
            "w_bit": 4,
            "version": "GEMM",
            "modules_to_not_convert": ["v_proj"],
        }
    foreign.put(auto_awq, ASYM, "^(?!.*v_proj)", change=zeros_of(0)).write(config, side).check(tokens)


def test_auto_awq_symmetric_is_said_by_zero_point(foreign, tokens):
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False, "version": "gemm"}
    foreign.put(auto_awq, SYM).write(config).check(tokens)


def test_llm_compressor_groups_by_pattern_and_ignores_by_pattern(foreign, tokens):
    def group(targets, grid):
        weights = {"num_bits": grid.bits, "type": "int", "symmetric": grid.sym, "dynamic": False, "actorder": None}
        weights |= (
            {"strategy": "channel", "group_size": None}
            if grid.group_size == -1
            else {"strategy": "group", "group_size": grid.group_size}
        )
        return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}

    whole = QuantConfig(bits=8, group_size=-1)
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
              "ignore": ["lm_head", "re:.*layers\\.0\\.self_attn.*"],
              "config_groups": {"group_0": group(["re:.*mlp\\.down_proj$"], whole), "group_1": group(["Linear"], ASYM)}}  # fmt: skip
    foreign.put(llm_compressor, whole, "down_proj").put(
        llm_compressor, ASYM, r"^(?!.*layers\.0\.self_attn)", change=zeros_of(0)
    )
    foreign.write(config).check(tokens)
