"""A run and a folder of rows in, whether the run may have learned the answers out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ping_llm.data.rows import MANIFEST_NAME, manifest_sha256, read_manifest
from ping_llm.training.run_state import ROWS_MANIFEST_NAME


@dataclass(frozen=True)
class LeakCheck:
    """Whether rows are those that a run was trained beside, and what, if anything, speaks against using them."""

    same_rows: bool
    problem: str = ""

    def refuse(self, allow_leak: bool) -> None:
        """ValueError if something speaks against it, unless that is allowed."""
        if self.problem and not allow_leak:
            raise ValueError(
                f"{self.problem}; give rows of other measurements, or --allow-leak to see the numbers anyway"
            )


def check_leak(run: Path, trained_rows: Path, rows_sha256: str, data: Path) -> LeakCheck:
    """`trained_rows` and `rows_sha256` are where the run's rows were, and the hash of their manifest.

    Rows with that manifest have test parts that were kept from the run. Any others must share no input file with it.
    """
    if manifest_sha256(data) == rows_sha256:
        return LeakCheck(same_rows=True)
    trained = _trained_manifest(run, trained_rows, rows_sha256)
    if trained is None:
        return LeakCheck(False, f"what {run} learned from is not known: {trained_rows} is gone or was prepared again")
    seen = {one["sha256"]: one["name"] for one in trained.get("inputs", ()) if one.get("sha256")}
    shared = [one["name"] for one in read_manifest(data).get("inputs", ()) if one.get("sha256") in seen]
    if shared:
        files = f"{shared[0]}" + (f" and {len(shared) - 1} more files" if len(shared) > 1 else "")
        return LeakCheck(False, f"{run} may have learned from {data}: both were made of {files}")
    return LeakCheck(False)


def _trained_manifest(run: Path, trained_rows: Path, rows_sha256: str) -> dict | None:
    for path in (run / ROWS_MANIFEST_NAME, trained_rows / MANIFEST_NAME):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == rows_sha256:
            return json.loads(path.read_text())
    return None
