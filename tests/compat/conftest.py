"""Small models as folders, in the place of those that the READMEs name."""

import pytest
import torch

from qcore.testing import tiny_transformer


def save_opt(folder, tokenizer, context, depth):
    """An OPT wide enough for the snippets' group_size=128."""
    model = tiny_transformer("opt", vocab_size=320, hidden_size=128, ffn_dim=256, num_hidden_layers=depth, num_attention_heads=4,
                             word_embed_proj_dim=128, max_position_embeddings=context, bos_token_id=0, eos_token_id=1,
                             pad_token_id=1)  # fmt: skip
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def opt_folder(tokenizer, tmp_path_factory):
    """An OPT whose context holds the 256 tokens that a pipeline generates by default."""
    return save_opt(tmp_path_factory.mktemp("models") / "opt-tiny", tokenizer, 512, 2)


@pytest.fixture(scope="session")
def short_opt_folder(tokenizer, tmp_path_factory):
    """A shallow OPT of short context: 512 samples for 200 iterations are AutoRound's defaults, and cost little here."""
    return save_opt(tmp_path_factory.mktemp("models") / "opt-short", tokenizer, 64, 1)


@pytest.fixture(scope="session")
def gptj_folder(tokenizer, tmp_path_factory):
    """A GPT-J whose context is long enough for the snippet's prompts."""
    folder = tmp_path_factory.mktemp("models") / "gptj-tiny"
    model = tiny_transformer("gptj", vocab_size=320, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=512,
                             bos_token_id=0, eos_token_id=1)  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
