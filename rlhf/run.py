"""The directory of one run: what was asked, what happened, what came out.

runs/<name>/config.yaml        resolved configuration
           run.json            program, time of creation, machine
           metrics.jsonl       one row per iteration (rlhf.metrics)
           tensorboard/        the same as events
           samples/            pictures; names with step_NNNNNN belong to an iteration
           checkpoints/        rlhf.checkpoint
           evaluations/        <id>.json written by other programs about this run
           superseded/NNN/     rows, samples and checkpoints past the point a run was resumed from
           result.json         what the program that made the run found out
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import config as config_module
from rlhf.errors import CheckpointError, ConfigError
from rlhf.files import atomic_write_text, json_text
from rlhf.metrics import FILE as METRICS
from rlhf.metrics import Row, read_rows, write_rows

Metric = Mapping[str, float | int]
STEP = re.compile(r"step_(\d+)")


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory. Make one with `create` or `open`."""

    root: Path

    @staticmethod
    def create(root: Path | str, name: str, config: Any, program: str) -> Run:
        """Make `root/name` with config.yaml and run.json. Raises ConfigError if the name is taken
        or unusable.
        """
        run = Run(Run.vacant(root, name))
        for folder in (run.samples, run.checkpoints, run.evaluations):
            folder.mkdir(parents=True, exist_ok=True)
        about = {
            "program": program,
            "name": name,
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": machine(),
        }
        run.write_json("run.json", about)
        config_module.save_yaml(config, run.root / "config.yaml")  # last: `open` looks for it
        return run

    @staticmethod
    def vacant(root: Path | str, name: str) -> Path:
        """The directory that `create` would fill; nothing is written. Raises ConfigError."""
        if not re.fullmatch(r"[\w][\w.\-]*", name):
            raise ConfigError(
                f"expected a run name of letters, digits, '_', '-', '.', got '{name}'"
            )
        path = Path(root) / name
        if path.exists() and any(path.iterdir()):
            raise ConfigError(
                f"the run '{path}' exists: write another name, continue it with --resume {path}, "
                "or remove the directory"
            )
        return path

    @staticmethod
    def open(path: Path | str) -> Run:
        """An existing run. Raises ConfigError if `path` holds none."""
        run = Run(Path(path))
        if not (run.root / "config.yaml").is_file():
            raise ConfigError(
                f"expected a run directory with a config.yaml, got '{path}': write runs/<name>"
            )
        return run

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluations"

    @property
    def config_path(self) -> Path:
        return self.root / "config.yaml"

    def rows(self) -> list[Row]:
        """Rows of metrics.jsonl, oldest first."""
        return read_rows(self.root / METRICS)

    def about(self) -> dict[str, Any]:
        """run.json; empty if the file is not there."""
        return self.read_json("run.json") or {}

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file in the run, whole or not at all. Raises ValueError on NaN."""
        path = self.root / name
        atomic_write_text(path, json_text(value))
        return path

    def read_json(self, name: str) -> Any:
        """A JSON file of the run, or None. Raises CheckpointError if it is damaged."""
        path = self.root / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(
                f"expected JSON in {path}, got {error}: restore or remove the file"
            ) from error

    def write_result(
        self, seconds: float | int, metrics: Mapping[str, Metric], **extra: Any
    ) -> dict[str, Any]:
        """Write and return result.json. Only for the program of the run. Raises ValueError."""
        result = report(self.about().get("program", ""), seconds, metrics, **extra)
        self.write_json("result.json", result)
        return result

    def write_evaluation(
        self,
        id: str,
        program: str,
        seconds: float | int,
        metrics: Mapping[str, Metric],
        **extra: Any,
    ) -> dict[str, Any]:
        """Write and return evaluations/<id>.json: what another program found out. Raises
        ValueError.
        """
        result = report(program, seconds, metrics, **extra)
        self.write_json(f"evaluations/{id}.json", result)
        return result

    def supersede(self, after_step: int) -> Path | None:
        """Move rows, samples and checkpoints with a step > `after_step` to superseded/NNN.

        Returns that folder, or None if there was nothing to move. Rows are copied before they are
        cut, so a kill in between loses nothing.
        """
        rows = self.rows()
        late_rows = [row for row in rows if row["step"] > after_step]
        late = [
            p
            for p in (*_entries(self.samples), *_entries(self.checkpoints))
            if _step(p) > after_step
        ]
        if not late_rows and not late:
            return None
        target = self._next_superseded()
        if late_rows:
            write_rows(target / METRICS, late_rows)
            write_rows(self.root / METRICS, [row for row in rows if row["step"] <= after_step])
        for path in late:
            moved = target / path.relative_to(self.root)
            moved.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, moved)
        return target

    def _next_superseded(self) -> Path:
        folder = self.root / "superseded"
        taken = [int(p.name) for p in _entries(folder) if p.name.isdigit()]
        path = folder / f"{max(taken, default=0) + 1:03d}"
        path.mkdir(parents=True)
        return path


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _step(path: Path) -> int:
    """The step in a file name, -1 if it has none."""
    found = STEP.search(path.name)
    return int(found.group(1)) if found else -1


def report(
    program: str, seconds: float | int, metrics: Mapping[str, Metric], **extra: Any
) -> dict[str, Any]:
    """The one form of a result: {"program", "seconds", "metrics": {name: {...}}}, extras after.

    Each metric holds either "value", or "before", "after" and "gain"; and may hold "low", "high"
    (95% interval of the value or gain) and "n". Raises ValueError naming the metric that does not.
    """
    allowed = [{"value"}, {"before", "after", "gain"}]
    for name, metric in metrics.items():
        if set(metric) - {"low", "high", "n"} not in allowed:
            raise ValueError(
                f"metric '{name}' expects 'value' or 'before', 'after', 'gain' (and 'low', "
                "'high', 'n'), "
                f"got {sorted(metric)}"
            )
    return {"program": program, "seconds": round(seconds, 3), "metrics": dict(metrics), **extra}


def machine() -> dict[str, Any]:
    """What the figures of a run were measured on."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
