"""The name of a model of the Hugging Face hub in, the folder that it lies in on this machine out.

The hub's own client does the work: it keeps what it has fetched, goes on where a transfer broke off, and shows a file only
once it is whole. HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to every program that uses it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

NAME_PATTERN = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(@[A-Za-z0-9_][\w./-]*)?"
"""OWNER/NAME, or OWNER/NAME@REVISION: a branch, a tag or a commit."""


def download(name: str, files: Sequence[str], proof: str) -> Path:
    """The folder of a model with those of its `files` that there are; ValueError, one line, if it cannot be had.

    Only a model that has the file `proof` is fetched. Without a connection it is what was fetched before.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    with one_line_errors(f"{name} is no folder here, and cannot be loaded from the hub"):
        try:
            try:
                found = Path(hf_hub_download(repo, proof, revision=revision or None))
            except HTTPError as error:
                if isinstance(error, HfHubHTTPError):
                    raise
                # The connection broke, which the client does not take for none.
                found = Path(hf_hub_download(repo, proof, revision=revision or None, local_files_only=True))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            raise ValueError(
                f"{name} is no model of ping-llm: the hub has it, but without the file {proof}, which ping-llm export writes"
            ) from None
        commit = found.parent.name  # the rest of the same state of the model, even if another one comes up meanwhile
        if all((found.parent / file).exists() for file in files):
            return found.parent
        return Path(snapshot_download(repo, revision=commit, allow_patterns=list(files)))


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Makes any failure of the hub or of the way to it a ValueError of one line, which begins with `what` failed."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f"the hub at {constants.ENDPOINT}"
    try:
        with _quiet():
            yield
    except RevisionNotFoundError:
        raise ValueError(f"{what}: it has no such revision") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{what}: {at} has no such model, or shows it only to a token that may read it (HF_TOKEN)"
        ) from None
    except HFValidationError as error:
        raise ValueError(f"{what}: {_first_line(error)}") from None
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code == 401:
            raise ValueError(f"{what}: {at} wants a valid token; set HF_TOKEN, or log in with hf auth login") from None
        if code == 403:
            raise ValueError(f"{what}: {at} does not allow it to this token: {_first_line(error)}") from None
        raise ValueError(f"{what}: {at} answered {code}: {_first_line(error)}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise ValueError(f"{what}: {at} did not answer as it should, and the model was not fetched before") from None
    except (HTTPError, ConnectionError, TimeoutError) as error:
        raise ValueError(
            f"{what}: the connection to {at} broke off ({_first_line(error)}); repeat the command"
        ) from None
    except OSError as error:
        if error.filename:  # a full disk, a folder without permission
            raise
        raise ValueError(f"{what}: {_first_line(error)}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a line of the client for each try, and without bars where there is no terminal."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    level, hide = logging.get_verbosity(), not sys.stderr.isatty() and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hide:
            enable_progress_bars()


def _first_line(error: Exception) -> str:
    """What an error says, without the lines after."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
