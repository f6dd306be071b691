"""The tokenizer as llama.cpp wants it in a GGUF file, from the files of a Hugging Face folder.

Byte-level BPE comes out of tokenizer.json, SentencePiece out of tokenizer.model. A model without either is written without a
tokenizer, which llama.cpp can load and run on token ids alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcore import CheckpointError, Content, read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: how text is cut before merging: the pattern of tokenizer.json -> llama.cpp's name for it
SPLITS = {
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}": "qwen2",
}


def describe(writer: Any, content: Content) -> None:
    """Add the tokenizer's fields."""
    files = content.files
    if "tokenizer.model" in files:
        _sentencepiece(writer, files["tokenizer.model"], content.config["vocab_size"])
    elif "tokenizer.json" in files:
        _byte_level(writer, read_json(files["tokenizer.json"]), content.config["vocab_size"])
    else:
        writer.add_tokenizer_model("none")
        return
    settings = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    _special(writer, settings, content)
    template = settings.get("chat_template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].read_text(encoding="utf-8")
    if isinstance(template, str):
        writer.add_chat_template(template)


def _byte_level(writer: Any, tokenizer: dict[str, Any], size: int) -> None:
    model = tokenizer.get("model", {})
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise CheckpointError(
            f"tokenizer.json holds {model.get('type')} (byte_fallback {bool(model.get('byte_fallback'))}); "
            "qcore writes byte-level BPE from it, and SentencePiece from a tokenizer.model."
        )
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [UNUSED] * size
    for token, number in model["vocab"].items():
        if number < size:
            tokens[number], kinds[number] = token, NORMAL
    for added in tokenizer.get("added_tokens", []):
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(tokenizer.get("pre_tokenizer") or {}))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    starts = {"add_prefix_space": True} in [
        {"add_prefix_space": step.get("add_prefix_space")} for step in _steps(tokenizer.get("pre_tokenizer") or {})
    ]
    writer.add_add_space_prefix(starts)


def _steps(pre: dict[str, Any]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    return steps


def _split_name(pre: dict[str, Any]) -> str:
    """llama.cpp's name for the way text is cut before merging."""
    steps = _steps(pre)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") in SPLITS:
        return SPLITS[steps[0]["pattern"]["Regex"]]
    known = ", ".join(["gpt-2", "smollm", *SPLITS.values()])
    raise CheckpointError(
        f"the tokenizer cuts text in a way qcore has no GGUF name for ({json.dumps(pre)[:200]}); it knows {known}."
    )


def _sentencepiece(writer: Any, path: Path, size: int) -> None:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise CheckpointError("tokenizer.model needs the sentencepiece package: pip install 'qcore[gguf]'") from None
    model = SentencePieceProcessor(model_file=str(path))
    tokens = [f"[PAD{number}]" for number in range(size)]
    scores, kinds = [-1000.0] * size, [UNUSED] * size
    for number in range(min(size, model.vocab_size())):
        tokens[number], scores[number] = model.id_to_piece(number), model.get_score(number)
        kinds[number] = (
            UNKNOWN if model.is_unknown(number) else CONTROL if model.is_control(number)
            else BYTE if model.is_byte(number) else UNUSED if model.is_unused(number) else NORMAL
        )  # fmt: skip
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)


def _special(writer: Any, settings: dict[str, Any], content: Content) -> None:
    """Ids of the special tokens: the model's config knows them, the tokenizer's settings say which are added."""
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        value = content.config.get(f"{name}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and 0 <= value < content.config["vocab_size"]:
            add(value)
    if isinstance(settings.get("add_bos_token"), bool):
        writer.add_add_bos_token(settings["add_bos_token"])
    elif "tokenizer.model" not in content.files:
        writer.add_add_bos_token(False)
    if isinstance(settings.get("add_eos_token"), bool):
        writer.add_add_eos_token(settings["add_eos_token"])
