import importlib.metadata

from qcore_plugin_mistral import MISTRAL

from qcore.testing import check_adapter, check_plugin, tiny_transformer


def test_declaration_agrees_with_a_forward_pass():
    model = tiny_transformer(
        "mistral", vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=None,
    )  # fmt: skip
    check_adapter(MISTRAL, model)


def test_installed_plugin_loads():
    (point,) = (p for p in importlib.metadata.entry_points(group="qcore") if p.name == "mistral")
    check_plugin(point)
