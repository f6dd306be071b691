"""What the peer runners share: arguments, a resource meter, exact decoding, and the files they write."""

import argparse
import json
import resource
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

# AWQ packs eight columns into a word; column j of the eight lies in nibble AWQ_SLOTS[j].
AWQ_SLOTS = [0, 4, 1, 5, 2, 6, 3, 7]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every runner takes."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--model", type=Path, required=True, help="folder of the float model")
    p.add_argument("--tokens", type=Path, required=True, help="int64 .npy of calibration token ids [samples, length]")
    p.add_argument("--bits", type=int, required=True)
    p.add_argument("--group-size", type=int, required=True)
    sym = p.add_mutually_exclusive_group(required=True)
    sym.add_argument("--sym", dest="sym", action="store_true")
    sym.add_argument("--asym", dest="sym", action="store_false")
    p.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoint/, dequantized.safetensors, result.json"
    )
    return p


def load_tokens(path: Path) -> torch.Tensor:
    """Calibration token ids, int64 [samples, length]."""
    ids = np.load(path)
    if ids.dtype != np.int64 or ids.ndim != 2:
        raise SystemExit(f"{path}: expected int64 [samples, length], found {ids.dtype} {ids.shape}")
    return torch.from_numpy(ids)


class Meter:
    """CPU-seconds (user + system, this process and its finished children) and wall seconds since its creation."""

    def __init__(self) -> None:
        self._cpu, self._wall = self._cpu_now(), time.perf_counter()

    @staticmethod
    def _cpu_now() -> tuple[float, float]:
        usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        own, children = (u.ru_utime + u.ru_stime for u in usages)
        return own, children

    def read(self) -> dict[str, float]:
        """The figures so far. Peak memory is this process's since it began (Linux counts ru_maxrss in KiB)."""
        own, children = (now - then for now, then in zip(self._cpu_now(), self._cpu, strict=True))
        return {
            "cpu_seconds": round(own + children, 2),
            "cpu_seconds_children": round(children, 2),
            "wall_seconds": round(time.perf_counter() - self._wall, 2),
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        }


def load_checkpoint(folder: Path) -> tuple[dict, Tensors]:
    """The quantization config and all tensors of a saved checkpoint."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return config, tensors


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Int32 words [rows, n] read as one little-endian bit stream per row -> codes, int32 [rows, 32 * n // bits]."""
    raw = np.ascontiguousarray(words.numpy()).view(np.uint8)
    stream = np.unpackbits(raw, axis=1, bitorder="little")
    codes = stream[:, : stream.shape[1] // bits * bits].reshape(len(stream), -1, bits)
    return torch.from_numpy(codes.astype(np.int32) @ (1 << np.arange(bits, dtype=np.int32)))


def dequantize(q: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """(q - zero) * scale; q is [out, in], zero and scale are [out, groups], group is each input's group [in].

    Exact: a half-precision scale times a small integer fits float32.
    """
    group = group.long()
    return (q - zero[:, group]).to(torch.float32) * scale.to(torch.float32)[:, group]


def decode_gptq(t: Tensors, name: str, bits: int, group_size: int, zeros: str) -> torch.Tensor:
    """One linear in GPTQ's layout -> float32 [out, in].

    ``zeros`` says how zero points are stored: "true", "minus_one" (field by field), or "minus_one_word" (the writer
    subtracted one from every field with a single subtraction on the packed word; adding it back undoes the borrows).
    """
    q = unpack(t[f"{name}.qweight"].T, bits)
    qzeros = t[f"{name}.qzeros"]
    if zeros == "minus_one_word" and 32 % bits == 0:
        ones = sum(1 << i for i in range(0, 32, bits))
        qzeros = torch.from_numpy((qzeros.numpy().view(np.uint32) + np.uint32(ones)).view(np.int32))
        zero = unpack(qzeros, bits)
    elif zeros == "minus_one_word":
        zero = (unpack(qzeros, bits) + 1) % (1 << bits)
    else:
        zero = unpack(qzeros, bits) + {"true": 0, "minus_one": 1}[zeros]
    group = t.get(f"{name}.g_idx")
    if group is None:
        group = torch.arange(q.shape[1]) // (group_size if group_size > 0 else q.shape[1])
    return dequantize(q, zero.T, t[f"{name}.scales"].T, group)


def decode_awq(t: Tensors, name: str, group_size: int) -> torch.Tensor:
    """One linear in AWQ's GEMM layout (4 bits, packed along outputs in a fixed shuffle) -> float32 [out, in]."""

    def codes(words: torch.Tensor) -> torch.Tensor:
        nibbles = unpack(words, 4)
        return nibbles.reshape(len(nibbles), -1, 8)[:, :, AWQ_SLOTS].reshape(len(nibbles), -1).T

    q = codes(t[f"{name}.qweight"])
    group = torch.arange(q.shape[1]) // (group_size if group_size > 0 else q.shape[1])
    return dequantize(q, codes(t[f"{name}.qzeros"]), t[f"{name}.scales"].T, group)


def modules(t: Tensors, suffix: str) -> list[str]:
    """Names of the linears that own a tensor with this suffix."""
    return sorted(name.removesuffix(suffix) for name in t if name.endswith(suffix))


def write(args: argparse.Namespace, peer: str, weights: Tensors, **extra: object) -> None:
    """Write OUT/dequantized.safetensors and OUT/result.json."""
    save_file({f"{name}.weight": w.contiguous() for name, w in weights.items()}, args.out / "dequantized.safetensors")
    result = {
        "peer": peer,
        "version": version(peer),
        "bits": args.bits,
        "group_size": args.group_size,
        "sym": args.sym,
        **extra,
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
