"""Adapters of one shape that run as one: the same as one after the other, and only where nothing else changes an adapter."""

import threading

import pytest
import torch
from conftest import disturb, inputs_for, labels_for, small_adapter
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from kadapter_hf import KAdapterForRelationClassification, KnowledgeAdapterConfig
from kadapter_hf.modeling import stacking_kadapter
from kadapter_hf.modeling.stacking_kadapter import _run_stacked


SMALL = small_adapter(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
BOTTLENECK = small_adapter(num_hidden_layers=0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch) -> str:
    """A device on which adapters run together."""
    monkeypatch.setattr(stacking_kadapter, "DEVICES", (request.param,))
    return request.param


@pytest.fixture
def stacked(monkeypatch) -> list[int]:
    """How many adapters have run together, each time that some did."""
    counts = []

    def run(adapters, *args):
        counts.append(len(adapters))
        return _run_stacked(adapters, *args)

    monkeypatch.setattr(stacking_kadapter, "_run_stacked", run)
    return counts


@pytest.fixture
def make(backbones):
    def make(config: KnowledgeAdapterConfig = SMALL, number: int = 4, **kwargs):
        set_seed(0)
        adapters = {f"part{index}": config for index in range(number)}
        model = KAdapterForRelationClassification.from_backbone(backbones["roberta"], adapters, **kwargs)
        disturb(model)
        return model.eval()

    return make


def one_by_one(model, batch, monkeypatch, **kwargs):
    with monkeypatch.context() as patched:
        patched.setattr(stacking_kadapter, "DEVICES", ())
        return model(**batch, **kwargs)


def inputs(device: str) -> dict[str, torch.Tensor]:
    batch = inputs_for(KAdapterForRelationClassification, padding=3)
    batch |= labels_for(KAdapterForRelationClassification, batch)
    return {name: tensor.to(device) for name, tensor in batch.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [SMALL, BOTTLENECK, small_adapter(attend_to_padding=True)])
@pytest.mark.parametrize("fusion", ["concat", "gate"])
def test_outputs_and_gradients_are_those_of_each_adapter_alone(
    config, fusion, attention, device, make, stacked, monkeypatch
):
    model, batch = make(config, fusion=fusion, attn_implementation=attention).to(device), inputs(device)
    model.unfreeze_backbone()
    together = model(**batch)
    together.loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert stacked == [4]
    model.zero_grad()
    alone = one_by_one(model, batch, monkeypatch)
    alone.loss.backward()
    torch.testing.assert_close(together.logits, alone.logits, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert (found[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_adapters_of_several_shapes_run_in_groups_and_come_back_in_their_order(device, make, stacked, monkeypatch):
    model = make()
    for name, config in {
        "wide": small_adapter(hidden_size=32),
        "other": small_adapter(backbone_layers=[1, 2]),
    }.items():
        model.add_knowledge_adapter(name, config)
    model.set_active_knowledge_adapters(["wide", "part2", "part0", "other", "part3", "part1"])
    disturb(model)
    model, batch = model.to(device).eval(), inputs(device)
    together, alone = model(**batch).logits, one_by_one(model, batch, monkeypatch).logits
    assert stacked == [4]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_each_row_has_its_own_adapters(device, make, stacked, monkeypatch):
    model, batch = make(number=5, fusion="gate").to(device), inputs(device)
    rows = [["part0", "part1", "part2", "part3"], ["part4"], [], ["part3", "part2", "part1", "part0", "part4"]]
    together = model(**batch, knowledge_adapters=rows).logits
    assert stacked == [4, 5]
    alone = one_by_one(model, batch, monkeypatch, knowledge_adapters=rows).logits
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_frozen_adapters_get_no_gradients(device, make, stacked):
    model = make(number=8).to(device)
    model.freeze_knowledge_adapters([f"part{number}" for number in range(4)])
    model(**inputs(device)).loss.backward()
    assert stacked == [4, 4]
    for name, adapter in model.adapters.items():
        trains = int(name[-1]) >= 4
        assert all((parameter.grad is not None) == trains for parameter in adapter.parameters())


def test_outputs_can_be_changed_in_place(device, make, stacked):
    model = make().to(device)
    first, *_ = model.encode(
        **{name: inputs(device)[name] for name in ("input_ids", "attention_mask")}
    ).knowledge.values()
    first += 1
    first.sum().backward()
    assert stacked == [4]


def test_adapters_with_different_dropout_run_apart(make, stacked, monkeypatch):
    monkeypatch.setattr(stacking_kadapter, "DEVICES", ("cpu",))
    model, batch = make(number=6), inputs("cpu")
    model.adapters["part0"].layers[0].encoder.layer[0].output.dropout.p = 0.5
    model.adapters["part1"].layers[0].encoder.layer[0].output.dropout.train()
    model(**batch)
    assert stacked == [4]


def test_adapters_with_tied_layers_run_apart(make, stacked, monkeypatch):
    monkeypatch.setattr(stacking_kadapter, "DEVICES", ("cpu",))
    model, batch = make(number=5), inputs("cpu")
    model.adapters["part1"].layers[1] = model.adapters["part1"].layers[0]
    together = model(**batch).logits
    assert stacked == [4]
    torch.testing.assert_close(together, one_by_one(model, batch, monkeypatch).logits, rtol=1e-5, atol=1e-5)


def test_dropout_is_another_for_each_adapter(device, make, stacked):
    model = make(small_adapter()).to(device).train()
    for adapter in model.adapters.values():
        adapter.load_state_dict(model.adapters["part0"].state_dict())
    outputs = list(
        model.encode(**{name: inputs(device)[name] for name in ("input_ids", "attention_mask")}).knowledge.values()
    )
    assert stacked == [4]
    assert not any(torch.equal(outputs[0], other) for other in outputs[1:])


def test_trainer_trains_them_as_one_after_the_other(device, make, stacked, monkeypatch, tmp_path):
    batch = inputs("cpu")
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(4)]
    weights = []
    for devices in ((device,), ()):
        monkeypatch.setattr(stacking_kadapter, "DEVICES", devices)
        model = make()
        arguments = TrainingArguments(
            tmp_path, max_steps=3, optim="sgd", learning_rate=0.1, report_to=[], use_cpu=device == "cpu"
        )
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append(model.cpu().state_dict())
    assert stacked == [4, 4, 4]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-5, msg=name)


def with_hook(model):
    model.adapters["part1"].layers[0].down_project.register_forward_hook(lambda module, args, output: output * 2)
    return model


def with_forward_of_its_own(model):
    """As accelerate attaches its hooks."""
    project = model.adapters["part1"].layers[0].down_project
    project.forward = lambda states: nn.Linear.forward(project, states) * 2
    return model


def with_weight_norm(model):
    project = nn.utils.parametrizations.weight_norm(model.adapters["part1"].layers[0].down_project)
    project.parametrizations.weight.original0.data *= 2
    return model


def with_lora(model):
    lora = LoraConfig(target_modules=r".*adapters\.part1\..*down_project", init_lora_weights=False)
    return get_peft_model(model, lora)


@pytest.mark.parametrize("change", [with_hook, with_forward_of_its_own, with_weight_norm, with_lora])
def test_an_adapter_that_something_else_changes_runs_alone(change, make, stacked, monkeypatch):
    monkeypatch.setattr(stacking_kadapter, "DEVICES", ("cpu",))
    plain, batch = make(number=5), inputs("cpu")
    changed = change(make(number=5)).eval()
    together, alone = changed(**batch).logits, one_by_one(changed, batch, monkeypatch).logits
    assert stacked == [4]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, plain(**batch).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "most", "expected"),
    [
        (SMALL, 4 * 10 * 2 * 10, [4]),  # rows, tokens, heads, tokens
        (SMALL, 4 * 10 * 2 * 10 - 1, []),
        (BOTTLENECK, 4 * 10 * 16, [4]),  # rows, tokens, width
        (BOTTLENECK, 4 * 10 * 16 - 1, []),
    ],
)
def test_large_adapters_run_alone(config, most, expected, make, stacked, monkeypatch):
    monkeypatch.setattr(stacking_kadapter, "DEVICES", ("cpu",))
    monkeypatch.setattr(stacking_kadapter, "MOST_VALUES", most)
    make(config)(**inputs("cpu"))
    assert stacked == expected


def test_a_hook_on_gradients_is_called(make, stacked, monkeypatch):
    monkeypatch.setattr(stacking_kadapter, "DEVICES", ("cpu",))
    model, called = make(number=5), []
    project = model.adapters["part1"].layers[0].down_project
    project.register_full_backward_pre_hook(lambda module, gradients: called.append(module))
    model(**inputs("cpu")).loss.backward()
    assert (stacked, called) == ([4], [project])


def test_a_mask_of_pairs_of_tokens_hides_the_same_as_one_of_tokens(make, stacked, monkeypatch):
    monkeypatch.setattr(stacking_kadapter, "DEVICES", ("cpu",))
    model, batch = make(attn_implementation="sdpa"), inputs("cpu")
    wanted = model(**batch).logits
    batch["attention_mask"] = batch["attention_mask"].bool()[:, None, None, :].expand(-1, 1, 10, -1)
    torch.testing.assert_close(model(**batch).logits, wanted, rtol=1e-5, atol=1e-5)
    assert stacked == [4]  # with the mask of tokens alone


def test_few_adapters_and_checkpointed_ones_run_alone(make, stacked, monkeypatch):
    monkeypatch.setattr(stacking_kadapter, "DEVICES", ("cpu",))
    batch = inputs("cpu")
    make(number=3)(**batch)
    model = make().train()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    assert stacked == []
    model.eval()(**batch)
    assert stacked == [4]


def test_on_a_cpu_adapters_run_one_after_the_other(make, stacked):
    make()(**inputs("cpu"))
    assert stacked == []


@pytest.mark.slow
def test_a_compiled_and_a_traced_model_give_the_same(make, stacked, monkeypatch):
    monkeypatch.setattr(stacking_kadapter, "DEVICES", ("cpu",))
    model, batch = make(), inputs("cpu")
    del batch["labels"]
    wanted = model(**batch).logits
    assert stacked == [4]
    compiled = torch.compile(model, backend="aot_eager")(**batch).logits
    traced = torch.jit.trace(model, example_kwarg_inputs=batch, strict=False)(**batch)["logits"]
    torch.testing.assert_close(compiled, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(traced, wanted, rtol=1e-5, atol=1e-5)


def test_threads_share_a_model(make, stacked, monkeypatch):
    monkeypatch.setattr(stacking_kadapter, "DEVICES", ("cpu",))
    model, batch = make(), inputs("cpu")
    with torch.no_grad():
        wanted = {
            number: one_by_one(
                model, batch, monkeypatch, knowledge_adapters=[f"part{i}" for i in range(number)]
            ).logits
            for number in (1, 4)
        }
        wrong = []

        def run(number: int) -> None:
            names = [f"part{index}" for index in range(number)]
            for _ in range(20):
                with torch.no_grad():
                    found = model(**batch, knowledge_adapters=names).logits
                if not torch.allclose(found, wanted[number], atol=1e-5):
                    wrong.append(number)

        threads = [threading.Thread(target=run, args=(number,)) for number in (1, 4, 1, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert stacked and not wrong
