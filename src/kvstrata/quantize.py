"""`kvstrata quantize`: a progress bar while it works, then what became of the checkpoint."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from folovllm.quantization.quantize import QuantizeReport, quantize_checkpoint


def run_quantize(
    model: Path,
    out: Path,
    *,
    bits: int,
    head_bits: int,
    group_size: int,
    calibration: Path,
    sym: bool,
    desc_act: bool,
    num_windows: int,
    window_tokens: int,
    console: Console,
) -> QuantizeReport:
    """Quantise, and report on `console`.

    Raises:
        folovllm.quantization.errors.QuantizationError: something is not fit; nothing is written.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # one bar is enough
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        report = quantize_checkpoint(
            model,
            out,
            bits=bits,
            head_bits=head_bits,
            group_size=group_size,
            calibration=calibration,
            sym=sym,
            desc_act=desc_act,
            num_windows=num_windows,
            window_tokens=window_tokens,
            progress=show,
        )
    console.print(as_table(report))
    return report


def as_table(report: QuantizeReport) -> Table:
    """Sizes and perplexities before and after."""
    groups = "all inputs" if report.group_size == -1 else f"{report.group_size} inputs"
    table = Table(
        "", "before", "after", box=box.SIMPLE, title=f"{report.out}: {report.bits} bits, a scale for {groups}"
    )
    linear = report.quantized_bytes_before, report.quantized_bytes_after
    head = report.head_bytes_before, report.head_bytes_after
    whole = tuple(map(sum, zip(linear, head, [report.kept_bytes] * 2, strict=True)))
    table.add_row(f"{report.num_layers} linear layers", *map(_megabytes, linear))
    if report.head_bits == 16:
        table.add_row("embedding, norms, head", *[_megabytes(report.kept_bytes)] * 2)
    else:
        before = _megabytes(head[0]) if head[0] else "the embedding"
        table.add_row(f"output head, {report.head_bits} bits", before, _megabytes(head[1]))
        table.add_row("embedding, norms", *[_megabytes(report.kept_bytes)] * 2)
    table.add_row("whole checkpoint", *map(_megabytes, whole))
    table.add_row(
        f"perplexity of {report.held_out_tokens} held-out tokens",
        f"{report.perplexity_before:.4f}",
        f"{report.perplexity_after:.4f} ({report.perplexity_increase:+.2%})",
    )
    table.caption = f"{report.calibration_tokens} tokens of calibration text, {report.seconds:.0f} s"
    table.caption_justify = "left"
    return table


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.2f} MB"
