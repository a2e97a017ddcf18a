"""`rlhf report RUN`: write report.html and the plots of a run again; see `rlhf.page`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import page
from rlhf.errors import ConfigError
from rlhf.run import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Which run to describe."""

    run: str = ""  # its directory

    def check(self) -> None:
        if self.run and not Path(self.run).is_dir():
            raise ConfigError(f"expected a run directory, got '{self.run}': write runs/<name>")


def run(config: Config) -> dict[str, Any]:
    """Write the report. Raises ConfigError if no run is named, OSError if it is not writable."""
    if not config.run:
        raise ConfigError("expected the directory of a run: write rlhf report runs/<name>")
    return page.write(Run(Path(config.run)))


def summarise(result: Mapping[str, Any]) -> str:
    """Where the page is."""
    return f"{result['report']}  ({len(result['plots'])} plots beside it)"
