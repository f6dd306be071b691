"""Run by the interpreter of a client's own environment: load folders, continue prompts greedily, print token ids as JSON.

    python clients.py CLIENT FOLDER TOKENS < [[prompt ids], …]

Clients: llamacpp, vllm, gptqmodel, transformers. Nothing of qcore is imported here.
"""

import json
import os
import sys


def llamacpp(folder, prompts, count):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = f"{folder}/model.gguf"
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    found, top = [], []
    for prompt in prompts:
        request = {"prompt": prompt, "max_tokens": count, "temperature": 0.0, "n_probs": 6, "ignore_eos": True}
        tokens = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
        found.append([token["id"] for token in tokens])
        top.append([{each["id"]: each["logprob"] for each in token["top_logprobs"]} for token in tokens])
    return found, xllamacpp.__version__, {"top": top}


def vllm(folder, prompts, count):
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    import vllm as library

    model = library.LLM(model=folder, dtype="float16", max_model_len=512, enforce_eager=True, max_num_seqs=2)
    sampling = library.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=6)
    answers = [
        answer.outputs[0] for answer in model.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    ]
    top = [[{token: each.logprob for token, each in place.items()} for place in answer.logprobs] for answer in answers]
    return [list(answer.token_ids) for answer in answers], library.__version__, {"top": top}


def gptqmodel(folder, prompts, count):
    import gptqmodel as library

    model = library.GPTQModel.load(folder, device="cpu", backend=library.BACKEND.TORCH)
    return _greedy(model.model, prompts, count), library.__version__, {}


def transformers(folder, prompts, count):
    import torch
    import transformers as library

    model = library.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float16)
    return _greedy(model, prompts, count), library.__version__, {}


def _greedy(model, prompts, count):
    import torch

    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False)  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return found


if __name__ == "__main__":
    name, folder, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    tokens, version, more = globals()[name](folder, json.load(sys.stdin), count)
    print("RESULT " + json.dumps({"tokens": tokens, "version": version, **more}))
