"""FIGER with 113 types (paper, section 4.1; `examples/run_finetune_figer_adapter.py` in the original)."""

from pathlib import Path

from ..corpora.files import read_text
from ..corpora.schema import MALFORMED
from .open_entity import OpenEntity
from .records import Records
from .task import register_task


@register_task("figer")
class Figer(OpenEntity):
    """
    JSON files as for OpenEntity, or the test set's own format (`exp.label`; Ling and Weld, 2012): a line a token and its tag
    (`O`, `B-/person,/person/actor` or `I-…`), and blank lines between sentences.
    """

    endings = (".json", ".label")
    labels = None  # those in the data, as the original does
    metric = "micro_f1"
    paper = {
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 64,
        "learning_rate": 5e-6,
        "warmup_steps": {"F": 500, "L": 200, "F+L": 1000},
        "num_train_epochs": 3,
        "max_length": 256,
    }
    published = {"": 77.83, "multitask": 78.84, "untrained": 77.90, "F": 80.42, "L": 79.18, "F+L": 80.54}
    reproduced = {}

    def records(self, path: Path) -> Records:
        return _mentions(path) if path.suffix.lower() == ".label" else super().records(path)


def _mentions(path: Path) -> Records:
    """A record for each mention of the sentences in an `exp.label` file."""
    sentence: list[tuple[str, str]] = []
    for number, line in enumerate([*read_text(path).splitlines(), ""], start=1):
        if line.strip():
            try:
                token, tag = line.split("\t")
                sentence.append((token.strip(), tag.strip()))
            except MALFORMED:
                yield f"line {number}", "not a token and its tag, separated by a tab"
        elif sentence:
            words = [token for token, _ in sentence]
            tags = [tag for _, tag in sentence]
            for first, tag in enumerate(tags):
                if not tag.startswith("B-"):
                    continue
                behind = first + 1
                while behind < len(tags) and tags[behind].startswith("I-"):
                    behind += 1
                start = len("".join(f"{word} " for word in words[:first]))
                yield (
                    f"line {number - len(sentence) + first}",
                    {
                        "sent": " ".join(words),
                        "start": start,
                        "end": start + len(" ".join(words[first:behind])),
                        "labels": [label.strip() for label in tag[2:].split(",") if label.strip()],
                    },
                )
            sentence = []
