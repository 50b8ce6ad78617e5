"""Any content of config.json, the index or an adapter's metadata yields a model or a documented error."""

import copy
import json
import os
import shutil

import pytest
import torch
from conftest import assert_same_weights, disturb, small_adapter
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import set_seed

from kadapter_hf import (
    KAdapterConfig,
    KAdapterConfigError,
    KAdapterForMaskedLM,
    KAdapterForSequenceClassification,
    KAdapterLoadError,
    KAdapterModel,
    KnowledgeAdapterConfig,
)
from kadapter_hf.modeling.compat_kadapter import decode_floats
from kadapter_hf.modeling.format_kadapter import metadata_checksum


# BackboneMismatchError is a KAdapterLoadError.
DOCUMENTED = (KAdapterConfigError, KAdapterLoadError)
INDEX = "model.safetensors.index.json"
FACTUAL = "adapters/factual.safetensors"
# The number of examples per test. `make slow` increases it, and these tests are then slow ones.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 40))
FUZZ = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), max_examples=EXAMPLES
)
pytestmark = [pytest.mark.slow] if EXAMPLES > 40 else []

FIELDS = (
    *KAdapterConfig.__dataclass_fields__,
    *KnowledgeAdapterConfig.__dataclass_fields__,
    *("model_type", "num_labels", "vocab_size", "torch_dtype", "attn_implementation", "_attn_implementation"),
    *("quantization_config", "auto_map", "is_decoder", "is_encoder_decoder", "tie_word_embeddings", "pruned_heads"),
    *("name_or_path", "_name_or_path", "_commit_hash", "use_cache", "max_position_embeddings", "type_vocab_size"),
    *("weight_map", "metadata", "fingerprints", "total_size", "self", "cls", "to_dict", "__class__", "kwargs"),
)
WORDS = (
    *("factual", "linguistic", "causal", "../../x", "", "concat", "add", "roberta", "bert", "gpt2", "t5", "kadapter"),
    *("gelu", "float16", "auto", "eager", "sdpa", "KAdapterForMaskedLM", "KAdapterModel", "nobody/nothing"),
    *("head.safetensors", "../head.safetensors", FACTUAL, "backbone.safetensors", "backbone.x", "adapters.factual.x"),
)
NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.integers(),
    st.sampled_from((16, 32, 100, 2**31, 2**63, 10**30)),
    st.floats(),
    st.booleans(),
)
TEXT = st.one_of(st.sampled_from(WORDS), st.sampled_from(FIELDS), st.text(max_size=12))
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def mutations(draw, original):
    """`original`, a JSON object, after one to three changes anywhere in it."""
    content = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        node, place = None, content
        while isinstance(place, (dict, list)) and place and draw(st.booleans() if node is not None else st.just(True)):
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            node, key = place, draw(st.sampled_from(keys))
            place = node[key]
        kind = draw(st.sampled_from(("replace", "replace", "delete", "add")))
        if node is None or (kind == "add" and isinstance(place, dict)):
            (place if isinstance(place, dict) else content)[draw(TEXT)] = draw(VALUES)
        elif kind == "delete":
            del node[key]
        else:
            node[key] = draw(VALUES)
    return content


def config_dict() -> dict:
    """A valid config.json, as a starting point."""
    config = KAdapterConfig(
        backbone_name_or_path="somewhere",
        backbone_config={"model_type": "roberta", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2},
        knowledge_adapters={"factual": small_adapter(), "linguistic": small_adapter(provenance={"corpus": "x"})},
    )
    return json.loads(config.to_json_string())


@pytest.fixture(scope="module")
def saved(backbone, tmp_path_factory):
    """Two saved models, by folder; the second stores its backbone."""
    models = {}
    for own_backbone in (False, True):
        set_seed(0)
        model = KAdapterForSequenceClassification.from_backbone(
            backbone, {name: small_adapter(backbone_layers=[0]) for name in ("factual", "linguistic")}, num_labels=3
        )
        for part in (model.adapters, model.fusion, model.classifier, *([model.backbone] if own_backbone else [])):
            disturb(part)
        folder = tmp_path_factory.mktemp("saved") / "model"
        model.save_pretrained(folder)
        models[folder] = model
    return models


@pytest.fixture(scope="module")
def scratch(saved, tmp_path_factory):
    """Copies to overwrite, each with its original and its model."""
    copies = []
    for folder, model in saved.items():
        copies.append((shutil.copytree(folder, tmp_path_factory.mktemp("scratch") / "model"), folder, model))
    return copies


def assert_a_model_or_an_error(folder, model, **kwargs):
    """If a model is loaded, all its weights are those that were saved, or announced as new."""
    try:
        found, info = KAdapterForSequenceClassification.from_pretrained(folder, output_loading_info=True, **kwargs)
    except DOCUMENTED as error:
        assert 20 < len(str(error)) < 5000
        return
    assert all(name.startswith("classifier.") for name in info["missing_keys"])
    expected = model.state_dict()
    for name, tensor in found.state_dict().items():
        assert name in info["missing_keys"] or torch.equal(tensor.to(expected[name].dtype), expected[name]), name


# ---- Configurations -----------------------------------------------------------------------------------------------------


@FUZZ
@given(content=mutations(config_dict()))
def test_a_configuration_is_built_or_refused(content):
    try:
        config = KAdapterConfig(**content)
    except KAdapterConfigError as error:
        assert len(str(error)) > 10
        return
    text = config.to_json_string()
    again = KAdapterConfig(**decode_floats(json.loads(text)))
    assert again.to_json_string() == text


@FUZZ
@given(fields=st.dictionaries(TEXT, VALUES, max_size=5))
def test_an_adapter_configuration_is_built_or_refused(fields):
    try:
        config = KnowledgeAdapterConfig.from_dict(fields)
    except KAdapterConfigError as error:
        assert len(str(error)) > 10
        return
    portable = config.to_dict()
    assert str(KnowledgeAdapterConfig.from_dict(portable).to_dict()) == str(portable)


@FUZZ
@given(data=st.data())
def test_a_changed_config_file_gives_a_model_or_a_documented_error(scratch, data):
    folder, original, model = data.draw(st.sampled_from(scratch))
    saved = json.loads((original / "config.json").read_text())
    content = data.draw(mutations(saved), label="config.json")
    (folder / "config.json").write_text(json.dumps(content))
    try:
        assert_a_model_or_an_error(folder, model)
    finally:
        shutil.copyfile(original / "config.json", folder / "config.json")


@FUZZ
@given(data=st.data())
def test_a_changed_config_of_another_class_gives_a_model_or_a_documented_error(scratch, data):
    folder, original, model = data.draw(st.sampled_from(scratch))
    content = data.draw(mutations(json.loads((original / "config.json").read_text())), label="config.json")
    (folder / "config.json").write_text(json.dumps(content))
    try:
        found = KAdapterForMaskedLM.from_pretrained(folder)
        assert_same_weights(found.backbone.to(torch.float32), model.backbone)
    except DOCUMENTED:
        pass
    finally:
        shutil.copyfile(original / "config.json", folder / "config.json")


NEWER = st.text("abcdefgh_", min_size=3, max_size=10).map(lambda name: f"newer_{name}")


@FUZZ
@given(data=st.data(), name=NEWER, value=VALUES)
def test_fields_of_a_newer_version_change_nothing(scratch, data, name, value):
    folder, original, model = scratch[0]
    content = json.loads((original / "config.json").read_text())
    content[name] = content["backbone_config"][name] = value
    (folder / "config.json").write_text(json.dumps(content))
    index = json.loads((original / INDEX).read_text())
    index[name] = index["metadata"][name] = value
    (folder / INDEX).write_text(json.dumps(index))
    try:
        found = KAdapterForSequenceClassification.from_pretrained(folder)
        assert_same_weights(found, model)
        assert str(getattr(found.config, name)) == str(value)
    finally:
        shutil.copyfile(original / "config.json", folder / "config.json")
        shutil.copyfile(original / INDEX, folder / INDEX)


@pytest.mark.parametrize(
    "field", ("to_dict", "save_pretrained", "from_dict", "model_type", "num_attention_heads_per_layer")
)
def test_a_field_that_would_overwrite_a_method_is_dropped_with_a_warning(field, caplog):
    with caplog.at_level("WARNING"):
        config = KAdapterConfig(**{field: "junk"})
    assert config.to_dict()["model_type"] == KAdapterConfig.model_type
    assert callable(config.to_dict) and callable(config.save_pretrained) and callable(KAdapterConfig.from_dict)


# ---- The index ----------------------------------------------------------------------------------------------------------


@FUZZ
@given(data=st.data())
def test_a_changed_index_gives_the_model_or_a_documented_error(scratch, data):
    folder, original, model = data.draw(st.sampled_from(scratch))
    content = data.draw(mutations(json.loads((original / INDEX).read_text())), label="index")
    (folder / INDEX).write_text(json.dumps(content))
    try:
        assert_a_model_or_an_error(folder, model)
    finally:
        shutil.copyfile(original / INDEX, folder / INDEX)


@FUZZ
@given(data=st.data(), name=st.sampled_from(("config.json", INDEX)))
def test_changed_bytes_give_the_model_or_a_documented_error(scratch, data, name):
    folder, original, model = data.draw(st.sampled_from(scratch))
    content = bytearray((original / name).read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[position] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'{}[]",:0123456789-.e ')))
    (folder / name).write_bytes(bytes(content[: data.draw(st.sampled_from((None, None, len(content) // 2)))]))
    try:
        assert_a_model_or_an_error(folder, model)
    finally:
        shutil.copyfile(original / name, folder / name)


# ---- An adapter's metadata ----------------------------------------------------------------------------------------------


@FUZZ
@given(data=st.data(), forged=st.booleans())
def test_changed_metadata_gives_an_adapter_or_a_documented_error(scratch, backbone, data, forged, tmp_path_factory):
    """Also with a matching forged checksum."""
    original, trained = scratch[0][1:]
    with safe_open(original / FACTUAL, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        saved = json.loads(file.metadata()["kadapter"])
    content = data.draw(mutations(saved), label="metadata")
    if forged:
        content.pop("checksum", None)
        content["checksum"] = metadata_checksum(content)
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    save_file(tensors, path, metadata={"kadapter": json.dumps(content)})
    model = KAdapterModel(KAdapterConfig(backbone_config=trained.config.backbone_config), trained.backbone)
    try:
        name = model.load_knowledge_adapter(path)
    except DOCUMENTED as error:
        assert list(model.adapters) == [] and 20 < len(str(error)) < 5000
    else:
        assert_same_weights(model.adapters[name], trained.adapters["factual"])
