"""Reports the runs of a regime: one line per system, then the ratios with their target values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.rate import Operations
from benchmarks.runs import Run
from benchmarks.table import table

HEADER = (
    "system", "batch", "rows/s", "prompt tok/s", "new tok/s", "decode of rate", "all of rate",
    "work s", "start s", "tail s", "peak GB", "occupancy", "while waiting", "spread", "same rows",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """A measured figure and its target."""

    name: str
    value: float
    least: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All runs of one regime."""

    regime: str
    runs: Mapping[str, Sequence[Run]]
    """Runs by system, possibly with several batch sizes."""
    operations: Operations
    rate: float
    """Operations per second of one large product on this machine."""

    def best(self, system: str) -> Run:
        """Return a system's run with the least work time."""
        return min(self.runs[system], key=lambda run: run.work_secs)

    def lines(self) -> str:
        """Return the Markdown table of all systems."""
        return table(HEADER, [self._line(system) for system in self.runs])

    def bars(self) -> list[Bar]:
        """Return the targets of this regime, for the systems that ran."""
        return [bar for bar in self._bars() if bar is not None]

    def _bars(self) -> list[Bar | None]:
        match self.regime:
            case "fixed":
                rate = self._bar("engine", None, "decode, of the matrix rate", 0.75)
                return [
                    self._bar("engine", "transformers", "new tok/s", 2.2),
                    self._bar("engine", "llama.cpp", "new tok/s", 1.4),
                    self._bar("engine", "llama.cpp-gguf", "new tok/s", 1.4),
                    rate,
                    self._bar("pipeline", "engine", "steady state", 0.93),
                ]
            case "natural":
                return [self._bar("engine", "transformers", "rows/s", 4.0)]
            case _:
                return [self._bar("pipeline", "engine", "steady state", 0.93)]

    def _bar(self, system: str, other: str | None, figure: str, least: float) -> Bar | None:
        if not {system, other or system} <= set(self.runs):
            return None
        value = self._figure(system, figure) / (self._figure(other, figure) if other else self.rate)
        name = f"{system} / {other}, {figure}" if other else f"{system}, {figure}"
        return Bar(name=name, value=value, least=least)

    def _figure(self, system: str, figure: str) -> float:
        run = self.best(system)
        match figure:
            case "new tok/s":
                return run.decode_rate
            case "rows/s":
                return run.rows_per_sec
            case "steady state":
                # The first step's time includes reading, prompts and the first batch.
                return run.operations_per_sec(self.operations, skip=1)
            case _:
                return run.decode_operations_per_sec(self.operations)

    def _line(self, system: str) -> list[str]:
        run = self.best(system)
        same_size = [r.work_secs for r in self.runs[system] if r.batch_size == run.batch_size]
        spread = (max(same_size) - min(same_size)) / min(same_size)
        waiting = run.backlog_occupancy
        return [
            system,
            str(run.batch_size),
            f"{run.rows_per_sec:.2f}",
            f"{run.prompt_rate:.0f}",
            f"{run.decode_rate:.0f}",
            f"{run.decode_operations_per_sec(self.operations) / self.rate:.2f}",
            f"{run.operations_per_sec(self.operations) / self.rate:.2f}",
            f"{run.work_secs:.1f}",
            f"{run.startup_secs:.1f}",
            f"{run.tail_secs:.1f}",
            f"{run.peak_bytes / 1e9:.2f}",
            f"{run.occupancy:.2f}",
            "" if waiting is None else f"{waiting:.2f}",
            f"{spread:.0%} of {len(same_size)}",
            self._same_rows(run),
        ]

    def _same_rows(self, run: Run) -> str:
        if "engine" not in self.runs:
            return ""
        pairs = zip(run.token_ids, self.best("engine").token_ids, strict=True)
        return f"{sum(theirs == ours for theirs, ours in pairs)}/{len(run.token_ids)}"


def bar_lines(bars: Sequence[Bar]) -> str:
    """Return the bars as a table."""
    header = ("figure", "measured", "bar", "")
    rows = [
        (
            bar.name,
            f"{bar.value:.2f}",
            f"{bar.least:.2f}",
            "met" if bar.value >= bar.least else "no",
        )
        for bar in bars
    ]
    return table(header, rows)
