"""Pushing K-Adapters to the Hub: a single commit of the changed files, and a model card merged with the existing one."""

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError
from transformers import AutoConfig
from transformers.utils import CONFIG_NAME, logging

from .cards import card_text
from .modeling.compat_kadapter import quiet, without_initialization
from .modeling.configuration_kadapter import KAdapterConfig
from .modeling.format_kadapter import (
    BACKBONE_FILE,
    CARD_FILE,
    HEAD_FILE,
    PEFT_FILES,
    BackboneMismatchError,
    KAdapterLoadError,
    is_own_file,
    part_of,
)
from .modeling.modeling_kadapter import KAdapterModel, KAdapterPreTrainedModel
from .modeling.peft_kadapter import plain_state_dict
from .modeling.reading_kadapter import (
    SavedAdapter,
    read_adapter,
    read_config,
    read_config_dict,
    read_file,
    read_index,
    read_json,
)
from .modeling.replacing_kadapter import finish_replacing
from .modeling.saving_kadapter import write_repository
from .modeling.sources_kadapter import adapter_file, patiently


logger = logging.get_logger(__name__)

RACES = 3  # attempts to commit, if others push at the same time
PICKLES = (".bin", ".pkl", ".pt", ".pth")


def push_to_hub(
    self: KAdapterPreTrainedModel, repo_id: str, *, max_shard_size: int | str | None = None, **kwargs
) -> CommitInfo:
    """
    Uploads the K-Adapter as one commit: its adapters, fusion, head, configuration, code and model card, and its backbone
    only if it differs from the one that the configuration names. Files that are already on the Hub are not uploaded again,
    and edits to the model card there are kept.

    Args:
        repo_id: the repository; created if needed.
        max_shard_size: ignored; a K-Adapter has a fixed set of files.
        kwargs: `commit_message`, `commit_description`, `private`, `token`, `revision` (a branch, created if needed),
            `create_pr` and `tags`, as in `PreTrainedModel.push_to_hub`.

    Raises:
        KAdapterLoadError: the repository is the backbone's own, or others kept pushing at the same time.
        HfHubHTTPError: the Hub refused the push.
    """
    with tempfile.TemporaryDirectory() as folder:
        self.save_pretrained(folder)
        return push_folder(Path(folder), repo_id, **kwargs)


def push_saved(self: KAdapterPreTrainedModel, folder: Path, repo_id: str, **kwargs) -> None:
    """Uploads a folder written by `save_pretrained`, including other files at its top level; see `push_folder`."""
    push_folder(folder, repo_id, **kwargs)


def push_knowledge_adapter_to_hub(self: KAdapterPreTrainedModel, name: str, repo_id: str, **kwargs) -> CommitInfo:
    """
    Uploads one adapter without other weights as a separate repository. `load_knowledge_adapter(repo_id)` loads the
    adapter, and `AutoModel.from_pretrained(repo_id)` loads it together with the backbone it was trained on.

    Args:
        repo_id: the repository; created if needed. A repository with another model is not changed.
        kwargs: as in `push_to_hub`.

    Raises:
        KAdapterLoadError: the repository holds more than an adapter of this name.
        BackboneMismatchError: the adapter was trained on a backbone that exists only in this model; push the whole
            model with `push_to_hub`, which includes the backbone.
        HfHubHTTPError: the Hub refused the push.
    """
    self._checked_names(name)
    origins, state = self.origins, plain_state_dict(self)
    origins.update_adapters(self, state)
    trained_on = (self.config.knowledge_adapters or {})[name].backbone_fingerprint
    if trained_on == origins.backbone_fingerprint(self, state):
        if origins.backbone_trained or origins.fingerprint_if_as_named(self.backbone, state, self.config) is None:
            raise BackboneMismatchError(
                f"the knowledge adapter '{name}' was trained on a backbone that differs from "
                f"'{self.config.backbone_name_or_path}', and is useless without it: push both with push_to_hub."
            )
    with tempfile.TemporaryDirectory() as folder:
        write_adapter_repository(Path(folder), name, self.config, part_of(state, f"adapters.{name}"))
        return push_folder(Path(folder), repo_id, adapter=name, **kwargs)


def write_adapter_repository(
    folder: Path, name: str, config: KAdapterConfig, tensors: Mapping[str, torch.Tensor]
) -> None:
    """
    Writes a repository with one adapter and no other weights. The backbone's weights are not needed.

    Args:
        config: the configuration of a K-Adapter with this adapter.
        tensors: the adapter's tensors; their names start with `adapters.<name>.`.
    """
    adapter = (config.knowledge_adapters or {})[name]
    backbone = adapter.backbone_name_or_path or config.backbone_name_or_path
    alone = KAdapterConfig(
        backbone_name_or_path=backbone,
        backbone_revision=config.backbone_revision if backbone == config.backbone_name_or_path else None,
        backbone_fingerprint=adapter.backbone_fingerprint,
        backbone_config=copy.deepcopy(config.backbone_config),
        knowledge_adapters={name: adapter},
        frozen_knowledge_adapters=[name],
        fusion="add",  # has no weights, so nothing that is loaded is untrained
        architectures=[KAdapterModel.__name__],
        dtype=str(next(iter(tensors.values())).dtype).removeprefix("torch."),
    )
    with torch.device("meta"), without_initialization():
        model = KAdapterModel(alone)
    dtype = config.backbone_config.dtype
    if dtype is not None:
        model.backbone.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    write_repository(model, folder, tensors)


def push_source(source: Path, repo_id: str, adapter: str | None, **kwargs) -> tuple[CommitInfo, list[str]]:
    """
    Uploads a K-Adapter folder, one of its adapters, or an adapter's file, as `kadapter push` names them; see `push_folder`.

    Returns:
        The commit, and the names of the uploaded files.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = source
        if adapter is not None or not (source / CONFIG_NAME).exists():
            folder, saved = Path(temporary), read_adapter(adapter_file(source, adapter))
            if adapter not in (None, saved.name):
                raise KAdapterLoadError(f"'{source}' has the adapter '{saved.name}', not '{adapter}'.")
            adapter = saved.name
            write_adapter_repository(folder, adapter, _config_of(source, saved, kwargs.get("token")), saved.tensors)
        else:
            finish_replacing(folder)
        files = sorted(checked_files(folder) | {CARD_FILE})
        return push_folder(folder, repo_id, adapter=adapter, **kwargs), files


def _config_of(source: Path, saved: SavedAdapter, token: str | None) -> KAdapterConfig:
    """
    A K-Adapter configuration with this adapter: the folder's, or, for a file, a new one with the backbone that it names.

    Raises:
        BackboneMismatchError: the backbone that the adapter was trained on exists only in the folder.
        KAdapterLoadError: there is no folder, and the backbone's configuration can't be read.
    """
    if (source / CONFIG_NAME).exists():
        config = read_config(source)
        if BACKBONE_FILE in read_index(source)[0] and saved.config.backbone_fingerprint == config.backbone_fingerprint:
            raise BackboneMismatchError(
                f"the adapter '{saved.name}' was trained on the backbone in '{source}' and is useless without it: push the "
                "folder without --adapter."
            )
        config.knowledge_adapters = {saved.name: saved.config}
        return config
    name = saved.config.backbone_name_or_path
    if name is None:
        raise KAdapterLoadError(
            f"'{source}' does not name its backbone, which a repository requires: push its folder instead."
        )
    try:
        with quiet():
            backbone = AutoConfig.from_pretrained(name, token=token)
    except Exception as error:  # a foreign configuration class may raise anything
        raise KAdapterLoadError(
            f"the configuration of the backbone '{name}' of '{source}' can't be read: {error}"
        ) from error
    return KAdapterConfig(
        backbone_name_or_path=name, backbone_config=backbone, knowledge_adapters={saved.name: saved.config}
    )


@contextlib.contextmanager
def _advice_to_log_in() -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            error.append_to_message("\nLog in with `hf auth login`, or pass a token with write access with token=….")
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
    Uploads the K-Adapter repository in `folder`, after checking that its files are complete.

    Files that are already on the Hub are not uploaded again; a K-Adapter's weight and code files that exist only there are
    deleted. Other files at the top level of the folder (e.g. the tokenizer's) are uploaded too, except pickles.

    Args:
        adapter: the folder holds only this adapter, and may only replace an earlier version of it.
        private, token, revision, create_pr, tags, commit_message, commit_description: as in `PreTrainedModel.push_to_hub`.

    Raises:
        KAdapterLoadError: the folder is not a K-Adapter repository, or a file in it is damaged; the repository on the Hub is
            the backbone's own or, with `adapter`, holds something else; or others kept pushing at the same time.
        HfHubHTTPError: the Hub refused the push.
    """
    config = KAdapterConfig.from_dict(read_config_dict(folder))
    files = checked_files(folder)
    if repo_id == config.backbone_name_or_path:
        raise KAdapterLoadError(f"'{repo_id}' is the backbone's own repository: choose another one to push to.")
    if os.path.isabs(config.backbone_name_or_path or ""):
        logger.warning(
            f"the backbone is '{config.backbone_name_or_path}', a local folder: others can load the pushed model only with "
            "backbone=…"
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
        remote = downloaded(repo_id, CARD_FILE, head.sha, token) if CARD_FILE in there else None
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
            logger.warning(f"'{repo_id}' has changed in the meantime (attempt {attempt + 1} of {RACES}).")
    raise KAdapterLoadError(f"'{repo_id}' kept changing during {RACES} attempts: push again later.")


def checked_files(folder: Path) -> set[str]:
    """
    The files to upload from a repository: its weights, after checking them, and other files at the top level.

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
        KAdapterLoadError: the repository holds more than this adapter; pushing would remove the rest.
    """
    if CONFIG_NAME not in there:
        return
    config = read_json(downloaded(repo_id, CONFIG_NAME, revision, token))
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


def downloaded(repo_id: str, file: str, revision: str | None, token: bool | str | None) -> Path:
    """The path in the Hub's cache of one file. Raises `KAdapterLoadError` if the repository does not have it."""
    try:
        return Path(patiently(hf_hub_download, repo_id, file, revision=revision, token=token))
    except RemoteEntryNotFoundError:
        raise KAdapterLoadError(
            f"'{repo_id}' has no {file}. If it is a K-Adapter, `kadapter info {repo_id}` shows its contents."
        ) from None
