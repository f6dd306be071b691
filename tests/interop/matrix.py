"""Write the tables of docs/interop.md from the records of real runs (results.json beside the environments).

QCORE_INTEROP=… make test-interop && python tests/interop/matrix.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import cases

PAGE = Path(__file__).parents[2] / "docs/interop.md"
HEAD = """# Interoperability, measured

Written by `tests/interop/matrix.py` from the records of `make test-interop`; nothing on this page is typed by hand. Each client runs in an
environment of its own, on a CPU, on the demo model (SmolLM2-135M-Instruct), group size 64 unless a folder says otherwise.

## Folders that qcore wrote, read by others

Each client continues three prompts by eight tokens, greedily, in float16. Gap: how far, in log-probability, a token it chose lies below the one
that qcore's reference finds likeliest after the same beginning, at most. Mean: distance of the log-probabilities of its six likeliest tokens from
qcore's, where the client tells them. The rows `float:` are what the same client makes of a file that quantizing had no part in, beside transformers
in float32: llama.cpp of the demo model's own file, which its converter wrote (it rounds activations to 8 bits), vLLM of a float16 checkpoint. The tests
hold the other rows to these. `check` is what `qcore check` said beforehand.

| client | environment | folder | check | outcome | gap | mean |
|---|---|---|---|---|---|---|
"""
BACK = """
## Folders that others wrote, read by qcore

Each program quantizes the demo model and answers a prompt; qcore opens its folder and answers the same. Difference: the largest between two
logits, whose own range is 30. GPTQModel computes in float16 (qcore in float16 is 0.14 from qcore in float32), the others in float32.

| written by | version | read as | linears | outcome | difference |
|---|---|---|---|---|---|
"""


def outcome(record):
    return (
        record["outcome"] if record["outcome"] != "fails" else f"fails: `{record['message'].replace('|', '/')[:160]}`"
    )


def number(record, key):
    return f"{record[key]:.3f}" if key in record else ""


def main():
    found = cases.results()
    places = {(e, c, n): place for place, (e, c, _, n) in enumerate(cases.READERS)}
    read = [record for record in found if record["kind"] == "read"]
    read.sort(key=lambda each: places.get((each["environment"], each["client"], each["folder"]), -1))
    text = HEAD
    for each in read:
        client = f"{each['client']} {each.get('version', '')}".strip()
        cells = (
            client,
            each["environment"],
            each["folder"],
            each.get("check", ""),
            outcome(each),
            number(each, "gap"),
            number(each, "mean"),
        )
        text += f"| {' | '.join(cells)} |\n"
    text += BACK
    order = list(cases.WRITERS)
    for each in sorted((r for r in found if r["kind"] == "write"), key=lambda r: order.index(r["writer"])):
        difference = f"{each['difference']:.2g}" if "difference" in each else ""
        cells = (
            each["writer"],
            each.get("version", ""),
            each.get("format", ""),
            str(each.get("linears", "")),
            outcome(each),
            difference,
        )
        text += f"| {' | '.join(cells)} |\n"
    run = {(each["environment"], each["client"], each["folder"]) for each in read}
    missing = [f"{e}, {c}: {n}" for e, c, _, n in cases.READERS if (e, c, n) not in run]
    missing += [name for name in cases.WRITERS if name not in {r.get("writer") for r in found}]
    if missing:
        text += "\nNot run here: " + ", ".join(missing) + ".\n"
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE}: {len(found)} runs, {len(missing)} missing")


if __name__ == "__main__":
    main()
