"""Prints the results as tables, and the ratios that are the goals of the project."""

from __future__ import annotations

from statistics import median

from benchlib.plan import SYNC_WORKLOADS, WORKLOADS, Result, Results, Workload
from rich.console import Console
from rich.table import Table

# (dividend, divisor, workload): above 1 the first one is faster.
RATIOS: tuple[tuple[str, str, str], ...] = (
    ("cowfs", "null", "create"),
    ("cowfs", "null", "delete"),
    ("cowfs", "null", "stat"),
    ("cowfs", "null", "readdir"),
    ("cowfs", "null-xattrs", "create"),
    ("null", "null-stock", "create"),
    ("null", "null-stock", "stat"),
    ("null", "null-stock", "delete"),
    ("null", "null-stock", "readdir"),
    ("cowfs", "zfs-fuse", "seq-write"),
    ("cowfs", "zfs-fuse", "seq-read"),
    ("cowfs", "zfs-fuse", "seq-read-remounted"),
    ("cowfs", "btrfs", "rand-write"),
    *(("cowfs", "before", workload.name) for workload in WORKLOADS),
    *(
        ("cowfs", peer, workload)
        for workload in (workload.name for workload in SYNC_WORKLOADS)
        for peer in ("zfs-fuse", "btrfs", "ext4")
    ),
)


def _cell(rates: list[float], result: Result) -> str:
    if not rates:
        return "-" if result.failure in ("", "-") else "failed"
    middle = f"{median(rates):,.0f}"
    if len(rates) > 1:
        middle += f"\n{min(rates):,.0f}-{max(rates):,.0f}"
    return middle


def print_rates(console: Console, results: Results, workloads: list[Workload]) -> None:
    """Print the table of rates, that of daemon CPU, and every failure in full."""
    rates = Table(title="rates: median, then minimum-maximum over the runs", title_justify="left")
    cpu = Table(title="daemon CPU, us per operation", title_justify="left")
    written = Table(title="written by the daemon, KiB per operation", title_justify="left")
    for table in (rates, cpu, written):
        table.add_column("workload", no_wrap=True)
        table.add_column("unit", no_wrap=True)
        for target in results:
            table.add_column(target, justify="right", no_wrap=True)
    for workload in workloads:
        rows = {target: results[target][workload.name] for target in results}
        shown = [
            "failed" if results[target][""].failure else _cell(row.rates, row)
            for target, row in rows.items()
        ]
        rates.add_row(workload.name, workload.unit, *shown)
        if workload.synced:
            shown = [_cell(row.synced_rates, row) for row in rows.values()]
            rates.add_row(f"{workload.name} + sync", workload.unit, *shown)
        if any(row.cpu_us for row in rows.values()):
            shown = [f"{median(row.cpu_us):,.1f}" if row.cpu_us else "-" for row in rows.values()]
            cpu.add_row(workload.name, f"per {workload.unit.removesuffix('/s')}", *shown)
            shown = [
                f"{median(row.written_kib):,.1f}" if row.written_kib else "-"
                for row in rows.values()
            ]
            written.add_row(workload.name, f"per {workload.unit.removesuffix('/s')}", *shown)
    console.print(rates)
    if cpu.row_count:
        console.print(cpu)
        console.print(written)
    for target, target_results in results.items():
        for name, result in target_results.items():
            if result.failure not in ("", "-"):
                console.print(f"{target}: {name or 'not measured'}: {result.failure}", markup=False)


def ratios(results: Results) -> dict[str, float]:
    """By name, the ratios of which both sides were measured."""
    found = {}
    for dividend, divisor, workload in RATIOS:
        above = results.get(dividend, {}).get(workload)
        below = results.get(divisor, {}).get(workload)
        if above and below and above.rates and below.rates:
            found[f"{workload}: {dividend}/{divisor}"] = median(above.rates) / median(below.rates)
    return found


def print_figures(console: Console, title: str, figures: dict[str, float]) -> None:
    """Print named numbers, one per line."""
    if not figures:
        return
    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:,.2f}")
    console.print(f"{title}:", markup=False)
    console.print(table)
