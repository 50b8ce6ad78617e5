"""Shared fixtures: tiny models with random weights, built once per session, and sources of files."""

import gc
import hashlib
import importlib.util
import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import ModuleType


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
import transformers
from packaging import version
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    set_seed,
)

from kadapter_hf import (
    KAdapterForDependencyParsing,
    KAdapterForEntityTyping,
    KAdapterForMaskedLM,
    KAdapterForMultipleChoice,
    KAdapterForQuestionAnswering,
    KAdapterForRelationClassification,
    KAdapterForTokenClassification,
    KAdapterModel,
    KnowledgeAdapterConfig,
)
from kadapter_hf.modeling.registry_kadapter import HEADS


WORDS = (
    "the a of in is was by and to who what where rome paris vienna berlin italy france austria germany capital city "
    "river country wrote composed born founded marie curie mozart dante physics music book opera danube seine tiber "
    "@ # ? . , he she it big old new red cat dog sat ran on mat"
).split()
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
VOCAB_SIZE = 100
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4}
POSITIONS = {"max_position_embeddings": 66, "pad_token_id": 1}
TINY = {
    "roberta": RobertaConfig(**SIZES, **POSITIONS, intermediate_size=48, type_vocab_size=1),
    "bert": BertConfig(**SIZES, **POSITIONS, intermediate_size=48),
    "xlm-roberta": XLMRobertaConfig(**SIZES, **POSITIONS, intermediate_size=48, type_vocab_size=1),
    "electra": ElectraConfig(**SIZES, **POSITIONS, intermediate_size=48, embedding_size=16),
    "deberta-v2": DebertaV2Config(
        **SIZES,
        **POSITIONS,
        intermediate_size=48,
        relative_attention=True,
        position_buckets=8,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        conv_kernel_size=3,
        conv_act="gelu",
    ),
    "distilbert": DistilBertConfig(
        vocab_size=VOCAB_SIZE, dim=32, n_heads=2, n_layers=4, hidden_dim=48, max_position_embeddings=66, pad_token_id=1
    ),
    "modernbert": ModernBertConfig(
        **SIZES,
        **POSITIONS,
        intermediate_size=48,
        bos_token_id=0,
        cls_token_id=0,
        eos_token_id=2,
        sep_token_id=2,
        local_attention=8,
    ),
}
# Tests that hold for every class run for each registered head.
ALL_CLASSES = (KAdapterModel, *(head for head, _ in HEADS.values()))
# transformers 5.5.0 to 5.5.3 divide every model's gradients, not the loss, by the number of micro-batches once more.
DIVIDES_GRADIENTS_AGAIN = version.parse(transformers.__version__) < version.parse("5.5.4")

# Real corpora, which are not part of the repository.
REAL_DATA = Path(__file__).parents[2] / "shared" / "data"
# transformers' own tests, which `make conformance` fetches.
collect_ignore = [] if "TRANSFORMERS_TESTS" in os.environ else ["conformance"]

SMALL_ADAPTER = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}


def small_adapter(**kwargs) -> KnowledgeAdapterConfig:
    """A knowledge adapter's configuration that is quick to run."""
    return KnowledgeAdapterConfig(**(SMALL_ADAPTER | kwargs))


def disturb(model: torch.nn.Module, seed: int = 0) -> None:
    """Sets all tensors of a module to random values, so that no result depends on an initial zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def batch(rows: int = 3, length: int = 10, seed: int = 0, padding: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids; the last row ends in `padding` padded positions."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(len(SPECIAL), VOCAB_SIZE, (rows, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if padding:
        input_ids[-1, -padding:] = 1
        attention_mask[-1, -padding:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def inputs_for(model_class: type, rows: int = 4, **kwargs) -> dict[str, torch.Tensor]:
    """A `batch` with the additional inputs of the class: marker positions, word starts, or two choices per row."""
    inputs = batch(rows, **kwargs)
    if model_class is KAdapterForEntityTyping:
        inputs["entity_start"] = torch.arange(rows) + 1
    elif model_class is KAdapterForRelationClassification:
        inputs["subject_start"] = torch.arange(rows) + 1
        inputs["object_start"] = torch.arange(rows) // 2
    elif model_class is KAdapterForDependencyParsing:
        inputs["word_starts"] = torch.tensor([1, 2, 4, 7]).repeat(rows, 1)
        inputs["word_starts"][::2, -1] = -1
    elif model_class is KAdapterForMultipleChoice:
        inputs = {name: tensor.view(rows // 2, 2, -1) for name, tensor in inputs.items()}
    return inputs


def labels_for(model_class: type, inputs: dict[str, torch.Tensor], num_labels: int = 2) -> dict[str, torch.Tensor]:
    """Labels that fit `inputs_for`, under the names that the class has for them."""
    generator = torch.Generator().manual_seed(1)
    shape = inputs["input_ids"].shape
    if model_class is KAdapterModel:
        return {}
    if model_class is KAdapterForMaskedLM:
        return {"labels": inputs["input_ids"].clone()}
    if model_class is KAdapterForTokenClassification:
        return {"labels": torch.randint(num_labels, shape, generator=generator)}
    if model_class is KAdapterForQuestionAnswering:
        return {"start_positions": torch.ones(shape[0]).long(), "end_positions": torch.full((shape[0],), 3)}
    if model_class is KAdapterForEntityTyping:
        return {"labels": torch.randint(2, (shape[0], num_labels), generator=generator).float()}
    if model_class is KAdapterForDependencyParsing:
        words = inputs["word_starts"] >= 0
        relations = torch.randint(num_labels, words.shape, generator=generator)
        heads = torch.tensor([2, 0, 2, 1]).repeat(shape[0], 1)
        return {"head_labels": heads.where(words, -100), "relation_labels": relations.where(words, -100)}
    return {"labels": torch.randint(2, (shape[0],), generator=generator)}


def assert_same_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Both have the same tensors, bit for bit and of the same dtype."""
    found, expected = model.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def contents(folder) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by its path in there."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_as_the_original(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within 1e-5 of the array's largest value."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def load_script(path: Path) -> ModuleType:
    """A program as a module, without running it."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    if str(path.parent) not in sys.path:  # as Python itself does for a program
        sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    """A port for `accelerate launch`: older versions of torch can't choose one themselves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module", autouse=True)
def nothing_to_collect():
    """Keeps the garbage collector off the million objects of all that was imported, also by the tests of other modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def arrays() -> dict[str, torch.Tensor]:
    """What the original computed, by name (fixtures/reference/README.md)."""
    with np.load(Path(__file__).parent / "fixtures" / "reference" / "reference_outputs.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of a small vocabulary, RoBERTa's special tokens."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=64,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return new_tokenizer()


@pytest.fixture(scope="session")
def backbones(tmp_path_factory, tokenizer) -> dict[str, str]:
    """A folder for each tested model type: a tiny encoder with a language-model head, and a tokenizer."""
    folders = {}
    for seed, (model_type, config) in enumerate(TINY.items()):
        set_seed(seed)
        model = AutoModelForMaskedLM.from_config(config)
        disturb(model, seed)
        folder = tmp_path_factory.mktemp("backbones") / model_type
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[model_type] = str(folder)
    return folders


@pytest.fixture(scope="session")
def backbone(backbones) -> str:
    """The folder of a tiny RoBERTa."""
    return backbones["roberta"]


@pytest.fixture
def build(backbone):
    """`build(KAdapterFor…, adapters=…)`: a model on the tiny RoBERTa, all of whose own weights are random."""

    def build(model_class=KAdapterModel, adapters=("factual", "linguistic"), backbone=backbone, seed=0, **kwargs):
        set_seed(seed)
        model = model_class.from_backbone(backbone, adapters={name: small_adapter() for name in adapters}, **kwargs)
        for part in (model.adapters, model.fusion, *model.head_modules()):
            if not hasattr(part, "base_model"):  # the language-model head is the backbone's
                disturb(part, seed)
        return model

    return build


@pytest.fixture
def interrupt_at(monkeypatch):
    """`interrupt_at(forward)`: the backbone's forward pass of this number ends in what Ctrl-C does; 0 for none."""
    wanted, passes = 0, 0
    forward = RobertaModel.forward

    def counted(self, *args, **kwargs):
        nonlocal passes
        passes += 1
        if passes == wanted:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args, **kwargs)

    def interrupt_at(number: int) -> int:
        """Returns the number of passes since the last call."""
        nonlocal wanted, passes
        before, wanted, passes = passes, number, 0
        return before

    monkeypatch.setattr(RobertaModel, "forward", counted)
    # A shell starts what runs in its background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield interrupt_at
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def backbone_passes(monkeypatch) -> list[int]:
    """The number of rows in each forward pass of the backbone."""
    passes: list[int] = []
    forward = RobertaModel.forward

    def counted(self, input_ids=None, **kwargs):
        passes.append(len(input_ids))
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(RobertaModel, "forward", counted)
    return passes


@pytest.fixture
def real():
    """`real("fewrel/val_wiki.json")`: the path of a real corpus; the test skips where it is absent."""

    def real(name: str) -> Path:
        path = (REAL_DATA / name).resolve()
        if not path.exists():
            pytest.skip(f"the corpus {path} is absent")
        return path

    return real


@pytest.fixture
def write_file(tmp_path):
    """`write_file(content)`: the path of a new file; anything but bytes and text is written as JSON."""
    count = 0

    def write_file(content, name: str | None = None) -> Path:
        nonlocal count
        count += 1
        path = tmp_path / (name or f"corpus-{count}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, (bytes, str)):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


@pytest.fixture
def hub():
    """A separate Hub for each test (hub/hub_server.py); unsupported requests fail the test."""
    from hub_server import HubServer  # pytest adds the folder of the Hub's tests to sys.path

    with HubServer() as server:
        yield server
    assert not server.errors
