"""The contents of an adapter file, a K-Adapter folder or a repository on the Hub, and whether they fit a backbone."""

import fnmatch
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import sha_fileobj
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from .messages import LOGIN, one_line, sentence
from .modeling.backbone_kadapter import check_is_encoder, load_backbone
from .modeling.compat_kadapter import quiet
from .modeling.configuration_kadapter import KAdapterConfig, KnowledgeAdapterConfig
from .modeling.format_kadapter import (
    BACKBONE_FILE,
    HEAD_FILE,
    KAdapterConfigError,
    KAdapterLoadError,
    adapter_path,
    fingerprint,
    locate,
)
from .modeling.reading_kadapter import read_adapter, read_adapter_metadata, read_config, read_index
from .modeling.sources_kadapter import repository_folder


# Names of the dtypes of adapters in a safetensors header.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SIZES = ("backbone_layers", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")


# ---- Contents -------------------------------------------------------------------------------------------------------


class Adapter(NamedTuple):
    """The description of an adapter in a file; `tensors` maps names to dtype and shape."""

    name: str
    config: KnowledgeAdapterConfig
    fingerprint: str
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    sha256: str | None


def describe(source: str, revision: str | None, token: str | None) -> dict[str, Any]:
    """The output of --json, except for the comparison with a backbone."""
    path = Path(source)
    if path.is_file():
        adapters = described({path.name: on_disk(path)}, {path.name: path.stat().st_size}, None)
        return {"source": source, "from": "file", "commit": None, "adapters": adapters}
    if path.is_dir():
        return {"source": source, "from": "folder", "commit": None, **describe_folder(path)}
    api = HfApi(token=token)
    try:
        there = api.model_info(source, revision=revision, files_metadata=True)
    except (OSError, HTTPError) as error:
        if type(error) is RepositoryNotFoundError:
            raise KAdapterLoadError(
                f"'{source}' is neither a local file or folder nor a repository on the Hub, or it is private: check the name, "
                f"and {LOGIN}."
            ) from None
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            raise
        folder = cached_folder(source, revision, error)
        return {"source": source, "from": "cache", "commit": folder.name, **describe_folder(folder)}
    return {"source": source, "from": "hub", "commit": there.sha, **describe_repository(api, source, there)}


def describe_folder(folder: Path) -> dict[str, Any]:
    saved = read_saved(folder, folder) if locate(folder, CONFIG_NAME).exists() else None
    paths = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    single = sorted(folder.glob(adapter_path("*")))
    files = saved.adapter_files if saved else [adapter_path(path.stem) for path in single]
    adapters = {file: on_disk(locate(folder, file)) for file in files}
    paths |= {file: locate(folder, file) for file in files}
    return summary(folder, saved, adapters, {file: path.stat().st_size for file, path in paths.items()})


def describe_repository(api: HfApi, repo: str, there: ModelInfo) -> dict[str, Any]:
    """Downloads only the headers of weight files."""
    siblings = {file.rfilename: file for file in there.siblings or ()}
    saved = None
    if CONFIG_NAME in siblings:
        # By commit, so that all files are from the same one and the branch in the cache is not updated.
        wanted = [file for file in (CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME) if file in siblings]
        paths = [Path(api.hf_hub_download(repo, file, revision=there.sha)) for file in wanted]
        saved = read_saved(paths[0].parent, repo)
    files = saved.adapter_files if saved else sorted(fnmatch.filter(siblings, adapter_path("*")))
    missing = set(files) - set(siblings)
    if missing:
        raise KAdapterLoadError(f"'{repo}' lacks '{min(missing)}', which its {CONFIG_NAME} describes.")
    adapters = {file: on_hub(api, repo, siblings[file], there.sha) for file in files}
    return summary(repo, saved, adapters, {file: found.size for file, found in siblings.items()})


def cached_folder(repo: str, revision: str | None, reason: Exception) -> Path:
    try:
        return repository_folder(repo, revision=revision, local_files_only=True)
    except KAdapterLoadError:
        place = f"the Hub's cache{f' with the revision {revision}' if revision else ''}"
        raise KAdapterLoadError(
            f"'{repo}' is neither a local file or folder nor in {place}, and the Hub can't be reached: check the name and "
            f"the network. The reason: {sentence(reason, repo)}"
        ) from None


class Saved(NamedTuple):
    """A repository's config.json, and the names of the tensors in each file."""

    config: KAdapterConfig
    tensors: dict[str, list[str]]

    @property
    def adapter_files(self) -> list[str]:
        return [adapter_path(name) for name in self.config.knowledge_adapters or ()]


def read_saved(folder: Path, source: Any) -> Saved:
    """The configuration and index of a repository; `source` is its name in errors."""
    return Saved(read_config(folder, source), read_index(folder)[0])


def on_disk(path: Path) -> Adapter:
    """A local adapter file, checked as for loading."""
    saved = read_adapter(path)
    tensors = {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in saved.tensors.items()
    }
    with path.open("rb") as file:
        return Adapter(saved.name, saved.config, saved.fingerprint, tensors, sha_fileobj(file).hex())


def on_hub(api: HfApi, repo: str, file: RepoSibling, commit: str | None) -> Adapter:
    """The header of an adapter file on the Hub, checked as for loading; the values of its tensors are not checked."""
    try:
        header = api.parse_safetensors_file_metadata(repo, file.rfilename, revision=commit)
        name, config, recorded = read_adapter_metadata(header.metadata, f"{repo}: {file.rfilename}")
        tensors = {
            key: (str(DTYPES.get(of.dtype, of.dtype)), tuple(map(int, of.shape))) for key, of in header.tensors.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise KAdapterLoadError(f"'{repo}': the header of '{file.rfilename}' is damaged ({error}).") from error
    return Adapter(name, config, recorded, tensors, file.lfs.sha256 if file.lfs else None)


def summary(
    source: Any, saved: Saved | None, adapters: dict[str, Adapter], sizes: Mapping[str, int | None]
) -> dict[str, Any]:
    """The output of --json for a repository; one without a config.json has only adapters."""
    if saved is None and not adapters:
        raise KAdapterLoadError(
            f"'{source}' is not a K-Adapter: it has neither {CONFIG_NAME} nor {adapter_path('<name>')}."
        )
    others = {file: size for file, size in sizes.items() if file not in adapters}
    found = {"adapters": described(adapters, sizes, saved and saved.config), "other_files": others}
    if saved is None:
        return found
    config, backbone = saved.config, saved.config.backbone_config
    has_head = any(not name.startswith("fusion.") for name in saved.tensors.get(HEAD_FILE, ()))
    return {
        "class": config.architectures[0] if config.architectures else None,
        "fusion": config.fusion,
        "task": (config.task or {}).get("name"),
        "labels": [label for label in (config.id2label or {}).values() if not label.startswith("LABEL_")],
        "label_names": (config.task or {}).get("label_names", {}),
        "fusion_weights": (config.task or {}).get("fusion_weights"),
        "active_adapters": config.active_knowledge_adapters,
        "frozen_adapters": config.frozen_knowledge_adapters,
        "has_head": has_head,
        "has_backbone": BACKBONE_FILE in saved.tensors,
        "backbone": {
            "name": config.backbone_name_or_path,
            "revision": config.backbone_revision,
            "fingerprint": config.backbone_fingerprint,
            "model_type": backbone.model_type,
            "hidden_size": backbone.hidden_size,
            "num_hidden_layers": backbone.num_hidden_layers,
        },
        **found,
    }


def described(
    adapters: dict[str, Adapter], sizes: Mapping[str, int | None], config: KAdapterConfig | None
) -> list[dict[str, Any]]:
    """The output of --json for the adapters."""
    found = []
    for file, adapter in adapters.items():
        fields = adapter.config.to_dict()
        name = fields["backbone_name_or_path"]
        _, projection = adapter.tensors.get(f"adapters.{adapter.name}.layers.0.down_project.weight", ("", ()))
        found.append(
            {
                "name": adapter.name,
                "file": file,
                **{key: fields[key] for key in SIZES},
                "parameters": sum(math.prod(shape) for _, shape in adapter.tensors.values()),
                "dtype": ", ".join(sorted({dtype for dtype, _ in adapter.tensors.values()})),
                "bytes": sizes[file],
                "sha256": adapter.sha256,
                "fingerprint": adapter.fingerprint,
                "backbone": {
                    "name": name,
                    "revision": config.backbone_revision if config and config.backbone_name_or_path == name else None,
                    "fingerprint": fields["backbone_fingerprint"],
                    "hidden_size": projection[-1] if projection else None,
                },
                "provenance": fields["provenance"],
            }
        )
    return found


# ---- Comparison with a backbone -------------------------------------------------------------------------------------


def fit(adapters: list[dict[str, Any]], backbone: str, token: str | None) -> dict[str, Any]:
    """
    Whether all adapters fit (None if unknown), and the reason if not; the same is added to each adapter.
    """
    try:
        config = AutoConfig.from_pretrained(backbone, token=token)
        check_is_encoder(config)
    except KAdapterConfigError as error:
        verdict: tuple[bool | None, str] = False, str(error)
    except Exception as error:  # a foreign configuration class may raise anything
        verdict = None, f"the configuration of '{backbone}' can't be read: {one_line(error)}"
    else:
        verdict = True, ""
    weights = fingerprint_at_hand(backbone) if verdict[0] else None
    for adapter in adapters:
        adapter["fits"], adapter["reason"] = compared(adapter, config, weights) if verdict[0] else verdict
    fits = [adapter["fits"] for adapter in adapters]
    worst = False if False in fits else None if None in fits or not fits else True
    reasons = {f"{adapter['name']}: {adapter['reason']}": None for adapter in adapters if adapter["fits"] is worst}
    return {"fits": worst, "reason": "; ".join(reasons) or "there is no adapter", "compared_with": backbone}


def fingerprint_at_hand(backbone: str) -> str | None:
    """The fingerprint of a backbone's weights, if they are available locally."""
    try:
        with quiet():
            return fingerprint(load_backbone(backbone, local_files_only=True).state_dict().values())
    except KAdapterLoadError:
        return None


def compared(adapter: dict[str, Any], config: PreTrainedConfig, weights: str | None) -> tuple[bool | None, str]:
    trained_on = adapter["backbone"]
    width, deepest = trained_on["hidden_size"], max(adapter["backbone_layers"] or [0])
    if width != config.hidden_size:
        return False, f"it was trained on a backbone of width {width}, and this one has width {config.hidden_size}"
    if deepest > config.num_hidden_layers:
        return False, f"it reads the state of layer {deepest}, and this backbone has {config.num_hidden_layers} layers"
    if trained_on["fingerprint"] is None:
        return None, "it does not record the fingerprint of its backbone"
    if weights is None:
        return None, "width and layers fit, but the weights of this backbone are not available locally for comparison"
    if weights != trained_on["fingerprint"]:
        return False, (
            f"it was trained on '{trained_on['name']}' with fingerprint {trained_on['fingerprint'][:12]}…, and this "
            f"backbone has other weights, {weights[:12]}…"
        )
    return True, "it was trained on these weights"
