"""A run and a folder of rows in, whether the run may have learned the answers out."""

from __future__ import annotations

import json
from pathlib import Path

from ping_llm.data.rows import MANIFEST_NAME, manifest_sha256, read_manifest
from ping_llm.system.files import file_sha256
from ping_llm.training.run_state import ROWS_MANIFEST_NAME


def leak_problem(run: Path, trained_rows: Path, rows_sha256: str, data: Path) -> str:
    """What speaks against querying `data`; empty if nothing does.

    `trained_rows` and `rows_sha256` are where the run's rows were, and the hash of their manifest. Rows with that manifest
    have test parts that were kept from the run. Any others must share no input file with it.
    """
    if manifest_sha256(data) == rows_sha256:
        return ""
    manifests = (path for path in (run / ROWS_MANIFEST_NAME, trained_rows / MANIFEST_NAME) if path.is_file())
    trained = next((path for path in manifests if file_sha256(path) == rows_sha256), None)
    if trained is None:
        return f"what {run} learned from is not known: {trained_rows} is gone or was prepared again"
    seen = {one.get("sha256") for one in json.loads(trained.read_text()).get("inputs", ())} - {None, ""}
    shared = [one["name"] for one in read_manifest(data).get("inputs", ()) if one.get("sha256") in seen]
    more = f" and {len(shared) - 1} more files" if len(shared) > 1 else ""
    return f"{run} may have learned from {data}: both were made of {shared[0]}{more}" if shared else ""
