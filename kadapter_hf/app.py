"""A web page for trying K-Adapters, with each adapter switched on and off: `kadapter app`."""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline

from kadapter_cli._names import is_repo_id

from . import __version__
from .conversion.writing import check_new
from .inspect import contributions, draw_contributions
from .messages import needs, sentence
from .modeling.format_kadapter import KAdapterConfigError, KAdapterLoadError
from .modeling.marking_kadapter import most_tokens
from .modeling.modeling_kadapter import KAdapterPreTrainedModel
from .predicting import load_finetuned
from .trees import draw_tree


try:
    import gradio as gr
except ImportError as error:
    raise ImportError(needs("kadapter app", "Gradio", "app")) from error


TOP = 5
FAULTS = (ValueError, OSError, ImportError, RuntimeError)  # RuntimeError: more tokens than the model has positions


@dataclass(frozen=True)
class View:
    """
    What the page shows for a kind of model.

    Args:
        task: the pipeline that predicts.
        title: the title of its predictions.
        example: a sentence to begin with; entities are in brackets, `{mask}` is the mask token.
        entities: the names of the marked entities in the pipeline's input.
        help: what to type.
        predict: a function from the pipeline and its input to the value that `output` shows.
        output: the component that shows a prediction.
    """

    task: str
    title: str
    example: str
    help: str
    predict: Callable[[Any, Any], Any]
    output: Callable[..., Any] = gr.Label
    entities: tuple[str, ...] = ()


def _scores(pipe: Any, inputs: Any) -> dict[str, float]:
    return {found.get("name", found["label"]): found["score"] for found in pipe(inputs, top_k=TOP)}


def _types(pipe: Any, inputs: Any) -> dict[str, float]:
    found = pipe(inputs, top_k=TOP, threshold=-1.0)
    return {label.get("name", label["label"]): label["score"] for label in found}


def _words(pipe: Any, inputs: str) -> dict[str, float]:
    text = re.sub(r"<mask>|\[MASK\]", lambda _: pipe.tokenizer.mask_token, inputs)
    if text.count(pipe.tokenizer.mask_token) != 1:
        raise ValueError(f"Put one {pipe.tokenizer.mask_token} where a word is to be filled in.")
    scores: dict[str, float] = {}
    for found in pipe(text, top_k=TOP):  # the best first; a word has a token of its own with a space before it
        word = found["token_str"].strip() or f"token {found['token']}"
        scores.setdefault(word, found["score"])
    return scores


def _tree(pipe: Any, inputs: str) -> str:
    # As wide as the column at most.
    drawing = re.sub(
        r'width="([\d.]+)" height="([\d.]+)"(.*?)max-width: none; height: [\d.]+px',
        r'width="\1" viewBox="0 0 \1 \2"\3max-width: 100%; height: auto',
        draw_tree(pipe(inputs)),
        count=1,
    )
    return f'<div style="background: white">{drawing}</div>'


def _tags(pipe: Any, inputs: str) -> list[tuple[str, str | None]]:
    """The text in pieces, with the label of each piece that has one."""
    pieces: list[tuple[str, str | None]] = []
    done = 0
    for found in pipe(inputs, aggregation_strategy="simple"):
        pieces += [
            (inputs[done : found["start"]], None),
            (inputs[found["start"] : found["end"]], found["entity_group"]),
        ]
        done = found["end"]
    return [*pieces, (inputs[done:], None)]


VIEWS = {
    "KAdapterForEntityTyping": View(
        "entity-typing",
        "Types of the entity",
        "We saw an exhibition of paintings by [Frida Kahlo].",
        "A sentence with one entity in brackets.",
        _types,
        entities=("entity",),
    ),
    "KAdapterForRelationClassification": View(
        "relation-classification",
        "Relation of the first entity to the second",
        "[Vienna] is the capital of [Austria].",
        "A sentence with two entities in brackets, the subject first; or numbered: [2: Austria] has the capital [1: Vienna].",
        _scores,
        entities=("subject", "object"),
    ),
    "KAdapterForMaskedLM": View(
        "fill-mask", "Words for the mask", "Vienna is the capital of {mask}.", "A sentence with one {mask}.", _words
    ),
    "KAdapterForDependencyParsing": View(
        "dependency-parsing",
        "Dependency tree",
        "The Danube flows through Vienna.",
        "A sentence.",
        _tree,
        gr.HTML,
    ),
    "KAdapterForSequenceClassification": View(
        "text-classification", "Classes of the text", "The Danube flows through Vienna.", "A text.", _scores
    ),
    "KAdapterForTokenClassification": View(
        "token-classification",
        "Labels in the text",
        "The Danube flows through Vienna.",
        "A sentence.",
        _tags,
        gr.HighlightedText,
    ),
}


def unbracketed(text: str, view: View) -> dict[str, Any]:
    """
    The input of a pipeline from a sentence with entities in brackets: the text without brackets, and the span of each entity
    under its name. `[1: …]` and `[2: …]` number the entities; otherwise their order does.

    Raises:
        ValueError: there are not as many entities in brackets as the view has, or only some of them are numbered.
    """
    plain, spans, done = "", {}, 0
    brackets = list(re.finditer(r"\[(?:\s*(\d)\s*:)?\s*([^\[\]]*?)\s*\]", text))
    if len(brackets) == len(view.entities) and 0 < sum(found[1] is None for found in brackets) < len(brackets):
        raise ValueError("Number both entities, [1: …] and [2: …], or neither.")
    for count, found in enumerate(brackets, start=1):
        plain += text[done : found.start()]
        spans[int(found[1] or count)] = [len(plain), len(plain) + len(found[2])]
        plain += found[2]
        done = found.end()
    plain += text[done:]
    filled = all(start < end for start, end in spans.values())
    if sorted(spans) != list(range(1, len(view.entities) + 1)) or not filled or "[" in plain or "]" in plain:
        wanted = "one entity" if len(view.entities) == 1 else f"{len(view.entities)} entities"
        raise ValueError(f"Put {wanted} in brackets, as in: {view.example}")
    return {"text": plain} | {name: spans[number] for number, name in enumerate(view.entities, start=1)}


Sources = str | Path | Sequence[str | Path]


def _each(sources: Sources) -> list[str]:
    listed = [str(source) for source in ([sources] if isinstance(sources, (str, Path)) else sources)]
    if not listed:
        raise KAdapterConfigError("the page needs a model: name a folder or a repository.")
    return listed


def build(sources: Sources) -> gr.Blocks:
    """
    The page, with a tab for each model; `build("user/model").launch()` serves it.

    Args:
        sources: one or more folders or repositories of K-Adapters with a task head, which may be of different tasks.

    Raises:
        KAdapterConfigError: there is no source.
        KAdapterLoadError: a model can't be loaded, or has a head that the page can't show.
        ValueError: a source is no K-Adapter.
    """
    with gr.Blocks(title="K-Adapter") as page:
        gr.Markdown("# K-Adapter\nType a sentence, and see what each knowledge adapter changes.")
        for source in _each(sources):
            model, tokenizer = load_finetuned(source)
            if type(model).__name__ not in VIEWS:
                raise KAdapterLoadError(
                    f"'{source}' is a {type(model).__name__}; the app shows models of the classes {', '.join(VIEWS)}."
                )
            with gr.Tab(Path(source).absolute().name):
                _tab(model, tokenizer)
    return page


def _tab(model: KAdapterPreTrainedModel, tokenizer: Any) -> None:
    view = VIEWS[type(model).__name__]
    task: Any = view.task  # transformers types the names that it knows itself
    pipe = pipeline(task, model=model.eval(), tokenizer=tokenizer)
    mask = tokenizer.mask_token or ""
    most = most_tokens(tokenizer, backbone=model.config.backbone_config)
    text = gr.Textbox(view.example.replace("{mask}", mask), label="Sentence", info=view.help.replace("{mask}", mask))
    names = list(model.adapters)
    active = gr.CheckboxGroup(names, value=model.active_knowledge_adapters, label="Knowledge adapters")
    button = gr.Button("Predict", variant="primary")
    with gr.Column() if view.output is gr.HTML else gr.Row():  # a tree needs the whole width
        titled = {"show_label": True, "container": True}  # gr.HTML has neither by default
        chosen = view.output(label=f"{view.title}: with these adapters", **titled)
        alone = view.output(label=f"{view.title}: backbone alone", **titled)
    gr.Markdown("The head was trained with the adapters, so it is at a disadvantage without them.")
    with gr.Accordion("What each adapter contributes", open=True):
        gr.Markdown(
            "Means over the tokens: the norm of the adapter's state, beside that of the backbone's; the relative change of the "
            "fused state if the adapter is left out, which the figure shows for each token; and the adapter's weight in the "
            "fusion, if it has weights."
        )
        table = gr.Dataframe(headers=COLUMNS, show_label=False)
        plot = gr.Plot(show_label=False)

    def predict(text: str, names: list[str]) -> tuple[Any, ...]:
        try:
            if not text.strip():
                raise ValueError("Type a sentence first.")
            inputs = unbracketed(text, view) if view.entities else text.strip()
            if (
                isinstance(inputs, str)
                and len(tokenizer(inputs, truncation=True, max_length=most + 1)["input_ids"]) > most
            ):
                raise ValueError(f"The text has more than {most} tokens, which is the most that the model takes.")
            with model.using_knowledge_adapters(names):
                predicted = view.predict(pipe, inputs)
                shares = _shares(pipe, inputs)
            with model.without_knowledge_adapters():
                return predicted, view.predict(pipe, inputs), *shares
        except FAULTS as error:
            raise gr.Error(html.escape(sentence(error)), print_exception=False) from error

    outputs = [chosen, alone, table, plot]
    events = [button.click, text.submit, active.change]
    done = gr.on(events, predict, [text, active], outputs)
    done.failure(lambda: [None] * len(outputs), outputs=outputs)  # what was shown before would seem to be the answer


COLUMNS = ["adapter", "norm", "backbone's norm", "change", "fusion weight"]


@torch.no_grad()
def _shares(pipe: Any, inputs: Any) -> tuple[list[list[Any]], Any]:
    """A row of the table for each adapter, and the figure; both empty without adapters."""
    model, tokenizer = pipe.model, pipe.tokenizer
    if not model.active_knowledge_adapters:
        return [], None
    if isinstance(inputs, dict):  # with markers around the entities
        found = next(iter(pipe.preprocess(inputs)))
        batch = {name: found[name] for name in ("input_ids", "attention_mask")}
    else:
        batch = dict(tokenizer(inputs, return_tensors="pt", truncation=True))
    encoded = model.encode(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    weights = model.fusion.weights(encoded.backbone_state, encoded.knowledge) or {}
    changes = contributions(model, batch)
    rows = []
    for name, state in encoded.knowledge.items():
        norms = [states.norm(dim=-1).mean().item() for states in (state, encoded.backbone_state)]
        weight = round(weights[name].mean().item(), 2) if name in weights else None
        rows.append([name, *(round(number, 2) for number in (*norms, float(changes[name].mean()))), weight])
    tokens = [tokenizer.decode([number]).strip() for number in batch["input_ids"][0]]
    return rows, draw_contributions(changes, tokens)


def write_space(sources: Sources, folder: str | Path) -> None:
    """
    Writes the files of a Space on the Hub that serves the page, into a folder that is new or empty.

    Raises:
        KAdapterConfigError: there is no source, or one is no repository on the Hub.
        KAdapterLoadError: the folder is not empty.
    """
    sources, folder = _each(sources), Path(folder)
    for source in sources:
        if Path(source).exists() or "/" not in source or not is_repo_id(source):
            raise KAdapterConfigError(
                f"a Space loads its models from the Hub, and '{source}' is no repository there (owner/name): push it first."
            )
    check_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    listed = "\n".join(f"- {source}" for source in sources)
    (folder / "README.md").write_text(
        f"---\ntitle: K-Adapter\nsdk: gradio\nsdk_version: {gr.__version__}\napp_file: app.py\nmodels:\n{listed}\n---\n\n"
        "Made by `kadapter app --space`.\n",
        encoding="utf-8",
    )
    release = f"=={__version__}" if re.fullmatch(r"[\d.]+", __version__) else ""
    (folder / "requirements.txt").write_text(f"kadapter-hf[app]{release}\n", encoding="utf-8")
    (folder / "app.py").write_text(
        f"from kadapter_hf.app import build\n\n\nbuild({sources!r}).launch()\n", encoding="utf-8"
    )
