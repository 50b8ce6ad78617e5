"""Other knowledge adapters than the active ones: for a while, in one thread, for a call or for each row."""

import asyncio
import copy
import threading

import pytest
import torch
from conftest import batch

from kadapter_hf import KAdapterConfigError, KAdapterForSequenceClassification, KAdapterModel


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


def test_compiled_model_uses_the_adapters_of_the_statement(build):
    model = build(KAdapterForSequenceClassification)
    compiled = torch.compile(model, backend="eager")

    @torch.no_grad()
    def both() -> list[torch.Tensor]:
        return [run(**batch()).logits for run in (compiled, model)]

    outputs = [both()]
    with model.using_knowledge_adapters("factual"):
        outputs.append(both())
    outputs.append(both())
    for found, wanted in outputs:
        torch.testing.assert_close(found, wanted)
    assert not torch.allclose(outputs[0][0], outputs[1][0]) and torch.allclose(outputs[0][0], outputs[2][0])
