"""
Pipelines for marked entities: `pipeline("entity-typing")` and `pipeline("relation-classification")`.

How a text is marked comes from the model's configuration, where fine-tuning has put it.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from transformers.pipelines.base import ChunkPipeline

from .marking_kadapter import encode_marked, most_tokens


class MarkedEntityPipeline(ChunkPipeline):
    """
    The labels of entities, or of pairs of them, in texts.

    Subclasses say how an input names its entities. A text with several is encoded once for each; all of them, also those of
    other texts, share batches.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    # The keys of an input with one entity or pair, the key with several, and the model's arguments for the markers' positions.
    one: tuple[str, ...]
    several: str
    positions: tuple[str, ...]
    default_top_k: int | None = None
    default_threshold = -1.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        parameters = inspect.signature(self.model.forward).parameters
        missing = [name for name in self.positions if name not in parameters]
        if missing:
            raise ValueError(
                f"{type(self.model).__name__} does not take marked entities; it has no {', '.join(missing)}."
            )

    def __call__(self, inputs: Any, *args, **kwargs) -> Any:
        if isinstance(inputs, list) and not inputs:  # transformers looks at the first one
            return []
        return super().__call__(inputs, *args, **kwargs)

    def _sanitize_parameters(self, top_k: Any = "default", threshold: float | None = None, **kwargs):
        chosen = {} if top_k == "default" else {"top_k": top_k}
        return kwargs, {}, chosen | ({} if threshold is None else {"threshold": threshold})

    def spans(self, given: Any) -> Any:
        """The spans of one entity or pair, which are checked afterwards."""
        raise NotImplementedError

    def markers(self) -> list[str]:
        """The marker of each span of `spans`."""
        raise NotImplementedError

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """The probabilities from one row of logits."""
        raise NotImplementedError

    def preprocess(
        self,
        inputs: Mapping[str, Any],
        max_length: int | None = None,
        knowledge_adapters: str | Sequence[str] | None = None,
    ) -> Iterator[dict[str, Any]]:
        if not isinstance(inputs, Mapping) or "text" not in inputs:
            raise ValueError(
                f'an input is a dict with "text", and either {" and ".join(self.one)} or "{self.several}"; not {inputs!r:.200}'
            )
        text, many = inputs["text"], self.several in inputs
        names = inputs.get("knowledge_adapters", knowledge_adapters)
        names = (names,) if isinstance(names, str) else None if names is None else tuple(names)
        given = inputs[self.several] if many else [self._of_one(inputs)]
        found = [self._checked(text, self.spans(spans)) for spans in given]
        ids = [self.tokenizer.encode(marker, add_special_tokens=False) for marker in self.markers()]
        rows = [(text, [(*span, marker) for span, marker in zip(spans, ids, strict=True)]) for spans in found]
        length = max_length or (self.model.config.task or {}).get("max_length")
        length = most_tokens(self.tokenizer, length, self.model.config.backbone_config)
        encoded = encode_marked(rows, self.tokenizer, length, space_after=len(ids) == 1)
        lost = sorted(set(range(len(rows))) - set(encoded["row"]))
        if lost:
            raise ValueError(
                f"the entities {found[lost[0]]} and the text between them have more than {length} tokens."
            )
        # The pipeline expects at least one chunk of each input.
        count = len(rows)
        for number in range(max(count, 1)):
            chunk: dict[str, Any] = {"is_last": number >= count - 1, "many": many, "empty": not count}
            start = encoded["starts"][number] if count else [0] * len(self.positions)
            row = encoded["input_ids"][number] if count else self.tokenizer.encode("", add_special_tokens=True)
            chunk |= {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            chunk["knowledge_adapters"] = names  # a tuple, as a batch is a list of these
            yield chunk | {name: torch.tensor([at]) for name, at in zip(self.positions, start, strict=True)}

    def _of_one(self, inputs: Mapping[str, Any]) -> Any:
        missing = [key for key in self.one if key not in inputs]
        if missing:
            raise ValueError(
                f'{" and ".join(missing)} is missing, or "{self.several}" for several; got {list(inputs)}.'
            )
        spans = [inputs[key] for key in self.one]
        return spans[0] if len(spans) == 1 else spans

    def _checked(self, text: Any, spans: Any) -> list[list[int]]:
        if not isinstance(text, str):
            raise ValueError(f"text is not a string, but {text!r:.100}")
        if not _is_list(spans) or len(spans) != len(self.positions):
            raise ValueError(f"{' and '.join(self.one)} are spans [start, end] in characters, not {spans!r:.100}")
        for span in spans:
            if not _is_list(span) or len(span) != 2 or not all(isinstance(place, Integral) for place in span):
                raise ValueError(f"a span is [start, end] in characters, not {span!r:.100}")
            start, end = span
            if not 0 <= start < end <= len(text) or not text[start:end].strip():
                raise ValueError(f"the span [{start}, {end}] is empty or outside the text of {len(text)} characters.")
        ordered = sorted(list(span) for span in spans)
        if any(second[0] < first[1] for first, second in zip(ordered, ordered[1:], strict=False)):
            raise ValueError(f"the spans {ordered} overlap; only entities of different inputs may.")
        return [list(span) for span in spans]

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        passed_on = {key: model_inputs.pop(key) for key in ("is_last", "many", "empty")}
        names = model_inputs.pop("knowledge_adapters")
        rows = names if isinstance(names, list) else [names]
        if any(names is not None for names in rows):
            active = self.model.active_knowledge_adapters
            model_inputs["knowledge_adapters"] = [active if names is None else names for names in rows]
        return {"logits": self.model(**model_inputs).logits, **passed_on}

    def postprocess(self, model_outputs: list[dict[str, Any]], top_k: Any = "default", threshold: float | None = None):
        results = []
        # The names of labels that are ids, such as Wikidata's relations.
        names = (self.model.config.task or {}).get("label_names", {})
        for output in model_outputs:
            scores = self.scores(output["logits"][0].float())
            labels = [
                {"label": self.model.config.id2label[number], "score": score}
                for number, score in enumerate(scores.tolist())
                if score > (self.default_threshold if threshold is None else threshold)
            ]
            labels.sort(key=lambda label: -label["score"])
            labels = [label | ({"name": names[label["label"]]} if label["label"] in names else {}) for label in labels]
            results.append(labels[: self.default_top_k if top_k == "default" else top_k])
        if model_outputs[0]["empty"]:
            return []
        return results if model_outputs[0]["many"] else results[0]


class EntityTypingPipeline(MarkedEntityPipeline):
    """
    The types of marked entities: `pipe({"text": "She moved to Rome.", "entity": [13, 17]})` returns
    `[{"label": "place", "score": 0.98}, …]`, all types with a probability above 0.5, the most probable first.

    Args:
        inputs: a dict with `text` and `entity` (a span `[start, end]` of characters), or with `text` and `entities` (several);
            or a list or a generator of them. For several, the result is a list of results.
        threshold: return types with a higher probability than this instead of 0.5.
        top_k: return at most this many.
        max_length: maximum number of tokens; by default that of the fine-tuning.
        knowledge_adapters: the adapters to use, by default the active ones; an input may have others under this key.

    Raises:
        ValueError: an input is not as described, or its entities don't fit into `max_length`.
    """

    one, several, positions = ("entity",), "entities", ("entity_start",)
    default_threshold = 0.5

    def spans(self, given: Any) -> Any:
        return [given]

    def markers(self) -> list[str]:
        return [(self.model.config.task or {}).get("marker", " @")]

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()


class RelationClassificationPipeline(MarkedEntityPipeline):
    """
    The relation between two marked entities: `pipe({"text": "Rome is in Italy.", "subject": [0, 4], "object": [11, 16]})`
    returns `[{"label": "country", "score": 0.97}]`.

    Args:
        inputs: a dict with `text`, `subject` and `object` (spans `[start, end]` of characters), or with `text` and `pairs`
            (several `[subject, object]`); or a list or a generator of them. For several, the result is a list of results.
        top_k: return this many relations, the most probable first, instead of one; `None` for all.
        threshold: leave out relations with a probability that is not higher.
        max_length: maximum number of tokens; by default that of the fine-tuning.
        knowledge_adapters: the adapters to use, by default the active ones; an input may have others under this key.

    Raises:
        ValueError: an input is not as described, or its entities don't fit into `max_length`.
    """

    one, several, positions = ("subject", "object"), "pairs", ("subject_start", "object_start")
    default_top_k = 1

    def spans(self, given: Any) -> Any:
        return given

    def markers(self) -> list[str]:
        return list((self.model.config.task or {}).get("markers", ("@", "#")))

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


# By head: its task, and the pipeline. transformers finds it in its registry, or without the package by config.json.
PIPELINES: dict[str, tuple[str, type[MarkedEntityPipeline]]] = {
    "KAdapterForEntityTyping": ("entity-typing", EntityTypingPipeline),
    "KAdapterForRelationClassification": ("relation-classification", RelationClassificationPipeline),
}


def custom_pipelines(head: type) -> dict[str, Any]:
    """config.json's entry for the pipeline of a head; empty if it has none of these."""
    if head.__name__ not in PIPELINES:
        return {}
    task, pipeline = PIPELINES[head.__name__]
    implementation = f"{__name__.rpartition('.')[2]}.{pipeline.__name__}"
    return {task: {"impl": implementation, "pt": ["AutoModelForSequenceClassification"], "type": "text"}}
