"""Configurations: valid values, errors that name the field, and saving and loading."""

import copy
import json
import logging
import pickle

import pytest
import torch
from conftest import TINY, small_adapter
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    BertConfig,
    RobertaConfig,
    RobertaModel,
)

from kadapter_hf import KAdapterConfig, KAdapterConfigError, KAdapterModel, KnowledgeAdapterConfig


def config_with(**adapters) -> KAdapterConfig:
    return KAdapterConfig(
        backbone_name_or_path="tiny",
        backbone_config=copy.deepcopy(TINY["roberta"]),
        knowledge_adapters={name: small_adapter(**fields) for name, fields in adapters.items()},
    )


@pytest.fixture
def warnings(caplog):
    """The warnings of transformers' logger, which does not propagate by default."""
    logger = logging.getLogger("transformers")
    propagate, logger.propagate = logger.propagate, True
    with caplog.at_level(logging.WARNING, logger="transformers"):
        yield caplog
    logger.propagate = propagate


# ---- Defaults -------------------------------------------------------------------------------------------------------


def test_default_is_roberta_large_without_adapters():
    config = KAdapterConfig()
    assert config.backbone_name_or_path == "FacebookAI/roberta-large"
    assert config.knowledge_adapters == {} and config.active_knowledge_adapters == []
    assert config.fusion == "concat" and config.freeze_backbone
    with torch.device("meta"):
        model = KAdapterModel(config)
        # The sizes in the model's own repository.
        roberta_large = RobertaModel(
            RobertaConfig(
                vocab_size=50265,
                hidden_size=1024,
                num_hidden_layers=24,
                num_attention_heads=16,
                intermediate_size=4096,
                max_position_embeddings=514,
                type_vocab_size=1,
            ),
            add_pooling_layer=False,
        )
    assert {name: tensor.shape for name, tensor in model.backbone.state_dict().items()} == {
        name: tensor.shape for name, tensor in roberta_large.state_dict().items()
    }
    assert model.backbone.config.layer_norm_eps == 1e-5 and model.backbone.config.pad_token_id == 1


def test_default_adapter_is_the_papers_for_24_layers():
    adapter = KAdapterConfig(knowledge_adapters={"factual": None}).knowledge_adapters["factual"]
    assert adapter.backbone_layers == [0, 11, 22]
    assert (adapter.num_hidden_layers, adapter.hidden_size, adapter.num_attention_heads) == (2, 768, 12)
    assert (adapter.intermediate_size, adapter.hidden_act, adapter.initializer_range) == (3072, "gelu", 2e-4)
    assert adapter.layer_norm_eps == 1e-5 and not adapter.attend_to_padding


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, [0]), (2, [0]), (4, [0, 1, 2]), (12, [0, 5, 10]), (24, [0, 11, 22])]
)
def test_default_layers_are_the_first_the_middle_and_the_last_but_one(depth, layers):
    backbone = copy.deepcopy(TINY["bert"])
    backbone.num_hidden_layers = depth
    config = KAdapterConfig(backbone_name_or_path=None, backbone_config=backbone, knowledge_adapters={"factual": {}})
    assert config.knowledge_adapters["factual"].backbone_layers == layers


def test_two_configurations_share_nothing():
    one, two = KAdapterConfig(), KAdapterConfig()
    one.active_knowledge_adapters.append("x")
    one.knowledge_adapters["x"] = small_adapter()
    assert two.active_knowledge_adapters == [] and two.knowledge_adapters == {}


def test_given_adapter_configuration_is_not_changed():
    given = small_adapter()
    config_with()
    KAdapterConfig(
        backbone_name_or_path=None, backbone_config=copy.deepcopy(TINY["bert"]), knowledge_adapters={"factual": given}
    )
    assert given.backbone_layers is None


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        # Wrong types.
        ("backbone_layers", "0,11,22"),
        ("backbone_layers", 3),
        ("backbone_layers", [0, "1"]),
        ("backbone_layers", [0.0]),
        ("backbone_layers", [True]),
        ("num_hidden_layers", 1.5),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", None),
        ("num_hidden_layers", True),
        ("hidden_size", "768"),
        ("hidden_size", [768]),
        ("num_attention_heads", 2.0),
        ("intermediate_size", None),
        ("hidden_act", 1),
        ("hidden_dropout_prob", "0.1"),
        ("attention_probs_dropout_prob", None),
        ("layer_norm_eps", "1e-5"),
        ("initializer_range", []),
        ("attend_to_padding", "yes"),
        ("attend_to_padding", 1),
        ("backbone_name_or_path", 1),
        ("backbone_fingerprint", b"00"),
        ("provenance", "Wikipedia"),
        # Impossible values.
        ("backbone_layers", []),
        ("backbone_layers", [-1]),
        ("num_hidden_layers", -1),
        ("hidden_size", -8),
        ("num_attention_heads", 0),
        ("num_attention_heads", 7),
        ("intermediate_size", 0),
        ("hidden_act", "gelus"),
        ("hidden_dropout_prob", 1.0),
        ("hidden_dropout_prob", -0.1),
        ("attention_probs_dropout_prob", float("nan")),
        ("layer_norm_eps", 0.0),
        ("layer_norm_eps", float("nan")),
        ("initializer_range", float("inf")),
        ("initializer_range", -1e-4),
    ],
)
def test_adapter_field_is_refused_by_name(field, value):
    with pytest.raises(KAdapterConfigError, match=field):
        KnowledgeAdapterConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        # Wrong types.
        ("backbone_name_or_path", 1),
        ("backbone_revision", 1),
        ("backbone_fingerprint", 1),
        ("backbone_config", "roberta"),
        ("backbone_config", []),
        ("knowledge_adapters", ["factual"]),
        ("knowledge_adapters", {"factual": "large"}),
        ("knowledge_adapters", {"factual": RobertaConfig()}),
        ("active_knowledge_adapters", "factual"),
        ("active_knowledge_adapters", [1]),
        ("fusion", None),
        ("fusion", 1),
        ("classifier_dropout", "0.1"),
        ("freeze_backbone", "yes"),
        ("frozen_knowledge_adapters", "factual"),
        ("freeze_head", 1),
        ("dtype", "float33"),
        ("dtype", "nn"),
        # Impossible values.
        ("backbone_config", {}),
        ("backbone_config", {"model_type": "no-such-model"}),
        ("backbone_config", {"model_type": ["roberta"]}),
        ("backbone_config", {"model_type": "kadapter"}),
        ("backbone_config", {"model_type": "roberta", "hidden_size": "wide"}),
        ("active_knowledge_adapters", ["factual"]),
        ("frozen_knowledge_adapters", ["factual"]),
        ("fusion", "attend"),
        ("classifier_dropout", 1.0),
        ("classifier_dropout", -1),
        ("problem_type", "guessing"),
    ],
)
def test_field_is_refused_by_name(field, value):
    with pytest.raises(KAdapterConfigError, match=field):
        KAdapterConfig(**{field: value})


def test_refusal_is_a_value_error():
    with pytest.raises(ValueError, match="fusion"):
        KAdapterConfig(fusion="none")


def test_heads_must_divide_the_width():
    with pytest.raises(KAdapterConfigError, match=r"num_attention_heads \(5\) must divide hidden_size \(16\)"):
        KnowledgeAdapterConfig(hidden_size=16, num_attention_heads=5)


def test_layer_outside_the_backbone_is_refused_with_adapter_and_range():
    config_with(factual={"backbone_layers": [0, 4]})  # the last state of four layers is number 4
    with pytest.raises(
        KAdapterConfigError, match=r"backbone_layers of knowledge adapter 'factual' names \[5\].*0 to 4"
    ):
        config_with(factual={"backbone_layers": [0, 5]})


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "../../x",
        "a/b",
        "a\\b",
        "/etc",
        "C:x",
        "a.b",
        "a b",
        "é",
        "-a",
        "_a",
        "a\n",
        "a" * 65,
        1,
        None,
    ],
)
def test_adapter_name_that_is_not_one_safe_segment_is_refused(name):
    with pytest.raises(KAdapterConfigError, match="can't name a knowledge adapter"):
        KAdapterConfig(knowledge_adapters={name: None})


@pytest.mark.parametrize("name", ["train", "forward", "keys", "items", "training", "to"])
def test_adapter_name_that_torch_would_refuse_is_refused(name):
    with pytest.raises(KAdapterConfigError, match="can't name a knowledge adapter.*torch"):
        KAdapterConfig(knowledge_adapters={name: None})


@pytest.mark.parametrize("name", ["f", "factual", "T-REx_2", "0", "backbone", "head", "a" * 64])
def test_adapter_name_that_is_one_safe_segment_is_accepted(name):
    assert list(KAdapterConfig(knowledge_adapters={name: None}).knowledge_adapters) == [name]


def test_names_that_differ_in_case_only_are_refused():
    with pytest.raises(KAdapterConfigError, match="knowledge_adapters.*case"):
        KAdapterConfig(knowledge_adapters={"Factual": None, "factual": None})


@pytest.mark.parametrize("field", ["active_knowledge_adapters", "frozen_knowledge_adapters"])
def test_adapter_listed_twice_is_refused(field):
    with pytest.raises(KAdapterConfigError, match=f"{field} names an adapter twice"):
        KAdapterConfig(knowledge_adapters={"factual": None}, **{field: ["factual", "factual"]})


def test_named_backbone_without_its_configuration_is_refused():
    with pytest.raises(
        KAdapterConfigError, match="backbone_config is missing for the backbone 'org/other'.*from_backbone"
    ):
        KAdapterConfig(backbone_name_or_path="org/other")


# ---- The nested configurations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", TINY)
def test_backbone_configuration_comes_back_whole(model_type, tmp_path):
    KAdapterConfig(
        backbone_name_or_path="tiny",
        backbone_config=copy.deepcopy(TINY[model_type]),
        knowledge_adapters={"factual": {}},
    ).save_pretrained(tmp_path)
    nested = AutoConfig.from_pretrained(tmp_path).backbone_config
    assert type(nested) is type(TINY[model_type])
    assert nested.to_dict() == TINY[model_type].to_dict()


def test_backbone_configuration_may_be_any_masked_language_models():
    for config_class in set(MODEL_FOR_MASKED_LM_MAPPING) - {KAdapterConfig}:
        config = KAdapterConfig(
            backbone_name_or_path="some", backbone_config={"model_type": config_class.model_type}
        ).backbone_config
        assert type(config) is config_class


def test_tools_that_ask_for_sizes_get_the_backbones():
    config = config_with(factual={})
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 4, 100)
    assert config.max_position_embeddings == 66 and config.tie_word_embeddings
    assert config.get_text_config().vocab_size == 100
    with pytest.raises(AttributeError, match="no attribute 'no_such_field'"):
        config.no_such_field  # noqa: B018


def test_adapters_are_active_and_trainable_by_default():
    config = config_with(factual={}, linguistic={})
    assert config.active_knowledge_adapters == ["factual", "linguistic"]
    assert config.frozen_knowledge_adapters == []


# ---- There and back -------------------------------------------------------------------------------------------------


def test_every_field_comes_back_from_a_file(tmp_path):
    config = KAdapterConfig(
        backbone_name_or_path="org/tiny",
        backbone_revision="c0ffee",
        backbone_fingerprint="00",
        backbone_config=BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=6),
        knowledge_adapters={
            "linguistic": small_adapter(backbone_layers=[0, 6, 3], hidden_dropout_prob=0, attend_to_padding=True),
            "factual": small_adapter(
                hidden_act="relu", initializer_range=1e-3, provenance={"corpus": "T-REx", "rows": [1, {"a": None}]}
            ),
        },
        active_knowledge_adapters=["linguistic", "factual"],
        fusion="add",
        classifier_dropout=0.3,
        freeze_backbone=False,
        frozen_knowledge_adapters=["linguistic"],
        freeze_head=True,
        id2label={0: "no", 1: "yes", 2: "perhaps"},
        label2id={"no": 0, "yes": 1, "perhaps": 2},
        problem_type="multi_label_classification",
    )
    config.save_pretrained(tmp_path)
    loaded = KAdapterConfig.from_pretrained(tmp_path)
    assert loaded.active_knowledge_adapters == ["linguistic", "factual"]
    assert isinstance(loaded.knowledge_adapters["factual"], KnowledgeAdapterConfig)
    first, second = config.to_dict(), loaded.to_dict()
    for field in ("transformers_version", "_name_or_path"):
        first.pop(field, None), second.pop(field, None)
    assert first == second
    assert loaded.num_labels == 3 and loaded.id2label[2] == "perhaps"


def test_configuration_file_is_plain_json_without_defaults_of_others(tmp_path):
    config_with(factual={"provenance": {"corpus": "T-REx"}}).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "kadapter"
    assert saved["backbone_config"]["model_type"] == "roberta"
    assert saved["knowledge_adapters"]["factual"] == {
        "attend_to_padding": False,
        "attention_probs_dropout_prob": 0.1,
        "backbone_fingerprint": None,
        "backbone_layers": [0, 1, 2],
        "backbone_name_or_path": None,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 16,
        "initializer_range": 2e-4,
        "intermediate_size": 24,
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "provenance": {"corpus": "T-REx"},
    }


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_configuration_can_be_copied_and_sent_to_a_process(duplicate):
    config = config_with(factual={}, linguistic={})
    twin = duplicate(config)
    assert twin.to_dict() == config.to_dict()
    twin.knowledge_adapters["factual"].backbone_layers.append(3)
    assert config.knowledge_adapters["factual"].backbone_layers == [0, 1, 2]


def test_configuration_prints():
    assert '"linguistic"' in repr(config_with(linguistic={}))


# ---- Written by a newer version -------------------------------------------------------------------------------------


def test_unknown_fields_are_kept(tmp_path):
    saved = config_with(factual={}).to_dict()
    saved["mixture_of_knowledge"] = {"experts": 4}
    saved["knowledge_adapters"]["factual"]["gate"] = "tanh"
    saved["backbone_config"]["rope_of_the_future"] = [1, 2]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.mixture_of_knowledge == {"experts": 4}
    assert loaded.knowledge_adapters["factual"].to_dict()["gate"] == "tanh"
    assert loaded.backbone_config.rope_of_the_future == [1, 2]
    loaded.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    assert again["mixture_of_knowledge"] == {"experts": 4}
    assert again["knowledge_adapters"]["factual"]["gate"] == "tanh"
    assert again["backbone_config"]["rope_of_the_future"] == [1, 2]


@pytest.mark.parametrize("field", ["to_dict", "validate_sizes", "newer_fields", "__class__"])
def test_unknown_field_of_an_adapter_is_kept_and_replaces_no_method(field):
    config = KnowledgeAdapterConfig.from_dict({field: "of the future", "hidden_size": 24})
    assert config.to_dict()[field] == "of the future" and config.hidden_size == 24
    with pytest.raises(KAdapterConfigError, match=field):
        KnowledgeAdapterConfig(**{field: "of the future"})


@pytest.mark.parametrize("field", ["to_json_string", "get_text_config", "validate_adapters", "is_composition"])
def test_unknown_field_of_the_whole_is_kept_or_dropped_with_a_warning(field, warnings, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_with().to_dict() | {field: "of the future"}))
    loaded = KAdapterConfig.from_pretrained(tmp_path)
    assert f"'{field}' is dropped" in warnings.text or getattr(loaded, field) == "of the future"
    loaded.save_pretrained(tmp_path / "again")


def test_adapter_configuration_of_a_newer_version_loads_with_all_its_known_fields():
    newer = small_adapter(backbone_layers=[1, 3]).to_dict() | {"gate": "tanh", "scale": 2.0}
    assert KnowledgeAdapterConfig.from_dict(newer).to_dict() == newer


def test_the_dict_has_the_sizes_that_tools_look_up_and_the_file_does_not(tmp_path):
    config = config_with(factual={})
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    assert sizes.items() <= config.to_dict().items()
    config.save_pretrained(tmp_path)
    assert not sizes.keys() & json.loads((tmp_path / "config.json").read_text()).keys()
    assert not sizes.keys() & json.loads(config.to_json_string()).keys()
    again = KAdapterConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert not sizes.keys() & vars(again).keys()
