"""The command `qcore`. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from . import __version__
from .errors import BackendError, ConfigError, QcoreError

if TYPE_CHECKING:
    from rich.console import Console

float_dtypes = click.Choice(["float16", "bfloat16", "float32"])
bits_option = click.option("--bits", default=4, type=click.IntRange(2, 8))
group_size_option = click.option("--group-size", default=128, help="Columns that share a scale; -1 for a whole row.")
sym_option = click.option("--sym/--asym", default=True, help="Symmetric grid, or a zero point per group.")
override_option = click.option("--override", "overrides", multiple=True, metavar="PATTERN:CHANGES",
                               help="'PATTERN:bits=8,group_size=32' or 'PATTERN:skip'; repeatable, later ones win.")  # fmt: skip
adapter_option = click.option("--adapter", help="Model adapter; by default the one of the model's type.")
backend_option = click.option("--backend", default="auto", help="Kernel backend; see `qcore backends`.")
output_folder = click.option("-o", "--output", required=True, type=click.Path(path_type=Path),
                             help="Folder to write; must not exist.")  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
device_option = click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
trust_option = click.option("--trust-remote-code", is_flag=True, help="Allow Python code from the model's repository.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="qcore")
def cli() -> None:
    """Quantize large language models to 2 to 8 bits and run them."""


def main() -> NoReturn:
    """Run the command line: exit code 0, 1 for failures, 2 for usage errors, 130 after Ctrl-C."""
    try:
        cli.main(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Stopped.", err=True)
        sys.exit(130)
    except QcoreError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    sys.exit(0)


@cli.command()
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to write; must not exist.")
@click.option("--algo", default="gptq", help="Algorithm; see `qcore algorithms`.")
@bits_option
@group_size_option
@sym_option
@click.option("--set", "options", multiple=True, metavar="NAME=VALUE", help="An option of the algorithm; repeatable.")
@click.option("--format", "format_", default="gptq", help="Output format; see `qcore formats`.")
@click.option("--calibration", metavar="NAME|FILE", help="A dataset, a text or JSON-lines file, or a mixture a:2,b.")
@click.option("--samples", default=128, help="Calibration sequences.")
@click.option("--seqlen", default=2048, help="Tokens per calibration sequence.")
@click.option("--batch-size", type=int, help="Sequences per forward pass.  [default: by size]")
@click.option("--max-memory", metavar="SIZE", help="Memory of the device to use, for instance 4GiB.  [default: all]")
@adapter_option
@device_option
@click.option("--seed", default=0)
@override_option
@click.option("--fresh", is_flag=True, help="Discard an unfinished run instead of resuming it.")
@click.option("--deterministic", is_flag=True, help="Give the same bytes with any number of processes (torchrun).")
@click.option(
    "--dry-run", is_flag=True, help="Print the plan instead: linears, bits, memory, disk, time; try one block."
)
@trust_option
@json_option
def quantize(
    model: str,
    output: Path | None,
    dry_run: bool,
    options: tuple[str, ...],
    format_: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Quantize MODEL (a folder, a hub name, a model file, or `demo`) into a folder.

    An interrupted run resumes when the same command is given again. Several GPUs or machines share a run that is started by
    `torchrun --nproc-per-node N -m qcore quantize …`.
    """
    from . import api
    from .plugins import installed
    from .ranks import Ranks, connect

    params = parse_options(options, api.quantize)
    if dry_run:
        _dry_run(model, output, as_json, format=format_, **settings, **params)
        return
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    progress = _progress(quiet=as_json)
    plugins = installed()
    plugins.manager.register(progress)
    try:
        with connect(settings["device"]), progress:
            api.quantize(model, output=output, format=format_, **settings, **params)
            if Ranks().rank > 0:
                return
    except KeyboardInterrupt:
        click.echo(
            f"\nStopped. Finished blocks are kept in {output}.partial: run the same command again to resume.", err=True
        )
        sys.exit(130)
    finally:
        plugins.manager.unregister(progress)
    report = api.report(output)
    found = api.inspect(output)
    sizes = {key: found[key] for key in ("size", "size_float16", "bits_per_weight", "notes")}
    if as_json:
        click.echo(json.dumps({**report, **sizes}, default=str))
    else:
        _show_layers(report["layers"])
        _show_summary(output, report, found)


def _dry_run(model: str, output: Path | None, as_json: bool, **settings: Any) -> None:
    from .tools.explain import explain

    for unused in ("fresh", "deterministic", "calibration"):
        settings.pop(unused)
    plan = explain(model, output=output, probe=True, **settings)
    if as_json:
        click.echo(json.dumps(plan))
        return
    _show_plan(plan)
    disk, parts = plan["disk"], plan["parts"]
    about = "" if disk["exact"] else "about "
    click.echo(f"disk: {about}{disk['output'] / 1e9:.3f} GB of weights, and {disk['journal'] / 1e9:.3f} GB of finished blocks until they are written")  # fmt: skip
    if plan["gpu_memory"]:
        click.echo(f"peak GPU memory: {plan['gpu_memory'] / 1e9:.2f} GB")
    click.echo(f"peak host memory: {plan['host_memory'] / 1e9:.2f} GB, this program itself included")
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    click.echo(
        f"time: {plan['seconds']:.1f} s ({spent}) from the moment the calibration is there, by one block tried here"
    )


def parse_options(options: tuple[str, ...], function: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Read NAME=VALUE; values are JSON where they can be (true, 0.05, null), else text.

    function: what they are handed to, where its own arguments must not be among them.
    """
    pairs = {}
    taken = signature(function).parameters.keys() - {"revision"} if function else ()  # which has no option of its own
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--set {option!r}: expected NAME=VALUE, for instance --set desc_act=true.")
        if name in taken:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"--set {name}: this is not an option of a plugin, but an option of its own, {flag}, or none here."
            )
        try:
            pairs[name] = json.loads(value)
        except json.JSONDecodeError:
            pairs[name] = value
    return pairs


def _progress(quiet: bool) -> Any:
    """Make a plugin of its own that draws the run's events as a progress bar on stderr."""
    from rich import progress as rich_progress

    from .hookspecs import hookimpl

    class Progress:
        bar: rich_progress.Progress | None = None

        def __enter__(self) -> Progress:
            return self

        def __exit__(self, *_: object) -> None:
            if self.bar is not None:
                self.bar.stop()

        @hookimpl
        def qcore_run_started(self, plan: Mapping[str, Any]) -> None:
            if quiet:
                return
            console = _console(stderr=True)
            for note in plan["assumed"]:
                console.print(f"[dim]generic adapter: {note}[/dim]")
            if plan["resumed_at"]:
                console.print(f"Resuming after {plan['resumed_at']} finished blocks.")
            self.bar = rich_progress.Progress(
                "{task.description}", rich_progress.BarColumn(), rich_progress.MofNCompleteColumn(), "{task.fields[error]}",
                rich_progress.TimeElapsedColumn(), rich_progress.TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self.bar.start()
            name = f"{plan['algorithm']} blocks"
            self.task = self.bar.add_task(name, total=plan["blocks"], completed=plan["resumed_at"], error="")

        @hookimpl
        def qcore_block_finished(self, records: list[dict[str, Any]]) -> None:
            if self.bar is not None:
                errors = [record["error"] for record in records if record["error"] is not None]
                self.bar.update(self.task, advance=1, error=f"error {max(errors):.3f}" if errors else "")

    return Progress()


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    # a pipe has no width: leave rows whole for grep and for files
    return Console(stderr=stderr, highlight=False, width=None if sys.stdout.isatty() else 200)


def _table(columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
    from rich import box
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE_HEAD, title=title)
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _show_layers(layers: list[dict[str, Any]]) -> None:
    rows = []
    for layer in layers:
        error = "" if layer.get("error") is None else f"{layer['error']:.4f}"
        seconds = f"{layer['seconds']:.2f}" if "seconds" in layer else ""
        grid = [f"{layer['bits']} {'sym' if layer['sym'] else 'asym'}", str(layer["group_size"])]
        rows.append([layer["name"], _by(layer["shape"]), *grid, error, seconds, layer.get("note", "")])
    _table(["linear", "shape", "bits", "group", "rel. error", "seconds", ""], rows)


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _show_summary(output: Path, report: dict[str, Any], found: dict[str, Any]) -> None:
    console = _console()
    before, after = found["size_float16"], found["size"]
    console.print(f"{output}: {after / 1e6:.1f} MB, {before / 1e6:.1f} MB in 16 bits ({before / after:.2f}x smaller); "
                  f"{found['bits_per_weight']:.2f} bits per quantized weight")  # fmt: skip
    calibration = report.get("calibration")
    if calibration:
        used = calibration["used"]
        console.print(f"calibrated on {used['samples']} sequences, {used['tokens']} tokens")
        for source in calibration["sources"]:
            if "short" in source:
                console.print(f"  {source['source']}: {source['short']}")


def _text_options(command: Any) -> Any:
    """Add the options of what measures on text, beside a reference."""
    for option in reversed((
        click.option("--text", type=click.Path(path_type=Path), help="File of held-out text: perplexity and KL divergence."),
        click.option("--reference", metavar="MODEL", help="Model to compare with, for instance the one before quantization."),
        click.option("--seqlen", default=512, help="Tokens per window of --text."),
        click.option("--windows", type=int, help="Use at most this many windows of --text."),
        device_option, trust_option,
    )):  # fmt: skip
        command = option(command)
    return command


@cli.command("eval")
@click.argument("model")
@click.option("--task", "tasks", multiple=True, metavar="NAME[:ARGUMENT]", help="Task; see `qcore tasks`; repeatable.")
@click.option("--data", metavar="FILE|NAME", help="The tasks' data: .jsonl, .json, .csv, or a hub name.")
@click.option("--set", "options", multiple=True, metavar="NAME=VALUE", help="An option of the tasks; repeatable.")
@_text_options
@json_option
def evaluate(model: str, text: Path | None, tasks: tuple[str, ...], data: str | None, options: tuple[str, ...],
             seqlen: int, windows: int | None, as_json: bool, **settings: Any) -> None:  # fmt: skip
    """Measure MODEL on held-out text or by tasks, beside a reference where one is given."""
    from . import api

    if text is None and not tasks:
        raise ConfigError("nothing to measure on: give --text FILE, --task NAME, or both (`qcore tasks` lists them).")
    params = parse_options(options, api.evaluate) | ({"data_name_or_path": data} if data else {})
    if params and not tasks:
        raise ConfigError("--data and --set are for tasks: give --task NAME as well.")
    results: dict[str, dict[str, float]] = {}
    if text is not None:
        results["text"] = api.evaluate(model, _read_text(text), seqlen=seqlen, windows=windows, **settings)
    for task in tasks:
        results[task] = api.evaluate(model, task=task, **settings, **params)
    if as_json:
        click.echo(json.dumps(results if tasks else results["text"]))
        return
    for name, result in results.items():
        if tasks:
            click.echo(name)
        _show_result(result)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path} cannot be read as UTF-8 text: {error}") from None


def _show_result(result: Mapping[str, float]) -> None:
    """One line per metric; the reference's value, where there is one, beside it."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value}"

    compared = {name for name in result if f"reference_{name}" in result}
    pairs = {
        n: result.get(f"reference_{n}") for n in result if n.removeprefix("reference_") not in compared or n in compared
    }
    if any(value is not None for value in pairs.values()):
        click.echo(f"{'':22}{'model':>12}{'reference':>12}")
    for name, before in pairs.items():
        click.echo(f"{name:22}{shown(result[name]):>12}{shown(before):>12}".rstrip())


@cli.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--max-new-tokens", default=64, type=click.IntRange(1))
@click.option("--fast", is_flag=True, help="A compiled step, captured on a GPU: for many tokens, as it starts slowly.")
@device_option
@trust_option
@json_option
def generate(model: str, prompt: str, max_new_tokens: int, fast: bool, device: str, trust_remote_code: bool,
             as_json: bool) -> None:  # fmt: skip
    """Continue PROMPT with a quantized or float MODEL (greedy)."""
    from . import api

    network, tokenizer = api.open_any(model, device, trust_remote_code, fast=fast)
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer, so a prompt cannot be read.")
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise ConfigError(f"the prompt {prompt!r} has no tokens. Give some text to continue.")
    inputs = inputs.to(next(network.parameters()).device)
    output = network.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    click.echo(json.dumps({"text": text}) if as_json else text)


@cli.group()
def bench() -> None:
    """Measure how fast models generate, and kernel backends multiply, on this machine."""


@bench.command("generate")
@click.argument("model")
@click.option("--reference", metavar="fp16|bf16|fp32|MODEL", help="MODEL with float weights, or another float model.")
@click.option("--new-tokens", default=512, type=click.IntRange(1))
@click.option("--prompt-tokens", default=128, type=click.IntRange(1))
@click.option("--num-beams", multiple=True, type=click.IntRange(1), default=(1,), help="Repeatable.")
@click.option("--repeat", default=1, type=click.IntRange(1), help="Runs by the clock; the fastest counts.")
@backend_option
@click.option("--dtype", type=float_dtypes, help="Of activations.  [default: as stored]")
@click.option("--device-map", help="`auto` spreads over all GPUs.")
@click.option("--fast/--no-fast", default=True, help="A compiled step, captured on a GPU.")
@device_option
@trust_option
@json_option
def bench_generate(model: str, reference: str | None, dtype: str | None, new_tokens: int, prompt_tokens: int,
                   num_beams: tuple[int, ...], repeat: int, as_json: bool, **settings: Any) -> None:  # fmt: skip
    """Generate with a quantized MODEL, beside a float reference, in one run: tokens per second, time to the first, memory."""
    from dataclasses import asdict

    import torch

    from . import api
    from .tools import bench

    facts = bench.device_facts(api.pick_device(settings["device"]))
    chosen = getattr(torch, dtype) if dtype else None
    opened = bench.openers(model, reference, dtype=chosen, **settings)
    found = bench.generation(
        opened, new_tokens=new_tokens, prompt_tokens=prompt_tokens, num_beams=num_beams, repeat=repeat
    )
    if as_json:
        click.echo(json.dumps({**facts, "prompt_tokens": prompt_tokens, "speeds": [asdict(each) for each in found]}))
        return
    title = f"{facts['device']}, torch {facts['torch']}: {new_tokens} tokens after {prompt_tokens}, batch 1"
    _table(list(bench.SPEED_COLUMNS), [bench.speed_cells(each) for each in found], title)


@bench.command("matmul")
@click.option("--shapes", help="IN x OUT features, separated by commas.  [default: of 7B and 70B models]")
@click.option("--tokens", help="Numbers of rows of x, separated by commas.")
@click.option("--backend", "backends", multiple=True, help="Repeatable.  [default: all that can serve]")
@bits_option
@group_size_option
@sym_option
@click.option("--act-order", is_flag=True)
@click.option("--dtype", type=float_dtypes,
              help="Of activations.  [default: float16 on a GPU, float32 on a CPU]")  # fmt: skip
@device_option
@json_option
def bench_matmul(shapes: str | None, tokens: str | None, dtype: str | None, device: str, as_json: bool,
                 **settings: Any) -> None:  # fmt: skip
    """Time products of one linear: the float weight, torch's own int4 product (tinygemm), and each backend; microseconds."""
    from dataclasses import asdict

    from . import api
    from .tools import bench

    place = api.pick_device(device)
    counts = bench.parse_tokens(tokens) if tokens else list(bench.TOKENS)
    rows = bench.matmul_as_asked(shapes, counts, dtype, place, **settings)
    facts = {**bench.device_facts(place), "copy_TB_per_s": bench.copy_bandwidth(place)}
    if as_json:
        click.echo(json.dumps({**facts, "tokens": counts, "rows": [asdict(row) for row in rows]}))
        return
    click.echo(
        f"{facts['device']}, torch {facts['torch']}, copies at {facts['copy_TB_per_s']:.2f} TB/s; µs for so many tokens"
    )
    click.echo(f"{'in x out':>12} {'':16}" + "".join(f"{m:>9}" for m in counts))
    for row in rows:
        cells = "".join(f"{'-' if each is None else format(each, '.1f'):>9}" for each in row.microseconds)
        click.echo(f"{row.in_features:>6}x{row.out_features:<6}{row.kind:16}{cells}  {row.why_not or ''}".rstrip())


@bench.command("load")
@click.argument("model")
@backend_option
@click.option("--fast/--no-fast", default=False, help="Linears of one input made one.")
@device_option
@trust_option
@json_option
def bench_load(model: str, as_json: bool, **settings: Any) -> None:
    """Open a quantized MODEL and make a first token, beside reading its files: seconds."""
    from dataclasses import asdict

    from .tools import bench

    found = bench.load_times(model, **settings)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    click.echo(
        f"{found.model}: {found.bytes / 1e6:.1f} MB read in {found.read_seconds:.2f} s, loaded in {found.load_seconds:.2f} s "
        f"({found.first_load_seconds:.2f} the first time, with what Python imports), the first token {found.first_token_seconds:.2f} s after that"
    )


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@json_option
def inspect(folder: Path, as_json: bool) -> None:
    """Show what a quantized FOLDER holds: bits, groups, sizes, every linear, where it came from."""
    from . import api

    found = api.inspect(folder)
    if as_json:
        click.echo(json.dumps(found, default=str))
        return
    _show_layers(found["layers"])
    made = found["provenance"]
    click.echo(f"{folder}: format {found['format']}, {found['model_type']}, {found['size'] / 1e6:.1f} MB, "
               f"{found['bits_per_weight']:.2f} bits per quantized weight")  # fmt: skip
    if made:
        click.echo(
            f"made by qcore {made.get('qcore')} from {made.get('model')} with {made.get('algorithm')} {json.dumps(made.get('params'))}"
        )
    for note in found["notes"]:
        click.echo(f"note: {note}")


@cli.command()
@click.argument("model")
@output_folder
@click.option("--format", "format_", required=True, help="Output format; see `qcore formats`.")
@click.option("--lossy", is_flag=True, help="Change what the format cannot hold exactly to the nearest it can.")
@click.option("--manifest", is_flag=True, help="Write SHA256SUMS too.")
@click.option("--shard-gb", type=float, help="The most a weight file holds, in GB.  [default: 5]")
@json_option
def convert(
    model: str, output: Path, format_: str, lossy: bool, manifest: bool, shard_gb: float | None, as_json: bool
) -> None:
    """Write a quantized MODEL (a folder or a hub name) in another format, without quantizing again."""
    from . import api
    from .tools import conversion

    shard_bytes = None if shard_gb is None else f"{shard_gb:.9f}GB"
    conversion.convert(model, output, format_, lossy=lossy, manifest=manifest, shard_bytes=shard_bytes)
    report = api.report(output)
    lost: dict[str, dict[str, Any]] = report["converted"]["lossy"]
    if as_json:
        click.echo(json.dumps({"output": str(output), "format": format_, **report["converted"]}))
        return
    for name, facts in lost.items():
        grid = facts.get("kept") or f"{facts['bits']} bits, group {facts['group_size']}"
        click.echo(f"changed: {name}: {grid}, relative error {facts['error']:.2g}")
    click.echo(
        f"{output}: {report['converted']['from']} to {format_}, {f'{len(lost)} linears changed' if lost else 'exact'}"
    )


@cli.command()
@click.argument("model")
@click.option("--target", required=True, help="Where it shall run; see `qcore targets`.")
@click.option("--format", "format_", help="Of a plan: the format.  [default: gptq]")
@bits_option
@group_size_option
@sym_option
@click.option("--act-order", is_flag=True, help="Of a plan.")
@override_option
@click.option("--set", "options", multiple=True, metavar="NAME=VALUE", help="An option of the target; repeatable.")
@json_option
def check(model: str, target: str, format_: str | None, options: tuple[str, ...], as_json: bool, **plan: Any) -> None:
    """Tell whether --target loads MODEL: a quantized folder, or a float one with a plan (--format to --override).

    Exit code 1 when it does not.
    """
    from dataclasses import asdict

    from .errors import name_list
    from .tools import checking

    findings = checking.check(model, target, format=format_, **plan, **parse_options(options, checking.check))
    refused = any(finding.level == "refuses" for finding in findings)
    if as_json:
        click.echo(json.dumps({"loads": not refused, "findings": [asdict(finding) for finding in findings]}))
    else:
        for found in findings:
            layers = f" [{name_list(found.layers, 3)}]" if found.layers else ""
            click.echo(
                f"{found.level}: {found.rule}: {found.message}{layers}{f' ({found.source})' if found.source else ''}"
            )
        click.echo(f"{target} {'does not load' if refused else 'loads'} it")
    sys.exit(1 if refused else 0)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="HTML file to write.")
@click.option("--plots", type=click.Path(path_type=Path), help="Folder for the same heat maps as PNG.")
@_text_options
def report(folder: Path, output: Path, plots: Path | None, text: Path | None, **settings: Any) -> None:
    """Write a page about a quantized FOLDER: errors, bits and outliers of each linear, sizes, quality, how it was made."""
    from .tools import page, reporting

    found = reporting.gather(folder, text=_read_text(text) if text else None, **settings)
    _write(output, page.report_page(found))
    for file in [output, *(page.save_plots(found, plots) if plots else [])]:
        click.echo(file)


@cli.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="HTML file to write.")
@click.option("--plot", type=click.Path(path_type=Path), help="PNG file to write.")
@click.option(
    "--new-tokens", default=32, type=click.IntRange(0), help="Tokens generated to measure speed; 0 leaves it out."
)
@_text_options
@json_option
def compare(folders: tuple[Path, ...], output: Path | None, plot: Path | None, text: Path | None, as_json: bool,
            **settings: Any) -> None:  # fmt: skip
    """Rank quantized FOLDERS by KL divergence, else perplexity, else size; with --text, and --reference."""
    from .tools import page, reporting

    rows = reporting.compare(folders, text=_read_text(text) if text else None, **settings)
    if output:
        _write(output, page.compare_page(rows))
    if plot:
        page.save_comparison(rows, plot)
    if as_json:
        click.echo(json.dumps(rows))
    else:
        columns = page.compared_columns(rows)
        _table([page.COMPARED[name][0] for name in columns], [page.compared_cells(row, columns) for row in rows])


def _write(file: Path, content: str) -> None:
    try:
        file.write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}.") from None


@cli.command("new-plugin")
@click.argument("name")
@click.option("--kind", required=True, help="algorithm, backend, dataset, format, model, target or task.")
@click.option("--in", "parent", default=".", type=click.Path(path_type=Path), help="Folder to put it in.")
def new_plugin(name: str, kind: str, parent: Path) -> None:
    """Write a distribution with a working plugin NAME of a kind, and its conformance test."""
    from .tools import new_plugin as writer

    folder = writer.write(kind, name, parent)
    click.echo(f"{folder}: now\n  pip install -e '{folder}[test]'\n  pytest {folder}\n  qcore plugins")


@cli.command("build-kernels")
@click.argument("plugin", required=False)
def build_kernels(plugin: str | None) -> None:
    """Compile the native code of the backend or algorithm PLUGIN for this machine, by default of all that have some.

    Without a name, what cannot be built here is said and the others are built all the same.
    """
    from .algorithm import Algorithm
    from .backend import Backend
    from .plugins import installed

    plugins = installed()
    algorithms, backends = plugins.usable("algorithm"), plugins.usable("backend")
    if plugin:
        each = plugins.get("algorithm" if plugin in algorithms else "backend", plugin)
        click.echo(f"{plugin}: {each.build(_say)}")
        return
    native = [(name, each) for name, each in algorithms.items() if each.build.__func__ is not Algorithm.build.__func__]  # type: ignore[attr-defined]
    native += [(name, each) for name, each in backends.items() if type(each).build is not Backend.build]
    failures = []
    for name, each in native:
        try:
            click.echo(f"{name}: {each.build(_say)}")
        except BackendError as error:
            failures.append(name)
            _say(f"{name}: {error}")
    if len(failures) == len(native):
        raise BackendError(f"nothing could be built: {'; '.join(failures) or 'no plugin has native code'}.")


def _say(step: str) -> None:
    click.echo(step, err=True)


def _listing(kind: str | None, as_json: bool) -> None:
    from .plugins import installed

    rows = [row for row in installed().table() if kind is None or row["kind"] == kind]
    for row in rows if kind else ():
        offer = installed().offers(row["kind"])[row["name"]][0][1]
        row["description"] = ", ".join(offer.model_types) if kind == "model" else offer.description
        if kind == "backend":
            row["usable"] = offer.unavailable() or "yes"
    if as_json:
        click.echo(json.dumps(rows))
        return
    if kind is None:
        columns = ["kind", "name", "plugin", "distribution", "version", "status", "reason"]
    else:
        columns = ["name", *(["usable"] if kind == "backend" else []), "description", "distribution", "version"]
    titles = ["model types" if kind == "model" and column == "description" else column for column in columns]
    _table(titles, [[row[column] for column in columns] for row in rows])


@cli.command()
@click.option(
    "--explain", metavar="MODEL", help="Show the plan for a model instead: blocks, groups, what stays in float."
)
@bits_option
@group_size_option
@click.option("--samples", default=128)
@click.option("--seqlen", default=2048)
@adapter_option
@override_option
@device_option
@trust_option
@json_option
def models(explain: str | None, as_json: bool, overrides: tuple[str, ...], **settings: Any) -> None:
    """List the declared model adapters (any other causal model gets the generic one), or explain one model."""
    if explain is None:
        _listing("model", as_json)
        return
    from .tools.explain import explain as planned

    plan = planned(explain, overrides=overrides, **settings)
    if as_json:
        click.echo(json.dumps(plan))
    else:
        _show_plan(plan)


def _show_plan(plan: Mapping[str, Any]) -> None:
    rows = []
    for kind in plan["kinds"]:
        where = _ranges(kind["blocks"])
        for number, group in enumerate(kind["groups"], 1):
            for linear in group["linears"]:
                times = f"{group['times']} experts" if group["times"] > 1 else ""
                rows.append([where, str(number), linear["linear"], _by(linear["shape"]), times])
                where = ""
    title = f"{plan['model_type']}: adapter {plan['adapter']}, {plan['blocks']} blocks"
    _table(["blocks", "input", "linear (of one input: the same number)", "shape", ""], rows, title)
    for note in plan["assumed"]:
        click.echo(f"generic adapter: {note}")
    for kind in plan["grids"]:
        click.echo(f"quantized: {kind['weights']:,} weights in {kind['linears']} linears to {kind['grid']}")
    for kept in plan["float"]:
        click.echo(
            f"in float: {kept['weights']:,} weights in {kept['tensors']} tensors, {kept['why']}; {kept['example']}"
        )
    click.echo(f"size: {plan['size'] / 1e6:.1f} MB now, about {plan['size_quantized'] / 1e6:.1f} MB then")
    if "seconds" in plan:
        return
    click.echo(
        f"a run into a folder: at least {plan['memory'] / 1e9:.2f} GB for the largest block and the hidden states, at least "
        f"{plan['seconds_forward']:.1f} s of forward passes here; what the algorithm needs comes on top"
    )


def _ranges(numbers: list[int]) -> str:
    """Write block numbers short: 0, 2-5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


@cli.command()
@click.option("--model", metavar="MODEL", help="A quantized model: show which backend each kind of its linears takes.")
@backend_option
@click.option("--dtype", type=float_dtypes, help="Of a model: of activations.")
@click.option("--tokens", default=1, type=click.IntRange(1), help="Of a model: rows of most products.")
@device_option
@json_option
def backends(model: str | None, dtype: str | None, as_json: bool, **settings: Any) -> None:
    """List the kernel backends and whether each can run here; with --model, which one each linear takes, and why."""
    if model is None:
        _listing("backend", as_json)
        return
    import torch

    from .tools.choices import choices

    rows = choices(model, dtype=getattr(torch, dtype) if dtype else None, **settings)
    if as_json:
        click.echo(json.dumps(rows))
        return
    for row in rows:
        kind = f"{row['grid']}{', act-order' if row['act_order'] else ''}, {row['dtype']} on {row['device']}"
        click.echo(f"{row['count']} x {', '.join(row['linears'])}: {_by(row['shape'])}, {kind}, {row['tokens']} tokens")
        click.echo(f"  {row['backend'] or 'none'}: {row['because']}")
        for name, reason in row["others"].items():
            click.echo(f"  not {name}: {reason}")


def _listing_command(name: str, kind: str | None, text: str) -> None:
    @cli.command(name, help=text)
    @json_option
    def listing(as_json: bool) -> None:
        _listing(kind, as_json)


_listing_command("plugins", None, "List every plugin: what it offers, where it comes from, whether it works.")
_listing_command("algorithms", "algorithm", "List the algorithms.")
_listing_command("formats", "format", "List the formats.")
_listing_command("targets", "target", "List the programs that `qcore check` knows the rules of.")
_listing_command("datasets", "dataset", "List the calibration datasets.")
_listing_command("tasks", "task", "List the evaluation tasks.")


if __name__ == "__main__":
    main()
