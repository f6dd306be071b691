"""Quantize a model with GPTQModel's GPTQ and its defaults, and decode the checkpoint it writes."""

from common import Meter, decode_gptq, load_checkpoint, load_tokens, modules, parser, write
from gptqmodel import GPTQModel, QuantizeConfig

# A packed word of "gptq" (v1) holds zero - 1; GPTQModel subtracts (and adds back) on whole words.
ZEROS = {"gptq": "minus_one_word", "gptq_v2": "true"}


def main() -> None:
    args = parser(__doc__).parse_args()
    tokens = load_tokens(args.tokens)
    samples = [{"input_ids": row, "attention_mask": row.new_ones(row.shape)} for row in tokens]
    checkpoint = args.out / "checkpoint"
    checkpoint.mkdir(parents=True)

    meter = Meter()
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, sym=args.sym)
    model = GPTQModel.load(str(args.model), config)
    model.quantize(samples)
    model.save(str(checkpoint))
    figures = meter.read()

    saved, tensors = load_checkpoint(checkpoint)
    zeros = ZEROS[saved["checkpoint_format"]]
    weights = {
        name: decode_gptq(tensors, name, args.bits, args.group_size, zeros) for name in modules(tensors, ".qweight")
    }
    write(args, "gptqmodel", weights, **figures)


if __name__ == "__main__":
    main()
