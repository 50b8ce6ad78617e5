"""Knowledge adapters by name: adding, loading, saving, activating, deleting, and the summary."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from conftest import ALL_CLASSES, SMALL_ADAPTER, batch, disturb, inputs_for, small_adapter
from safetensors import safe_open

from kadapter_hf import (
    BackboneMismatchError,
    KAdapterConfigError,
    KAdapterForEntityTyping,
    KAdapterForMaskedLM,
    KAdapterForSequenceClassification,
    KAdapterLoadError,
    KAdapterModel,
    KnowledgeAdapterConfig,
)


every_class = pytest.mark.parametrize("model_class", ALL_CLASSES, ids=lambda model_class: model_class.__name__)
fusions = pytest.mark.parametrize("fusion", ["concat", "add", "gate", "attention"])
FOUR_OF_THEIR_OWN = {
    "syntax": small_adapter(backbone_layers=[4]),
    "facts": small_adapter(hidden_size=8, num_hidden_layers=3, backbone_layers=[0, 1, 2, 3, 4]),
    "places": small_adapter(num_attention_heads=4, intermediate_size=7, hidden_act="relu", backbone_layers=[3, 1]),
    "dates": small_adapter(hidden_size=48, num_attention_heads=3, attend_to_padding=True),
}


def snapshot(model, *parts: str) -> dict[str, torch.Tensor]:
    """Copies of the tensors whose names start with one of these, or of all tensors."""
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if not parts or any(name.startswith(part) for part in parts)
    }


def assert_unchanged(model, before: dict[str, torch.Tensor]) -> None:
    """Compares bit for bit, and checks that no tensor is missing."""
    after = model.state_dict()
    assert before
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@torch.no_grad()
def knowledge(model, name: str) -> torch.Tensor:
    """The output of one adapter, independent of other adapters and the class."""
    inputs = batch(padding=2)
    states = model.backbone(**inputs, output_hidden_states=True).hidden_states
    return model.adapters[name](states, inputs["attention_mask"])


@pytest.fixture
def hub(tmp_path):
    """`hub(folder, commit)`: puts a folder into a Hub cache as `org/model`, and returns the path of the cache."""

    def put(folder, commit="a" * 40, branch="main"):
        repository = tmp_path / "hub" / "models--org--model"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        return tmp_path / "hub"

    return put


# ---- Adding ---------------------------------------------------------------------------------------------------------


@every_class
def test_added_adapter_is_active_trains_and_takes_part(model_class, build):
    model = build(model_class)
    before = snapshot(model)
    model.add_knowledge_adapter("places", small_adapter(backbone_layers=[1, 4]))
    assert model.active_knowledge_adapters == ["factual", "linguistic", "places"]
    assert model.config.knowledge_adapters["places"].backbone_layers == [1, 4]
    assert all(parameter.requires_grad for parameter in model.adapters["places"].parameters())
    assert_unchanged(model, before)
    inputs = inputs_for(model_class)
    with torch.no_grad():
        first = next(value for value in model(**inputs).to_tuple())
        disturb(model.adapters["places"])
        disturb(model.fusion.states["places"])
        assert not torch.equal(next(value for value in model(**inputs).to_tuple()), first)


def test_adapter_added_without_a_configuration_has_the_papers_sizes(build):
    model = build(adapters=())
    model.add_knowledge_adapter("factual")
    assert model.config.knowledge_adapters["factual"].hidden_size == 768
    assert model.adapters["factual"].layers[0].down_project.weight.shape == (768, 32)
    assert len(model.adapters["factual"].layers[0].encoder.layer) == 2


def test_added_adapter_does_not_share_its_configuration(build):
    given = small_adapter()
    model = build(adapters=())
    model.add_knowledge_adapter("one", given)
    model.add_knowledge_adapter("two", given)
    assert given.backbone_layers is None and given.backbone_fingerprint is None
    assert model.config.knowledge_adapters["one"] is not model.config.knowledge_adapters["two"]


@pytest.mark.parametrize("name", ["../x", "", "a.b", "train", None])
def test_impossible_name_is_refused_before_anything_changes(name, build):
    model = build()
    before = list(model.state_dict())
    with pytest.raises(KAdapterConfigError, match="can't name a knowledge adapter"):
        model.add_knowledge_adapter(name, small_adapter())
    assert list(model.state_dict()) == before and model.active_knowledge_adapters == ["factual", "linguistic"]


@pytest.mark.parametrize("name", ["factual", "Factual"])
def test_taken_name_is_refused_before_anything_changes(name, build):
    model = build()
    before = snapshot(model)
    with pytest.raises(KAdapterConfigError, match="'factual' already; delete it first"):
        model.add_knowledge_adapter(name, small_adapter())
    assert_unchanged(model, before)
    assert list(model.config.knowledge_adapters) == ["factual", "linguistic"]


def test_adapter_that_does_not_fit_the_backbone_is_refused_before_anything_changes(build):
    model = build()
    with pytest.raises(KAdapterConfigError, match="backbone_layers of knowledge adapter 'places'"):
        model.add_knowledge_adapter("places", small_adapter(backbone_layers=[9]))
    assert list(model.adapters) == model.active_knowledge_adapters == ["factual", "linguistic"]


# ---- Any number of adapters, of different configurations ------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["concat", "add"])
@torch.no_grad()
def test_adapters_of_different_sizes_and_layers_fuse_by_the_formula(fusion, backbone):
    model = KAdapterModel.from_backbone(backbone, adapters=FOUR_OF_THEIR_OWN, fusion=fusion)
    disturb(model.adapters)
    disturb(model.fusion)
    inputs = batch(padding=3)
    output = model(**inputs, output_hidden_states=True)
    state, parts = output.backbone_last_hidden_state, []
    assert list(output.knowledge_states) == list(FOUR_OF_THEIR_OWN)
    for name, knowledge_state in output.knowledge_states.items():
        adapter = model.adapters[name]
        last = torch.zeros_like(state)
        for index, layer in zip(adapter.config.backbone_layers, adapter.layers, strict=True):
            read = output.hidden_states[index] + last
            down = read @ layer.down_project.weight.T + layer.down_project.bias
            mask = None
            if not adapter.config.attend_to_padding:
                mask = inputs["attention_mask"].bool()[:, None, None, :].expand(-1, 1, down.shape[1], -1)
            encoded = down
            for block in layer.encoder.layer:
                encoded = block(encoded, mask)
                encoded = encoded[0] if isinstance(encoded, tuple) else encoded
            last = read + encoded @ layer.up_project.weight.T + layer.up_project.bias
        torch.testing.assert_close(knowledge_state, last, rtol=1e-4, atol=1e-4)
        if fusion == "add":
            parts.append(knowledge_state)
        else:
            block = model.fusion.states[name]
            both = torch.cat([state, knowledge_state], dim=-1) @ block.weight.T + block.bias
            parts.append(both @ model.fusion.mix[name].weight.T)
    wanted = sum(parts) + (state if fusion == "add" else model.fusion.bias)
    torch.testing.assert_close(output.last_hidden_state, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@torch.no_grad()
def test_adapter_layer_without_transformer_layers_is_a_bottleneck(activation, build):
    model = build(adapters=())
    config = KnowledgeAdapterConfig(num_hidden_layers=0, hidden_size=5, hidden_act=activation, backbone_layers=[1, 4])
    model.add_knowledge_adapter("factual", config)
    disturb(model.adapters)
    assert not any("encoder" in name for name in model.adapters.state_dict())
    output = model(**batch(padding=3), output_hidden_states=True)
    wanted = torch.zeros(())
    for index, layer in zip((1, 4), model.adapters["factual"].layers, strict=True):
        read = output.hidden_states[index] + wanted
        down = read @ layer.down_project.weight.T + layer.down_project.bias
        middle = down.clamp(min=0) if activation == "relu" else torch.nn.functional.gelu(down)
        wanted = read + middle @ layer.up_project.weight.T + layer.up_project.bias
    torch.testing.assert_close(output.knowledge_states["factual"], wanted)


def test_adapters_of_different_sizes_and_layers_come_back(backbone, tmp_path):
    bottleneck = KnowledgeAdapterConfig(num_hidden_layers=0, hidden_size=5)
    model = KAdapterModel.from_backbone(backbone, adapters=FOUR_OF_THEIR_OWN | {"terms": bottleneck})
    disturb(model.adapters)
    model.save_pretrained(tmp_path)
    loaded = KAdapterModel.from_pretrained(tmp_path)
    assert loaded.active_knowledge_adapters == [*FOUR_OF_THEIR_OWN, "terms"]
    with torch.no_grad():
        assert torch.equal(loaded(**batch(padding=3)).last_hidden_state, model(**batch(padding=3)).last_hidden_state)


@torch.no_grad()
def test_one_active_adapter_in_concat_gives_its_block_alone(build):
    model = build()
    model.set_active_knowledge_adapters("linguistic")
    output = model(**batch())
    assert list(output.knowledge_states) == ["linguistic"]
    block = model.fusion.states["linguistic"]
    both = torch.cat([output.backbone_last_hidden_state, output.knowledge_states["linguistic"]], dim=-1)
    torch.testing.assert_close(output.last_hidden_state, both @ block.weight.T + block.bias)


@fusions
@pytest.mark.parametrize("none", [None, [], ()])
@torch.no_grad()
def test_without_an_active_adapter_the_backbones_state_comes_out(fusion, none, build):
    model = build(fusion=fusion)
    model.set_active_knowledge_adapters(none)
    output = model(**batch())
    assert output.knowledge_states is None
    assert output.last_hidden_state is output.backbone_last_hidden_state
    assert torch.equal(output.last_hidden_state, model.backbone(**batch()).last_hidden_state)


# ---- Activating and deleting ----------------------------------------------------------------------------------------


@fusions
@torch.no_grad()
def test_activating_and_back_gives_the_same_output_and_touches_no_weight(fusion, build):
    model = build(adapters=("a", "b", "c"), fusion=fusion)
    before, output = snapshot(model), model(**batch()).last_hidden_state
    model.set_active_knowledge_adapters(["b"])
    assert model.active_knowledge_adapters == ["b"]
    assert not torch.equal(model(**batch()).last_hidden_state, output)
    model.set_active_knowledge_adapters(["a", "b", "c"])
    assert torch.equal(model(**batch()).last_hidden_state, output)
    assert_unchanged(model, before)


def test_active_names_are_in_the_order_given_and_count_once(build):
    model = build(adapters=("a", "b", "c"))
    model.set_active_knowledge_adapters(["c", "a", "c"])
    assert model.active_knowledge_adapters == ["c", "a"]
    assert list(model(**batch()).knowledge_states) == ["c", "a"]


def test_list_of_active_names_is_a_copy(build):
    model = build()
    model.active_knowledge_adapters.clear()
    assert model.active_knowledge_adapters == ["factual", "linguistic"]


@pytest.mark.parametrize(
    "method", ["set_active_knowledge_adapters", "delete_knowledge_adapter", "train_knowledge_adapter"]
)
def test_unknown_name_is_refused_with_those_there_are(method, build):
    model = build()
    with pytest.raises(
        KAdapterConfigError, match=r"no knowledge adapter 'places'; there are \['factual', 'linguistic'\]"
    ):
        getattr(model, method)("places")
    assert model.active_knowledge_adapters == ["factual", "linguistic"]


def test_activation_comes_back(build, tmp_path):
    model = build(adapters=("a", "b", "c"))
    model.set_active_knowledge_adapters(["c", "a"])
    model.save_pretrained(tmp_path)
    loaded = KAdapterModel.from_pretrained(tmp_path)
    assert loaded.active_knowledge_adapters == ["c", "a"]
    loaded.set_active_knowledge_adapters(["a", "b", "c"])  # including the inactive one
    model.set_active_knowledge_adapters(["a", "b", "c"])
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).last_hidden_state, model(**batch()).last_hidden_state)


@every_class
def test_deleted_adapter_is_gone_from_everywhere_and_the_others_stay(model_class, build, tmp_path):
    model = build(model_class, adapters=("a", "b", "c"))
    model.freeze_knowledge_adapters("b")
    others = ("adapters.a.", "adapters.c.", "fusion.states.a", "fusion.states.c", "fusion.mix.a", "fusion.bias")
    before = snapshot(model, *others)
    model.delete_knowledge_adapter("b")
    assert_unchanged(model, before)
    assert not [name for name in model.state_dict() if ".b." in name]
    assert list(model.config.knowledge_adapters) == model.active_knowledge_adapters == ["a", "c"]
    assert model.config.frozen_knowledge_adapters == []
    with torch.no_grad():
        output = model(**inputs_for(model_class)).to_tuple()[0]
        model.save_pretrained(tmp_path)
        assert torch.equal(model_class.from_pretrained(tmp_path)(**inputs_for(model_class)).to_tuple()[0], output)
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["a.safetensors", "c.safetensors"]


@fusions
@torch.no_grad()
def test_deleting_equals_never_having_added(fusion, build):
    model = build(adapters=("a",), fusion=fusion)
    output = model(**batch()).last_hidden_state
    model.add_knowledge_adapter("b", small_adapter())
    disturb(model.adapters["b"])
    model.delete_knowledge_adapter("b")
    assert torch.equal(model(**batch()).last_hidden_state, output)


def test_last_adapter_can_be_deleted(build, tmp_path):
    model = build(adapters=("a",))
    model.delete_knowledge_adapter("a")
    model.save_pretrained(tmp_path)
    loaded = KAdapterModel.from_pretrained(tmp_path)
    assert list(loaded.adapters) == []
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).last_hidden_state, model.backbone(**batch()).last_hidden_state)


def test_deleted_name_can_be_given_again(build):
    model = build()
    old = knowledge(model, "factual")
    model.delete_knowledge_adapter("factual")
    model.add_knowledge_adapter("factual", small_adapter())
    assert model.active_knowledge_adapters == ["linguistic", "factual"]
    assert not torch.equal(knowledge(model, "factual"), old)


# ---- Saving one -----------------------------------------------------------------------------------------------------


def test_folder_and_file_name_are_made(build, tmp_path):
    model = build()
    assert model.save_knowledge_adapter(tmp_path / "new" / "folder", "factual") == (
        tmp_path / "new" / "folder" / "adapters" / "factual.safetensors"
    )
    path = model.save_knowledge_adapter(str(tmp_path / "other" / "mine.safetensors"), "factual")
    assert path == tmp_path / "other" / "mine.safetensors" and path.is_file()
    with pytest.raises(KAdapterConfigError, match="no knowledge adapter 'places'"):
        model.save_knowledge_adapter(tmp_path, "places")


def test_file_describes_itself(build, backbone, tmp_path):
    model = build(adapters=())
    provenance = {"corpus": "T-REx", "relations": 430, "seed": 42, "note": "naïve"}
    model.add_knowledge_adapter("factual", small_adapter(backbone_layers=[0, 4], provenance=provenance))
    with safe_open(model.save_knowledge_adapter(tmp_path, "factual"), "pt") as file:
        described = json.loads(file.metadata()["kadapter"])
        assert all(name.startswith("adapters.factual.layers.") for name in file.keys())  # noqa: SIM118
    assert described["name"] == "factual"
    fields = {"backbone_layers": [0, 4], "provenance": provenance, "backbone_name_or_path": backbone}
    assert described["config"].items() >= (SMALL_ADAPTER | fields).items()
    assert described["config"]["backbone_fingerprint"] == model.backbone_fingerprint()


# ---- Loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_class", "kind"),
    [
        *((model_class, "file") for model_class in ALL_CLASSES),
        (KAdapterModel, "folder"),
        (KAdapterModel, "repository"),
    ],
)
def test_adapter_loads_from_each_kind_of_source_and_into_every_class(model_class, kind, build, tmp_path):
    source = build(KAdapterForSequenceClassification, seed=1)
    place = {"file": tmp_path / "x.safetensors", "folder": tmp_path / "x"}.get(kind, tmp_path / "repository")
    if kind == "repository":
        source.save_pretrained(place)
    else:
        source.save_knowledge_adapter(place, "factual")
    model = build(model_class, adapters=("linguistic",))
    before = snapshot(model)
    assert model.load_knowledge_adapter(place, "factual") == "factual"
    assert_unchanged(model, before)
    assert torch.equal(knowledge(model, "factual"), knowledge(source, "factual"))
    assert model.active_knowledge_adapters == ["linguistic", "factual"]


def test_name_is_the_saved_one_or_the_one_given(build, tmp_path):
    path = build().save_knowledge_adapter(tmp_path / "x.safetensors", "factual")
    model = build(adapters=())
    assert model.load_knowledge_adapter(path) == "factual"
    assert model.load_knowledge_adapter(str(path), name="wikidata") == "wikidata"
    assert torch.equal(knowledge(model, "factual"), knowledge(model, "wikidata"))
    model.save_pretrained(tmp_path / "both")
    loaded = KAdapterModel.from_pretrained(tmp_path / "both")
    assert torch.equal(knowledge(loaded, "wikidata"), knowledge(model, "wikidata"))


def test_folder_with_one_adapter_needs_no_name_and_one_with_several_does(build, tmp_path):
    source = build()
    source.save_knowledge_adapter(tmp_path / "one", "factual")
    source.save_pretrained(tmp_path / "several")
    model = build(adapters=())
    assert model.load_knowledge_adapter(tmp_path / "one", "wikidata") == "wikidata"
    assert model.load_knowledge_adapter(tmp_path / "several", "linguistic") == "linguistic"
    with pytest.raises(KAdapterLoadError, match=r"\['factual', 'linguistic'\], and no name was given"):
        model.load_knowledge_adapter(tmp_path / "several")
    with pytest.raises(KAdapterLoadError, match=r"\['factual', 'linguistic'\], and there is no 'places'"):
        model.load_knowledge_adapter(tmp_path / "several", "places")


def test_loaded_adapter_is_frozen_unless_it_is_to_train(build, tmp_path):
    path = build().save_knowledge_adapter(tmp_path / "x.safetensors", "factual")
    model = build(adapters=())
    model.load_knowledge_adapter(path, "frozen")
    model.load_knowledge_adapter(path, "trained", trainable=True)
    assert model.config.frozen_knowledge_adapters == ["frozen"]
    assert not any(parameter.requires_grad for parameter in model.adapters["frozen"].parameters())
    assert all(parameter.requires_grad for parameter in model.adapters["trained"].parameters())


def test_provenance_and_sizes_come_with_the_adapter(build, tmp_path):
    source = build(adapters=())
    source.add_knowledge_adapter("factual", small_adapter(backbone_layers=[2], provenance={"corpus": "T-REx"}))
    path = source.save_knowledge_adapter(tmp_path, "factual")
    model = build(adapters=())
    model.load_knowledge_adapter(path)
    assert (
        model.config.knowledge_adapters["factual"].to_dict() == source.config.knowledge_adapters["factual"].to_dict()
    )
    assert sha256(model.save_knowledge_adapter(tmp_path / "again.safetensors", "factual")) == sha256(path)


def test_loading_at_construction_takes_sources_and_new_ones(build, backbone, tmp_path):
    source = build()
    source.save_pretrained(tmp_path / "repository")
    path = source.save_knowledge_adapter(tmp_path / "x.safetensors", "factual")
    one = KAdapterModel.from_backbone(backbone, adapters=path)
    several = KAdapterModel.from_backbone(backbone, adapters=[path])
    named = KAdapterForSequenceClassification.from_backbone(
        backbone,
        adapters={"facts": path, "linguistic": str(tmp_path / "repository"), "new": small_adapter()},
    )
    assert list(one.adapters) == list(several.adapters) == ["factual"]
    assert named.active_knowledge_adapters == ["facts", "linguistic", "new"]
    assert named.config.frozen_knowledge_adapters == ["facts", "linguistic"]
    assert torch.equal(knowledge(named, "facts"), knowledge(source, "factual"))
    assert torch.equal(knowledge(named, "linguistic"), knowledge(source, "linguistic"))


@pytest.mark.parametrize("revision", [None, "v1", "b" * 40])
def test_adapter_loads_from_a_repository_in_the_cache_at_a_revision(revision, build, hub, tmp_path):
    old, new = build(seed=1), build(seed=2)
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    hub(tmp_path / "old", "b" * 40, branch="v1")
    cache = hub(tmp_path / "new", "c" * 40)
    model = build(adapters=())
    model.load_knowledge_adapter("org/model", "factual", revision=revision, cache_dir=cache, local_files_only=True)
    assert torch.equal(knowledge(model, "factual"), knowledge(new if revision is None else old, "factual"))


@pytest.mark.parametrize("source", ["org/absent", "nowhere", "/nowhere/at/all", "not a name!", "../x"])
def test_source_that_is_nowhere_is_named(source, build, tmp_path):
    model = build()
    before = snapshot(model)
    with pytest.raises(KAdapterLoadError, match=re.escape(source)):
        model.load_knowledge_adapter(source, "places", cache_dir=tmp_path)
    assert_unchanged(model, before)
    assert list(model.adapters) == ["factual", "linguistic"]


def test_refused_adapter_leaves_the_model_as_it_was(build, backbones, tmp_path):
    path = build().save_knowledge_adapter(tmp_path / "x.safetensors", "factual")
    model = build()
    before, trainable = snapshot(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(KAdapterConfigError, match="'factual' already"):
        model.load_knowledge_adapter(path)
    with pytest.raises(KAdapterConfigError, match="can't name"):
        model.load_knowledge_adapter(path, name="../x")
    other = build(backbone=backbones["bert"]).save_knowledge_adapter(tmp_path / "y.safetensors", "factual")
    with pytest.raises(BackboneMismatchError, match="ignore_backbone_mismatch=True"):
        model.load_knowledge_adapter(other, "places")
    assert_unchanged(model, before)
    assert model.state_dict().keys() == before.keys()
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert list(model.config.knowledge_adapters) == model.active_knowledge_adapters == ["factual", "linguistic"]
    assert model.config.frozen_knowledge_adapters == []


# ---- The summary ----------------------------------------------------------------------------------------------------


def rows(summary: str) -> dict[str, list[str]]:
    """The cells of each row, by its first cell."""
    lines = summary.splitlines()
    assert lines[0].split() == ["part", "parameters", "trainable", "dtype", "device", "source"]
    cells = [re.split(r"\s{2,}", line) for line in lines[2:]]
    return {row[0]: row[1:] for row in cells}


def count(module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


def test_summary_tells_parameters_dtype_device_and_source_of_each_part(build, backbone, tmp_path):
    path = build().save_knowledge_adapter(tmp_path / "x.safetensors", "factual")
    model = build(KAdapterForEntityTyping, adapters=("linguistic",), num_labels=9)
    model.load_knowledge_adapter(path)
    model.backbone.to(torch.bfloat16)
    model.set_active_knowledge_adapters(["factual"])
    table = rows(model.knowledge_summary())
    assert list(table) == [
        "backbone",
        "adapter linguistic (inactive)",
        "adapter factual",
        "fusion (concat)",
        "head",
        "total",
    ]
    assert table["backbone"] == [count(model.backbone), "0", "bfloat16", "cpu", backbone]
    adapter = model.adapters["linguistic"]
    assert table["adapter linguistic (inactive)"] == [count(adapter), "0", "float32", "cpu", "new"]
    assert table["adapter factual"] == [count(model.adapters["factual"]), "0", "float32", "cpu", str(path)]
    # The active adapter's part of the fusion; a single adapter is not mixed.
    block = count(model.fusion.states["factual"])
    assert table["fusion (concat)"] == [count(model.fusion), block, "float32", "cpu", "new"]
    head = 32 * 32 + 32 + 32 * 9 + 9
    assert table["head"] == [f"{head:,}", f"{head:,}", "float32", "cpu", "new"]


@every_class
def test_summary_adds_up_to_the_whole_model(model_class, build):
    model = build(model_class)
    model.train_knowledge_adapter("factual")
    total = rows(model.knowledge_summary())["total"]
    assert total == [f"{model.num_parameters():,}", f"{model.num_parameters(only_trainable=True):,}"]
    table = rows(model.knowledge_summary())
    for column in (0, 1):
        parts = [int(cells[column].replace(",", "")) for part, cells in table.items() if part != "total"]
        assert f"{sum(parts):,}" == total[column]


def test_summary_follows_training_and_deleting(build):
    model = build()
    factual = count(model.adapters["factual"])
    assert rows(model.knowledge_summary())["adapter factual"][:2] == [factual, factual]
    model.train_knowledge_adapter("linguistic")
    assert rows(model.knowledge_summary())["adapter factual"][:2] == [factual, "0"]
    model.delete_knowledge_adapter("factual")
    assert not [part for part in rows(model.knowledge_summary()) if "factual" in part]


def test_summary_names_the_repository_after_loading(build, backbone, tmp_path):
    build(KAdapterForEntityTyping).save_pretrained(tmp_path)
    model = KAdapterForEntityTyping.from_pretrained(tmp_path)
    model.add_knowledge_adapter("places", small_adapter())
    sources = {part: cells[-1] for part, cells in rows(model.knowledge_summary()).items() if part != "total"}
    assert sources == {
        "backbone": backbone,
        "adapter factual": str(tmp_path),
        "adapter linguistic": str(tmp_path),
        "adapter places": "new",
        "fusion (concat)": str(tmp_path),
        "head": str(tmp_path),
    }


def test_summary_tells_what_is_new_and_what_is_the_backbones(build, backbone, tmp_path):
    build().save_pretrained(tmp_path)

    def source(model, part):
        return rows(model.knowledge_summary())[part][-1]

    assert source(KAdapterForSequenceClassification.from_pretrained(tmp_path), "head") == "new"
    assert source(KAdapterForMaskedLM.from_pretrained(tmp_path), "head") == backbone
    assert source(build(KAdapterForMaskedLM), "head") == backbone
    assert source(KAdapterModel(build().config), "backbone") == "new"
    trained = build()
    with torch.no_grad():
        trained.get_input_embeddings().weight[5] += 1
    trained.save_pretrained(tmp_path)
    assert source(KAdapterModel.from_pretrained(tmp_path), "backbone") == str(tmp_path)


def test_summary_of_an_adapter_called_like_a_part(build):
    model = build(adapters=("head", "backbone", "fusion"))
    table = rows(model.knowledge_summary())
    assert table["adapter head"][0] == table["adapter backbone"][0] == count(model.adapters["head"])
    assert table["adapter backbone"][-1] == "new" and table["backbone"][0] == count(model.backbone)


def test_adapter_called_like_a_part_is_saved_and_loaded(build, tmp_path):
    model = build(KAdapterForSequenceClassification, adapters=("head", "backbone", "fusion"))
    model.save_pretrained(tmp_path)
    loaded = KAdapterForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_configuration_class_of_travelled_code_is_accepted(build):
    """The code of a repository defines a separate `KnowledgeAdapterConfig`."""
    travelled = type("KnowledgeAdapterConfig", (KnowledgeAdapterConfig,), {})
    model = build(adapters=())
    model.add_knowledge_adapter("factual", travelled(**SMALL_ADAPTER))
    assert list(model.adapters) == ["factual"]


def test_a_new_adapter_can_be_given_by_its_fields(backbone):
    model = KAdapterModel.from_backbone(backbone, adapters={"factual": dict(SMALL_ADAPTER)})
    model.add_knowledge_adapter("places", SMALL_ADAPTER | {"backbone_layers": [1]})
    assert model.config.knowledge_adapters["factual"].hidden_size == SMALL_ADAPTER["hidden_size"]
    assert model.config.knowledge_adapters["places"].backbone_layers == [1]


@pytest.mark.parametrize("wrong", [{"hiden_size": 16}, 16, object(), [16]])
def test_what_is_no_adapter_is_refused_in_a_sentence(wrong, build, backbone):
    with pytest.raises(KAdapterConfigError, match="knowledge adapter|KnowledgeAdapterConfig"):
        KAdapterModel.from_backbone(backbone, adapters={"factual": wrong})
    with pytest.raises(KAdapterConfigError, match="knowledge adapter|KnowledgeAdapterConfig"):
        build().add_knowledge_adapter("places", wrong)


def test_adapters_that_are_neither_places_nor_named_are_refused_in_a_sentence(backbone):
    with pytest.raises(KAdapterConfigError, match="a dict from names to them"):
        KAdapterModel.from_backbone(backbone, adapters=KnowledgeAdapterConfig())
