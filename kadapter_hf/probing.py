"""
The LAMA probe: how often a masked-language model completes sentences with the right words, for a K-Adapter and for its
backbone.

Source: Petroni et al., EMNLP 2019; the LAMA section of the first versions of the K-Adapter paper.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from kadapter_cli._source import flag

from .cloze import Candidates, Prediction, Query, predict, queries_of, read_vocabulary, single_token_words
from .corpora import RELATION, Report
from .corpora.files import write_json
from .features import load_tokenizer, most_tokens
from .figures import new_figure, warn_without_matplotlib
from .lama import Fact, Pair, read_lama
from .masked_lm import backbone_of, encode_texts, freeze_all_but, models_of, read_texts, train_on
from .messages import shortened
from .rows import load_rows
from .runs import Parser


METRICS, PREDICTIONS, FIGURE = "metrics.json", "predictions.jsonl", "probe.png"
NAMES = {"backbone": "backbone", "kadapter": "K-Adapter"}


@dataclass
class ProbingArguments:
    """What to probe, and how."""

    model: str = field(metadata={"help": "A K-Adapter, or a stock masked-language model: a repository or folder."})
    data: str = field(metadata={"help": "LAMA's folder, the folder of one of its parts, or a .jsonl file of facts."})
    backbone: str | None = flag(None, "The backbone: a repository or folder. Default: as recorded in the K-Adapter.")
    protocol: Literal["as-is", "fusion", "new-head"] = flag(
        "as-is",
        "What is trained on --train_text before the probe: nothing (as-is); the fusion, with the backbone's own masked-"
        "language-model head (fusion); or a new head, for the backbone as well, and the fusion (new-head, the paper's).",
    )
    train_text: str | None = flag(None, "A file with one text per line, or a .jsonl file with the field text.")
    fusion: Literal["add", "attention", "concat", "gate"] | None = flag(
        None, "Replace the K-Adapter's fusion by a new one of this kind (add, attention, …), if it has another."
    )
    epochs: int = flag(2, "Epochs of the training.")
    learning_rate: float = flag(1e-3, "Its learning rate, which decreases linearly, without warm-up.")
    max_length: int = flag(512, "Maximum number of tokens of a training text; the rest of it is not used.")
    train_batch_size: int = flag(1024, "Texts per training step.")
    batch_size: int = flag(32, "Texts that are processed at once, in training and in probing.")
    vocab: str | None = flag(
        None,
        "The words to choose among, one per line, e.g. LAMA's common vocabulary. Default: all words that are one token of the "
        "tokenizer.",
    )
    multi_token: bool = flag(
        False,
        "Also score objects of several tokens: each is ranked among the objects of its relation, not among --vocab.",
    )
    exclude: str | None = flag(
        None, "Facts to leave out (LAMA-UHN): a uuid, subject<TAB>object, or a JSON object with these per line."
    )
    corpus: str | None = flag(
        None, "The rows that the adapter was trained on, as written by `kadapter prepare`: facts in it are told apart."
    )
    output_dir: str | None = flag(None, f"Folder for {METRICS}, {PREDICTIONS} and {FIGURE}.")
    seed: int = flag(42, "Seed of the training.")

    def __post_init__(self):
        if (self.train_text is None) != (self.protocol == "as-is"):
            raise ValueError("--train_text is needed with --protocol fusion and new-head, and only there.")
        if self.vocab is not None and self.multi_token:
            raise ValueError("--multi_token ranks the objects of a relation, so it can't be used with --vocab.")
        for name in ("epochs", "learning_rate", "max_length", "train_batch_size", "batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be greater than 0, not {getattr(self, name)}.")
        if self.protocol != "as-is" and self.train_batch_size % min(self.batch_size, self.train_batch_size):
            raise ValueError(
                f"--train_batch_size must be a multiple of --batch_size, not {self.train_batch_size} and {self.batch_size}."
            )


# ---- Metrics --------------------------------------------------------------------------------------------------------


def rank_metrics(ranks: Sequence[int]) -> dict[str, float]:
    """`p_at_1` and `p_at_10` (the shares of ranks up to 1 and 10), and `mrr`, the mean of 1 / rank."""
    return {
        "p_at_1": sum(rank == 1 for rank in ranks) / len(ranks),
        "p_at_10": sum(rank <= 10 for rank in ranks) / len(ranks),
        "mrr": sum(1 / rank for rank in ranks) / len(ranks),
    }


def macro_mean(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over relations, which count equally, regardless of their numbers of facts."""
    return {name: sum(row[name] for row in metrics) / len(metrics) for name in metrics[0]}


def by_relation(facts: Sequence[Fact], ranks: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """
    The metrics of each relation, in the order of their first facts.

    Args:
        ranks: for each model, one rank per fact.

    Returns:
        For each relation `part`, `relation`, the number of its `facts`, and the metrics of each model under its name.
    """
    rows = defaultdict(list)
    for number, fact in enumerate(facts):
        rows[fact.part, fact.relation].append(number)
    return [
        {"part": part, "relation": relation, "facts": len(numbers)}
        | {name: rank_metrics([of_model[number] for number in numbers]) for name, of_model in ranks.items()}
        for (part, relation), numbers in rows.items()
    ]


def by_part(relations: Sequence[dict[str, Any]], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The metrics of LAMA's parts: for each model, the macro mean over the metrics of the part's relations."""
    names = list(names)
    parts: dict[str, dict[str, Any]] = {}
    for part in dict.fromkeys(row["part"] for row in relations):
        rows = [row for row in relations if row["part"] == part]
        parts[part] = {"relations": len(rows), "facts": sum(row["facts"] for row in rows)}
        parts[part] |= {name: macro_mean([row[name] for row in rows]) for name in names}
    return parts


def pairs_of_corpus(corpus: str) -> set[Pair]:
    """
    Subject and object, case-folded, of each training row of a corpus.

    Raises:
        ValueError: its rows are not of the relation schema.
    """
    rows = load_rows(corpus, RELATION)["train"]
    return {
        (text[slice(*subject)].casefold(), text[slice(*object_)].casefold())
        for text, subject, object_ in zip(rows["text"][:], rows["subject"][:], rows["object"][:], strict=True)
    }


def by_corpus(
    facts: Sequence[Fact], ranks: Mapping[str, Sequence[int]], pairs: set[Pair]
) -> dict[str, dict[str, Any]]:
    """The metrics of the facts whose subject and object are, as a pair, in the corpus, and of the others, by part."""
    groups = {}
    for group, inside in (("in_corpus", True), ("not_in_corpus", False)):
        numbers = [number for number, fact in enumerate(facts) if (fact.pair in pairs) is inside]
        of_group = {name: [of_model[number] for number in numbers] for name, of_model in ranks.items()}
        groups[group] = by_part(by_relation([facts[number] for number in numbers], of_group), ranks)
    return groups


# ---- The probe ------------------------------------------------------------------------------------------------------


def probe(arguments: ProbingArguments, with_backbone: bool = True) -> dict[str, Any]:
    """
    Probes a K-Adapter and its untouched backbone, or a stock masked-language model.

    Args:
        with_backbone: probe a K-Adapter's backbone as well.

    Returns:
        What is written to `metrics.json`: the metrics by part (`parts`) and by relation (`relations`), those of facts inside
        and outside of `--corpus` (`corpus`), the numbers of facts left out and why (`left_out`), the size of the vocabulary
        (`vocabulary`, null with `--multi_token`), the `training`, and the settings. Metrics are between 0 and 1.

    Raises:
        ValueError: something is wrong with the data or the model.
        OSError: a file or the model can't be read.
    """
    output = None if arguments.output_dir is None else Path(arguments.output_dir)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        warn_without_matplotlib(FIGURE)
    (facts, report), pairs, read = load_data(arguments)
    texts: Any = read
    backbone, _, _ = backbone_of(arguments.model, arguments.backbone)
    tokenizer = load_tokenizer(backbone)
    if tokenizer.mask_token_id is None:
        raise ValueError(f"the tokenizer of '{backbone}' has no mask: only masked-language models can be probed.")
    vocabulary, unused = _vocabulary(arguments, tokenizer)
    queries: list[Query] = []
    predictions: dict[str, list[Prediction]] = {}
    training: dict[str, Any] = {}
    new_head = arguments.protocol == "new-head"
    for name, model in models_of(arguments.model, arguments.backbone, arguments.fusion, new_head, with_backbone):
        if not queries:
            most = most_tokens(tokenizer, None, model.config.backbone_config)
            queries = queries_of(facts, tokenizer, vocabulary, most, report)
            texts = texts and encode_texts(texts, tokenizer, min(arguments.max_length, most))
        if texts is not None and (new_head or name == "kadapter"):
            count = freeze_all_but(model, head=new_head, seed=arguments.seed)
            done = train_on(
                model,
                texts,
                tokenizer,
                epochs=arguments.epochs,
                learning_rate=arguments.learning_rate,
                step_size=arguments.train_batch_size,
                batch_size=min(arguments.batch_size, arguments.train_batch_size),
                seed=arguments.seed,
            )
            training[name] = {"texts": len(texts), "parameters": count} | done
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        predictions[name] = predict(model, queries, tokenizer.mask_token_id, arguments.batch_size, NAMES[name])
        del model
    scored = [query.fact for query in queries]
    ranks = {name: [prediction.rank for prediction in of_model] for name, of_model in predictions.items()}
    relations = by_relation(scored, ranks)
    results = {
        "backbone": backbone,
        "parts": by_part(relations, ranks),
        "relations": relations,
        "corpus": None if pairs is None else by_corpus(scored, ranks, pairs),
        "facts": len(scored),
        "left_out": dict(report.dropped.most_common()),
        "relations_left_out": _without_facts(facts, scored),
        "vocabulary": None if vocabulary is None else len(vocabulary),
        "vocabulary_lines_unused": unused,
        "training": training or None,
        "settings": asdict(arguments),
        "versions": {package: version(package) for package in ("kadapter-hf", "torch", "transformers")},
    }
    if output is not None:
        _write_predictions(output / PREDICTIONS, queries, predictions, pairs)
        _draw(relations, list(ranks), output / FIGURE)
        write_json(output / METRICS, results)
    return results


def load_data(
    arguments: ProbingArguments,
) -> tuple[tuple[list[Fact], Report], set[Pair] | None, list[str] | None]:
    """
    The facts and the report that `read_lama` returns; the pairs of the corpus and the texts to train on, None without one.

    Raises:
        ValueError: a file is not in its format.
    """
    return (
        read_lama(arguments.data, arguments.exclude),
        None if arguments.corpus is None else pairs_of_corpus(arguments.corpus),
        None if arguments.train_text is None else read_texts(arguments.train_text),
    )


def _vocabulary(arguments: ProbingArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Candidates | None, int]:
    if arguments.multi_token:
        return None, 0
    if arguments.vocab is None:
        return single_token_words(tokenizer), 0
    return read_vocabulary(arguments.vocab, tokenizer)


def _without_facts(facts: Iterable[Fact], scored: Iterable[Fact]) -> list[str]:
    """The relations without a fact that can be scored."""
    left = {(fact.part, fact.relation) for fact in scored}
    return [
        f"{part}, {name}"
        for part, name in dict.fromkeys((f.part, f.relation) for f in facts)
        if (part, name) not in left
    ]


def _write_predictions(
    path: Path, queries: Sequence[Query], predictions: dict[str, list[Prediction]], pairs: set[Pair] | None
) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for number, query in enumerate(queries):
            row = asdict(query.fact) | {"candidates": len(query.candidates)}
            if pairs is not None:
                row["in_corpus"] = query.fact.pair in pairs
            row |= {name: asdict(of_model[number]) for name, of_model in predictions.items()}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _draw(relations: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> None:
    """A bar per relation and model: P@1 in percent."""
    figure = new_figure(max(6, 2 + 0.3 * len(relations)), 4)
    if figure is None:
        return
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    for offset, name in enumerate(names):
        places = [number + offset * width for number in range(len(relations))]
        axes.bar(places, [100 * row[name]["p_at_1"] for row in relations], width, align="edge", label=NAMES[name])
    labels = [shortened(row["relation"], 20) for row in relations]
    axes.set_xticks([number + 0.4 for number in range(len(relations))], labels, rotation=90)
    axes.set_ylabel("P@1, %")
    axes.legend()
    figure.savefig(path, dpi=150)


def parser(program: str) -> Parser:
    """The parser of the flags."""
    return Parser(
        ProbingArguments,
        prog=program,
        description="Probes a K-Adapter and its backbone for facts (LAMA). Example: kadapter probe --model factual-adapter "
        "--data LAMA --output_dir probe. With --json, prints the content of metrics.json.",
    )
