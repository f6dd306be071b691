"""Quantize a model with llm-compressor's GPTQ and its defaults, and decode the checkpoint it writes."""

import torch
from common import Meter, Tensors, dequantize, load_checkpoint, load_tokens, modules, parser, unpack, write
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier


def decode(t: Tensors, name: str, bits: int, group_size: int) -> torch.Tensor:
    """One linear in compressed-tensors' pack-quantized layout -> float32 [out, in]."""
    rows, columns = t[f"{name}.weight_shape"].tolist()
    q = unpack(t[f"{name}.weight_packed"], bits)[:, :columns]
    scale = t[f"{name}.weight_scale"]
    packed_zero = t.get(f"{name}.weight_zero_point")
    if packed_zero is None:
        zero = torch.full(scale.shape, 1 << bits - 1, dtype=torch.int32)
    else:
        zero = unpack(packed_zero.T, bits).T[:rows]
    group = t.get(f"{name}.weight_g_idx")
    if group is None:
        group = torch.arange(columns) // group_size
    return dequantize(q, zero, scale, group)


def main() -> None:
    p = parser(__doc__)
    p.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        required=True,
        help="dtype to hold the model in; the peer's own default is auto, the stored one (float16 is slow on many CPUs)",
    )
    args = p.parse_args()
    tokens = load_tokens(args.tokens)
    rows = tokens.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
    checkpoint = args.out / "checkpoint"
    checkpoint.mkdir(parents=True)

    meter = Meter()
    weights_args = {
        "num_bits": args.bits,
        "type": "int",
        "symmetric": args.sym,
        "strategy": "group",
        "group_size": args.group_size,
    }
    oneshot(
        model=str(args.model),
        precision=args.dtype,
        dataset=data,
        recipe=GPTQModifier(
            config_groups={"group_0": {"targets": ["Linear"], "weights": weights_args}}, ignore=["lm_head"]
        ),
        num_calibration_samples=tokens.shape[0],
        max_seq_length=tokens.shape[1],
        output_dir=str(checkpoint),
    )
    figures = meter.read()

    saved, tensors = load_checkpoint(checkpoint)
    if saved["format"] != "pack-quantized":
        raise SystemExit(f"cannot decode format {saved['format']}")
    names = modules(tensors, ".weight_packed")
    weights = {n: decode(tensors, n, args.bits, args.group_size) for n in names}
    write(args, "llmcompressor", weights, dtype=args.dtype, **figures)


if __name__ == "__main__":
    main()
