"""Uploading an export to a Hugging Face hub, with the user's own token.

Each export gets a repository of its own, which is private at first: its owner decides who may see it. All files
arrive in one commit, so that a reader never meets half of an export; large files are uploaded before it. The card is
the one with the quality table. The quality is known only after the export was evaluated, so that card is not in the
exported directory. `HF_ENDPOINT` names another hub. The token comes from `HF_TOKEN` or `hf auth login`, and no
message shows it.
"""

from __future__ import annotations

import os
from pathlib import Path

from hwpq_pipeline.checkpoints.file_checksums import LISTING
from hwpq_pipeline.checkpoints.quiet import quiet_transformers
from hwpq_pipeline.errors import HwpqError

from .card import check_card


def push_to_hub(folder: str | Path, card: str, repo: str) -> str:
    """Upload an export; gives back the commit's address.

    Args:
        folder: the export; its files are uploaded, `README.md` is replaced by `card`. The list of checksums, which
            would name another card, stays here.
        card: the model card.
        repo: `owner/name`; it is created, private, if it does not exist.

    Raises:
        HwpqError: no token, a token that the hub refuses, a card that hubs refuse, or no answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    check_card(card, where=f"model card for {repo}")
    if not get_token():
        raise HwpqError(
            "there is no token to upload with",
            where=f"export.push_to_hub: {repo}",
            remedy="Log in with `hf auth login` or set HF_TOKEN, or take push_to_hub out.",
        )
    files = sorted(
        path for path in Path(folder).rglob("*") if path.is_file() and path.name not in ("README.md", LISTING)
    )
    operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        with quiet_transformers():
            api.create_repo(repo, exist_ok=True, private=True)
            commit = api.create_commit(repo, operations, commit_message=f"Export of {Path(folder).name}")
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise HwpqError(
            f"the hub refused the upload ({said[:300]})",
            where=f"export.push_to_hub: {repo}",
            remedy="Check the repository's name, that the token may write there, and the network.",
        ) from error
    return str(commit.commit_url)
