"""The conformance kit must tell a plugin that is wrong; that it passes right ones, their own tests show."""

import dataclasses

import pytest
import torch

from qcore import (
    CalibrationDataset,
    CheckpointError,
    EvalTask,
    Finding,
    LayerSpec,
    QuantConfig,
    Subject,
    Target,
    grid,
)
from qcore.plugins import installed
from qcore.testing import (
    TinyModel,
    check_algorithm,
    check_backend,
    check_dataset,
    check_exporter,
    check_target,
    check_task,
    random_weight,
    tiny_language_model,
    tiny_tokenizer,
    tiny_tokens,
)

RTN = installed().get("algorithm", "rtn")
GPTQ_FORMAT = type(installed().get("format", "gptq"))
REFERENCE = type(installed().get("backend", "torch_reference"))


class Drifting(RTN):
    """Gives another result each time."""

    count = 0

    def quantize_block(self, block):
        Drifting.count += 1
        found = super().quantize_block(block)
        for weight in found.values():
            weight.codes[:, 0] ^= Drifting.count // 2 % 2  # two blocks a run
        return found


class Noise(RTN):
    """Pays no attention to the weights."""

    def quantize_block(self, block):
        return {name: random_weight(*linear.weight.shape, linear.config) for name, linear in block.linears.items()}


class Stubborn(RTN):
    """Always takes 4 bits in groups of 32."""

    def quantize_block(self, block):
        config = QuantConfig(bits=4, group_size=32)
        return {
            name: dataclasses.replace(
                random_weight(*linear.weight.shape, config), codes=torch.zeros(linear.weight.shape, dtype=torch.uint8)
            )
            for name, linear in block.linears.items()
        }


@pytest.mark.parametrize(
    ("kind", "says"),
    [(Drifting, "two equal runs differ"), (Noise, "relative error"), (Stubborn, "asked for|relative error")],
)
def test_a_wrong_algorithm_is_told(kind, says):
    with pytest.raises(AssertionError, match=says):
        check_algorithm(kind)


class Shifted(REFERENCE):
    """Forgets the zero points."""

    def prepare(self, weight, spec):
        buffers = super().prepare(weight, spec)
        return {**buffers, "zeros": torch.zeros_like(buffers["zeros"])}


class Graphless(REFERENCE):
    """Computes outside of autograd."""

    def matmul(self, x, buffers, spec):
        return super().matmul(x.detach(), buffers, spec).requires_grad_()


class Absent(REFERENCE):
    def unavailable(self):
        return "no such device"


@pytest.mark.parametrize(("kind", "says"), [(Shifted, "relative error"), (Absent, "cannot run here: no such device")])
def test_a_wrong_backend_is_told(kind, says):
    with pytest.raises(AssertionError, match=says):
        check_backend(kind())


def test_a_backend_without_a_gradient_is_told():
    with pytest.raises((AssertionError, RuntimeError)):
        check_backend(Graphless())


class Lossy(GPTQ_FORMAT):
    """Loses the order of act-order columns, and compares with what it encoded."""

    def encode(self, name, weight):
        g_idx = grid.group_index(weight.in_features, weight.group_size)
        return super().encode(name, dataclasses.replace(weight, g_idx=g_idx))

    def reader(self, folder):
        return None


class Boastful(GPTQ_FORMAT):
    """Says it holds everything."""

    def why_not(self, layer):
        return None

    def encode(self, name, weight):
        if weight.bits == 5:
            raise CheckpointError("no, not 5 bits")
        return super().encode(name, weight)


@pytest.mark.parametrize(
    ("kind", "says"), [(Lossy, "comes back with a different g_idx"), (Boastful, "and then refuses")]
)
def test_a_wrong_format_is_told(kind, says, tmp_path):
    with pytest.raises(AssertionError, match=says):
        check_exporter(kind(), tmp_path)


def test_the_tiny_model_is_always_the_same_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    one, other = TinyModel(), TinyModel()
    ids = torch.stack(tiny_tokens())
    assert torch.equal(one(ids).logits, other(ids).logits)
    assert not torch.equal(one(ids).logits, TinyModel(seed=1)(ids).logits)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_tiny_model_is_causal():
    ids = torch.stack(tiny_tokens(1, length=8))
    changed = ids.clone()
    changed[0, 5:] = 49
    model = TinyModel()
    assert torch.equal(model(ids).logits[:, :5], model(changed).logits[:, :5])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_random_weights_are_such_as_every_format_can_hold(bits):
    for sym in (True, False):
        weight = random_weight(64, 96, QuantConfig(bits=bits, group_size=32, sym=sym), act_order=True)
        assert int(weight.zeros.min()) >= 1
        assert weight.act_order
        assert {bool(sign) for sign in (weight.scales < 0).flatten()} == {True, False}


class Fixed(CalibrationDataset):
    name, rows = "fixed", (["a", "b"], ["a", "b"])

    def load(self, request):
        return self.rows[0] if request.samples else []


class Moody(Fixed):
    calls = 0

    def load(self, request):
        type(self).calls += 1
        return [f"text {self.calls}"]


class Mixed(Fixed):
    rows = (["a", [1, 2]],)


def test_a_dataset_that_drifts_or_mixes_is_told():
    check_dataset(Fixed())
    with pytest.raises(AssertionError, match="two equal requests give different data"):
        check_dataset(Moody())
    with pytest.raises(AssertionError, match="mixes text and token ids"):
        check_dataset(Mixed())


def test_a_target_that_names_what_is_not_there_or_cites_nothing_is_told():
    subject = Subject("gptq", {}, {"a": LayerSpec("a", QuantConfig(), 8, 8)})

    class Fixed(Target):
        name = "fixed"
        found = Finding("warns", "rows", "odd", ("a",), "manual")

        def check(self, subject):
            return [self.found]

    assert check_target(Fixed(), subject) == [Fixed.found]
    for changed, says in (
        ({"layers": ("b",)}, "does not have"),
        ({"source": ""}, "no source"),
        ({"level": "bad"}, "level 'bad'"),
        ({"message": ""}, "says nothing"),
    ):
        Fixed.found = dataclasses.replace(Finding("warns", "rows", "odd", ("a",), "manual"), **changed)
        with pytest.raises(AssertionError, match=says):
            check_target(Fixed(), subject)


class Counting(EvalTask):
    name = "counting"

    def run(self, model, tokenizer, params, argument=""):
        return {"layers": len(model.model.layers)}


class Rolling(Counting):
    def run(self, model, tokenizer, params, argument=""):
        return {"draw": float(torch.rand(()))}


class Breaking(Counting):
    def run(self, model, tokenizer, params, argument=""):
        with torch.no_grad():
            model.lm_head.weight[0] += 1
        return {"one": 1.0}


class Wordy(Counting):
    def run(self, model, tokenizer, params, argument=""):
        return {"verdict": "good"}


@pytest.mark.parametrize(
    ("kind", "says"),
    [(Rolling, "changed the process's random state"), (Breaking, "changed the model"), (Wordy, "expected a number")],
)
def test_a_wrong_task_is_told(kind, says):
    assert check_task(Counting()) == {"layers": 2}
    with pytest.raises(AssertionError, match=says):
        check_task(kind())


def test_the_tiny_tokenizer_gives_back_any_text():
    tokenizer = tiny_tokenizer()
    text = "naïve 漢字 <s>?\n"
    assert tokenizer.decode(tokenizer("naïve 漢字?\n")["input_ids"]) == text.replace(" <s>", "")
    assert max(tokenizer(text)["input_ids"]) < tiny_language_model().config.vocab_size
