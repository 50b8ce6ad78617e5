"""Other knowledge adapters than the active ones: for a while, in one thread, for a call or for each row."""

import asyncio
import copy
import threading

import pytest
import torch
from conftest import ALL_CLASSES, batch, disturb, inputs_for, small_adapter
from torch.nn import functional as F

from kadapter_hf import (
    KAdapterConfigError,
    KAdapterForDependencyParsing,
    KAdapterForEntityTyping,
    KAdapterForMultipleChoice,
    KAdapterForRelationClassification,
    KAdapterForSequenceClassification,
    KAdapterModel,
)


KINDS = {
    "add": ("add", {"scale": 0.5}),
    "concat": ("concat", {}),
    "gate": ("gate", {"activation": "softmax"}),
    "attention": ("attention", {}),
}


@torch.no_grad()
def output(model, **kwargs) -> torch.Tensor:
    return model(**batch(), **kwargs).last_hidden_state


@pytest.fixture
def model(build):
    return build(adapters=("a", "b", "c"))


@pytest.fixture
def alone(model):
    """`alone("a")`: the output with these adapters active."""

    def alone(*names) -> torch.Tensor:
        other = copy.deepcopy(model)
        other.set_active_knowledge_adapters(names)
        return output(other)

    return alone


# ---- For a while ----------------------------------------------------------------------------------------------------


def test_adapters_are_used_within_the_statement_only(model, alone):
    before = output(model)
    with model.using_knowledge_adapters("b"):
        assert model.active_knowledge_adapters == ["b"] and torch.equal(output(model), alone("b"))
    with model.using_knowledge_adapters(["c", "a"]):
        assert torch.equal(output(model), alone("c", "a"))
    with model.without_knowledge_adapters():
        assert torch.equal(output(model), model.backbone(**batch()).last_hidden_state)
    assert model.active_knowledge_adapters == ["a", "b", "c"] and torch.equal(output(model), before)


def test_statements_nest_and_end_with_an_error(model):
    with model.using_knowledge_adapters("a"):
        with pytest.raises(ZeroDivisionError), model.without_knowledge_adapters():
            assert model.active_knowledge_adapters == []
            raise ZeroDivisionError
        assert model.active_knowledge_adapters == ["a"]
    assert model.active_knowledge_adapters == ["a", "b", "c"]


def test_statement_of_one_model_leaves_another_alone(model):
    other = copy.deepcopy(model)
    with model.using_knowledge_adapters("a"):
        inside = copy.deepcopy(model)
        assert other.active_knowledge_adapters == inside.active_knowledge_adapters == ["a", "b", "c"]


def test_unknown_adapter_is_refused_before_anything_changes(model):
    with pytest.raises(KAdapterConfigError, match=r"there is no knowledge adapter 'd'; there are \['a', 'b', 'c'\]"):
        with model.using_knowledge_adapters(["a", "d"]):
            pass
    assert model.active_knowledge_adapters == ["a", "b", "c"]


def test_statement_changes_neither_what_is_saved_nor_what_trains(model, tmp_path):
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with model.using_knowledge_adapters("a"):
        model.save_pretrained(tmp_path)
        model.train()
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    assert KAdapterModel.from_pretrained(tmp_path).active_knowledge_adapters == ["a", "b", "c"]


def test_adapters_that_come_and_go_within_a_statement(model):
    with model.using_knowledge_adapters("a"):
        model.set_active_knowledge_adapters(["b", "c"])
        assert model.active_knowledge_adapters == ["a"]
        model.delete_knowledge_adapter("a")
        with pytest.raises(KAdapterConfigError, match="there is no knowledge adapter 'a'"):
            output(model)
    assert model.active_knowledge_adapters == ["b", "c"]


def test_each_thread_has_its_own(model, alone):
    expected = {"": alone("a", "b", "c"), "a": alone("a"), "b": alone("b")}
    barrier, errors = threading.Barrier(3), []

    def run(name: str) -> None:
        try:
            barrier.wait()
            for _ in range(10):
                if name:
                    with model.using_knowledge_adapters(name):
                        found = output(model)
                else:
                    found = output(model)
                assert torch.equal(found, expected[name])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_each_asyncio_task_has_its_own(model):
    async def run(name: str) -> list[str]:
        with model.using_knowledge_adapters(name):
            await asyncio.sleep(0.01)
            return model.active_knowledge_adapters

    async def both() -> list[list[str]]:
        return await asyncio.gather(run("a"), run("b"))

    assert asyncio.run(both()) == [["a"], ["b"]]


def test_data_parallel_is_refused_within_a_statement(model):
    replica = model._replicate_for_data_parallel()
    replica._former_parameters = {}  # as torch.nn.parallel.replicate sets it
    assert replica.active_knowledge_adapters == ["a", "b", "c"]
    with model.using_knowledge_adapters("a"):
        replica = model._replicate_for_data_parallel()
        replica._former_parameters = {}
        with pytest.raises(RuntimeError, match=r"torch.nn.DataParallel. Pass knowledge_adapters=\[…\]"):
            _ = replica.active_knowledge_adapters


def test_compiled_model_uses_the_adapters_of_the_statement_and_of_the_row(build):
    model = build(KAdapterForSequenceClassification, adapters=())
    for name in ("factual", "linguistic"):
        model.add_knowledge_adapter(name, small_adapter(num_hidden_layers=0))
    compiled = torch.compile(model, backend="eager")
    states = torch.randn(3, 4, 5, 32)  # so that the backbone need not be compiled

    @torch.no_grad()
    def both(**kwargs) -> list[torch.Tensor]:
        return [run(backbone_states=states, **kwargs).logits for run in (compiled, model)]

    outputs = [both()]
    with model.using_knowledge_adapters("factual"):
        outputs.append(both())
    outputs.append(both(knowledge_adapters=[["factual"], [], ["factual", "linguistic"]]))
    for found, wanted in outputs:
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(outputs[-1][0][[0, 2]], torch.stack([outputs[1][0][0], outputs[0][0][2]]))
    assert not torch.allclose(outputs[0][0], outputs[1][0])


# ---- For a call, and for each row -----------------------------------------------------------------------------------

ROWS = [["a"], ["c", "b"], [], ["a"]]


def test_names_are_of_all_rows(model, alone):
    assert torch.equal(output(model, knowledge_adapters=["b"]), alone("b"))
    assert torch.equal(output(model, knowledge_adapters="b"), alone("b"))
    assert torch.equal(output(model, knowledge_adapters=[]), alone())
    model.set_active_knowledge_adapters("a")
    assert torch.equal(output(model, knowledge_adapters=["c", "b"]), alone("c", "b"))


@pytest.mark.parametrize(("fusion", "values"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("model_class", ALL_CLASSES, ids=lambda model_class: model_class.__name__)
@torch.no_grad()
def test_each_row_of_a_batch_equals_the_row_alone(model_class, fusion, values, build):
    model = build(model_class, adapters=("a", "b", "c"), fusion=fusion, fusion_config=values)
    inputs = inputs_for(model_class, rows=4, padding=2)
    rows = ROWS[: len(inputs["input_ids"])]
    whole = model(**inputs, knowledge_adapters=rows)
    assert len(rows) in (2, 4)
    for row, names in enumerate(rows):
        with model.using_knowledge_adapters(names):
            alone = model(**{name: tensor[row : row + 1] for name, tensor in inputs.items()})
        for key, wanted in alone.items():
            if torch.is_tensor(wanted):
                torch.testing.assert_close(whole[key][row : row + 1], wanted, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("given", ["backbone_states", "fusion_states"])
@torch.no_grad()
def test_rows_have_their_own_adapters_on_states_that_were_computed_before(given, model):
    inputs = batch(rows=4, padding=2)
    found = model(**inputs, output_hidden_states=True)
    states = [found.hidden_states[index] for index in model.backbone_states_read()]
    if given == "fusion_states":
        states = [found.backbone_last_hidden_state, *found.knowledge_states.values()]
    else:
        states.append(found.backbone_last_hidden_state)
    again = model(**inputs, knowledge_adapters=ROWS, **{given: torch.stack(states, dim=1)})
    torch.testing.assert_close(again.last_hidden_state, model(**inputs, knowledge_adapters=ROWS).last_hidden_state)


@torch.no_grad()
def test_knowledge_states_are_zero_where_a_row_has_no_such_adapter(model):
    inputs = batch(rows=4)
    states, plain = (model(**inputs, **kwargs).knowledge_states for kwargs in ({"knowledge_adapters": ROWS}, {}))
    assert list(states) == ["a", "c", "b"]
    torch.testing.assert_close(states["a"][[0, 3]], plain["a"][[0, 3]])
    assert not states["a"][[1, 2]].any() and not states["b"][[0, 2, 3]].any()


def test_an_adapter_runs_on_the_rows_that_name_it(model):
    rows = {}
    for name, adapter in model.adapters.items():
        adapter.register_forward_pre_hook(lambda _, args, name=name: rows.update({name: len(args[0][0])}))
    output_of_rows = model(**batch(rows=4), knowledge_adapters=ROWS)
    assert rows == {"a": 2, "b": 1, "c": 1} and len(output_of_rows.last_hidden_state) == 4


def test_rows_with_their_own_adapters_train_all_that_they_name(build):
    model = build(KAdapterForSequenceClassification).train()
    rows = [["factual"], ["linguistic"], ["factual", "linguistic"]]
    model(**batch(), labels=torch.tensor([0, 1, 0]), knowledge_adapters=rows).loss.backward()
    parameters = [*model.adapters.named_parameters(), *model.fusion.named_parameters()]
    assert all(parameter.grad is not None for name, parameter in parameters)


@torch.no_grad()
def test_dozens_of_small_adapters_are_chosen_among_by_position_and_by_row(build):
    model = build(adapters=(), fusion="gate", fusion_config={"activation": "softmax", "top_k": 2})
    names = [f"part{number}" for number in range(64)]
    for name in names:
        model.add_knowledge_adapter(name, small_adapter(num_hidden_layers=0, hidden_size=4))
    disturb(model.adapters)
    disturb(model.fusion)
    weights = model(**batch(), output_fusion_weights=True).fusion_weights
    assert list(weights) == names and ((torch.stack([*weights.values()]) > 0).sum(0) == 2).all()
    found = model(**batch(), knowledge_adapters=[names[:3], names[5:60], []]).last_hidden_state
    with model.using_knowledge_adapters(names[5:60]):
        torch.testing.assert_close(found[1], model(**batch()).last_hidden_state[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_backbone_reads_what_the_named_adapters_need(build):
    model = build(adapters=())
    for name, layers in {"low": [0, 1], "high": [3, 4]}.items():
        model.add_knowledge_adapter(name, small_adapter(backbone_layers=layers))
    model.set_active_knowledge_adapters("low")
    assert model.backbone_states_read() == [0, 1]
    states = model(**batch(), knowledge_adapters=[["high"], [], ["low"]]).knowledge_states
    assert list(states) == ["high", "low"]
    given = torch.zeros(3, 3, 10, 32)
    with pytest.raises(
        ValueError, match=r"backbone_states lack the states \[3, 4\], which the adapters \['high'\] read"
    ):
        model(**batch(), backbone_states=given, knowledge_adapters=["high"])
    with pytest.raises(ValueError, match=r"fusion_states lack the outputs of \['high'\], which are not active"):
        model(**batch(), fusion_states=given[:, :2], knowledge_adapters=["high"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["d"], r"there is no knowledge adapter 'd'; there are \['a', 'b', 'c'\]"),
        ([["a"], ["d"], []], r"row 1 of knowledge_adapters: there is no knowledge adapter 'd'"),
        ([["a"], "b", []], "row 1 of knowledge_adapters must be a list of names, not 'b'"),
        ([["a"], None, []], "row 1 of knowledge_adapters must be a list of names, not None"),
        ([["a"], ["b"]], "knowledge_adapters has 2 rows, and the batch 3"),
        (3, "knowledge_adapters must be a list of names for all rows, or a list of such lists, not 3"),
    ],
)
def test_impossible_names_are_refused_in_one_sentence(given, message, model):
    with pytest.raises(KAdapterConfigError, match=message) as caught:
        model(**batch(), knowledge_adapters=given)
    assert "\n" not in str(caught.value)


# ---- Weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["gate", "attention"])
@pytest.mark.parametrize("model_class", ALL_CLASSES, ids=lambda model_class: model_class.__name__)
@torch.no_grad()
def test_every_head_gives_the_weights_at_the_positions_that_it_reads(model_class, fusion, build):
    model, inputs = build(model_class, fusion=fusion), inputs_for(model_class)
    plain, found = model(**inputs), model(**inputs, output_fusion_weights=True)
    assert "fusion_weights" not in plain and list(found.fusion_weights) == ["factual", "linguistic"]
    for key, wanted in plain.items():
        assert not torch.is_tensor(wanted) or torch.equal(found[key], wanted)
    rows = {name: inputs[name].flatten(0, -2) for name in ("input_ids", "attention_mask")}
    states = KAdapterModel.forward(model, **rows)
    everywhere = model.fusion.weights(states.backbone_last_hidden_state, dict(states.knowledge_states))
    read = {
        KAdapterForEntityTyping: lambda: inputs["entity_start"][:, None],
        KAdapterForRelationClassification: lambda: torch.stack([inputs["subject_start"], inputs["object_start"]], 1),
        KAdapterForSequenceClassification: lambda: torch.zeros(4, 1).long(),
        KAdapterForMultipleChoice: lambda: torch.zeros(4, 1).long(),
        KAdapterForDependencyParsing: lambda: F.pad(inputs["word_starts"].clamp(min=0), (1, 0)),
    }
    for name, weights in found.fusion_weights.items():
        wanted = everywhere[name]
        if model_class in read:
            wanted = wanted.gather(1, read[model_class]())
        torch.testing.assert_close(weights.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_weights_of_rows_with_their_own_adapters(build):
    model = build(fusion="gate", adapters=("a", "b", "c"))
    weights = model(**batch(rows=4), knowledge_adapters=ROWS, output_fusion_weights=True).fusion_weights
    assert {name: (weight > 0).all(1).tolist() for name, weight in weights.items()} == {
        "a": [True, False, False, True],
        "c": [False, True, False, False],
        "b": [False, True, False, False],
    }
    assert all(weight.shape == (4, 10) and not weight[2].any() for weight in weights.values())
    assert model(**batch(), knowledge_adapters=[], output_fusion_weights=True).fusion_weights == {}


@torch.no_grad()
def test_weights_are_last_in_a_tuple(build):
    model = build(fusion="attention")
    wanted = model(**batch(), output_fusion_weights=True)
    found = model(**batch(), output_fusion_weights=True, return_dict=False)
    torch.testing.assert_close(found[-1]["factual"], wanted.fusion_weights["factual"])


@pytest.mark.parametrize("fusion", ["concat", "add"])
def test_fusion_without_weights_says_so(fusion, build):
    message = f"output_fusion_weights: the fusion '{fusion}' has no weights of adapters; 'attention', 'gate' and 'add'"
    with pytest.raises(ValueError, match=message):
        build(fusion=fusion)(**batch(), output_fusion_weights=True)


@pytest.mark.parametrize("names", [3, [["factual"]], [None]])
def test_names_of_another_type_are_refused(names, build):
    model = build(KAdapterModel, adapters=["factual"])
    with pytest.raises(KAdapterConfigError, match="chosen by a name or a list of names, not"):
        model.set_active_knowledge_adapters(names)
    with (
        pytest.raises(KAdapterConfigError, match="chosen by a name or a list of names, not"),
        model.using_knowledge_adapters(names),
    ):
        pass
