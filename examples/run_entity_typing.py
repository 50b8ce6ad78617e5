"""
Fine-tunes a K-Adapter on entity typing: OpenEntity, FIGER, or rows of your own (paper, section 4.1).

The steps of `kadapter finetune open-entity` with the stock Trainer, to be copied and changed:

    python examples/run_entity_typing.py --model_name_or_path FacebookAI/roberta-large \\
        --adapters factual-adapter linguistic-adapter --train_file train.json --validation_file dev.json \\
        --test_file test.json --output_dir out --learning_rate 5e-6 \\
        --per_device_train_batch_size 4 --warmup_steps 500 --num_train_epochs 24

The paper trains the backbone and freezes the adapters; `--freeze_backbone true` trains only the fusion and the head.
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed

from kadapter_hf import KAdapterForEntityTyping
from kadapter_hf.tasks import TASKS


@dataclass
class Arguments:
    train_file: str = field(metadata={"help": "The rows to train on."})
    model_name_or_path: str = field(metadata={"help": "The backbone: a repository or a folder."})
    validation_file: str | None = field(
        default=None, metadata={"help": "The rows to evaluate on during the training."}
    )
    test_file: str | None = field(default=None, metadata={"help": "The rows for the final evaluation."})
    adapters: list[str] | None = field(
        default=None, metadata={"help": "Trained adapters: repositories, folders or files."}
    )
    task_name: str = field(default="open-entity", metadata={"help": "open-entity, figer or typing"})
    freeze_backbone: bool = field(default=False, metadata={"help": "Train only the fusion and the head."})
    max_length: int = field(default=256, metadata={"help": "Maximum number of tokens."})


def main() -> dict[str, float]:
    args, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    task = TASKS[args.task_name]
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    rows = {split: task.read(file)[0] for split, file in files.items() if file is not None}
    labels = task.labels_in(rows)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    data = {split: task.encode(split_rows, tokenizer, labels, args.max_length) for split, split_rows in rows.items()}
    model = KAdapterForEntityTyping.from_backbone(
        args.model_name_or_path,
        args.adapters,
        freeze_backbone=args.freeze_backbone,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        task={"name": task.name, "max_length": args.max_length},
    )
    print(model.knowledge_summary())
    trainer = Trainer(
        model,
        training,
        data_collator=task.collator(tokenizer),
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        compute_metrics=task.metrics(labels),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    split = "test" if "test" in data else "validation"
    if split not in data:
        return {}
    metrics = trainer.evaluate(data[split], metric_key_prefix=split)
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    return metrics


if __name__ == "__main__":
    main()
