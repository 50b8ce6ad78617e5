"""
Searches the hyperparameters of a fine-tuning on the validation rows with Optuna, over the values that the authors searched:

    pip install 'kadapter-hf[search]'
    python examples/search_hyperparameters.py --model_name_or_path FacebookAI/roberta-large --adapters factual-adapter \\
        --task_name open-entity --train_file train.json --validation_file dev.json --num_train_epochs 3 --output_dir search

`Trainer.hyperparameter_search` does the work. Without `--trials`, each of the 20 combinations is tried once, in random order.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from transformers import AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

from kadapter_hf.tasks import TASKS


# The README of the original: batch size per GPU, learning rate, warm-up steps.
SPACE = {
    "per_device_train_batch_size": [4, 8],
    "learning_rate": [1e-5, 5e-6],
    "warmup_steps": [0, 200, 500, 1000, 1200],
}


@dataclass
class Arguments:
    train_file: str = field(metadata={"help": "The rows to train on."})
    validation_file: str = field(metadata={"help": "The rows that the trials are compared on."})
    model_name_or_path: str = field(metadata={"help": "The backbone: a repository or a folder."})
    adapters: list[str] | None = field(
        default=None, metadata={"help": "Trained adapters: repositories, folders or files."}
    )
    task_name: str = field(default="open-entity", metadata={"help": f"The task: {', '.join(TASKS)}"})
    max_length: int = field(default=256, metadata={"help": "Maximum number of tokens."})
    trials: int = field(default=20, metadata={"help": "How many of the combinations are tried."})


def main() -> dict[str, float]:
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(eval_strategy="epoch", save_strategy="no", report_to="none")
    args, training = parser.parse_args_into_dataclasses()
    task = TASKS[args.task_name]
    files = {"train": args.train_file, "validation": args.validation_file}
    rows = {
        split: task.used_rows(task.read(file)[0], task.options(), training=split == "train")
        for split, file in files.items()
    }
    labels = task.labels_in(rows)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    data = {split: task.encode(split_rows, tokenizer, labels, args.max_length) for split, split_rows in rows.items()}
    names = (
        {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}} if labels else {}
    )
    trainer = Trainer(
        args=training,
        model_init=lambda trial: task.model_class.from_backbone(
            args.model_name_or_path, args.adapters, freeze_backbone=False, **names
        ),
        data_collator=task.collator(tokenizer),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=task.metrics_on(rows["validation"], data["validation"], labels, task.options()),
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {name: trial.suggest_categorical(name, values) for name, values in SPACE.items()},
        compute_objective=lambda metrics: metrics[f"eval_{task.metric}"],
        n_trials=args.trials,
        direction="maximize",
        backend="optuna",
        sampler=optuna.samplers.GridSampler(SPACE, seed=training.seed),
    )
    found = {**best.hyperparameters, f"eval_{task.metric}": best.objective}
    (Path(training.output_dir) / "best.json").write_text(json.dumps(found, indent=2) + "\n")
    print("Best:", " ".join(f"--{name} {value:g}" for name, value in best.hyperparameters.items()))
    return found


if __name__ == "__main__":
    main()
