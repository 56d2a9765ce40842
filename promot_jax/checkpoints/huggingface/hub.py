"""Pushes an export to the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from promot_jax.errors import UserError


def check(repository: str) -> None:
    """Raises UserError where a repository's name is malformed, or its client is not installed."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository, re.ASCII):
        raise UserError(f"PUSH_TO_HUB is {repository!r}; give it as ORGANISATION/NAME.")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise UserError("PUSH_TO_HUB needs the package huggingface_hub: pip install promot_jax[hub].") from error


def push(folder: Path, repository: str, root: str, subfolders: Sequence[str]) -> str:
    """Uploads folders of an export; what the repository has already is not sent again.

    Args:
        folder: of the export.
        repository: "org/name" of a model; made private if it is not there.
        root: name of the folder whose files go to the repository's top; "" for none.
        subfolders: names of the folders that keep their names.

    Returns:
        The address of the repository.

    Raises:
        UserError: no access, or no connection.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        for name in [*([root] if root else []), *subfolders]:
            place = "" if name == root else name
            message = f"promot_jax export: {name}"
            api.upload_folder(repo_id=repository, folder_path=folder / name, path_in_repo=place, commit_message=message)
    except Exception as error:  # its own errors, and those of its HTTP library
        reasons = [error, *([error.__cause__] if error.__cause__ else [])]
        reason = " ".join(" ".join(str(one).split())[:300] or type(one).__name__ for one in reasons)
        raise UserError(
            f"Cannot push {folder} to {repository} on the Hugging Face hub: {reason} Log in with `hf auth login`, or "
            "set HF_TOKEN; the same command goes on from here."
        ) from error
    return str(url)
