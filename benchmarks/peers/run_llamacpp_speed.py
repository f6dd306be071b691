"""Tokens per second that llama.cpp generates on a CPU, as its server counts them.

    VENV/bin/pip install xllamacpp                          # an environment of its own
    VENV/bin/python benchmarks/peers/run_llamacpp_speed.py FILE.gguf [--new-tokens 128] [--prompt-tokens 16] [--threads 2]

Prints one line of JSON. benchmarks/generation_cpu.py runs this file beside qcore.
"""

from __future__ import annotations

import argparse
import json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel = options.gguf, 1
    params.n_ctx = options.prompt_tokens + options.new_tokens + 8
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    server = xllamacpp.Server(params)
    request = {
        "prompt": list(range(1, options.prompt_tokens + 1)), "n_predict": options.new_tokens, "ignore_eos": True,
        "temperature": 0, "cache_prompt": False,
    }  # fmt: skip
    best: dict[str, float] = {}
    for _ in range(options.repeat + 1):  # the first warms up
        answer = server.handle_completions(request)
        timings = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
        if timings["predicted_n"] < options.new_tokens:
            raise SystemExit(f"llama.cpp generated {timings['predicted_n']} tokens of {options.new_tokens}")
        if timings["predicted_per_second"] > best.get("tokens_per_second", 0):
            best = {"tokens_per_second": timings["predicted_per_second"], "first_token_ms": timings["prompt_ms"]}
    print("\n" + json.dumps(best))


if __name__ == "__main__":
    main()
