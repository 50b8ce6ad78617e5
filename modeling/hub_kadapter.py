"""K-Adapter repositories to the Hub: one commit with what has changed, the model card merged with the one that is there."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import CONFIG_NAME, logging

from .card_kadapter import CARD_FILE, card_text
from .configuration_kadapter import KAdapterConfig
from .sources_kadapter import patiently
from .storage_kadapter import (
    BACKBONE_FILE,
    HEAD_FILE,
    PEFT_FILES,
    KAdapterLoadError,
    is_own_file,
    read_config_dict,
    read_file,
    read_index,
    read_json,
)


logger = logging.get_logger(__name__)

RACES = 3  # at a commit, when others push at the same time
PICKLES = (".bin", ".pkl", ".pt", ".pth")


def push_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `push_to_hub` that a repository of ours has a use for: all but `max_shard_size`."""
    names = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
    return {key: kwargs[key] for key in names if kwargs.get(key) is not None}


@contextlib.contextmanager
def _advice_to_log_in() -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            error.append_to_message(
                "\nLog in with `hf auth login`, or give a token that may write there with token=…."
            )
        raise


@_advice_to_log_in()
def push_folder(
    folder: Path,
    repo_id: str,
    *,
    adapter: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> CommitInfo:
    """
    Uploads the K-Adapter repository in `folder`, after a check that its files are whole.

    What the Hub has already is not sent again; weights of ours that the repository there has beyond these are removed.
    Beside the repository's own files, those at the top of the folder go along (a tokenizer's, say), but no pickles.

    Args:
        adapter: the folder is this adapter's, and only takes the place of another version of it.
        private, token, revision, create_pr, tags and the commit's: as in `PreTrainedModel.push_to_hub`.

    Raises:
        KAdapterLoadError: the folder is no K-Adapter repository or a file in it is damaged; the repository on the Hub is
            the backbone's own, or, with `adapter`, holds something else; or others kept pushing at the same time.
        HfHubHTTPError: the Hub refused.
    """
    config = KAdapterConfig.from_dict(read_config_dict(folder))
    files = checked_files(folder)
    if repo_id == config.backbone_name_or_path:
        raise KAdapterLoadError(f"'{repo_id}' is the backbone's own repository: choose another one to push to.")
    if os.path.isabs(config.backbone_name_or_path or ""):
        logger.warning(
            f"the backbone is '{config.backbone_name_or_path}', a folder of this machine: others can load what is pushed "
            "only with backbone=…"
        )
    api = HfApi(token=token)
    repo_id = patiently(api.create_repo, repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        patiently(api.create_branch, repo_id, branch=revision, exist_ok=True)
    for attempt in range(RACES):
        head = patiently(api.model_info, repo_id, revision=revision)
        there = {file.rfilename for file in head.siblings or ()}
        if adapter is not None:
            _check_is_only(adapter, repo_id, there, head.sha, token)
        remote = _downloaded(CARD_FILE, repo_id, head.sha, token) if CARD_FILE in there else None
        card = card_text(
            config,
            repo_id,
            backbone_stored=BACKBONE_FILE in files,
            earlier=[folder / CARD_FILE, *([remote] if remote else [])],
            tags=tags,
        )
        obsolete = sorted(file for file in there - files if is_own_file(file))
        try:
            return patiently(
                api.create_commit,
                repo_id,
                operations=[
                    *([CommitOperationAdd(CARD_FILE, card.encode())] if card else []),
                    *(CommitOperationAdd(file, folder / file) for file in sorted(files - {CARD_FILE})),
                    *(CommitOperationDelete(file) for file in obsolete),
                ],
                commit_message=commit_message or ("Upload knowledge adapter" if adapter else "Upload model"),
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head.sha,
            )
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code != 412:
                raise
            logger.warning(f"'{repo_id}' has changed meanwhile (attempt {attempt + 1} of {RACES}).")
    raise KAdapterLoadError(f"'{repo_id}' changed each time that this was about to be committed: push again later.")


def checked_files(folder: Path) -> set[str]:
    """
    What to upload from a repository: its weights, which are read once to see that they are whole, and the rest at its top.

    Raises:
        KAdapterLoadError: a file is missing or damaged.
    """
    weights, fingerprints = read_index(folder)
    for file, names in weights.items():
        read_file(folder, file, names, fingerprints.get(file))
    top = {path.name for path in folder.iterdir() if path.is_file()}
    return {*weights, *(name for name in top if not name.startswith((".", "_")) and not name.endswith(PICKLES))}


def _check_is_only(adapter: str, repo_id: str, there: set[str], revision: str | None, token: Any) -> None:
    """
    Raises:
        KAdapterLoadError: the repository holds more than this adapter, which pushing it would remove.
    """
    if CONFIG_NAME not in there:
        return
    config = read_json(_downloaded(CONFIG_NAME, repo_id, revision, token))
    found = config if isinstance(config, dict) else {}
    others = set(found.get("knowledge_adapters") or ()) - {adapter}
    more = {HEAD_FILE, BACKBONE_FILE, *PEFT_FILES} & there
    if found.get("model_type") != KAdapterConfig.model_type:
        raise KAdapterLoadError(f"'{repo_id}' holds a {found.get('model_type')!r} model; choose another repository.")
    if others or more:
        what = f"the knowledge adapters {sorted(others)}" if others else f"a model with {', '.join(sorted(more))}"
        raise KAdapterLoadError(
            f"'{repo_id}' holds {what}, and pushing '{adapter}' alone would remove that. Choose another repository, or push "
            "the whole model with push_to_hub."
        )


def _downloaded(file: str, repo_id: str, revision: str | None, token: Any) -> Path:
    return Path(patiently(hf_hub_download, repo_id, file, revision=revision, token=token))
