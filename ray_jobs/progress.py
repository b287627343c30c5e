"""How far a job is: bars on a terminal, elsewhere (a job's log, CI) a line for every tenth part."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Meter:
    """A context that shows one or more countable pieces of work by name."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # Not `is_terminal`, which FORCE_COLOR makes true for a log, too.
        self._live = console.file.isatty() and not console.is_dumb_terminal
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[tuple[str, int], int] = {}

    def __enter__(self) -> Self:
        """Begin to show."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bars where they are."""
        self._bars.stop()

    def say(self, line: str) -> None:
        """Print a line that stays, above the bars."""
        self._console.print(line, highlight=False, markup=False)

    def show(self, name: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` parts of the work `name` are done; may be called from another thread."""
        if self._live:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total, note=note)
            self._bars.update(self._tasks[name], completed=done, total=total, note=note)
            return
        tenth = 10 * done // max(1, total)
        if tenth > self._tenths.get((name, total), 0):
            self._tenths[name, total] = tenth
            self.say(f"{name}: {done} of {total}{', ' if note else ''}{note}")
