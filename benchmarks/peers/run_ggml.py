"""Milliseconds that llama.cpp's own kernels take for one product of a linear on a CPU: ggml, called through its C interface.

    python3 -m venv VENV && VENV/bin/pip install xllamacpp
    VENV/bin/python benchmarks/peers/run_ggml.py [--shape 4096x11008] [--tokens 1,2,4] [--threads 2] [--types Q4_0,Q4_1]

Prints one line of JSON. A graph multiplies the tokens by --copies weights in turn, so that none is still in the caches; the fastest of
many runs counts, divided by the copies. With `+repack` behind a type its weights lie in the buffer in which llama.cpp rearranges
them at load, where it has one for that type on this CPU. benchmarks/matmul_cpu.py runs this file beside qcore's kernels.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import time
from pathlib import Path

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}  # ggml_type
REPACK = "_Z35ggml_backend_cpu_repack_buffer_typev"
POINTERS = (
    "ggml_init ggml_new_tensor_2d ggml_mul_mat ggml_new_graph_custom ggml_backend_cpu_init ggml_backend_cpu_buffer_type"
    " ggml_backend_alloc_ctx_tensors_from_buft ggml_backend_alloc_ctx_tensors " + REPACK
).split()


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def library() -> ctypes.CDLL:
    """The ggml inside xllamacpp's extension module."""
    import xllamacpp

    (path,) = Path(xllamacpp.__file__).parent.glob("xllamacpp*.so")
    ggml = ctypes.CDLL(str(path))
    for name in POINTERS:
        getattr(ggml, name).restype = ctypes.c_void_p
    ggml.ggml_nbytes.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    return ggml


def context(ggml: ctypes.CDLL) -> ctypes.c_void_p:
    return ctypes.c_void_p(ggml.ggml_init(InitParams(1 << 20, None, True)))


def quantized_rows(ggml: ctypes.CDLL, kind: int, K: int, N: int) -> ctypes.Array[ctypes.c_char]:
    """N rows of K random floats in a type; 64 different rows."""
    rows, held = 64, 8 * K
    values = (ctypes.c_float * (rows * K))(*(random.gauss(0, 1) for _ in range(rows * K)))
    target = ctypes.create_string_buffer(rows * held)
    size = ggml.ggml_quantize_chunk(
        kind, values, target, ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(K), None
    )
    whole = target.raw[:size] * (N // rows)
    return ctypes.create_string_buffer(whole, len(whole))


class Layer:
    """`copies` weights [N, K] of one type."""

    def __init__(self, ggml: ctypes.CDLL, kind: str, K: int, N: int, copies: int) -> None:
        self.ggml, self.K, self.copies = ggml, K, copies
        name, _, where = kind.partition("+")
        self.memory = context(ggml)
        K_, N_ = ctypes.c_int64(K), ctypes.c_int64(N)
        self.weights = [
            ctypes.c_void_p(ggml.ggml_new_tensor_2d(self.memory, TYPES[name], K_, N_)) for _ in range(copies)
        ]
        buffers = getattr(ggml, REPACK) if where else ggml.ggml_backend_cpu_buffer_type
        ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.memory, ctypes.c_void_p(buffers()))
        data = quantized_rows(ggml, TYPES[name], K, N)
        self.nbytes = ggml.ggml_nbytes(self.weights[0])
        for weight in self.weights:
            ggml.ggml_backend_tensor_set(weight, data, ctypes.c_size_t(0), ctypes.c_size_t(self.nbytes))

    def milliseconds(self, backend: ctypes.c_void_p, tokens: int, seconds: float, clock) -> float:  # type: ignore[no-untyped-def]
        """The fastest of the runs that fit into some seconds, per product."""
        ggml, memory = self.ggml, context(self.ggml)
        x = ctypes.c_void_p(
            ggml.ggml_new_tensor_2d(memory, TYPES["F32"], ctypes.c_int64(self.K), ctypes.c_int64(tokens))
        )
        graph = ctypes.c_void_p(ggml.ggml_new_graph_custom(memory, ctypes.c_size_t(256), False))
        for weight in self.weights:
            product = ctypes.c_void_p(ggml.ggml_mul_mat(memory, weight, x))
            ggml.ggml_build_forward_expand(graph, product)
        ggml.ggml_backend_alloc_ctx_tensors(memory, backend)
        floats = (ctypes.c_float * (self.K * tokens))(*(random.gauss(0, 1) for _ in range(self.K * tokens)))
        ggml.ggml_backend_tensor_set(x, floats, ctypes.c_size_t(0), ctypes.c_size_t(4 * self.K * tokens))
        times: list[float] = []
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(times) < 3:
            start = clock()
            ggml.ggml_backend_graph_compute(backend, graph)
            times.append(clock() - start)
        return 1e3 * min(times) / self.copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x11008", help="K x N")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128")
    parser.add_argument("--types", default="Q4_0,Q4_0+repack,Q4_1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument(
        "--cpu-time", action="store_true", help="measure this thread's CPU time: for one thread on a busy machine"
    )
    arguments = parser.parse_args()
    K, N = map(int, arguments.shape.split("x"))
    ggml = library()
    backend = ctypes.c_void_p(ggml.ggml_backend_cpu_init())
    ggml.ggml_backend_cpu_set_n_threads(backend, arguments.threads)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    found = {}
    for kind in arguments.types.split(","):
        layer = Layer(ggml, kind, K, N, arguments.copies)
        times = [layer.milliseconds(backend, int(m), arguments.seconds, clock) for m in arguments.tokens.split(",")]
        found[kind] = {"milliseconds": times, "megabytes": layer.nbytes / 1e6}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
