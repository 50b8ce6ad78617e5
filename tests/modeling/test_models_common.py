"""The common tests of transformers' encoder models, for every class of this package."""

import copy
import inspect
import json
import pickle

import pytest
import torch
from conftest import ALL_CLASSES, batch, inputs_for, labels_for, small_adapter
from safetensors import safe_open
from transformers import AttentionInterface, AutoModel, AutoModelForMaskedLM, PreTrainedModel, set_seed
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kadapter_hf import (
    KAdapterForDependencyParsing,
    KAdapterForEntityTyping,
    KAdapterForMaskedLM,
    KAdapterForMultipleChoice,
    KAdapterForQuestionAnswering,
    KAdapterForRelationClassification,
    KAdapterForSequenceClassification,
    KAdapterForTokenClassification,
    KAdapterModel,
)


HEADS = {
    KAdapterForSequenceClassification: {"classifier.weight", "classifier.bias"},
    KAdapterForTokenClassification: {"classifier.weight", "classifier.bias"},
    KAdapterForQuestionAnswering: {"qa_outputs.weight", "qa_outputs.bias"},
    KAdapterForMultipleChoice: {"classifier.weight", "classifier.bias"},
    KAdapterForEntityTyping: {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"},
    KAdapterForRelationClassification: {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"},
    KAdapterForDependencyParsing: {
        f"{kind}_{layer}.{tensor}"
        for kind in ("arc", "relation")
        for layer in ("word", "head", "scorer")
        for tensor in ("weight", "bias")
    },
}
every_class = pytest.mark.parametrize("model_class", ALL_CLASSES, ids=lambda model_class: model_class.__name__)
# One class for each kind: without a head, with the backbone's own head, with a head that reads marked positions.
KINDS = (KAdapterModel, KAdapterForMaskedLM, KAdapterForRelationClassification)
each_kind = pytest.mark.parametrize("model_class", KINDS, ids=lambda model_class: model_class.__name__)
every_new_head = pytest.mark.parametrize("model_class", HEADS, ids=lambda model_class: model_class.__name__)


def tensors_of(output) -> list[torch.Tensor]:
    """All tensors of a model's output, in order."""
    found = []
    for value in output.to_tuple() if hasattr(output, "to_tuple") else output:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            found.extend(value.values())
        elif isinstance(value, tuple):
            found.extend(value)
    return found


def assert_same(one, two, **tolerance) -> None:
    """The same number of tensors with the same values, bit for bit unless a tolerance is given."""
    first, second = tensors_of(one), tensors_of(two)
    assert len(first) == len(second) > 0
    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(left, right, **(tolerance or {"rtol": 0, "atol": 0}))


@torch.no_grad()
def run(model, **kwargs):
    return model(**inputs_for(type(model)), **kwargs)


def main_output(output) -> torch.Tensor:
    """The logits, or the fused states of the class without a head."""
    return next(
        output[name] for name in ("logits", "start_logits", "relation_logits", "last_hidden_state") if name in output
    )


# ---- Saving and loading ---------------------------------------------------------------------------------------------


@every_class
def test_saved_model_loads_with_the_same_output_and_nothing_missing(model_class, build, tmp_path):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert {name: set(problems) for name, problems in info.items()} == dict.fromkeys(info, set())
    assert info.keys() >= {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}
    for (name, tensor), (other_name, other) in zip(
        model.state_dict().items(), loaded.state_dict().items(), strict=True
    ):
        assert name == other_name and torch.equal(tensor, other)
    assert_same(run(model), run(loaded))
    assert not loaded.training


@each_kind
def test_saving_again_gives_the_same_weight_files(model_class, build, tmp_path):
    build(model_class).save_pretrained(tmp_path / "first")
    model_class.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").rglob("*.safetensors")}
    second = {path.name: path.read_bytes() for path in (tmp_path / "second").rglob("*.safetensors")}
    assert first == second and {"factual.safetensors", "linguistic.safetensors"} <= first.keys()


@every_new_head
def test_head_that_the_base_model_lacks_is_new_and_reported(model_class, build, tmp_path):
    base = build()
    base.save_pretrained(tmp_path)
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == HEADS[model_class]
    assert info["unexpected_keys"] == set()
    head = [parameter for name, parameter in model.named_parameters() if name in HEADS[model_class]]
    assert all(parameter.isfinite().all() and parameter.abs().max() < 1 for parameter in head)
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


@every_new_head
def test_base_model_of_a_head_model_drops_the_head_and_says_so(model_class, build, tmp_path):
    model = build(model_class)
    model.save_pretrained(tmp_path)
    base, info = KAdapterModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set()
    assert info["unexpected_keys"] == HEADS[model_class]
    for name, tensor in base.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_head_of_another_class_is_not_taken_over(build, tmp_path):
    """Both have a `classifier.weight` of the same shape, with different meanings."""
    build(KAdapterForSequenceClassification).save_pretrained(tmp_path)
    model, info = KAdapterForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == {"classifier.weight", "classifier.bias"}


def test_a_class_of_ones_own_takes_the_head_of_the_class_that_it_derives_from(build, tmp_path):
    class Own(KAdapterForSequenceClassification):
        pass

    model = build(KAdapterForSequenceClassification)
    model.save_pretrained(tmp_path)
    own, info = Own.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == set()
    assert torch.equal(own.classifier.weight, model.classifier.weight)


def test_head_with_another_number_of_labels_is_new_on_request_only(build, tmp_path):
    model = build(KAdapterForSequenceClassification, num_labels=3)
    model.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="classifier.*shape"):
        KAdapterForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    resized, info = KAdapterForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert info["missing_keys"] | {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert run(resized).logits.shape == (4, 5)
    assert torch.equal(resized.fusion.bias, model.fusion.bias)


def test_arguments_of_from_pretrained_override_the_configuration(build, tmp_path):
    build(KAdapterForSequenceClassification).save_pretrained(tmp_path)
    model = KAdapterForSequenceClassification.from_pretrained(
        tmp_path, freeze_backbone=False, active_knowledge_adapters=["linguistic"], classifier_dropout=0.5
    )
    assert model.config.classifier_dropout == model.dropout.p == 0.5
    assert model.active_knowledge_adapters == ["linguistic"]
    assert all(parameter.requires_grad for parameter in model.backbone.parameters())


def test_from_config_builds_with_random_weights_and_no_files(build):
    config = copy.deepcopy(build().config)
    config.backbone_name_or_path = "/nowhere"
    model = AutoModel.from_config(config)
    assert type(model) is KAdapterModel
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# ---- Initialisation -------------------------------------------------------------------------------------------------


@every_class
def test_every_weight_is_initialised(model_class, backbone):
    """`torch.empty` is filled with NaN, so that memory that was never written holds NaN."""
    filled, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    torch.use_deterministic_algorithms(True)
    try:
        model = model_class.from_backbone(backbone, adapters={"factual": small_adapter()})
        scratch = model_class(copy.deepcopy(model.config))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
    for each in (model, scratch):
        for name, tensor in each.state_dict().items():
            assert tensor.isfinite().all(), name


def test_new_projections_have_the_papers_spread(backbone):
    set_seed(0)
    model = KAdapterModel.from_backbone(backbone, adapters={"factual": small_adapter(hidden_size=256)})
    for layer in model.adapters["factual"].layers:
        for projection in (layer.down_project, layer.up_project):
            assert projection.weight.std().item() == pytest.approx(2e-4, rel=0.05)
            assert abs(projection.weight.mean().item()) < 1e-5
            assert not projection.bias.any()


def test_new_projections_have_the_spread_that_is_asked_for(backbone):
    set_seed(0)
    model = KAdapterModel.from_backbone(
        backbone, adapters={"factual": small_adapter(hidden_size=256, initializer_range=0.03)}
    )
    assert model.adapters["factual"].layers[0].up_project.weight.std().item() == pytest.approx(0.03, rel=0.05)


def test_new_adapter_is_almost_the_identity(backbone):
    """Each layer passes its input on, so the adapter returns the sum of the states that it reads."""
    model = KAdapterModel.from_backbone(backbone, adapters={"factual": small_adapter(backbone_layers=[0, 2, 3])})
    output = run(model, output_hidden_states=True)
    wanted = output.hidden_states[0] + output.hidden_states[2] + output.hidden_states[3]
    difference = (output.knowledge_states["factual"] - wanted).norm() / wanted.norm()
    assert 0 < difference < 1e-2


@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("start", [None, 0.0])
def test_new_model_adds_a_little_of_its_adapters_to_what_its_backbone_gives(backbone, adapters, start):
    model = KAdapterModel.from_backbone(
        backbone,
        adapters={f"a{number}": small_adapter() for number in range(adapters)},
        fusion_config=None if start is None else {"start": start},
    )
    output = run(model)
    state, knowledge = output.backbone_last_hidden_state, sum(output.knowledge_states.values()) / adapters
    wanted = state + (0.1 if start is None else start) * knowledge
    assert 0 < (output.last_hidden_state - wanted).norm() / state.norm() < 0.05
    assert (output.last_hidden_state - state).norm() / state.norm() < 0.5


@each_kind
def test_same_seed_gives_the_same_weights(model_class, backbone):
    models = []
    for seed in (0, 0, 1):
        set_seed(seed)
        models.append(model_class.from_backbone(backbone, adapters={"factual": small_adapter()}).state_dict())
    name = "adapters.factual.layers.0.down_project.weight"
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert not torch.equal(models[0][name], models[2][name])


# ---- Outputs --------------------------------------------------------------------------------------------------------


@every_class
def test_forward_is_deterministic(model_class, build):
    model = build(model_class)
    assert_same(run(model), run(model))


@each_kind
def test_dropout_is_drawn_anew_in_training_and_follows_the_seed(model_class, build):
    model = build(model_class).train()
    outputs = []
    for seed in (0, 0, 1):
        set_seed(seed)
        outputs.append(main_output(run(model)))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@every_class
def test_a_row_gives_the_same_alone_and_in_a_batch(model_class, build):
    model = build(model_class)
    inputs = inputs_for(model_class, padding=3)
    rows = next(iter(inputs.values())).shape[0]
    with torch.no_grad():
        together = tensors_of(model(**inputs))
        for row in range(rows):
            alone = tensors_of(model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()}))
            for one, all_rows in zip(alone, together, strict=True):
                torch.testing.assert_close(one[0], all_rows[row], rtol=1e-5, atol=1e-5)


@every_class
def test_tuple_output_holds_what_the_named_output_does(model_class, build):
    model = build(model_class)
    asked = {"output_hidden_states": True} | labels_for(model_class, inputs_for(model_class))
    named = run(model, **asked)
    plain = run(model, **asked, return_dict=False)
    assert type(plain) is tuple and len(plain) == len(named.to_tuple())
    assert_same(named, plain)
    model.config.return_dict = False
    assert type(run(model)) is tuple


@every_class
def test_hidden_states_and_attentions_are_the_backbones(model_class, build, backbone):
    model = build(model_class, attn_implementation="eager")
    stock = AutoModel.from_pretrained(backbone, attn_implementation="eager")
    inputs = inputs_for(model_class)
    output = run(model, output_hidden_states=True, output_attentions=True)
    ids = inputs["input_ids"].view(-1, inputs["input_ids"].shape[-1])
    with torch.no_grad():
        wanted = stock(ids, torch.ones_like(ids), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 5 and len(output.attentions) == 4
    assert_same((output.hidden_states,), (wanted.hidden_states,))
    assert_same((output.attentions,), (wanted.attentions,))


@each_kind
def test_hidden_states_and_attentions_come_on_request_only(model_class, build):
    model = build(model_class, attn_implementation="eager")
    output = run(model)
    assert output.hidden_states is None and output.attentions is None
    model.config.output_hidden_states = True
    assert len(run(model).hidden_states) == 5
    assert run(model, output_hidden_states=False).hidden_states is None


@each_kind
def test_hidden_states_of_some_layers_come_by_their_indices(model_class, build):
    """The others are None, whether the adapters read them or not; 0 and 2 are read here."""
    model = build(model_class)
    every = run(model, output_hidden_states=True).hidden_states
    for indices in ([1], [2, -1], [0, 1, 2, 3, 4]):
        found = run(model, output_hidden_states=indices).hidden_states
        kept = {index % 5 for index in indices}
        assert [index for index, state in enumerate(found) if state is not None] == sorted(kept)
        assert all(torch.equal(found[index], every[index]) for index in kept)


@every_class
def test_embeddings_in_place_of_ids_give_the_same(model_class, build):
    model = build(model_class)
    inputs = inputs_for(model_class)
    embedded = dict(inputs)
    embedded["inputs_embeds"] = model.get_input_embeddings()(embedded.pop("input_ids"))
    with torch.no_grad():
        assert_same(model(**inputs), model(**embedded), rtol=1e-6, atol=1e-6)


@every_class
def test_without_a_mask_every_token_counts(model_class, build):
    model = build(model_class)
    inputs = inputs_for(model_class)
    with torch.no_grad():
        with_mask = model(**inputs)
        del inputs["attention_mask"]
        assert_same(with_mask, model(**inputs), rtol=1e-5, atol=1e-5)


@every_class
def test_labels_give_a_loss_that_reaches_every_trainable_weight(model_class, build):
    if model_class is KAdapterModel:
        model = build(model_class, freeze_backbone=False)
        model(**inputs_for(model_class)).last_hidden_state.square().mean().backward()
    else:
        model = build(model_class, freeze_backbone=False)
        inputs = inputs_for(model_class)
        output = model(**inputs, **labels_for(model_class, inputs))
        assert output.loss.shape == () and output.loss.isfinite()
        output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and parameter.grad is not None and parameter.grad.isfinite().all(), name


@every_class
def test_forward_names_its_arguments_as_trainer_looks_for_them(model_class):
    """Trainer drops the columns of a data set that forward does not name."""
    named = inspect.signature(model_class.forward).parameters
    inputs = inputs_for(model_class)
    assert inputs.keys() | labels_for(model_class, inputs).keys() <= named.keys()


# ---- Attention ------------------------------------------------------------------------------------------------------


@every_class
def test_eager_and_sdpa_agree(model_class, build):
    inputs = inputs_for(model_class, padding=3)
    with torch.no_grad():
        outputs = [build(model_class, attn_implementation=name)(**inputs) for name in ("eager", "sdpa")]
    assert_same(*outputs, rtol=1e-4, atol=1e-5)


@each_kind
def test_attention_set_at_run_time_reaches_backbone_and_adapters(model_class, build):
    calls = []

    def counting(module, *args, **kwargs):
        calls.append(module)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("counting", counting)
    AttentionMaskInterface.register("counting", sdpa_mask)
    model = build(model_class)
    inputs = inputs_for(model_class, padding=3)
    with torch.no_grad():
        before = model(**inputs)
        assert not calls
        model.set_attn_implementation("counting")
        after = model(**inputs)
    assert model.config._attn_implementation == model.backbone.config._attn_implementation == "counting"
    # Four layers in the backbone; three adapter layers of one transformer layer each in both adapters.
    assert len(calls) == len(set(calls)) == 4 + 2 * 3
    assert_same(before, after)


@each_kind
def test_attention_given_at_construction_reaches_backbone_and_adapters(model_class, build, tmp_path):
    build(model_class).save_pretrained(tmp_path)
    for model in (
        build(model_class, attn_implementation="eager"),
        model_class.from_pretrained(tmp_path, attn_implementation="eager"),
    ):
        assert model.backbone.config._attn_implementation == "eager"
        for adapter in model.adapters.values():
            assert {adapter.attention._attn_implementation} == {"eager"}


def test_adapter_added_later_uses_the_attention_of_the_model(build):
    model = build(adapters=(), attn_implementation="eager")
    model.add_knowledge_adapter("factual", small_adapter())
    assert model.adapters["factual"].attention._attn_implementation == "eager"


# ---- Embeddings -----------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("size", [110, 90])
def test_resized_embeddings_keep_their_rows_and_survive_saving(model_class, size, build, tmp_path):
    model = build(model_class)
    before = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(size)
    kept = min(size, 100)
    assert torch.equal(model.get_input_embeddings().weight[:kept], before[:kept])
    assert model.get_input_embeddings().weight.shape == (size, 32)
    assert model.config.vocab_size == model.config.backbone_config.vocab_size == size
    assert model.backbone.get_input_embeddings().weight is model.get_input_embeddings().weight
    inputs = inputs_for(model_class)
    inputs["input_ids"] = inputs["input_ids"].clamp(max=size - 1)
    if size > 100:
        inputs["input_ids"].view(-1)[3] = size - 1
    with torch.no_grad():
        output = model(**inputs)
        model.save_pretrained(tmp_path)
        assert_same(output, model_class.from_pretrained(tmp_path)(**inputs))
    if model_class is KAdapterForMaskedLM:
        assert output.logits.shape[-1] == size


def test_resized_language_model_head_stays_tied(build, tmp_path):
    model = build(KAdapterForMaskedLM)
    model.resize_token_embeddings(110)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_output_embeddings().bias.shape == (110,)
    model.save_pretrained(tmp_path)
    loaded = KAdapterForMaskedLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_tied_weights_are_one_tensor_and_stored_once(build, tmp_path):
    model = build(KAdapterForMaskedLM, freeze_backbone=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path)
    shapes = []
    for path in tmp_path.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes += [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    assert shapes.count((100, 32)) == 1
    loaded = KAdapterForMaskedLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert_same(run(model), run(loaded))


def test_untied_language_model_head_is_stored_beside_the_embeddings(backbone, tmp_path):
    stock = AutoModelForMaskedLM.from_pretrained(backbone, tie_word_embeddings=False)
    with torch.no_grad():
        stock.get_output_embeddings().weight = torch.nn.Parameter(torch.randn(100, 32))
    stock.save_pretrained(tmp_path / "untied")
    model = KAdapterForMaskedLM.from_backbone(tmp_path / "untied")
    assert torch.equal(model.get_output_embeddings().weight, stock.get_output_embeddings().weight)
    model.save_pretrained(tmp_path / "saved")
    loaded = KAdapterForMaskedLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.get_output_embeddings().weight, stock.get_output_embeddings().weight)
    assert not torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)


# ---- Devices and dtypes ---------------------------------------------------------------------------------------------


@each_kind
def test_builds_on_the_meta_device(model_class, build):
    config = copy.deepcopy(build(model_class).config)
    with torch.device("meta"):
        model = model_class(config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in build(model_class).state_dict().items()
    }


@each_kind
def test_model_built_on_the_meta_device_can_be_initialised_later(model_class, build):
    """Also the backbone's buffers, which are in no file. Memory is filled with NaN or the largest integer first."""
    expected = build(model_class)
    with torch.device("meta"):
        model = model_class(copy.deepcopy(expected.config))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    buffers = dict(model.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in expected.named_buffers())
    assert main_output(run(model.eval())).isfinite().all()


@each_kind
def test_loading_onto_the_meta_device_is_refused(model_class, build, tmp_path):
    build(model_class).save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(RuntimeError, match="`from_pretrained` with a meta device"):
        model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("model_class", "dtype"),
    [*((model_class, "bfloat16") for model_class in ALL_CLASSES), *((kind, torch.float16) for kind in KINDS)],
)
def test_dtype_reaches_every_part_and_the_output(model_class, dtype, build, tmp_path):
    wanted = torch.bfloat16 if dtype == "bfloat16" else dtype
    build(model_class).save_pretrained(tmp_path)
    for model in (build(model_class, dtype=dtype), model_class.from_pretrained(tmp_path, dtype=dtype)):
        assert {parameter.dtype for parameter in model.parameters()} == {wanted}
        output = main_output(run(model))
        assert output.dtype == wanted and output.isfinite().all()
    torch.testing.assert_close(
        output.float(), main_output(run(build(model_class))).to(wanted).float(), rtol=0.1, atol=0.2
    )


@each_kind
def test_dtype_auto_and_no_dtype_are_what_was_saved(model_class, build, tmp_path):
    model = build(model_class, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    for kwargs in ({"dtype": "auto"}, {}):
        loaded = model_class.from_pretrained(tmp_path, **kwargs)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
        assert_same(run(model), run(loaded))


@every_class
def test_half_precision_backbone_with_full_precision_adapters(model_class, build, tmp_path):
    model = build(model_class)
    precise = main_output(run(model))
    model.backbone.to(torch.bfloat16)
    if model_class is KAdapterForMaskedLM:
        model.lm_head.to(torch.bfloat16)  # it belongs to the backbone
    output = main_output(run(model))
    torch.testing.assert_close(output.float(), precise, rtol=0.1, atol=0.2)
    assert {parameter.dtype for parameter in model.adapters.parameters()} == {torch.float32}
    assert output.dtype == (torch.bfloat16 if model_class is KAdapterForMaskedLM else torch.float32)
    model.set_active_knowledge_adapters(None)
    assert main_output(run(model)).isfinite().all()
    model.set_active_knowledge_adapters(["factual", "linguistic"])
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "backbone.safetensors").exists()  # the named one, cast
    loaded = model_class.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.backbone.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in loaded.adapters.parameters()} == {torch.float32}
    assert_same(run(model), run(loaded))


@each_kind
def test_half_precision_backbone_trains_full_precision_adapters(model_class, build):
    model = build(model_class)
    for part in (model.backbone, getattr(model, "lm_head", None)):
        if part is not None:
            part.to(torch.bfloat16)
    inputs = inputs_for(model_class)
    output = model(**inputs, **labels_for(model_class, inputs))
    (main_output(output).float().square().mean() if model_class is KAdapterModel else output.loss).backward()
    for parameter in model.adapters.parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


# ---- Training aids --------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize(("freeze_backbone", "fusion"), [(True, "concat"), (False, "concat"), (True, "attention")])
def test_gradient_checkpointing_changes_neither_output_nor_gradients(model_class, freeze_backbone, fusion, build):
    inputs = inputs_for(model_class, padding=2)
    gradients = []
    outputs = []
    for checkpointing in (False, True):
        model = build(model_class, freeze_backbone=freeze_backbone, fusion=fusion)
        model.add_knowledge_adapter("terms", small_adapter(num_hidden_layers=0))
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.train()
        set_seed(0)
        output = main_output(model(**inputs))
        output.float().square().mean().backward()
        outputs.append(output.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*outputs)
    assert gradients[0].keys() == gradients[1].keys() and any(name.startswith("adapters.") for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_gradient_checkpointing_recomputes_backbone_and_adapter_layers(build):
    """Each checkpointed layer runs once more in the backward pass."""
    model = build(freeze_backbone=False)
    model.gradient_checkpointing_enable()
    model.train()
    runs = []
    for layer in (model.backbone.encoder.layer[1], model.adapters["factual"].layers[1].encoder.layer[0]):
        layer.attention.register_forward_pre_hook(lambda module, args: runs.append(module))
    output = model(**batch()).last_hidden_state.sum()
    assert len(runs) == 2
    output.backward()
    assert len(runs) == 4
    model.gradient_checkpointing_disable()
    runs.clear()
    model(**batch()).last_hidden_state.sum().backward()
    assert len(runs) == 2


# ---- Copies ---------------------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_model_can_be_copied_and_sent_to_a_process(model_class, duplicate, build, tmp_path):
    model = build(model_class)
    twin = duplicate(model)
    before = run(model)
    assert_same(before, run(twin))
    if model_class is KAdapterForMaskedLM:
        assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    twin.save_pretrained(tmp_path)
    assert_same(before, run(model_class.from_pretrained(tmp_path)))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(before, run(model))


def test_model_that_has_run_can_be_copied(build):
    model = build()
    before = run(model)
    twin = copy.deepcopy(model)
    del model
    assert_same(before, run(twin))


@every_class
def test_class_is_documented_and_a_transformers_model(model_class):
    assert issubclass(model_class, PreTrainedModel) and model_class.__doc__
    assert model_class.from_backbone.__doc__ and model_class.forward.__doc__


@every_class
def test_saved_configuration_names_the_class(model_class, build, tmp_path):
    build(model_class).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [model_class.__name__]
