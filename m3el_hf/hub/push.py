"""Publishes a folder as a Hub repository."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from m3el_hf.errors import M3ELError


def push_folder(folder: Path, repo_id: str, *, repo_type: str = "model", private: bool = False) -> str:
    """Uploads a saved model or a built dataset, card included, and returns the commit's address.

    Args:
        folder: What `save_pretrained` or `m3el-hf data build` wrote.
        repo_id: ``user/name``; created if it does not exist.
        repo_type: ``"model"`` or ``"dataset"``.
        private: Whether a repository that is created is private.

    Raises:
        M3ELError: If the folder is not such a folder, or the Hub cannot be reached or refuses.
    """
    needed = {"model": "config.json", "dataset": "README.md"}[repo_type]
    if not (folder / needed).is_file():
        raise M3ELError(f"{folder} has no {needed}: pass the folder of a saved {repo_type}")
    api = HfApi()
    try:
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, repo_type=repo_type, folder_path=folder).commit_url)
    except Exception as error:  # the client lets its HTTP library's own errors through
        reason = " ".join(str(error).split())
        raise M3ELError(f"{folder} could not be pushed to {repo_id}: {reason}") from error
