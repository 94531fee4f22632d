"""``first_light.json``: what was measured, kept whole on disk after every item."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "first_light.json"
# Where the process of a step writes; what is left of it belongs to a run that was killed.
PART = ".first_light.part.json"
ATTEMPTS = 2  # of an item that does not end well


class Unwritable(Exception):
    """The folder or its file cannot be used; the message says why."""


class Saved:
    """The file's content: for each step its items, by name, and whether it has them all."""

    def __init__(self, folder: Path, rehearsal: bool) -> None:
        self.path, self.part = folder / NAME, folder / PART
        self.content: dict[str, Any] = {"format": FORMAT, "rehearsal": rehearsal, "steps": {}}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._read(rehearsal)
            self.write()
        except OSError as error:
            raise Unwritable(f"cannot write {self.path}: {error.strerror}") from error
        self.take_part()

    def _read(self, rehearsal: bool) -> None:
        try:
            content = json.loads(self.path.read_text())
            fits = content["format"] == FORMAT and content["rehearsal"] == rehearsal
        except (ValueError, KeyError, TypeError):
            raise Unwritable(f"{self.path} is not of first_light; use another folder") from None
        if not fits:
            raise Unwritable(
                f"{self.path} is of {'a rehearsal' if content['rehearsal'] else 'a GPU'} in format "
                f"{content['format']}; use another folder"
            )
        self.content = content

    def write(self) -> None:
        """Whole or not at all."""
        write_json(self.path, self.content)

    def step(self, name: str) -> dict[str, Any]:
        return self.content["steps"].setdefault(
            name, {"complete": False, "seconds": 0.0, "items": {}}
        )

    def settled(self, name: str) -> set[str]:
        """The items that need not be measured any more."""
        items = self.step(name)["items"].items()
        return {key for key, row in items if row["status"] == "done" or row["attempts"] >= ATTEMPTS}

    def is_settled(self, name: str) -> bool:
        step = self.step(name)
        return step["complete"] and self.settled(name) == set(step["items"])

    def put(self, name: str, key: str, row: dict[str, Any]) -> None:
        items = self.step(name)["items"]
        attempts = items.get(key, {}).get("attempts", 0) + 1
        items[key] = {**row, "attempts": attempts}

    def take_part(self) -> dict[str, Any]:
        """Move what a step's process has written by now into the file; what it said."""
        try:
            said = json.loads(self.part.read_text())
        except (OSError, ValueError):
            return {}
        known = self.step(said["step"])
        new = {key: row for key, row in said["items"].items() if row["id"] not in known_ids(known)}
        for key, row in new.items():
            self.put(said["step"], key, row)
        if new or said["ended"] and not known["complete"]:
            known["complete"] = known["complete"] or said["ended"]
            self.write()
        return said

    def drop_part(self) -> None:
        self.part.unlink(missing_ok=True)


def known_ids(step: dict[str, Any]) -> set[str]:
    return {row["id"] for row in step["items"].values() if "id" in row}


def write_json(path: Path, content: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
