"""Why `auto` picked what it picked: the terms of its cost model beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from reducer._bench.contest import Outcome
from reducer._bench.team import Team
from reducer._bench.units import format_seconds, format_size


@dataclass(frozen=True)
class Choice:
    """What a group does by size, and what it expects at each of some sizes, each way; nothing: it did not measure."""

    algorithm: str
    sizes: tuple[int, ...]
    ways: tuple[list[dict[str, Any]], ...]


def read_choice(team: Team, group: str, sizes: Sequence[int]) -> Choice:
    reply = team.call({"do": "explain", "group": group, "sizes": list(sizes)}, 60.0)[0]
    return Choice(reply["algorithm"], tuple(sizes), tuple(reply["ways"]))


def way_name(algorithm: str, chunk_bytes: int, window_bytes: int) -> str:
    """ "mixed", or "mixed, chunk 64 KiB"."""
    name = algorithm
    if chunk_bytes:
        name += f", chunk {format_size(chunk_bytes)}"
    return name + (f", window {format_size(window_bytes)}" if window_bytes else "")


def explain_choice(console: Console, choice: Choice, cases: Sequence[Sequence[Outcome]]) -> None:
    console.print(f"auto is: {choice.algorithm}")
    if not any(choice.ways):
        console.print(
            "It went by no measurement: these are made where a group is on several hosts (unless REDUCER_TUNING is "
            "off), and by `reducer tune`. Without any, `auto` is shared memory where all ranks can share it, else "
            "mixed with standalone reducers and direct without."
        )
        return
    console.print(choice_table(choice, cases))


def choice_table(choice: Choice, cases: Sequence[Sequence[Outcome]]) -> Table:
    """One row per size and way, the picked one marked.

    factor: by which the model is corrected, since that was measured; now: measured in this run, where the way ran.
    """
    table = Table(title="what auto expects of each way, and what was measured", title_justify="left")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("way", no_wrap=True)
    for heading in ("hops", "frames", "wire", "work", "factor", "predicted", "now", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("picked", no_wrap=True)
    for nbytes, ways, case in zip(choice.sizes, choice.ways, cases, strict=True):
        medians = {outcome.contender: outcome.median_s for outcome in case if outcome.measured}
        for number, way in enumerate(ways):
            plain = not way["chunk_bytes"] and not way["window_bytes"]
            now = medians.get(f"reducer {way['algorithm']}") if plain else None
            if way["chosen"]:
                now = medians.get("reducer auto", now)
            table.add_row(
                format_size(nbytes) if number == 0 else "",
                way_name(way["algorithm"], way["chunk_bytes"], way["window_bytes"]),
                *(format_seconds(way[f"{part}_s"]) for part in ("messages", "frames", "wire", "work")),
                f"{way['correction']:.2f}",
                format_seconds(way["seconds"]),
                "-" if now is None else format_seconds(now),
                "-" if now is None else f"{way['seconds'] / now:.2f}",
                "[green]yes" if way["chosen"] else "",
                end_section=way is ways[-1],
            )
    return table
