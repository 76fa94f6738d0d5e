"""An exported model sent to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from minimind_dpo.errors import UserError


def check_repository(name: str) -> None:
    """Raise UserError for a name that no repository can have."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub: {error}") from None


def push(path: Path, repository: str) -> str:
    """Send a model; a repository that is not there is made, private.

    The token is huggingface_hub's own affair (`hf auth login`, or `HF_TOKEN`): it is neither read nor written here.

    Args:
        path: the directory or file.
        repository: `owner/name`, or a name of the user's own.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub can't be reached, or refuses.
    """
    api = HfApi()
    message = "Upload a model aligned with minimind_dpo"
    try:
        full_name = api.create_repo(repository, private=True, exist_ok=True).repo_id
        if path.is_dir():
            return api.upload_folder(folder_path=path, repo_id=full_name, commit_message=message).commit_url
        return api.upload_file(
            path_or_fileobj=path, path_in_repo=path.name, repo_id=full_name, commit_message=message
        ).commit_url
    except Exception as error:  # of the hub, or of what lies between
        raise UserError(
            f"--push_to_hub: {repository}: {type(error).__name__}: {error}\nThe model is in {path}. Log in with "
            "`hf auth login`, unset HF_HUB_OFFLINE, and send it with `hf upload`"
        ) from error
