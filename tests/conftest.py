"""What several test files share: a small tokenizer, small models saved as folders, token ids, plugins from source."""

# ruff: noqa: E402 (libraries read the environment when they are imported)

import os

# before torch is imported: tiny matrices only lose by threads, and resumed runs are compared byte by byte
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
for variable in ("QCORE_DISABLE_PLUGINS", "QCORE_ONLY_PLUGINS"):
    os.environ.pop(variable, None)

import pydoc_data.topics
import re

import hypothesis
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qcore import QuantLinear
from qcore.plugins import Plugins
from qcore.testing import entry_point, tiny_transformer

# the same examples in every run and on every machine, however slow
hypothesis.settings.register_profile("qcore", deadline=None, derandomize=True)
hypothesis.settings.load_profile("qcore")
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

#: every side a multiple of 32, so that the formats hold it at every width; 3 blocks, so that one has two neighbours
LLAMA = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    torch.manual_seed(0)  # a test draws the same numbers whichever tests ran before it


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    torch.manual_seed(1)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of 320 tokens, trained on a page of English."""
    text = pydoc_data.topics.topics["assert"] + pydoc_data.topics.topics["break"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def save_llama(tokenizer):
    """A function that saves a tiny Llama with its tokenizer: save_llama(folder, dtype, shard_size, **config)."""

    def save(folder, dtype=torch.float32, max_shard_size="1GB", **config):
        model = tiny_transformer("llama", **{**LLAMA, **config}).to(dtype)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def llama_folder(save_llama, tmp_path_factory):
    """A tiny float32 Llama in one file; tests must not change it."""
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def sharded_folder(save_llama, tmp_path_factory):
    """The same Llama in several shards with an index; tests must not change it."""
    return save_llama(tmp_path_factory.mktemp("models") / "sharded", max_shard_size="100KB")


@pytest.fixture
def llama():
    """The same Llama as a fresh module in memory."""
    return tiny_transformer("llama", **LLAMA)


@pytest.fixture(scope="session")
def tokens():
    """Eight sequences of 32 token ids."""
    return list(torch.randint(0, 320, (8, 32), generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def plugin(tmp_path):
    """A function that turns a plugin's source into an entry point: plugin(name, source, distribution)."""

    def make(name, source, distribution="a-plugin"):
        return entry_point(tmp_path / "site", name, source, distribution)

    return make


@pytest.fixture
def watched():
    """The installed plugins with one more object registered: watched(object) -> Plugins."""

    def make(*observers):
        plugins = Plugins()
        for observer in observers:
            plugins.manager.register(observer)
        return plugins

    return make


@pytest.fixture(scope="session")
def weights_of():
    """A function that gives the exact QuantizedWeights of a model in memory, by name."""

    def collect(model):
        return {name: m.weight_source() for name, m in model.named_modules() if isinstance(m, QuantLinear)}

    return collect


@pytest.fixture(scope="session")
def declared_in():
    """A function that reads a C header: its functions' parameters by name, in the notation of `Native.functions`."""

    def read(header):
        text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
        found = {}
        for name, parameters in re.findall(r"(qc_\w+)\(([^)]*)\);", text):
            words = []
            for each in parameters.split(",") if parameters.strip() != "void" else ():
                kind, word = each.rsplit(maxsplit=1)
                words.append(word.lstrip("*") + ("*" if "*" in each else "#" if "int64" in kind else ""))
            found[name] = " ".join(words)
        return found

    return read


@pytest.fixture(scope="session")
def same_files():
    """A function that says whether two folders hold the same files, byte for byte; names the first that differs."""

    def compare(one, other):
        names = sorted(path.name for path in one.iterdir())
        assert names == sorted(path.name for path in other.iterdir())
        for name in names:
            assert (one / name).read_bytes() == (other / name).read_bytes(), f"{name} differs"

    return compare
