"""
Fine-tunes a K-Adapter on extractive question answering: SearchQA, Quasar-T, or SQuAD's format (paper, section 4.2).

The steps of `kadapter finetune search-qa` with the stock Trainer, to be copied and changed:

    python examples/run_extractive_qa.py --model_name_or_path FacebookAI/roberta-large \\
        --adapters factual-adapter linguistic-adapter --train_file train.txt --validation_file dev.txt \\
        --test_file test.txt --output_dir out --learning_rate 5e-6 \\
        --per_device_train_batch_size 8 --warmup_steps 0 --num_train_epochs 2

The paper trains the backbone and freezes the adapters; `--freeze_backbone true` trains only the fusion and the head.
"""

from dataclasses import dataclass, field

from transformers import AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed

from kadapter_hf import KAdapterForQuestionAnswering
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
    task_name: str = field(default="search-qa", metadata={"help": "search-qa, quasar-t or extractive-qa"})
    freeze_backbone: bool = field(default=False, metadata={"help": "Train only the fusion and the head."})
    max_length: int = field(default=128, metadata={"help": "Maximum number of tokens."})


def main() -> dict[str, float]:
    args, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    task = TASKS[args.task_name]
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    rows = {split: task.read(file)[0] for split, file in files.items() if file is not None}
    rows["train"] = task.used_rows(rows["train"], task.options(), training=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    data = {split: task.encode(split_rows, tokenizer, [], args.max_length) for split, split_rows in rows.items()}
    model = KAdapterForQuestionAnswering.from_backbone(
        args.model_name_or_path,
        args.adapters,
        freeze_backbone=args.freeze_backbone,
        task={"name": task.name, "max_length": args.max_length},
    )
    print(model.knowledge_summary())

    def metrics_on(split: str):
        """The metrics are about answers, not about logits, and so need the texts."""
        return task.metrics_on(rows[split], data[split], [], task.options())

    trainer = Trainer(
        model,
        training,
        data_collator=task.collator(tokenizer),
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        compute_metrics=metrics_on("validation") if "validation" in rows else None,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    split = "test" if "test" in data else "validation"
    if split not in data:
        return {}
    trainer.compute_metrics = metrics_on(split)
    metrics = trainer.evaluate(data[split], metric_key_prefix=split)
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    return metrics


if __name__ == "__main__":
    main()
