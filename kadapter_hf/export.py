"""Export of a K-Adapter to ONNX, and its comparison with the model on ONNX Runtime."""

import contextlib
import copy
import inspect
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from .conversion.writing import check_new
from .messages import needs
from .modeling.marking_kadapter import most_tokens
from .modeling.modeling_kadapter import KAdapterPreTrainedModel
from .predicting import labels_of, options_of, task_of


ONNX_FILE, QUANTIZED_FILE = "model.onnx", "model_quantized.onnx"
TOLERANCE = 1e-4
# Protocol buffers have at most 2 GiB; the weights of a larger model are in a file of their own.
LARGEST_FILE = 2**31 - 2**24
# The inputs of heads that the backbone does not take: positions in the text.
POSITIONS = ("entity_start", "subject_start", "object_start", "word_starts")
# Rows, tokens and padding of what is exported, compared and timed; lengths are limited to the model's.
EXPORTED = (2, 12, 3)
COMPARED = ((1, 7, 0), (3, 17, 6), (5, 40, 25), (1, 512, 0))
TIMED = ((1, 32, 0), (8, 128, 0))
Tensors = dict[str, torch.Tensor]
Run = Callable[[Tensors], Tensors]


def export_onnx(
    model: KAdapterPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: str | Path,
    *,
    quantize: bool = False,
    batches: Iterable[Mapping[str, torch.Tensor]] = (),
) -> dict[str, Any]:
    """
    Writes a K-Adapter with its active adapters as one ONNX file, in a new folder with its configuration and tokenizer.

    The file takes any number of rows of any length. It is run on ONNX Runtime and compared with the model, on other numbers
    and lengths than those it was exported with, and with padding.

    Args:
        model: of a class of this package, or of your own with the same inputs. Its weights are exported in float32.
        output: the folder, which must be new or empty.
        quantize: also write a file with 8-bit weights, and measure how much its outputs differ.
        batches: inputs of the model to measure that on; by default random tokens.

    Returns:
        `output`, `opset`, the names of the `inputs` and the `outputs`, and `files`: for each file by name, and for the model
        itself as `torch`, its `bytes`, and the `milliseconds` per batch by shape. Files also have the `largest_difference`
        between their outputs and the model's, and the share of `same_predictions`, None if the model predicts no classes.

    Raises:
        ImportError: one of the libraries of the extra `export` is missing.
        KAdapterLoadError: the folder is not empty.
        ValueError: an output differs by more than 1e-4, relative to the largest if that is above 1. Nothing is kept then.
    """
    require_onnx()
    output = Path(output)
    check_new(output)
    model = copy.deepcopy(model).float().cpu().eval()
    random = RandomBatches(model, tokenizer)
    # Inside the output, which may be the current folder or on a disk of its own, and so can't be replaced.
    with _made(output), TemporaryDirectory(dir=output, prefix="incomplete-") as temporary, torch.no_grad():
        folder = Path(temporary)
        tokenizer.save_pretrained(folder)
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        names = [name for name, value in model(**random.batch(*EXPORTED)).items() if torch.is_tensor(value)]
        opset = _write(_Flat(model, random.names, names).eval(), random.batch(*EXPORTED), folder / ONNX_FILE)
        runs: dict[str, Run] = {"torch": lambda batch: {name: model(**batch)[name] for name in names}}
        files: dict[str, Any] = {"torch": {"bytes": sum(tensor.nbytes for tensor in model.state_dict().values())}}

        runs[ONNX_FILE] = on_runtime(folder / ONNX_FILE)
        files[ONNX_FILE] = compare(model, runs["torch"], runs[ONNX_FILE], [random.batch(*shape) for shape in COMPARED])
        difference = files[ONNX_FILE]["largest_difference"]
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the exported {type(model).__name__} differs from the model by {difference:.1e} on ONNX Runtime, more than "
                f"{TOLERANCE:.0e}; it is not kept."
            )
        if quantize:
            _quantize(folder / ONNX_FILE, folder / QUANTIZED_FILE)
            runs[QUANTIZED_FILE] = on_runtime(folder / QUANTIZED_FILE)
            measured = [random.complete(batch) for batch in batches]
            measured = measured or [random.batch(8, 64, seed=seed) for seed in range(8)]
            files[QUANTIZED_FILE] = compare(model, runs["torch"], runs[QUANTIZED_FILE], measured)
        for name, run in runs.items():
            files[name]["milliseconds"] = {
                "×".join(map(str, batch["input_ids"].shape)): _milliseconds(run, batch)
                for batch in (random.batch(*shape) for shape in TIMED)
            }
            if name != "torch":
                files[name]["bytes"] = sum(path.stat().st_size for path in folder.glob(f"{name}*"))
        for path in folder.iterdir():
            path.rename(output / path.name)
    return {"output": str(output), "opset": opset, "inputs": random.names, "outputs": names, "files": files}


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder and those above it, and removes the ones that were made if something fails."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in new:
            path.rmdir()
        raise


def require_onnx() -> None:
    """
    Call it before a model is loaded to be exported.

    Raises:
        ImportError: one of the libraries of the extra `export` is missing.
    """
    for library in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(library) is None:
            raise ImportError(needs("an export to ONNX", library, "export"))


def batches_of(
    model: KAdapterPreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: str | Path
) -> Iterable[Mapping[str, torch.Tensor]]:
    """
    The inputs for a file of the task that the model was fine-tuned on, row by row.

    Raises:
        ValueError: the model does not record its task, or a row can't be used.
    """
    if (model.config.task or {}).get("name") is None:
        raise ValueError("the model does not record the task that it was fine-tuned on: leave out --data.")
    task = task_of(model)
    rows, _ = task.read(data, labelled=False)
    maximum = (model.config.task or {}).get("max_length")
    features = task.encode(rows, tokenizer, labels_of(model, task), maximum, options_of(model, task))
    return DataLoader(features, collate_fn=task.collator(tokenizer))


class RandomBatches:
    """
    Random inputs of a model.

    Attributes:
        names: the inputs: what the tokenizer returns and the backbone takes, then the positions that the head takes.
    """

    def __init__(self, model: KAdapterPreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.config = model.config.backbone_config
        self.most = most_tokens(tokenizer, None, self.config)
        self.has_choices = type(model).__name__ == "KAdapterForMultipleChoice"
        taken = inspect.signature(model.backbone.forward).parameters
        of_head = inspect.signature(model.forward).parameters
        self.names = [name for name in tokenizer.model_input_names if name in taken]
        self.names += [name for name in POSITIONS if name in of_head]

    def batch(self, rows: int, length: int, padding: int = 0, seed: int = 0) -> Tensors:
        """`(rows, length)`, or `(rows, 3, length)` for a choice; the last row ends in padding."""
        generator = torch.Generator().manual_seed(seed)
        length = min(length, self.most)
        shape = (rows, 3, length) if self.has_choices else (rows, length)
        last = max(length - padding, 1)
        pad = self.config.pad_token_id or 0
        input_ids = torch.randint(self.config.vocab_size - 1, shape, generator=generator)
        input_ids = torch.where(input_ids < pad, input_ids, input_ids + 1)  # padding is at the end only
        attention_mask = torch.ones_like(input_ids)
        input_ids[-1, ..., last:], attention_mask[-1, ..., last:] = pad, 0
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        for name in POSITIONS[:3]:
            batch[name] = torch.randint(last, (rows,), generator=generator)
        words = torch.rand(rows, last, generator=generator).argsort()[:, : (last + 1) // 2].sort().values
        words[-1, 1:] = -1
        batch["word_starts"] = words
        return self.complete(batch)

    def complete(self, batch: Mapping[str, torch.Tensor]) -> Tensors:
        """The inputs alone, in their order."""
        inputs = {"token_type_ids": torch.zeros_like(batch["input_ids"])} | dict(batch)
        return {name: inputs[name] for name in self.names}


class _Flat(nn.Module):
    """A model that takes its inputs by position and returns a tuple of tensors."""

    def __init__(self, model: KAdapterPreTrainedModel, inputs: list[str], outputs: list[str]):
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(found[name] for name in self.outputs)


def _axes(name: str, tensor: torch.Tensor) -> dict[int, str]:
    if name in POSITIONS:
        return dict(enumerate(("batch", "words")[: tensor.dim()]))
    return dict(enumerate(("batch", "length") if tensor.dim() == 2 else ("batch", "choices", "length")))


def _write(flat: _Flat, batch: Tensors, path: Path) -> int:
    """Writes the ONNX file, and returns the version of its operators."""
    shapes = tuple(_axes(name, tensor) for name, tensor in batch.items())
    size = sum(tensor.nbytes for tensor in flat.state_dict().values())
    with _quietly():
        program: Any = torch.onnx.export(
            flat,
            tuple(batch.values()),
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=flat.inputs,
            output_names=flat.outputs,
            verbose=False,
        )
        program.save(path, external_data=size > LARGEST_FILE)
    return program.model.opset_imports[""]


def _quantize(source: Path, target: Path) -> None:
    """Makes the weights of matrix products and embeddings 8-bit integers; activations are quantised at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    large = source.with_name(f"{source.name}.data").exists()
    with _quietly():
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=large)
    for path in target.parent.glob(f"{target.name}*"):
        path.chmod(source.stat().st_mode)  # its data file is readable by its owner only


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silences libraries that warn of what can't be changed here, such as that torchvision is not installed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def on_runtime(path: Path) -> Run:
    """A function that runs an ONNX file on ONNX Runtime, on as many threads as PyTorch uses."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(batch: Tensors) -> Tensors:
        found = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        return dict(zip(names, map(torch.from_numpy, found), strict=True))

    return run


def compare(model: KAdapterPreTrainedModel, run: Run, other: Run, batches: Iterable[Tensors]) -> dict[str, Any]:
    """
    The largest difference of an output, relative to the largest value if that is above 1; and the share of the predictions
    that are the same.
    """
    differences, same = [0.0], []
    for batch in batches:
        wanted, found = run(batch), other(batch)
        for name, values in wanted.items():
            # Scores of impossible arcs are the lowest number.
            values, others = values.clamp(min=-1e6), found[name].clamp(min=-1e6)
            differences.append(((values - others).abs().max() / values.abs().max().clamp(min=1)).item())
        predictions = zip(_predicted(model, wanted), _predicted(model, found), strict=True)
        same += [value for one, two in predictions for value in (one == two).flatten().tolist()]
    return {
        "largest_difference": max(differences),
        "same_predictions": statistics.fmean(same) if same else None,
    }


def _predicted(model: KAdapterPreTrainedModel, outputs: Tensors) -> list[torch.Tensor]:
    logits = [values for name, values in outputs.items() if name.endswith("logits")]
    if model.config.problem_type == "multi_label_classification":
        return [values > 0 for values in logits]
    return [values.argmax(-1) for values in logits if values.shape[-1] > 1]


def _milliseconds(run: Run, batch: Tensors) -> float:
    """The median of five runs, after one that is not counted."""
    taken = []
    for _ in range(6):
        started = time.perf_counter()
        run(batch)
        taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken[1:])
