"""`torch.export` and `torch.jit.trace` on every class."""

import pytest
import torch
import transformers
from conftest import ALL_CLASSES, inputs_for
from packaging.version import Version
from torch import nn
from torch.export import Dim

from kadapter_hf import KAdapterForEntityTyping


# The others take some seconds together.
TRACED = [
    model_class if model_class is KAdapterForEntityTyping else pytest.param(model_class, marks=pytest.mark.slow)
    for model_class in ALL_CLASSES
]


class FirstOutput(nn.Module):
    """A model that takes and returns tensors: `torch.export` does not know the nested output of `KAdapterModel`."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)), return_dict=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("model_class", ALL_CLASSES)
@torch.no_grad()
def test_an_exported_program_takes_other_numbers_of_rows_and_other_lengths(model_class, build):
    inputs = inputs_for(model_class, padding=2)
    model = FirstOutput(build(model_class), list(inputs))
    shapes = tuple({axis: Dim.DYNAMIC for axis in range(tensor.dim())} for tensor in inputs.values())
    program = torch.export.export(model, tuple(inputs.values()), dynamic_shapes=(shapes,)).module()
    for rows, length, padding in ((2, 8, 0), (6, 30, 21)):
        others = inputs_for(model_class, rows, length=length, padding=padding).values()
        torch.testing.assert_close(program(*others), model(*others), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.9"),
    reason="older versions of transformers make masks that can't be traced",
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("model_class", TRACED)
@torch.no_grad()
def test_a_traced_model_takes_other_numbers_of_rows_and_other_lengths(model_class, build):
    inputs = inputs_for(model_class, padding=2)
    model = FirstOutput(build(model_class), list(inputs))
    traced = torch.jit.trace(model, tuple(inputs.values()))
    for rows, length, padding in ((2, 8, 0), (6, 30, 21)):
        others = inputs_for(model_class, rows, length=length, padding=padding).values()
        torch.testing.assert_close(traced(*others), model(*others), rtol=1e-5, atol=1e-5)
