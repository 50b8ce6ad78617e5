"""A different backbone from the one used in training is an error; a changed backbone is never lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_same_weights, batch, contents, disturb, small_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, RobertaConfig, RobertaModel, set_seed

from kadapter_hf import (
    BackboneMismatchError,
    KAdapterConfigError,
    KAdapterForMaskedLM,
    KAdapterForSequenceClassification,
    KAdapterLoadError,
    KAdapterModel,
)
from kadapter_hf.modeling import backbone_kadapter
from kadapter_hf.modeling.format_kadapter import checksum, equal_bits, fingerprint


BACKBONE = "backbone.safetensors"


@pytest.fixture
def own_backbone(backbone, tmp_path):
    """A copy of the tiny RoBERTa, to change or delete."""
    return shutil.copytree(backbone, tmp_path / "backbone")


@pytest.fixture(scope="module")
def saved_once(backbone, tmp_path_factory):
    set_seed(0)
    model = KAdapterModel.from_backbone(backbone, {"factual": small_adapter(), "linguistic": small_adapter()})
    disturb(model.adapters)
    disturb(model.fusion)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(saved_once, own_backbone, tmp_path):
    """The folder of a K-Adapter on `own_backbone`."""
    folder = shutil.copytree(saved_once, tmp_path / "saved")
    edit_config(folder, backbone_name_or_path=str(own_backbone))
    return folder


def make_backbone(folder, seed=7, **changes):
    """A tiny RoBERTa like the one of the tests, except for its weights and `changes`."""
    set_seed(seed)
    config = RobertaConfig(**{**TINY["roberta"].to_dict(), **changes})
    model = AutoModelForMaskedLM.from_config(config)
    disturb(model, seed)
    model.save_pretrained(folder)
    return str(folder)


def edit_config(folder, **fields):
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(error, function, *args, **kwargs) -> str:
    """The message of the error, after checking that nothing was initialised before it."""
    before = torch.get_rng_state()
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert torch.equal(torch.get_rng_state(), before)
    return str(caught.value)


# ---- It can't be found --------------------------------------------------------------------------------------------------

NOT_THERE = ("nobody/no-such-model", "/no/such/folder", "a/b/c/d", "../no-such-folder", "")


@pytest.mark.parametrize("name", NOT_THERE)
@pytest.mark.parametrize("model_class", (KAdapterModel, KAdapterForMaskedLM))
def test_a_backbone_that_can_t_be_found_is_an_error_before_anything_is_built(saved, model_class, name):
    edit_config(saved, backbone_name_or_path=name)
    message = refusal(KAdapterLoadError, model_class.from_pretrained, saved)
    assert f"the backbone '{name}' can't be loaded" in message and "backbone=" in message


@pytest.mark.parametrize("name", NOT_THERE)
@pytest.mark.parametrize("model_class", (KAdapterModel, KAdapterForMaskedLM))
def test_from_backbone_on_nothing_is_an_error_before_anything_is_built(model_class, name):
    message = refusal(KAdapterLoadError, model_class.from_backbone, name, adapters={"factual": small_adapter()})
    assert f"the backbone '{name}' can't be loaded" in message and "backbone=" in message


def test_a_deleted_backbone_is_an_error_and_another_place_for_it_is_the_way_out(saved, own_backbone, tmp_path):
    expected = KAdapterModel.from_pretrained(saved)
    moved = shutil.move(own_backbone, tmp_path / "moved")
    message = refusal(KAdapterLoadError, KAdapterModel.from_pretrained, saved)
    assert str(own_backbone) in message and "backbone=" in message
    for place in (moved, str(moved), AutoModel.from_pretrained(moved)):
        assert_same_weights(KAdapterModel.from_pretrained(saved, backbone=place), expected)


def test_a_backbone_given_by_place_is_the_one_that_is_named_when_saved_again(saved, own_backbone, tmp_path):
    moved = shutil.move(own_backbone, tmp_path / "moved")
    model = KAdapterModel.from_pretrained(saved, backbone=moved)
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / BACKBONE).exists()
    assert_same_weights(KAdapterModel.from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize(
    "damage", ("no config", "junk config", "typed config", "no weights", "half the weights", "a tensor")
)
def test_a_damaged_backbone_is_an_error_before_anything_is_built(saved, own_backbone, damage):
    config, weights = own_backbone / "config.json", own_backbone / "model.safetensors"
    if damage == "no config":
        config.unlink()
    elif damage == "junk config":
        config.write_text("junk")
    elif damage == "typed config":
        edit_config(own_backbone, hidden_size="wide")
    elif damage == "no weights":
        weights.unlink()
    elif damage == "half the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        tensors = load_file(weights)
        name = next(name for name in tensors if name.endswith("intermediate.dense.weight"))
        save_file(tensors | {name: tensors[name][:40].clone()}, weights, metadata={"format": "pt"})
    for load in (KAdapterModel.from_pretrained, KAdapterForMaskedLM.from_pretrained):
        message = (
            refusal(KAdapterLoadError, load, saved)
            if damage != "a tensor"
            else str(pytest.raises(KAdapterLoadError, load, saved).value)
        )
        assert str(own_backbone) in message and "backbone=" in message


def test_a_backbone_that_lacks_a_tensor_is_an_error(saved, own_backbone):
    model = AutoModelForMaskedLM.from_pretrained(own_backbone)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layer.2.output.dense.bias" not in name}
    model.save_pretrained(own_backbone, state_dict=state)
    with pytest.raises(KAdapterLoadError, match=r"no weights for '[\w.]*layer\.2\.output\.dense\.bias'.*backbone="):
        KAdapterModel.from_pretrained(saved)


def test_a_k_adapter_is_no_backbone(saved):
    assert "load it with from_pretrained" in refusal(KAdapterConfigError, KAdapterModel.from_backbone, saved)


# ---- It is another ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value", (("hidden_size", 48), ("num_hidden_layers", 5), ("vocab_size", 101), ("model_type", "bert"))
)
def test_a_backbone_of_another_kind_is_refused_whatever_is_ignored(saved, backbones, tmp_path, field, value):
    if field == "model_type":
        other = backbones["bert"]
    else:
        other = make_backbone(tmp_path / "other", **{field: value})
    for ignore in (False, True):
        for given in (other, AutoModel.from_pretrained(other)):
            message = refusal(
                BackboneMismatchError,
                KAdapterModel.from_pretrained,
                saved,
                backbone=given,
                ignore_backbone_mismatch=ignore,
            )
            was = getattr(TINY["roberta"], field)
            assert other in message and f"{field} {value!r}" in message and repr(was) in message
            assert "backbone=" in message


def test_the_named_backbone_replaced_by_one_of_another_kind_is_refused(saved, own_backbone):
    shutil.rmtree(own_backbone)
    make_backbone(own_backbone, num_hidden_layers=3)
    message = refusal(BackboneMismatchError, KAdapterModel.from_pretrained, saved)
    assert "num_hidden_layers 3" in message and str(own_backbone) in message


@pytest.mark.parametrize("how", ("in its place", "given by place", "given loaded"))
@pytest.mark.parametrize("model_class", (KAdapterModel, KAdapterForMaskedLM))
def test_other_weights_of_the_same_shapes_are_refused(saved, own_backbone, tmp_path, how, model_class):
    if how == "in its place":
        other = make_backbone(own_backbone)
        kwargs = {}
    else:
        other = make_backbone(tmp_path / "other")
        kwargs = {"backbone": other if how == "given by place" else AutoModel.from_pretrained(other)}
    with pytest.raises(BackboneMismatchError) as caught:
        model_class.from_pretrained(saved, **kwargs)
    expected = json.loads((saved / "config.json").read_text())["backbone_fingerprint"]
    for word in (str(saved), expected[:12], "backbone=", "ignore_backbone_mismatch=True"):
        assert word in str(caught.value)
    model = model_class.from_pretrained(saved, **kwargs, ignore_backbone_mismatch=True)
    assert_same_weights(model.backbone, AutoModel.from_pretrained(other, add_pooling_layer=False))


def test_one_changed_value_in_the_backbone_is_refused(saved, own_backbone):
    model = AutoModelForMaskedLM.from_pretrained(own_backbone)
    with torch.no_grad():
        model.roberta.encoder.layer[3].output.LayerNorm.bias[7] += 1e-6
    model.save_pretrained(own_backbone)
    with pytest.raises(BackboneMismatchError):
        KAdapterModel.from_pretrained(saved)


@pytest.mark.parametrize("given", (str, AutoModel.from_pretrained))
def test_what_was_saved_after_an_ignored_mismatch_loads_without_ignoring_any(saved, tmp_path, given):
    other = make_backbone(tmp_path / "other")
    model = KAdapterModel.from_pretrained(saved, backbone=given(other), ignore_backbone_mismatch=True)
    model.save_pretrained(tmp_path / "again")
    assert_same_weights(KAdapterModel.from_pretrained(tmp_path / "again"), model)


# ---- The backbone of a knowledge adapter --------------------------------------------------------------------------------


def test_an_adapter_of_other_weights_is_refused_unless_told_otherwise(saved, backbone, tmp_path):
    model = KAdapterModel.from_backbone(make_backbone(tmp_path / "other"))
    for source in (saved, saved / "adapters" / "factual.safetensors"):
        message = refusal(BackboneMismatchError, model.load_knowledge_adapter, source, "factual")
        for word in ("factual.safetensors", backbone, str(tmp_path / "other"), "ignore_backbone_mismatch=True"):
            assert word in message
        assert list(model.adapters) == []
    model.load_knowledge_adapter(saved, "factual", ignore_backbone_mismatch=True)
    assert_same_weights(model.adapters["factual"], KAdapterModel.from_pretrained(saved).adapters["factual"])


def test_an_adapter_of_a_backbone_of_another_type_is_refused(saved, backbones):
    model = KAdapterModel.from_backbone(backbones["bert"])
    assert "ignore_backbone_mismatch" in refusal(BackboneMismatchError, model.load_knowledge_adapter, saved, "factual")


def test_an_adapter_of_a_wider_or_deeper_backbone_is_refused_whatever_is_ignored(build, tmp_path):
    wide = build(backbone=make_backbone(tmp_path / "wide", hidden_size=48), adapters=["factual"])
    deep = build(backbone=make_backbone(tmp_path / "deep", num_hidden_layers=6), adapters=[])
    deep.add_knowledge_adapter("factual", small_adapter(backbone_layers=[0, 6]))
    model = build(adapters=[])
    for other, error, word in (
        (wide, KAdapterLoadError, "shape"),
        (deep, KAdapterConfigError, "hidden states 0 to 4"),
    ):
        path = other.save_knowledge_adapter(tmp_path / "adapter.safetensors", "factual")
        with pytest.raises(BackboneMismatchError, match="ignore_backbone_mismatch"):
            model.load_knowledge_adapter(path)
        assert word in refusal(error, model.load_knowledge_adapter, path, ignore_backbone_mismatch=True)
        assert list(model.adapters) == []


def test_an_adapter_stays_with_the_backbone_that_it_was_trained_on(saved, tmp_path):
    """An adapter that is loaded on another backbone, despite the warning, and saved there still belongs to its own."""
    model = KAdapterModel.from_backbone(make_backbone(tmp_path / "other"))
    model.load_knowledge_adapter(saved, "factual", ignore_backbone_mismatch=True)
    path = model.save_knowledge_adapter(tmp_path / "elsewhere", "factual")
    assert path.read_bytes() == (saved / "adapters" / "factual.safetensors").read_bytes()
    with pytest.raises(BackboneMismatchError):
        KAdapterModel.from_backbone(tmp_path / "other").load_knowledge_adapter(path)


def test_an_adapter_that_was_trained_further_belongs_to_the_backbone_that_it_was_trained_on(saved, tmp_path):
    other = make_backbone(tmp_path / "other")
    model = KAdapterModel.from_backbone(other)
    model.load_knowledge_adapter(saved, "factual", ignore_backbone_mismatch=True, trainable=True)
    disturb(model.adapters)
    path = model.save_knowledge_adapter(tmp_path / "elsewhere", "factual")
    assert KAdapterModel.from_backbone(other).load_knowledge_adapter(path) == "factual"


def test_an_adapter_trained_on_a_trained_backbone_does_not_fit_the_one_that_it_began_with(build, backbone, tmp_path):
    model = build(adapters=["factual"])
    model.unfreeze_backbone()
    disturb(model.backbone)
    disturb(model.adapters)
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(BackboneMismatchError):
        KAdapterModel.from_backbone(backbone).load_knowledge_adapter(tmp_path / "both")
    own = KAdapterModel.from_pretrained(tmp_path / "both")
    own.delete_knowledge_adapter("factual")
    assert own.load_knowledge_adapter(tmp_path / "both") == "factual"


# ---- The same in another dtype ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_class, dtype",
    (
        (KAdapterModel, torch.float16),
        (KAdapterModel, torch.float64),
        (KAdapterForMaskedLM, torch.bfloat16),
        (KAdapterForSequenceClassification, "bfloat16"),
    ),
    ids=str,
)
def test_a_backbone_in_another_dtype_is_still_the_named_one(backbone, tmp_path, model_class, dtype):
    model = model_class.from_backbone(backbone, adapters={"factual": small_adapter()}, dtype=dtype)
    real = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {real}
    assert model.config.backbone_fingerprint == KAdapterModel.from_backbone(backbone).config.backbone_fingerprint
    model.save_pretrained(tmp_path)
    assert not (tmp_path / BACKBONE).exists()
    again = model_class.from_pretrained(tmp_path)
    assert_same_weights(again, model)
    again.save_pretrained(tmp_path)
    assert not (tmp_path / BACKBONE).exists()
    assert_same_weights(model_class.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_model_loaded_in_another_dtype_does_not_store_its_backbone(saved, own_backbone, tmp_path, dtype):
    model = KAdapterModel.from_pretrained(saved, dtype=dtype)
    assert_same_weights(model.backbone, AutoModel.from_pretrained(own_backbone, dtype=dtype, add_pooling_layer=False))
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / BACKBONE).exists()
    assert_same_weights(KAdapterModel.from_pretrained(tmp_path / "again"), model)
    whole = KAdapterModel.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert_same_weights(whole.backbone, AutoModel.from_pretrained(own_backbone, add_pooling_layer=False))


def test_a_model_cast_after_loading_does_not_store_its_backbone(saved, tmp_path):
    model = KAdapterModel.from_pretrained(saved).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / BACKBONE).exists()
    assert_same_weights(KAdapterModel.from_pretrained(tmp_path / "again"), model)


def test_a_backbone_cast_there_and_back_is_not_the_named_one_any_more(saved, tmp_path):
    """Its weights have lost precision, so it is a different backbone, which is stored."""
    model = KAdapterModel.from_pretrained(saved)
    model.backbone.to(torch.bfloat16).to(torch.float32)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / BACKBONE).exists()
    assert_same_weights(KAdapterModel.from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_adapters_move_between_dtypes_of_one_backbone(saved, own_backbone, dtype):
    model = KAdapterModel.from_backbone(own_backbone, dtype=dtype)
    assert model.load_knowledge_adapter(saved, "factual") == "factual"


@pytest.mark.parametrize(
    "model_class, dtype",
    (
        (KAdapterModel, torch.bfloat16),
        (KAdapterForMaskedLM, torch.float16),
        (KAdapterForSequenceClassification, torch.bfloat16),
    ),
)
def test_a_backbone_stored_in_another_dtype_is_used_in_it(own_backbone, tmp_path, model_class, dtype):
    """The named backbone's own files are in half precision; adapters and heads are not."""
    AutoModelForMaskedLM.from_pretrained(own_backbone).to(dtype).save_pretrained(own_backbone)
    model = model_class.from_backbone(own_backbone, adapters={"factual": small_adapter()})
    assert {parameter.dtype for parameter in model.backbone.parameters()} == {dtype}
    assert {parameter.dtype for parameter in model.adapters.parameters()} == {torch.float32}
    for active in (["factual"], []):
        model.set_active_knowledge_adapters(active)
        assert_comes_back(model, tmp_path / "saved", stored=False)


# ---- A changed backbone comes back bit for bit --------------------------------------------------------------------------


def assert_comes_back(model, folder, stored=True):
    """The model, its outputs included, after saving and loading twice."""
    model.eval()
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs, return_dict=True)[0]
    current = model
    for _ in range(2):
        current.save_pretrained(folder)
        assert (folder / BACKBONE).exists() == stored
        current = type(model).from_pretrained(folder)
        assert_same_weights(current, model)
        with torch.no_grad():
            assert torch.equal(current(**inputs, return_dict=True)[0], expected)
    return current


def train_backbone(model):
    """One step of gradient descent on the backbone."""
    model.unfreeze_backbone()
    model.train()
    optimizer = torch.optim.SGD(model.backbone.parameters(), lr=0.1)
    model(**batch(), return_dict=True)[0].sum().backward()
    optimizer.step()
    optimizer.zero_grad()


CLASSES = (KAdapterForSequenceClassification, KAdapterForMaskedLM)


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_trained_backbone_comes_back(build, tmp_path, model_class):
    model = build(model_class, freeze_backbone=False)
    train_backbone(model)
    assert not assert_comes_back(model, tmp_path).config.freeze_backbone


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_backbone_frozen_again_after_training_comes_back(build, tmp_path, model_class):
    model = build(model_class)
    train_backbone(model)
    model.freeze_backbone()
    assert assert_comes_back(model, tmp_path).config.freeze_backbone


def test_a_backbone_that_may_train_and_did_not_is_not_stored(build, tmp_path):
    assert_comes_back(build(freeze_backbone=False), tmp_path, stored=False)


def test_a_trained_backbone_does_not_need_the_one_that_it_began_as(own_backbone, build, tmp_path):
    model = build(backbone=own_backbone)
    train_backbone(model)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(own_backbone)
    assert_same_weights(KAdapterModel.from_pretrained(tmp_path / "saved"), model)


def test_a_frozen_backbone_whose_source_is_gone_is_stored(own_backbone, build, tmp_path):
    model = build(backbone=own_backbone)
    shutil.rmtree(own_backbone)
    assert_comes_back(model, tmp_path / "saved")


def test_a_frozen_backbone_whose_source_has_changed_is_stored(own_backbone, build, tmp_path):
    model = build(backbone=own_backbone)
    (own_backbone / "model.safetensors").unlink()  # the model may have the old file mapped
    make_backbone(own_backbone)
    assert_comes_back(model, tmp_path / "saved")


def test_a_frozen_backbone_whose_source_is_damaged_is_stored(own_backbone, build, tmp_path):
    model = build(backbone=own_backbone)
    weights = own_backbone / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()  # the model may have the old file mapped
    weights.write_bytes(content[:1000])
    assert_comes_back(model, tmp_path / "saved")


def test_a_change_that_the_fingerprint_does_not_see_is_stored(tmp_path, build):
    """The fingerprint covers a sample; storing depends on every bit."""
    folder = make_backbone(tmp_path / "large", vocab_size=1000)
    model = build(backbone=folder)
    weights = list(model.backbone.state_dict().values())
    before = fingerprint(weights)
    weight = model.backbone.embeddings.word_embeddings.weight.data.view(-1).view(torch.int32)
    for position in range(256, weight.numel()):
        weight[position] ^= 1
        if fingerprint(weights) == before:
            break
        weight[position] ^= 1
    assert fingerprint(weights) == before
    assert_comes_back(model, tmp_path / "saved")


@pytest.fixture
def saved_twice(own_backbone, build, tmp_path, monkeypatch):
    """A model that has been saved, and the loads of its backbone after that."""
    model, loads = build(backbone=own_backbone), []
    model.save_pretrained(tmp_path / "first")
    load = backbone_kadapter.load_backbone
    monkeypatch.setattr(backbone_kadapter, "load_backbone", lambda *a, **k: loads.append(a) or load(*a, **k))
    return model, loads


def test_a_backbone_that_was_compared_once_is_not_read_again_by_the_next_save(saved_twice, tmp_path):
    model, loads = saved_twice
    disturb(model.adapters)
    model.save_pretrained(tmp_path / "second")
    assert not loads and not (tmp_path / "second" / BACKBONE).exists()
    assert_same_weights(KAdapterModel.from_pretrained(tmp_path / "second"), model)


def test_a_bit_that_changes_after_a_save_is_stored_by_the_next(saved_twice, tmp_path):
    model, _ = saved_twice
    model.backbone.embeddings.word_embeddings.weight.data.view(-1).view(torch.int32)[700] ^= 1
    assert_comes_back(model, tmp_path / "second")


def test_a_backbone_whose_source_changes_after_a_save_is_stored_by_the_next(saved_twice, own_backbone, tmp_path):
    model, _ = saved_twice
    (own_backbone / "model.safetensors").unlink()
    make_backbone(own_backbone)
    assert_comes_back(model, tmp_path / "second")


@pytest.mark.parametrize("size", (117, 80), ids=("larger", "smaller"))
@pytest.mark.parametrize("model_class", CLASSES)
def test_resized_embeddings_come_back(build, tmp_path, model_class, size):
    model = build(model_class)
    model.resize_token_embeddings(size)
    again = assert_comes_back(model, tmp_path) if size > 100 else None
    if again is None:  # the inputs of `assert_comes_back` use the whole vocabulary
        model.save_pretrained(tmp_path)
        again = model_class.from_pretrained(tmp_path)
        assert_same_weights(again, model)
    assert again.get_input_embeddings().weight.shape[0] == again.config.backbone_config.vocab_size == size
    if model_class is KAdapterForMaskedLM:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
        with torch.no_grad():
            found, expected = (m(input_ids=torch.tensor([[3, 70]])).logits for m in (again, model.eval()))
        assert found.shape[-1] == size and torch.equal(found, expected)


def test_resized_and_trained_embeddings_come_back_in_half_precision(build, tmp_path):
    model = build(KAdapterForMaskedLM, dtype=torch.bfloat16)
    model.resize_token_embeddings(117)
    disturb(model.backbone)
    model.freeze_backbone()
    assert {tensor.dtype for tensor in assert_comes_back(model, tmp_path).state_dict().values()} == {torch.bfloat16}


def test_a_backbone_resized_back_to_its_size_with_its_weights_is_the_named_one(build, tmp_path):
    model = build()
    model.resize_token_embeddings(117)
    model.resize_token_embeddings(100)
    assert_comes_back(model, tmp_path, stored=False)


def test_a_stored_backbone_goes_again_with_the_change(saved, own_backbone, tmp_path):
    model = KAdapterModel.from_pretrained(saved)
    original = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    disturb(model.backbone)
    model.save_pretrained(saved)
    assert BACKBONE in contents(saved)
    model = KAdapterModel.from_pretrained(saved)
    model.backbone.load_state_dict(original)
    model.save_pretrained(saved)
    assert BACKBONE not in contents(saved)
    assert_same_weights(
        KAdapterModel.from_pretrained(saved).backbone, AutoModel.from_pretrained(own_backbone, add_pooling_layer=False)
    )


def test_a_backbone_from_no_repository_is_stored(tmp_path):
    set_seed(0)
    backbone = RobertaModel(TINY["roberta"], add_pooling_layer=False)
    model = KAdapterModel.from_backbone(backbone, adapters={"factual": small_adapter()})
    assert_comes_back(model, tmp_path)
    stored = load_file(tmp_path / BACKBONE)
    assert stored.keys() == {f"backbone.{name}" for name in backbone.state_dict()}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("model_class", CLASSES)
def test_a_loaded_backbone_that_was_not_changed_is_not_stored(backbone, tmp_path, model_class, dtype):
    given = AutoModel.from_pretrained(backbone, dtype=dtype)
    model = model_class.from_backbone(given, adapters={"factual": small_adapter()})
    assert_comes_back(model, tmp_path, stored=False)


def test_the_comparison_is_of_bits():
    scalar, nan = torch.tensor(1.0), torch.full((3,), float("nan"))
    assert equal_bits({"a": scalar, "b": nan}, {"a": scalar.clone(), "b": nan.clone()})
    assert equal_bits({"a": torch.ones(2, dtype=torch.float16)}, {"a": torch.ones(2)})
    assert not equal_bits({"a": torch.zeros(2)}, {"a": -torch.zeros(2)})
    assert not equal_bits({"a": torch.ones(2)}, {"a": torch.ones(2, 1)})
    assert not equal_bits({"a": scalar}, {"a": scalar, "b": nan})


# ---- Casts after loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_an_adapter_saved_from_a_cast_model_fits_its_backbone(build, backbone, tmp_path, dtype):
    model = build().to(dtype)
    path = model.save_knowledge_adapter(tmp_path, "factual")
    KAdapterModel.from_backbone(backbone, path)


def test_a_cast_backbone_takes_an_adapter_that_was_trained_on_it(build, tmp_path):
    path = build().save_knowledge_adapter(tmp_path, "factual")
    model = build(adapters=()).to(torch.bfloat16)
    assert model.load_knowledge_adapter(path) == "factual"


def test_an_adapter_added_to_a_cast_model_fits_its_backbone(build, backbone, tmp_path):
    model = build(adapters=()).to(torch.bfloat16)
    model.add_knowledge_adapter("late", small_adapter())
    KAdapterModel.from_backbone(backbone, model.save_knowledge_adapter(tmp_path, "late"))


# ---- The checksum that tells whether a backbone was touched ----------------------------------------------------------


def changed(tensor: torch.Tensor, change: str) -> torch.Tensor:
    other = tensor.clone()
    if change == "one bit":
        other.view(torch.uint8)[-1] ^= 1
    elif change == "two values in each other's place":
        other[[3, 5000]] = other[[5000, 3]]
    elif change == "two rows in each other's place":
        other[:4096] = tensor[4096:8192]
        other[4096:8192] = tensor[:4096]
    return other


@pytest.mark.parametrize("change", ["one bit", "two values in each other's place", "two rows in each other's place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_checksum_tells_of_any_change(change, dtype):
    tensor = torch.randn(20_003, generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)
    assert checksum({"weight": changed(tensor, "none")}) == checksum({"weight": tensor})
    assert checksum({"weight": changed(tensor, change)}) != checksum({"weight": tensor})


def test_a_checksum_depends_on_values_and_not_on_where_they_are_stored():
    stored = torch.arange(30_001, dtype=torch.bfloat16)
    assert checksum({"weight": stored[1:]}) == checksum({"weight": stored[1:].clone()})
    assert checksum({"weight": torch.zeros(())}) != checksum({"weight": torch.zeros(1)})
