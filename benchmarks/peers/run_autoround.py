"""Quantize a model with auto-round and its defaults, and decode the checkpoint it writes."""

from auto_round import AutoRound
from common import Meter, decode_awq, decode_gptq, load_checkpoint, load_tokens, modules, parser, write

# How each packing format of auto-round in GPTQ's layout stores zero points.
ZEROS = {"auto_round:auto_gptq": "minus_one", "auto_round": "true", "auto_round:gptqmodel": "true"}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--iters", type=int, required=True, help="tuning iterations a block")
    p.add_argument("--batch-size", type=int, required=True, help="samples a tuning step")
    args = p.parse_args()
    tokens = load_tokens(args.tokens)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint"

    meter = Meter()
    rounder = AutoRound(
        str(args.model),
        bits=args.bits,
        group_size=args.group_size,
        sym=args.sym,
        iters=args.iters,
        dataset=list(tokens.split(1)),
        nsamples=tokens.shape[0],
        seqlen=tokens.shape[1],
        batch_size=args.batch_size,
        amp=False,
        enable_torch_compile=False,
    )
    rounder.quantize_and_save(str(checkpoint), format="auto_round")
    figures = meter.read()

    if not (checkpoint / "config.json").exists():  # some versions save to a folder of their own inside
        checkpoint = next(checkpoint.glob("*/config.json")).parent
    saved, tensors = load_checkpoint(checkpoint)
    packing = saved["packing_format"]
    names = modules(tensors, ".qweight")
    if packing == "auto_round:auto_awq":
        weights = {n: decode_awq(tensors, n, args.group_size) for n in names}
    else:
        weights = {n: decode_gptq(tensors, n, args.bits, args.group_size, ZEROS[packing]) for n in names}
    write(
        args,
        "auto-round",
        weights,
        iters=args.iters,
        batch_size=args.batch_size,
        packing_format=packing,
        **figures,
    )


if __name__ == "__main__":
    main()
