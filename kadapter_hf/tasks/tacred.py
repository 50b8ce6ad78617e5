"""TACRED (paper, section 4.3; `examples/run_finetune_TACRED_adapter.py` in the original)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from kadapter_cli._source import flag

from ..corpora.schema import MALFORMED, Row
from ..corpora.tacred import records as tacred_records, row_of
from ..metrics import tacred_metrics
from .records import Records, RowProblem
from .relation import RelationOptions, RelationTask
from .task import register_task


NO_RELATION = "no_relation"
# In the order of the original, so that heads converted from it fit.
LABELS = (
    "per:siblings per:parents org:member_of per:origin per:alternate_names per:date_of_death per:title org:alternate_names "
    "per:countries_of_residence org:stateorprovince_of_headquarters per:city_of_death per:schools_attended per:employee_of "
    "org:members org:dissolved per:date_of_birth org:number_of_employees/members org:founded org:founded_by "
    "org:political/religious_affiliation org:website org:top_members/employees per:children per:cities_of_residence "
    "per:cause_of_death org:shareholders per:age per:religion no_relation org:parents org:subsidiaries "
    "per:country_of_birth per:stateorprovince_of_death per:city_of_birth per:stateorprovinces_of_residence "
    "org:country_of_headquarters per:other_family per:stateorprovince_of_birth per:country_of_death per:charges "
    "org:city_of_headquarters per:spouse"
).split()


@dataclass
class TacredOptions(RelationOptions):
    negative_sample: int = flag(
        45000,
        "Train on fewer than this many rows with no_relation: the first ones, as the original does. 0 keeps all.",
    )


@register_task("tacred")
class Tacred(RelationTask):
    """Files in TACRED's JSON format; also TACREV and Re-TACRED, with the labels of TACRED."""

    endings = (".json",)
    options = TacredOptions
    feature_options = ("markers",)
    labels = LABELS
    paper = {
        "per_device_train_batch_size": 32,
        "learning_rate": {"F": 1e-5, "L": 1e-5, "F+L": 5e-6},
        "warmup_steps": {"F": 500, "L": 200, "F+L": 1000},
        "num_train_epochs": 5,
        "max_length": 184,
    }
    published = {"": 71.25, "multitask": 71.62, "F": 71.89, "L": 71.96, "F+L": 72.04}
    reproduced = {"F": "69.9", "L": "70.0", "F+L": "68.8 to 69.8"}

    def records(self, path: Path) -> Records:
        for name, example in tacred_records(path):
            yield name, example if isinstance(example, dict) else "not a JSON object"

    def row(self, record: dict) -> Row:
        try:
            row = row_of(record, record.get("relation", ""))
        except MALFORMED as error:
            raise RowProblem(f"not a record of TACRED: {type(error).__name__} {error}") from None
        if isinstance(row, str):
            raise RowProblem(row)
        return {**row, "relation": record.get("relation")}

    def used_rows(self, rows: Dataset, options: TacredOptions, training: bool) -> Dataset:  # type: ignore[override]
        if not training or not options.negative_sample:
            return rows
        kept, negative = [], 0
        for number, relation in enumerate(rows["relation"][:]):
            negative += relation == NO_RELATION
            if relation != NO_RELATION or negative < options.negative_sample:
                kept.append(number)
        return rows.select(kept)

    def metrics(self, labels: Sequence[str]):
        return tacred_metrics(labels, NO_RELATION)
