"""An export -> a repository on the Hugging Face hub, private until its owner says otherwise."""

from __future__ import annotations

from pathlib import Path

from rewardtune.errors import RecipeError


def check(repository: str) -> None:
    """Raises RecipeError where a push cannot succeed: a name that is none, no token, or a machine set offline.

    Called before the export is made, which may take long. Asks nothing of the network.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RecipeError(f"--push {repository}: {error} Write it as OWNER/NAME.") from error
    if constants.is_offline_mode():
        raise RecipeError(
            "--push: HF_HUB_OFFLINE keeps this machine away from the hub. Unset it, or export without --push and "
            "upload the folder from elsewhere: hf upload OWNER/NAME FOLDER."
        )
    if get_token() is None:
        raise RecipeError(
            "--push needs a token with the right to write: `hf auth login`, or set HF_TOKEN. Nothing was exported."
        )


def push(folder: Path, repository: str, *, message: str) -> str:
    """Upload all files of an export, with its card, as one commit; returns the address of the repository.

    A repository that is not there is made, private. One that is there stays as visible as it is, and files of the same
    names are replaced. Raises RecipeError with the hub's own words where it refuses or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever client it is built on

    api = HfApi()
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message)
    except (HTTPError, OSError, ValueError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(
            f"--push {repository}: the hub did not take it ({said}). The export is whole in {folder}: check the name, "
            f"the network and that your token may write, then run the same command again, or "
            f"`hf upload {repository} {folder}`."
        ) from error
    return str(url)
