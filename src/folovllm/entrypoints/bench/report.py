"""Figures of a benchmark: percentiles, a table, a JSON file with the machine they come from."""

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

PERCENTILES = (50, 90, 99)


def summarize(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles; None without values."""
    if not values:
        return None
    found = {"mean": float(np.mean(values))}
    return found | {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}


def report(title: str, figures: dict[str, Any], output_json: Path | None) -> None:
    """Print the figures, and write them to `output_json`; a nested dict is one row of percentiles."""
    console = Console()
    table = Table(title=title, show_header=False, title_justify="left")
    spread = Table("", "mean", *[f"p{p}" for p in PERCENTILES], box=None)
    for name, value in figures.items():
        if isinstance(value, dict):
            spread.add_row(name, *[f"{v:,.2f}" for v in value.values()])
        elif value is not None:
            table.add_row(name, f"{value:,.2f}" if isinstance(value, float) else f"{value}")
    console.print(table)
    if spread.rows:
        console.print(spread)
    if output_json is not None:
        machine = {"platform": platform.platform(), "python": platform.python_version(), "cpus": os.cpu_count()}
        output_json.write_text(json.dumps({"benchmark": title, **figures, "machine": machine}, indent=2) + "\n")
