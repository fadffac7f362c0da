"""What people see while a run goes on: one table, in place on a terminal, as plain lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ipvg_ray.pipeline.ledger import Event
from ipvg_ray.pipeline.survey import Counts

LOG_EVERY = 15.0
"""Seconds between two lines where the output is no terminal."""
_WINDOW = 60.0
"""Seconds over which the rate is taken; shorter at the start."""


@dataclass
class StageProgress:
    """Live counts of one stage: rows. `first_row` is the longest that a node was up before its first one began, s;
    `nodes` those on which one has begun."""

    counts: Counts
    done: int = 0
    failed: int = 0
    lost: int = 0
    open: dict[str, int] = field(default_factory=dict)
    busy: float = 0.0
    history: list[tuple[float, int]] = field(default_factory=list)
    first_row: float = 0.0
    nodes: set[str] = field(default_factory=set)

    @property
    def finished(self) -> int:
        return self.counts.done + self.done

    @property
    def all_failed(self) -> int:
        return self.counts.failed + self.failed

    @property
    def running(self) -> int:
        """Rows of batches that have begun and not ended; a batch that begins again counts once."""
        return sum(self.open.values())

    @property
    def waiting(self) -> int:
        return max(0, self.counts.waiting - self.done - self.failed - self.running - self.lost)

    def rate(self, now: float) -> float:
        """Rows per second over the last minute in which there were any."""
        recent = [(t, n) for t, n in self.history if t >= now - _WINDOW]
        if not recent:
            return 0.0
        span = now - recent[0][0]
        return sum(n for _, n in recent[1:]) / span if span > 0 and len(recent) > 1 else 0.0


class Progress:
    """Adds up the workers' events and draws them.

    Args:
        counts: per stage, in order, where the run starts from.
        prompts: how many samples each identity has on average: what one failed identity costs later stages.
        grains: grain per stage.

    Attributes:
        lost: `batches` that were in work on nodes which were lost, nodes that left after a notice (`notices`), and how
            often so much was lost that the run began again from its checkpoints (`executions`).
    """

    def __init__(self, counts: Mapping[str, Counts], grains: Mapping[str, str], prompts: float) -> None:
        self.stages = {name: StageProgress(c) for name, c in counts.items()}
        self.began = dict(counts)
        self.grains = dict(grains)
        self.prompts = prompts
        self.started = time.monotonic()
        self.lost: Counter[str] = Counter()

    def restart(self, counts: Mapping[str, Counts]) -> None:
        """Begin again from what is on disk: batches that were in work are not, and some were counted twice."""
        for name, stage in self.stages.items():
            self.stages[name] = StageProgress(
                counts[name], busy=stage.busy, first_row=stage.first_row, nodes=stage.nodes
            )

    def done_here(self, name: str) -> tuple[int, int]:
        """Rows of a stage that were finished since this start began, however often it began again, and those failed."""
        stage, began = self.stages[name], self.began[name]
        return stage.finished - began.done, stage.all_failed - began.failed

    def add(self, events: Sequence[Event]) -> None:
        """Take in what workers told since the last call."""
        now = time.monotonic()
        for event in events:
            stage = self.stages[event.stage]
            ended = event.done + event.failed
            if event.began:
                stage.open[event.batch] = event.began
            if event.ended:
                stage.open.pop(event.batch, None)
            stage.done += event.done
            stage.failed += event.failed
            stage.busy += event.seconds
            if event.node_age and event.node not in stage.nodes:  # a later process on it says nothing of the node
                stage.nodes.add(event.node)
                stage.first_row = max(stage.first_row, event.node_age)
            if ended:
                stage.history = [*stage.history[-500:], (now, ended)]
            if event.began > 0 and not stage.history:
                stage.history.append((now, 0))
            if event.failed:
                self._lose(event)

    def _lose(self, event: Event) -> None:
        """Rows that will never reach the stages behind a failure no longer wait there."""
        behind = False
        for name, stage in self.stages.items():
            if behind:
                widened = self.grains[event.stage] == "identity" and self.grains[name] == "sample"
                stage.lost += round(event.failed * self.prompts) if widened else event.failed
            behind = behind or name == event.stage

    def table(self) -> Table:
        """The table as it stands now."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("stage")
        for heading in ("done", "running", "waiting", "failed", "rows/s", "time left"):
            table.add_column(heading, justify="right")
        now = time.monotonic()
        for name, stage in self.stages.items():
            rate = stage.rate(now)
            left = stage.waiting + stage.running
            table.add_row(
                name,
                f"{stage.finished} / {stage.counts.total}",
                str(stage.running or "·"),
                str(stage.waiting or "·"),
                f"[red]{stage.all_failed}[/red]" if stage.all_failed else "·",
                f"{rate:.2f}" if rate and left else "·",
                duration(left / rate) if rate and left else "·",
            )
        return table

    def line(self) -> str:
        """The same as one line for a log."""
        parts = []
        for name, stage in self.stages.items():
            failed = f", {stage.all_failed} failed" if stage.all_failed else ""
            parts.append(f"{name} {stage.finished}/{stage.counts.total}{failed}")
        return f"[{duration(time.monotonic() - self.started)}] " + " · ".join(parts)


class Display:
    """Shows a `Progress` on `stream`: a live table where that is a terminal, else a line every `LOG_EVERY` seconds."""

    def __init__(self, progress: Progress, stream: TextIO) -> None:
        self.progress = progress
        self.console = Console(file=stream)
        # What others print is on its way to the log by `own_terminal`; rich must not fetch it back.
        self.live = Live(
            console=self.console,
            get_renderable=progress.table,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self.next_line = time.monotonic() + LOG_EVERY
        self.last = ""

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.console.is_terminal:
            self.live.stop()
        else:
            self._write()

    def tick(self) -> None:
        """Call often; writes a line when one is due and something has changed."""
        if not self.console.is_terminal and time.monotonic() >= self.next_line:
            self._write()
            self.next_line = time.monotonic() + LOG_EVERY

    def _write(self) -> None:
        line = self.progress.line()
        if line.partition("] ")[2] != self.last:
            print(line, file=self.console.file, flush=True)
        self.last = line.partition("] ")[2]


@contextmanager
def own_terminal(log: Path) -> Iterator[TextIO]:
    """Keep the terminal for ourselves: until the end, whatever anybody prints in this process goes to the file `log`.

    Ray writes from Python and from C++, to both streams, whatever its log levels say; so the file descriptors
    themselves are turned over.

    Yields:
        The real standard error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as file, os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace") as terminal:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def duration(seconds: float) -> str:
    """Seconds as people write them: `42 s`, `3 min 20 s`, `2 h 05 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
