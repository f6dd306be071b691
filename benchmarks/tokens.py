"""Write calibration tokens as an int64 .npy file [samples, seqlen], so that qcore and peers get the very same.

The text is the dataset `topics`: pydoc's topics in sorted order, tokenized once, the first samples x seqlen tokens.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from pathlib import Path

import numpy as np

from qcore.checkpoint import resolve_model
from qcore.model import load_tokenizer
from qcore.plugins import installed

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokenizer = load_tokenizer(resolve_model(arguments.model, installed()))
    count = arguments.samples * arguments.seqlen
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:count]
    np.save(arguments.out, np.array(ids).reshape(arguments.samples, arguments.seqlen))
