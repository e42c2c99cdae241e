"""An exported folder in, a model of the Hugging Face hub out."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ping_llm.inference.sources import is_export
from ping_llm.system.hub import one_line_errors

_UPLOADED = ["*.json", "*.safetensors", "*.py", "README.md"]


def check_name(name: str) -> None:
    """ValueError unless a name has the form OWNER/NAME: without an owner the hub would take it for two models."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push {name}: {' '.join(str(error).split())}") from None
    if "/" not in name:
        raise ValueError(f"--push {name} has no owner; write it as OWNER/{name}")


def push(folder: Path, name: str, public: bool = False) -> str:
    """Puts an exported folder onto the hub as OWNER/NAME, in one commit, whole or not at all; gives its address.

    A model that is new is private unless `public`. Of one that is there, all files of an export are replaced, and others
    stay. ValueError, one line: it is no export, or the hub or the way to it fails.
    """
    if not is_export(folder):
        raise ValueError(f"{folder} is no exported folder; write one with ping-llm export RUN --to DIR")
    check_name(name)
    with one_line_errors(f"{folder} cannot be pushed to {name}"):
        api = HfApi()
        address = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=_UPLOADED,
            delete_patterns=[pattern for pattern in _UPLOADED if pattern != "README.md"],
            commit_message="Export of ping-llm",
        )
    return str(address)
