"""Upload exported models to the Hugging Face Hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from lit_gpt_scratch.errors import UserError
from lit_gpt_scratch.terminal_output import quote_short

ADVICE: Final = {401: "use another token", 403: "use a token that may write to this repository"}
"""What to do after the Hub has rejected a request, keyed by its status code."""


def require_hub_access(name: str) -> None:
    """Check the name of a repository, and that the Hub accepts the user's token, before a model is exported.

    Raises:
        UserError: The name is invalid, there is no token, or the Hub rejects it or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in __all__

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"argument --push: {quote_short(str(error))}; choose another name") from error
    if "/" not in name:
        raise UserError(f"argument --push: {name} has no owner; it must have the form owner/name")
    with _explained("cannot log in to the Hub"):
        HfApi().whoami()


def upload_model(folder: Path, name: str, public: bool) -> str:
    """Upload a folder to a model repository, which is created if it does not exist.

    Args:
        folder: Folder written by ``write_hf_checkpoint``.
        name: Name of the repository, ``owner/name``.
        public: Whether a new repository is public. An existing repository keeps its visibility.

    Returns:
        URL of the repository.

    Raises:
        UserError: The Hub rejects the upload or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _explained(f"cannot upload {folder}, which is complete, to {name}"):
        url = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload model")
    return str(url)


@contextmanager
def _explained(failed: str) -> Iterator[None]:
    """Context manager that converts the errors of requests to the Hub to a one-line ``UserError``."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    from huggingface_hub.errors import HTTPError as LibraryError  # type: ignore[attr-defined]  # of its HTTP library

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(f"{failed}: there is no token; run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        reason = quote_short(error.server_message or str(error))
        status = error.response.status_code
        advice = ADVICE.get(status, "try again later")
        raise UserError(f"{failed}: the Hub answers {status} ({reason}); {advice}") from error
    except (OSError, LibraryError) as error:
        raise UserError(f"{failed}: {quote_short(str(error))}; check the network connection") from error
