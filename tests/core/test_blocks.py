import types

import pytest
import torch
from torch import nn

import qcore
from qcore import ModelAdapter, ModelError, QuantConfig, RunError
from qcore import blocks as walk
from qcore.capture import Stream, capture_inputs
from qcore.plan import plan_linears
from qcore.streaming import ModuleWeights
from qcore.testing import TinyBlock, TinyModel, random_weight, tiny_tokens, tiny_transformer

CPU = torch.device("cpu")


def captured_of(model, batches, blocks="blocks", before=("embed",)):
    adapter = ModelAdapter("any", (), blocks, (), before)
    return capture_inputs(model, ModuleWeights(model), adapter, batches, CPU, torch.float32)


def batches_of(sequences, mask=None):
    return [(torch.stack(list(sequences)), mask)]


def first_block(model, captured, index=0):
    """Block `index` of a TinyModel as an algorithm sees it."""
    plan = plan_linears(model, TinyModel.adapter, QuantConfig(bits=4, group_size=32), [])
    module = model.blocks[index]
    stages = TinyModel.adapter.stages_in(module)
    return walk.Block(
        index,
        f"blocks.{index}",
        module,
        stages,
        plan,
        lambda name: torch.float32,
        captured,
        captured.kwargs[index] if captured else [],
        None,
        CPU,
        0,
    )


def quantized(block, names):
    """Random quantized weights for linears of a block."""
    shapes = {name: block.linears[name].weight.shape for name in names}
    return {name: random_weight(*shapes[name], QuantConfig(bits=4, group_size=32)) for name in names}


def test_the_captured_inputs_are_those_of_the_first_block():
    model = TinyModel()
    ids = torch.stack(tiny_tokens(3))
    captured = captured_of(model, [(ids[:2], None), (ids[2:], None)])
    assert torch.equal(torch.cat(captured.stream.hidden), model.embed(ids))
    assert captured.masks == [None, None]
    assert captured.kwargs == [[{"scale": 0.5}] * 2] * 2


def test_walking_the_blocks_gives_what_the_model_computes():
    model = TinyModel()
    captured = captured_of(model, batches_of(tiny_tokens(2)))
    for index in range(2):
        block = first_block(model, captured, index)
        block.advance(captured.stream)
    expected = model(torch.stack(tiny_tokens(2))).logits
    assert torch.equal(model.head(captured.stream.hidden[0]), expected)


@pytest.mark.parametrize(
    ("model_type", "blocks", "config"),
    [
        ("llama", "model.layers", {"num_key_value_heads": 2}),
        ("opt", "model.decoder.layers", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
        ("gpt2", "transformer.h", {}),
        ("gemma3_text", "model.layers", {"sliding_window": 8, "head_dim": 16, "num_key_value_heads": 2,
                                         "layer_types": ["sliding_attention", "full_attention"]}),
        ("qwen2", "model.layers", {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8,
                                   "max_window_layers": 1}),
    ],
)  # fmt: skip
def test_each_block_gets_what_its_model_passes_to_it(model_type, blocks, config):
    model = tiny_transformer(model_type, vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                             num_attention_heads=4, max_position_embeddings=64, **config)  # fmt: skip
    ids = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    captured = captured_of(model, [(ids, None)], blocks, ())
    hidden = captured.stream.hidden[0]
    wanted = {}
    modules = list(model.get_submodule(blocks))
    handles = [
        module.register_forward_hook(lambda m, a, k, out, i=i: wanted.__setitem__(i, out), with_kwargs=True)
        for i, module in enumerate(modules)
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        for index, module in enumerate(modules):
            output = module(hidden, **captured.kwargs[index][0])
            hidden = output[0] if isinstance(output, tuple) else output
            expected = wanted[index][0] if isinstance(wanted[index], tuple) else wanted[index]
            assert torch.equal(hidden, expected)


def test_batches_share_equal_masks_instead_of_holding_one_each(llama):
    ids = torch.randint(0, 320, (4, 16), generator=torch.Generator().manual_seed(0))
    captured = captured_of(llama, [(ids[:2], None), (ids[2:], None)], "model.layers", ())
    first, second = captured.kwargs[0]
    shared = [key for key, value in first.items() if isinstance(value, torch.Tensor)]
    assert all(first[key] is second[key] for key in shared)
    assert first["position_embeddings"][0] is second["position_embeddings"][0]


class Scaled(TinyModel):
    """Alters the hidden states between its blocks."""

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden) * 1.5
        return types.SimpleNamespace(logits=self.head(hidden))


class Skipping(TinyModel):
    """Leaves its last block out."""

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.blocks[0](self.embed(input_ids))
        return types.SimpleNamespace(logits=self.head(hidden))


@pytest.mark.parametrize("kind", [Scaled, Skipping])
def test_a_model_that_a_walk_cannot_follow_is_refused_and_left_usable(kind):
    model = kind()
    ids = torch.stack(tiny_tokens(2))
    before = model(ids).logits
    with pytest.raises(ModelError, match=f"{kind.__name__} does not hand hidden states from block to block unchanged"):
        qcore.quantize(model, "gptq", group_size=32, calibration=tiny_tokens(), adapter="generic")
    assert torch.equal(model(ids).logits, before)


class TupleBlock(TinyBlock):
    def forward(self, hidden_states, scale=1.0):
        return (super().forward(hidden_states, scale), "attention weights")


class Tuples(TinyModel):
    """Its blocks return tuples."""

    def __init__(self):
        super().__init__()
        for index, block in enumerate(self.blocks):
            self.blocks[index] = TupleBlock(64, 96)
            self.blocks[index].load_state_dict(block.state_dict())
        self.requires_grad_(False)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden, scale=0.5)[0]
        return types.SimpleNamespace(logits=self.head(hidden))


def test_blocks_that_return_tuples_quantize_like_those_that_do_not(weights_of):
    settings = {"group_size": 32, "calibration": tiny_tokens(), "adapter": "generic"}
    plain, tuples = (weights_of(qcore.quantize(kind(), "gptq", **settings)) for kind in (TinyModel, Tuples))
    assert all(plain[name].equal(tuples[name]) for name in plain)


def observed(block, names):
    seen = {name: [] for name in names}
    block.observe(names, lambda name, x: seen[name].append(x.clone()))
    return seen


def test_observing_shows_the_inputs_of_each_linear_as_tokens():
    model = TinyModel()
    ids = torch.stack(tiny_tokens(4))
    captured = captured_of(model, [(ids[:2], None), (ids[2:], None)])
    block = first_block(model, captured)
    seen = observed(block, ["blocks.0.left", "blocks.0.gate"])
    assert [tuple(x.shape) for x in seen["blocks.0.gate"]] == [(64, 64)] * 2
    x = nn.functional.layer_norm(model.embed(ids), (64,))
    assert torch.equal(torch.cat(seen["blocks.0.left"]), x.reshape(-1, 64))


def test_padding_never_reaches_an_observer():
    model = TinyModel()
    ids = torch.stack(tiny_tokens(2, length=8))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 5:] = False
    whole = observed(first_block(model, captured_of(model, [(ids, None)])), ["blocks.0.left", "blocks.0.down"])
    seen = observed(first_block(model, captured_of(model, [(ids, mask)])), ["blocks.0.left", "blocks.0.down"])
    for name in seen:
        assert len(seen[name][0]) == 13
        assert torch.equal(seen[name][0], whole[name][0][mask.flatten()])


def test_what_padding_holds_changes_nothing(weights_of):
    mask = [1] * 20 + [0] * 12

    def padded_with(token):
        return [{"input_ids": ids[:20].tolist() + [token] * 12, "attention_mask": mask} for ids in tiny_tokens()]

    one, other = (
        weights_of(qcore.quantize(TinyModel(), "gptq", group_size=32, calibration=padded_with(token)))
        for token in (0, 49)
    )
    assert all(one[name].equal(other[name]) for name in one)


def test_a_replaced_linear_acts_quantized_in_later_replays():
    model = TinyModel()
    captured = captured_of(model, batches_of(tiny_tokens(2)))
    block = first_block(model, captured)
    name = "blocks.0.left"
    before = observed(block, ["blocks.0.out"])["blocks.0.out"][0]
    weight = quantized(block, [name])[name]
    block.replace(name, weight)
    after = observed(block, ["blocks.0.out"])["blocks.0.out"][0]
    assert not torch.equal(before, after)
    assert torch.equal(model.blocks[0].left.weight, weight.dequantize())
    assert not torch.equal(block.linears[name].weight, weight.dequantize())  # the algorithm still sees the float one


def test_remembered_outputs_give_the_same_bits_as_computing_again():
    settings = {"groups": [["left", "right"], ["out"], ["gate", "up"], ["down"]]}
    streams = []
    for budget in (0, 2000, 10**9):  # nothing is kept, a few outputs are, all are
        model = TinyModel()
        captured = captured_of(model, [(ids[None], None) for ids in tiny_tokens(3)])
        block = first_block(model, captured)
        block.memo_bytes = budget
        seen = []
        for group in settings["groups"]:
            names = [f"blocks.0.{name}" for name in group]
            seen += [x for xs in observed(block, names[:1]).values() for x in xs]
            for name, weight in quantized(block, names).items():
                block.replace(name, weight)
        # a second look at an earlier group, and a second weight for it, must not find anything stale
        seen += observed(block, ["blocks.0.down"])["blocks.0.down"]
        block.replace("blocks.0.left", random_weight(64, 64, QuantConfig(bits=4, group_size=32), seed=9))
        seen += observed(block, ["blocks.0.down"])["blocks.0.down"]
        block.advance(captured.stream)
        streams.append([*seen, *captured.stream.hidden])
    for kept in streams[1:]:
        assert all(torch.equal(a, b) for a, b in zip(streams[0], kept, strict=True))
    assert not torch.equal(streams[0][-9], streams[0][-6])


def test_the_block_is_an_ordinary_module_again_afterwards():
    model = TinyModel()
    captured = captured_of(model, batches_of(tiny_tokens(2)))
    block = first_block(model, captured)
    block.replace("blocks.0.left", quantized(block, ["blocks.0.left"])["blocks.0.left"])
    observed(block, ["blocks.0.out"])
    block.advance(captured.stream)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks


def test_an_algorithm_that_asks_for_undeclared_data_is_told():
    block = first_block(TinyModel(), None)
    with pytest.raises(qcore.RunError, match="calibration data it did not declare"):
        block.observe(["blocks.0.left"], lambda name, x: None)
    block = first_block(TinyModel(), captured_of(TinyModel(), batches_of(tiny_tokens(1))))
    with pytest.raises(qcore.RunError, match="needs an algorithm with float_stream"):
        block.observe(["blocks.0.left"], lambda name, x, y: None, paired=True)


class Watching(qcore.Algorithm):
    """Rounds plainly and notes the quantized and the float inputs of what it quantizes."""

    name = "watching"
    float_stream = True

    def __init__(self):
        super().__init__()
        self.pairs = []

    def quantize_block(self, block):
        results = {}
        for group in block.groups:
            block.observe(group[:1], lambda name, x, x_float: self.pairs.append((name, x, x_float)), paired=True)
            for name in group:
                results[name] = random_weight(*block.linears[name].weight.shape, block.linears[name].config)
                block.replace(name, results[name])
        return results


def test_the_float_stream_is_that_of_the_original_model():
    original, algorithm = TinyModel(), Watching()
    qcore.quantize(TinyModel(), algorithm, group_size=32, calibration=tiny_tokens(1), adapter="generic")
    expected = {}
    for name, module in original.named_modules():
        module.register_forward_pre_hook(lambda m, args, name=name: expected.__setitem__(name, args[0]))
    original(tiny_tokens(1)[0][None])
    assert len(algorithm.pairs) == 8
    for name, x, x_float in algorithm.pairs:
        # one batch of the same tokens through the same weights; only the order of sums may differ
        assert torch.allclose(x_float, expected[name].reshape(x_float.shape), atol=1e-5)
        if name != "blocks.0.left":
            assert not torch.allclose(x, x_float, atol=1e-3)


def test_seeds_differ_from_block_to_block():
    model = TinyModel()
    captured = captured_of(model, batches_of(tiny_tokens(1)))
    assert first_block(model, captured, 0).seed != first_block(model, captured, 1).seed


def test_the_dtype_of_a_bias_is_the_models_own(weights_of):
    model = TinyModel()
    model.half()
    kept = {name: parameter.clone() for name, parameter in model.named_parameters() if name.endswith("bias")}
    found = weights_of(qcore.quantize(model, "rtn", group_size=32))
    for name, bias in kept.items():
        assert torch.equal(found[name.removesuffix(".bias")].bias, bias)
        assert bias.dtype == torch.float16


def with_float_stream(model, index=0):
    """A block of a TinyModel with both streams."""
    captured = captured_of(model, [(torch.stack(tiny_tokens(3)[:2]), None), (torch.stack(tiny_tokens(3)[2:]), None)])
    block = first_block(model, captured, index)
    block.float_inputs = Stream([hidden.clone() for hidden in captured.stream.hidden])
    return block


def test_a_forward_pass_takes_other_weights_and_gives_their_gradients():
    model = TinyModel()
    block = with_float_stream(model)
    hidden, kwargs, _ = block.batch(0)
    leaf = torch.zeros(64, 96, requires_grad=True)
    output = block.forward(hidden, kwargs, {"blocks.0.down": leaf})
    output.sum().backward()
    assert leaf.grad.abs().sum() > 0
    before = block.forward(hidden, kwargs)
    model.blocks[0].down.weight.data.zero_()
    assert torch.equal(block.forward(hidden, kwargs), output)
    assert not torch.equal(before, output)


def test_weights_given_are_out_by_in_for_conv1d_too():
    model = tiny_transformer("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=64)
    captured = captured_of(model, batches_of(tiny_tokens(2)), "transformer.h", ("transformer.wte", "transformer.wpe"))
    short = "mlp.c_fc"
    plan = {f"transformer.h.0.{short}": QuantConfig()}
    block = walk.Block(0, "transformer.h.0", model.transformer.h[0], [[(short,)]], plan, lambda name: torch.float32,
                            captured, captured.kwargs[0], None, CPU, 0)  # fmt: skip
    (linear,) = block.linears.values()
    assert tuple(linear.weight.shape) == (128, 32)
    hidden, kwargs, _ = block.batch(0)
    assert torch.allclose(
        block.forward(hidden, kwargs, {linear.name: linear.weight.clone()}), block.forward(hidden, kwargs)
    )


def test_float_outputs_are_the_float_models_whatever_was_replaced():
    model = TinyModel()
    block = with_float_stream(model)
    expected = [model.blocks[0](hidden, scale=0.5) for hidden in block.float_inputs.hidden]
    for name, weight in quantized(block, list(block.linears)).items():
        block.replace(name, weight)
    seen = {}
    expected_inputs = [nn.functional.layer_norm(hidden, (64,)).reshape(-1, 64) for hidden in block.float_inputs.hidden]
    outputs = block.float_outputs(["blocks.0.left"], lambda name, x: seen.setdefault(name, []).append(x.clone()))
    assert list(seen) == ["blocks.0.left"]
    assert all(torch.equal(one, other) for one, other in zip(seen["blocks.0.left"], expected_inputs, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))
    assert block.float_outputs()[0] is outputs[0], "computed once"
    with pytest.raises(RunError, match="float_outputs was called before"):
        block.batch(0, float_stream=True)
    with pytest.raises(RunError, match="float_outputs was called before"):
        block.observe(["blocks.0.left"], lambda *_: None, paired=True)
    assert len(list(block.batches())) == 2


def test_blocks_in_a_row_run_as_one():
    model = TinyModel()
    span = walk.Span({"0": model.blocks[0], "1": model.blocks[1]})
    hidden = model.embed(torch.stack(tiny_tokens(2)))
    expected = model.blocks[1](model.blocks[0](hidden, scale=0.5), scale=0.25)
    assert torch.equal(span(hidden, **{"0": {"scale": 0.5}, "1": {"scale": 0.25}}), expected)


def walked(budget, settings, monkeypatch, weights_of):
    """Quantize a small Llama with that much room for kept outputs; return weights, and calls of q_proj block by block."""
    monkeypatch.setattr(qcore.memory, "MEMO_BYTES", budget)
    model = tiny_transformer("llama", vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                             num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    calls = [0] * 3
    for index, block in enumerate(model.model.layers):
        original = block.self_attn.q_proj

        def count(module, args, output, index=index):
            calls[index] += 1

        original.register_forward_hook(count)
    tokens = tiny_tokens(6, vocabulary=320)
    quantized_model = qcore.quantize(model, "gptq", group_size=32, calibration=tokens, batch_size=2, **settings)
    return weights_of(quantized_model), calls


@pytest.mark.parametrize("settings", [{}, {"true_sequential": False}, {"float_targets": 0.5}], ids=str)
def test_the_input_of_a_closing_linear_spares_running_what_leads_to_it(monkeypatch, weights_of, settings):
    wanted, many = walked(0, settings, monkeypatch, weights_of)
    for budget in (20_000, 10**9):  # a batch of hidden states has 16 kB
        found, few = walked(budget, settings, monkeypatch, weights_of)
        assert all(wanted[name].equal(found[name]) for name in wanted)
        assert sum(few) < sum(many) or "true_sequential" in settings  # seen in one replay: nothing runs twice
    if not settings:
        assert few[1] == few[2] == 3  # once a batch; watching q_proj itself stops in front of it
        assert many == [12, 12, 9]  # to watch o, gate and down, and, but for the last block, to move on


def test_a_kept_input_is_dropped_when_what_leads_to_it_changes():
    model = tiny_transformer("llama", vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=4)  # fmt: skip
    captured = captured_of(model, [(torch.stack(tiny_tokens(2, vocabulary=320)), None)], "model.layers", ())
    stages = [[("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")], [("self_attn.o_proj",)]]
    names = [f"model.layers.0.{short}" for stage in stages for group in stage for short in group]
    outputs = []
    for keep in (False, True):
        block = walk.Block(0, "model.layers.0", model.model.layers[0], stages, dict.fromkeys(names, QuantConfig(group_size=32)),
                                lambda name: torch.float32, captured, captured.kwargs[0], None, CPU, 0)  # fmt: skip
        block.memo_bytes = 10**9 if keep else 0
        weights = {name: random_weight(64, 64, QuantConfig(group_size=32)) for name in names}
        for _ in range(2):  # the second time it is known that o_proj closes attention
            for name in names[:3]:
                block.replace(name, weights[name])
            seen = observed(block, names[3:])
            block.replace(names[3], weights[names[3]])
            block.replace(names[0], random_weight(64, 64, QuantConfig(group_size=32), seed=5))
            stream = Stream([hidden.clone() for hidden in captured.stream.hidden])
            block.advance(stream)
        outputs.append([*seen[names[3]], *stream.hidden])
        for name, linear in block.linears.items():
            walk.set_weight(block._module(name), linear.weight)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
