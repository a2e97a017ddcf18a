"""`rlhf assets`: the models that are shipped inside the package, from their cards.

An asset is a folder or a weights file in rlhf/assets or rewards/assets. The card of a folder is its
README.md, with a YAML head between two lines of `---` (or a card.json); it gives the `resolution`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import rewards
from rlhf.assets import ROOT, digest

ROOTS = (ROOT, Path(rewards.__file__).parent / "assets")
WEIGHTS = (".safetensors",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Nothing to set."""


def entries(roots: tuple[Path, ...] = ROOTS) -> dict[str, dict[str, Any]]:
    """{name: {path, resolution, megabytes, sha256}} of what lies in the asset folders.

    `resolution` is in pixels, None where no card says; sha256 is over names and bytes of all files.
    """
    out: dict[str, dict[str, Any]] = {}
    for root in roots:
        found = sorted(root.iterdir()) if root.is_dir() else []
        for path in found:
            if not _is_asset(path):
                continue
            name = path.stem if path.is_file() else path.name
            files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
            out[name if name not in out else f"{root.parent.name}/{name}"] = {
                "path": str(path),
                "resolution": card(path).get("resolution"),
                "megabytes": round(sum(p.stat().st_size for p in files) / 2**20, 3),
                "sha256": digest(path) if path.is_dir() else _digest_file(path),
            }
    return out


def _is_asset(path: Path) -> bool:
    if path.name.startswith((".", "_")):
        return False
    if path.is_file():
        return path.suffix in WEIGHTS
    return any(p.suffix in WEIGHTS for p in path.rglob("*"))


def _digest_file(path: Path) -> str:
    from rlhf.checkpoint import sha256

    return sha256(path)


def card(path: Path) -> Mapping[str, Any]:
    """The YAML head of a folder's README.md, or card.json; empty if there is neither."""
    folder = path if path.is_dir() else path.with_suffix("")
    text = folder / "README.md"
    if text.is_file():
        parts = text.read_text(encoding="utf-8").split("---", 2)
        head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
        if isinstance(head, Mapping):
            return head
    record = folder / "card.json"
    if record.is_file():
        data = json.loads(record.read_text(encoding="utf-8"))
        if isinstance(data, Mapping):
            return data
    return {}


def run(config: Config) -> dict[str, Any]:
    """The table, as `--json` prints it."""
    return entries()


def summarise(result: Mapping[str, Any]) -> str:
    """One block per asset, with its card."""
    if not result:
        return "no models are shipped with this installation"
    width = max(map(len, result))
    lines = []
    for name, asset in result.items():
        pixels = f"{asset['resolution']} px" if asset["resolution"] else "-"
        lines.append(
            f"{name:<{width}}  {pixels:>7}  {asset['megabytes']:>8.2f} MB  "
            f"{asset['sha256'][:12]}  {asset['path']}"
        )
        about = {k: v for k, v in card(Path(asset["path"])).items() if k != "resolution"}
        lines += [f"{'':<{width}}    {key}: {value}" for key, value in about.items()]
    return "\n".join(lines)
