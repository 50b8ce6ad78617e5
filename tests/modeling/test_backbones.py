"""All tested backbone types, sources of backbones, and models that can't be backbones."""

import copy
import shutil

import pytest
import torch
from conftest import SIZES, TINY, batch, contents, disturb, small_adapter
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaModel,
    SplinterConfig,
    T5Config,
    ViTConfig,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kadapter_hf import (
    BackboneMismatchError,
    KAdapterConfig,
    KAdapterConfigError,
    KAdapterForMaskedLM,
    KAdapterForSequenceClassification,
    KAdapterLoadError,
    KAdapterModel,
)


every_backbone = pytest.mark.parametrize("model_type", TINY)
READ = [0, 1, 3, 4]


@pytest.fixture
def on(backbones, build):
    """`on(model_type, …)`: a model with one adapter on the tiny backbone of that type, with random weights."""

    def on(model_type, model_class=KAdapterModel, **kwargs):
        model = build(model_class, adapters=(), backbone=backbones[model_type], **kwargs)
        model.add_knowledge_adapter("factual", small_adapter(backbone_layers=READ))
        disturb(model.adapters)
        disturb(model.fusion)
        return model.eval()

    return on


def stock(folder, auto_class=AutoModel, **kwargs):
    """The backbone as transformers itself loads it."""
    return auto_class.from_pretrained(folder, **kwargs).eval()


# ---- Every type -----------------------------------------------------------------------------------------------------


@every_backbone
@torch.no_grad()
def test_each_state_that_is_read_is_the_backbones_own(model_type, on, backbones):
    model = on(model_type)
    read = []
    for layer in model.adapters["factual"].layers:
        layer.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        layer.register_forward_hook(lambda module, args, output: read.append(output))
    output = model(**batch(padding=3))
    wanted = stock(backbones[model_type])(**batch(padding=3), output_hidden_states=True)
    inputs, outputs = read[0::2], [torch.zeros(1), *read[1::2]]
    for index, found, last in zip(READ, inputs, outputs, strict=False):
        assert torch.equal(found, wanted.hidden_states[index] + last)
    assert torch.equal(output.backbone_last_hidden_state, wanted.last_hidden_state)


@every_backbone
@torch.no_grad()
def test_output_at_real_tokens_ignores_what_padding_follows(model_type, on):
    model = on(model_type)
    plain = model(**batch(rows=2)).last_hidden_state
    for padding in (1, 5, 40):
        inputs = {
            "input_ids": nn.functional.pad(batch(rows=2)["input_ids"], (0, padding), value=1),
            "attention_mask": nn.functional.pad(batch(rows=2)["attention_mask"], (0, padding), value=0),
        }
        padded = model(**inputs).last_hidden_state[:, :10]
        torch.testing.assert_close(padded, plain, rtol=1e-4, atol=1e-4)


@every_backbone
@torch.no_grad()
def test_adapter_at_real_tokens_ignores_what_padding_precedes(model_type, on):
    """For the same states, positions are passed explicitly to backbones that number them from the left."""
    model = on(model_type)
    states = stock_states(model, batch(rows=2))
    shifted = tuple(nn.functional.pad(state, (0, 0, 4, 0), value=3.0) for state in states)
    mask = nn.functional.pad(batch(rows=2)["attention_mask"], (4, 0), value=0)
    alone = model.adapters["factual"](states, batch(rows=2)["attention_mask"])
    after_padding = model.adapters["factual"](shifted, mask)[:, 4:]
    torch.testing.assert_close(after_padding, alone, rtol=1e-4, atol=1e-4)


def stock_states(model, inputs):
    return model.backbone(**inputs, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "bert", "electra"])
@torch.no_grad()
def test_output_at_real_tokens_ignores_what_padding_precedes(model_type, on):
    model = on(model_type)
    start = 2 if "roberta" in model_type else 0  # RoBERTa numbers positions from its padding id on
    plain = model(**batch(rows=2)).last_hidden_state
    positions = torch.cat([torch.full((4,), 1 if start else 0), torch.arange(start, start + 10)]).expand(2, -1)
    padded = model(
        input_ids=nn.functional.pad(batch(rows=2)["input_ids"], (4, 0), value=1),
        attention_mask=nn.functional.pad(batch(rows=2)["attention_mask"], (4, 0), value=0),
        position_ids=positions,
    ).last_hidden_state
    torch.testing.assert_close(padded[:, 4:], plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "modernbert"])
@torch.no_grad()
def test_left_padding_needs_no_positions_where_the_backbone_needs_none(model_type, on):
    model = on(model_type)
    plain = model(**batch(rows=2)).last_hidden_state
    padded = model(
        input_ids=nn.functional.pad(batch(rows=2)["input_ids"], (4, 0), value=1),
        attention_mask=nn.functional.pad(batch(rows=2)["attention_mask"], (4, 0), value=0),
    ).last_hidden_state
    torch.testing.assert_close(padded[:, 4:], plain, rtol=1e-4, atol=1e-4)


@every_backbone
@torch.no_grad()
def test_attending_to_padding_is_another_thing(model_type, on):
    """With `attend_to_padding=True`, padding influences every position."""
    model = on(model_type)
    plain = model(**batch(rows=2)).knowledge_states["factual"]
    model.adapters["factual"].config.attend_to_padding = True
    inputs = {
        "input_ids": nn.functional.pad(batch(rows=2)["input_ids"], (0, 5), value=1),
        "attention_mask": nn.functional.pad(batch(rows=2)["attention_mask"], (0, 5), value=0),
    }
    assert not torch.allclose(model(**inputs).knowledge_states["factual"][:, :10], plain, atol=1e-4)


@every_backbone
@torch.no_grad()
def test_saved_model_gives_the_same_and_leaves_the_backbone_where_it_is(model_type, on, tmp_path):
    model = on(model_type, KAdapterForSequenceClassification)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "backbone.safetensors").exists()
    loaded, info = KAdapterForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    inputs = batch(padding=2)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@every_backbone
@torch.no_grad()
def test_trained_backbone_is_stored_and_comes_back(model_type, on, tmp_path):
    model = on(model_type, freeze_backbone=False)
    disturb(model.backbone, 7)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "backbone.safetensors").exists()
    loaded = KAdapterModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch()).last_hidden_state, model(**batch()).last_hidden_state)


@every_backbone
@torch.no_grad()
def test_language_model_without_active_adapter_is_the_stock_one_bit_for_bit(model_type, on, backbones, tmp_path):
    model = on(model_type, KAdapterForMaskedLM)
    inputs = batch(padding=3)
    wanted = stock(backbones[model_type], AutoModelForMaskedLM)(**inputs).logits
    fused = model(**inputs).logits
    assert not torch.allclose(fused, wanted)
    model.set_active_knowledge_adapters(None)
    assert torch.equal(model(**inputs).logits, wanted)
    model.set_active_knowledge_adapters("factual")
    model.save_pretrained(tmp_path)
    loaded = KAdapterForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, fused)
    loaded.set_active_knowledge_adapters(None)
    assert torch.equal(loaded(**inputs).logits, wanted)


@every_backbone
@torch.no_grad()
def test_language_model_head_comes_from_the_backbones_repository(model_type, on, backbones, tmp_path):
    """For a K-Adapter that was saved without a head."""
    on(model_type).save_pretrained(tmp_path)
    model = KAdapterForMaskedLM.from_pretrained(tmp_path)
    model.set_active_knowledge_adapters(None)
    wanted = stock(backbones[model_type], AutoModelForMaskedLM)(**batch()).logits
    assert torch.equal(model(**batch()).logits, wanted)


@every_backbone
def test_fused_states_go_through_the_backbones_head(model_type, on, backbones):
    """The backbone's own class, with the fused states instead of its encoder's output."""
    model = on(model_type, KAdapterForMaskedLM)
    whole = stock(backbones[model_type], AutoModelForMaskedLM)

    class Given(nn.Module):
        def __init__(self, states, encoder):
            super().__init__()
            self.states, self.embeddings = states, getattr(encoder, "embeddings", None)

        def forward(self, *args, **kwargs):
            return BaseModelOutput(last_hidden_state=self.states)

    with torch.no_grad():
        output = model(**batch(), output_hidden_states=True)
        adapter = model.adapters["factual"](output.hidden_states, batch()["attention_mask"])
        state = model.backbone(**batch()).last_hidden_state
        block = model.fusion.states["factual"]
        fused = torch.cat([state, adapter], -1) @ block.weight.T + block.bias
        setattr(whole, whole.base_model_prefix, Given(fused, whole.base_model))
        torch.testing.assert_close(output.logits, whole(**batch()).logits, rtol=1e-4, atol=1e-4)


@every_backbone
@pytest.mark.parametrize("freeze_backbone", [True, False])
def test_gradients_reach_the_adapters_and_an_unfrozen_backbone_only(model_type, freeze_backbone, on):
    model = on(model_type, KAdapterForSequenceClassification, freeze_backbone=freeze_backbone).train()
    model(**batch(padding=2), labels=torch.tensor([0, 1, 1])).loss.backward()
    for parameter in model.adapters.parameters():
        assert parameter.grad is not None
    assert model.adapters["factual"].layers[0].down_project.weight.grad.abs().sum() > 0
    reached = [parameter.grad is not None for parameter in model.backbone.parameters()]
    assert all(reached) if not freeze_backbone else not any(reached)


# ---- Where a backbone comes from ------------------------------------------------------------------------------------


@torch.no_grad()
def test_backbone_may_be_a_loaded_model(backbone, tmp_path):
    wanted = stock(backbone)(**batch()).last_hidden_state
    model = KAdapterModel.from_backbone(stock(backbone), adapters={"factual": small_adapter()})
    output = model(**batch())
    assert torch.equal(output.backbone_last_hidden_state, wanted)
    model.save_pretrained(tmp_path)
    assert torch.equal(KAdapterModel.from_pretrained(tmp_path)(**batch()).last_hidden_state, output.last_hidden_state)


@torch.no_grad()
def test_loaded_models_pooler_is_left_behind(backbone, tmp_path):
    """Most encoders have a pooler when loaded; it is not used here, so it is neither saved nor trained."""
    loaded = AutoModel.from_pretrained(backbone)
    assert loaded.pooler is not None
    model = KAdapterModel.from_backbone(loaded, freeze_backbone=False)
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "backbone.safetensors").exists()
    disturb(model.backbone)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        KAdapterModel.from_pretrained(tmp_path)(**batch()).last_hidden_state, model(**batch()).last_hidden_state
    )


@pytest.mark.parametrize("model_class", [KAdapterModel, KAdapterForMaskedLM])
@torch.no_grad()
def test_loaded_language_model_still_runs_by_itself(model_class, backbone):
    loaded = stock(backbone, AutoModelForMaskedLM)
    wanted = loaded(**batch()).logits
    model = model_class.from_backbone(loaded, adapters={"factual": small_adapter()})
    assert torch.equal(loaded(**batch()).logits, wanted)
    model.set_active_knowledge_adapters(None)
    if model_class is KAdapterForMaskedLM:
        assert torch.equal(model(**batch()).logits, wanted)


@torch.no_grad()
def test_language_model_on_a_loaded_encoder_gets_the_head_of_its_repository(backbone):
    model = KAdapterForMaskedLM.from_backbone(stock(backbone))
    assert torch.equal(model(**batch()).logits, stock(backbone, AutoModelForMaskedLM)(**batch()).logits)


def test_language_model_on_an_encoder_from_nowhere_is_refused():
    with pytest.raises(KAdapterLoadError, match="language-model head"):
        KAdapterForMaskedLM.from_backbone(BertModel(TINY["bert"]))


@pytest.mark.parametrize("auto_class", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
@torch.no_grad()
def test_loaded_model_with_a_head_is_taken_for_the_encoder_in_it(auto_class, backbone):
    loaded = stock(backbone, auto_class)
    model = KAdapterForSequenceClassification.from_backbone(loaded, num_labels=7)
    assert type(model.backbone) is RobertaModel
    assert model(**batch()).logits.shape == (3, 7)
    assert {name.split(".")[0] for name in model.state_dict()} == {"backbone", "fusion", "classifier"}


@torch.no_grad()
def test_head_of_a_loaded_classifier_is_not_mistaken_for_a_language_model_head(backbone):
    model = KAdapterForMaskedLM.from_backbone(stock(backbone, AutoModelForSequenceClassification))
    assert torch.equal(model(**batch()).logits, stock(backbone, AutoModelForMaskedLM)(**batch()).logits)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForMaskedLM])
@pytest.mark.parametrize("model_class", [KAdapterModel, KAdapterForMaskedLM, KAdapterForSequenceClassification])
@torch.no_grad()
def test_saved_model_loads_on_a_backbone_that_is_loaded_already(model_class, auto_class, build, backbone, tmp_path):
    """With its own head, even if the loaded model has one."""
    model = build(model_class)
    disturb(model.fusion)
    if model_class is KAdapterForMaskedLM:
        model.lm_head.lm_head.dense.weight.add_(1)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path, backbone=stock(backbone, auto_class))
    assert torch.equal(loaded(**batch()).to_tuple()[0], model(**batch()).to_tuple()[0])


def test_arguments_for_a_backbone_that_is_loaded_already_are_refused(backbone):
    with pytest.raises(KAdapterConfigError, match="dtype.*already loaded"):
        KAdapterModel.from_backbone(stock(backbone), dtype=torch.bfloat16)


@torch.no_grad()
def test_backbone_by_repository_id_is_pinned_to_its_commit(backbone, tmp_path):
    repository = tmp_path / "hub" / "models--org--tiny"
    for commit, branch in (("a" * 40, "main"), ("b" * 40, "v1")):
        shutil.copytree(backbone, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    cache = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    latest = KAdapterModel.from_backbone("org/tiny", adapters={"factual": small_adapter()}, **cache)
    assert latest.config.backbone_name_or_path == "org/tiny"
    assert latest.config.backbone_revision == "a" * 40
    for revision in ("v1", "b" * 40):
        assert KAdapterModel.from_backbone("org/tiny", revision=revision, **cache).config.backbone_revision == "b" * 40
    latest.save_pretrained(tmp_path / "saved")
    # The branch gets other weights; the saved model uses its commit.
    moved = AutoModelForMaskedLM.from_config(copy.deepcopy(TINY["roberta"]))
    moved.save_pretrained(repository / "snapshots" / ("c" * 40))
    (repository / "refs" / "main").write_text("c" * 40)
    loaded = KAdapterModel.from_pretrained(tmp_path / "saved", **cache)
    assert torch.equal(loaded(**batch()).last_hidden_state, latest(**batch()).last_hidden_state)


def test_backbone_by_a_relative_folder_is_found_from_elsewhere(backbone, tmp_path, monkeypatch):
    shutil.copytree(backbone, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    model = KAdapterModel.from_backbone("tiny")
    model.save_pretrained("saved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    KAdapterModel.from_pretrained("../saved")


def test_every_argument_reaches_the_backbones_own_from_pretrained(backbone, monkeypatch, tmp_path):
    received = []
    original = RobertaModel.from_pretrained.__func__

    def recording(cls, *args, **kwargs):
        received.append(kwargs)
        return original(cls, *args, **kwargs)

    monkeypatch.setattr(RobertaModel, "from_pretrained", classmethod(recording))
    given = {
        "dtype": torch.float16,
        "device_map": {"": "cpu"},
        "revision": "main",
        "token": "a-token",
        "cache_dir": str(tmp_path / "cache"),
        "local_files_only": True,
        "attn_implementation": "eager",
        "max_memory": {"cpu": "1GB"},
        "use_safetensors": True,
    }
    model = KAdapterModel.from_backbone(backbone, **given)
    assert {name: received[0].get(name) for name in given} == given
    assert model.backbone.config._attn_implementation == "eager" and model.backbone.dtype == torch.float16
    model.save_pretrained(tmp_path / "saved")
    received.clear()
    del given["use_safetensors"], given["revision"]  # those are about the K-Adapter's own repository
    KAdapterModel.from_pretrained(tmp_path / "saved", **given)
    assert {name: received[0].get(name) for name in given} == given


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto", {"": torch.device("cpu")}])
@pytest.mark.parametrize("model_class", [KAdapterForSequenceClassification, KAdapterForMaskedLM])
@torch.no_grad()
def test_device_map_places_the_backbone_and_all_that_stands_beside_it(model_class, device_map, build, tmp_path):
    plain = build(model_class)
    plain.save_pretrained(tmp_path)
    for model in (
        build(model_class, device_map=device_map),
        model_class.from_pretrained(tmp_path, device_map=device_map),
    ):
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert torch.equal(model(**batch()).logits, plain(**batch()).logits)
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "backbone.safetensors").exists()


@torch.no_grad()
def test_offloaded_backbone_runs_and_is_not_stored(build, tmp_path):
    """Layers on disk are read when they are needed."""
    plain = build()
    plain.save_pretrained(tmp_path / "saved")
    device_map = {"embeddings": "cpu"} | {f"encoder.layer.{i}": "disk" if i else "cpu" for i in range(4)}
    model = KAdapterModel.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    assert any(parameter.is_meta for parameter in model.backbone.parameters())
    torch.testing.assert_close(model(**batch()).last_hidden_state, plain(**batch()).last_hidden_state)
    model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "backbone.safetensors").exists()
    again = KAdapterModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again(**batch()).last_hidden_state, plain(**batch()).last_hidden_state)


@register_quantization_config("rounded")
class RoundedConfig(QuantizationConfigMixin):
    def __init__(self, steps: int = 8, **kwargs):
        self.quant_method, self.steps = "rounded", steps


@register_quantizer("rounded")
class RoundedQuantizer(HfQuantizer):
    """The smallest quantizer that runs anywhere: the encoder's linear weights become multiples of a step."""

    requires_calibration = False
    is_trainable = False

    def is_serializable(self, *args, **kwargs):
        return False

    def _process_model_before_weight_loading(self, model, **kwargs):
        return model

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "encoder" in name:
                steps = self.quantization_config.steps
                module.weight = nn.Parameter((module.weight * steps).round() / steps)
        return model


@pytest.mark.parametrize("model_class", [KAdapterForSequenceClassification, KAdapterForMaskedLM])
@torch.no_grad()
def test_quantization_is_the_backbones_own_and_it_is_not_stored(model_class, build, backbone, tmp_path):
    wanted = stock(backbone, quantization_config=RoundedConfig(4))
    plain = build(model_class)
    plain.save_pretrained(tmp_path / "plain")
    for number, model in enumerate(
        (
            build(model_class, quantization_config=RoundedConfig(4)),
            model_class.from_pretrained(tmp_path / "plain", quantization_config=RoundedConfig(4)),
        )
    ):
        query = model.backbone.encoder.layer[0].attention.self.query.weight
        assert torch.equal(query * 4, (query * 4).round())
        assert torch.equal(model.backbone(**batch()).last_hidden_state, wanted(**batch()).last_hidden_state)
        projection = model.adapters["factual"].layers[0].down_project.weight
        assert not torch.equal(projection * 4, (projection * 4).round())
        model.save_pretrained(tmp_path / str(number))
        assert not (tmp_path / str(number) / "backbone.safetensors").exists()
        loaded = model_class.from_pretrained(tmp_path / str(number))  # in full precision, the default
        assert torch.equal(loaded.backbone(**batch()).last_hidden_state, plain.backbone(**batch()).last_hidden_state)
        again = model_class.from_pretrained(tmp_path / str(number), quantization_config=RoundedConfig(4))
        assert torch.equal(again(**batch()).logits, model(**batch()).logits)


def test_a_trained_backbone_that_is_quantised_is_not_lost_by_saving(build, tmp_path):
    model = build(KAdapterForSequenceClassification)
    model.unfreeze_backbone()
    disturb(model.backbone)
    model.save_pretrained(tmp_path / "trained")
    before = contents(tmp_path / "trained")
    model = KAdapterForSequenceClassification.from_pretrained(
        tmp_path / "trained", quantization_config=RoundedConfig(4)
    )
    for folder in ("trained", "new"):
        with pytest.raises(KAdapterConfigError, match="can't be saved .* Load it without quantization_config"):
            model.save_pretrained(tmp_path / folder)
    assert contents(tmp_path / "trained") == before and not (tmp_path / "new").exists()
    model.save_knowledge_adapter(tmp_path / "adapter", "factual")


# ---- What can't be one ----------------------------------------------------------------------------------------------


NOT_ENCODERS = {
    "gpt2": (GPT2Config(vocab_size=100, n_positions=64, n_embd=32, n_layer=2, n_head=2), "is a decoder"),
    "t5": (T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2), "is an encoder-decoder"),
    "vit": (
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16),
        "'pixel_values', not the token ids",
    ),
    "bert": (BertConfig(**SIZES, intermediate_size=48, is_decoder=True), "is a decoder"),
}


@pytest.mark.parametrize("model_type", NOT_ENCODERS)
@pytest.mark.parametrize("given", ["folder", "loaded model", "configuration"])
def test_what_is_no_text_encoder_is_refused_in_a_sentence(model_type, given, tmp_path):
    config, reason = NOT_ENCODERS[model_type]
    with pytest.raises(KAdapterConfigError, match=f"a '{model_type}' model .*{reason}"):
        if given == "configuration":
            KAdapterModel(KAdapterConfig(backbone_name_or_path=None, backbone_config=config.to_dict()))
        elif given == "loaded model":
            KAdapterModel.from_backbone(AutoModel.from_config(config))
        else:
            config.save_pretrained(tmp_path)  # refused before weights are looked for
            KAdapterForSequenceClassification.from_backbone(tmp_path)


class Silent(PreTrainedModel):
    """An encoder that does not return its hidden states."""

    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None):
        return BaseModelOutput(last_hidden_state=self.embedding(input_ids))


def test_model_that_returns_no_hidden_states_is_refused_in_a_sentence():
    with pytest.raises(KAdapterConfigError, match="returns no hidden states"):
        KAdapterModel.from_backbone(Silent(BertConfig(**SIZES)))


class Promising(Silent):
    """A model that claims to return hidden states, but does not."""

    def forward(self, input_ids, attention_mask=None, output_hidden_states=None, return_dict=None):
        return super().forward(input_ids)


def test_model_that_does_not_keep_its_promise_is_refused_when_it_runs():
    model = KAdapterModel.from_backbone(Promising(BertConfig(**SIZES)), adapters={"factual": small_adapter()})
    with pytest.raises(KAdapterConfigError, match="returned 0 hidden states, and the adapters read number 2"):
        model(**batch())


class Sizeless(PreTrainedConfig):
    model_type = "sizeless"


class SizelessModel(Silent):
    config_class = Sizeless

    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.embedding = nn.Embedding(10, 4)

    def forward(self, input_ids, output_hidden_states=None):
        return None


def test_model_that_does_not_say_its_sizes_is_refused_in_a_sentence():
    with pytest.raises(KAdapterConfigError, match="does not say its hidden_size and num_hidden_layers"):
        KAdapterModel.from_backbone(SizelessModel(Sizeless()))


def test_type_without_a_masked_language_model_is_refused_for_that_class_only(tmp_path):
    config = SplinterConfig(**SIZES, intermediate_size=48)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    KAdapterModel.from_backbone(tmp_path)
    with pytest.raises(KAdapterConfigError, match="no masked-language model of type 'splinter'"):
        KAdapterForMaskedLM.from_backbone(tmp_path)
    with pytest.raises(KAdapterConfigError, match="no masked-language model of type 'splinter'"):
        KAdapterForMaskedLM.from_backbone(AutoModel.from_config(config))
    with pytest.raises(KAdapterConfigError, match="no masked-language model of type 'splinter'"):
        KAdapterForMaskedLM(KAdapterConfig(backbone_name_or_path=None, backbone_config=config))


def test_backbone_of_another_type_is_not_an_answer_to_a_missing_one(build, backbones, tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(BackboneMismatchError, match="model_type 'bert'.*made for 'roberta'"):
        KAdapterModel.from_pretrained(tmp_path, backbone=backbones["bert"])


@pytest.mark.parametrize("argument", ["state_dict", "gguf_file"])
@pytest.mark.parametrize("stored", [True, False])
def test_an_argument_that_would_replace_the_files_is_refused(argument, stored, build, backbone, tmp_path):
    model = build()
    if stored:
        model.unfreeze_backbone()
        disturb(model.backbone)
    model.save_pretrained(tmp_path)
    value = model.state_dict() if argument == "state_dict" else "model.gguf"
    for load in (
        lambda: KAdapterModel.from_pretrained(tmp_path, **{argument: value}),
        lambda: KAdapterModel.from_backbone(backbone, **{argument: value}),
    ):
        with pytest.raises(KAdapterConfigError, match=f"can't be loaded with {argument}="):
            load()


def test_a_variant_that_the_backbone_lacks_is_named(build, backbone, tmp_path):
    build().save_pretrained(tmp_path)
    for load in (KAdapterModel.from_pretrained, KAdapterModel.from_backbone):
        with pytest.raises(KAdapterLoadError, match="variant='fp16' applies to the backbone's files"):
            load(tmp_path if load == KAdapterModel.from_pretrained else backbone, variant="fp16")


def test_a_variant_of_the_backbone_is_loaded(tmp_path):
    AutoModel.from_config(TINY["roberta"]).save_pretrained(tmp_path / "backbone", variant="fp16")
    KAdapterModel.from_backbone(tmp_path / "backbone", variant="fp16").save_pretrained(tmp_path / "model")
    KAdapterModel.from_pretrained(tmp_path / "model", variant="fp16")


@pytest.mark.parametrize("wrong", [16, {}, object()])
def test_what_is_no_backbone_is_refused_in_a_sentence(wrong, build, tmp_path):
    build().save_pretrained(tmp_path)
    for load in (
        lambda: KAdapterModel.from_backbone(wrong),
        lambda: KAdapterModel.from_pretrained(tmp_path, backbone=wrong),
    ):
        with pytest.raises(KAdapterConfigError, match="a backbone is a repository, a folder or a loaded model"):
            load()
