"""Dependency trees of texts, from a `KAdapterForDependencyParsing`: `pipeline("dependency-parsing")`, and drawings."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.pipelines.base import Pipeline

from .messages import needs
from .modeling.parsing_kadapter import decode_parse


class DependencyParsingPipeline(Pipeline):
    """
    The words of a text with their heads and relations:

        parse = pipeline("dependency-parsing", model="linguistic-adapter")
        parse("The Danube flows through Vienna.")
        # [{"id": 1, "text": "The", "head": 2, "label": "det", "start": 0, "end": 3}, …]

    Args:
        inputs: a sentence, which is split into words and punctuation marks; or a list of sentences.
        knowledge_adapters: the adapters to use, by default the active ones.

    Returns:
        For each word its number, starting at 1, its text, the number of its head (0 for the root), the relation to the head,
        and its span in the text.

    Raises:
        ValueError: the text has no words, or more tokens than the model takes.
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(self, knowledge_adapters: Any = None, **kwargs):
        return kwargs, {} if knowledge_adapters is None else {"knowledge_adapters": knowledge_adapters}, {}

    def preprocess(self, inputs: str, max_length: int | None = None) -> dict[str, Any]:
        from .features import dependency_features  # imported here, as datasets takes seconds

        words = re.findall(r"\w+|[^\w\s]", inputs)
        if not words:
            raise ValueError("a text without words has no tree.")
        rows = {"text": [inputs], "tokens": [words]}
        encoded = dependency_features(rows, self.tokenizer, [], max_length=max_length)
        if not encoded["row"]:
            raise ValueError(
                f"a text of {len(words)} words has more tokens than the model takes, or a word without tokens."
            )
        tensors = {name: torch.tensor(encoded[name]) for name in ("input_ids", "attention_mask", "word_starts")}
        return {**tensors, "text": inputs, "words": words}

    def _forward(self, model_inputs: dict[str, Any], **kwargs) -> dict[str, Any]:
        kept = {name: model_inputs.pop(name) for name in ("text", "words")}
        starts = model_inputs["word_starts"]
        # Pipelines pad batches with 0, where no word but the first can start.
        padding = (starts == 0) & (torch.arange(starts.shape[1], device=starts.device) > 0)
        output = self.model(**(model_inputs | {"word_starts": starts.masked_fill(padding, -1)}), **kwargs)
        return {"arc_logits": output.arc_logits, "relation_logits": output.relation_logits, **kept}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        text, words = model_outputs["text"], model_outputs["words"]
        count = len(words)
        heads, relations = decode_parse(
            model_outputs["arc_logits"][0, :count, : count + 1],
            model_outputs["relation_logits"][0, :count, : count + 1],
        )
        tree, place = [], 0
        for number, (word, head, relation) in enumerate(zip(words, heads, relations, strict=True), start=1):
            start = text.index(word, place)
            place = start + len(word)
            label = self.model.config.id2label[int(relation)]
            tree.append({"id": number, "text": word, "head": int(head), "label": label, "start": start, "end": place})
        return tree


def draw_tree(tree: Sequence[Mapping[str, Any]]) -> str:
    """
    A drawing of a tree from the pipeline, as SVG.

    Raises:
        ImportError: spaCy, which draws it, is not installed.
    """
    try:
        from spacy import displacy
    except ImportError as error:
        raise ImportError(needs("drawing a tree", "spaCy", "parse")) from error
    arcs = [
        {
            "start": min(word["id"], word["head"]) - 1,
            "end": max(word["id"], word["head"]) - 1,
            "label": word["label"],
            "dir": "left" if word["id"] < word["head"] else "right",
        }
        for word in tree
        if word["head"]
    ]
    words = [{"text": word["text"], "tag": ""} for word in tree]
    return displacy.render({"words": words, "arcs": arcs}, style="dep", manual=True, jupyter=False)
