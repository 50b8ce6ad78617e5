"""
Fine-tunes and evaluates a text classifier as transformers' example scripts do, with the Auto classes only:

    python classify.py --model_name_or_path FOLDER --train_file train.csv --validation_file validation.csv --output_dir OUT

It imports kadapter_hf, which registers its classes; with `--trust_remote_code` it doesn't, and the model's own code is used.
With `--no_trainer` it runs a plain training loop with accelerate instead of Trainer. Either way it saves the model, loads
it again, evaluates it again, and writes both metrics to `results.json` in the output folder.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    get_scheduler,
    set_seed,
)


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(metadata={"help": "Folder of a saved model and its tokenizer."})
    train_file: str = field(metadata={"help": "CSV with the columns sentence and label."})
    validation_file: str = field(metadata={"help": "The same, to evaluate on."})
    max_seq_length: int = 32
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code in the model's folder."})
    no_trainer: bool = field(default=False, metadata={"help": "Train in a plain loop with accelerate."})


def accuracy_of(logits, labels) -> float:
    return float((np.asarray(logits).argmax(-1) == np.asarray(labels)).mean())


def train_with_trainer(args: TrainingArguments, model, tokenizer, data) -> float:
    """Trains, saves to the output folder, and returns the accuracy."""
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=lambda found: {"accuracy": accuracy_of(found.predictions, found.label_ids)},
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    result = trainer.train()
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return metrics["eval_accuracy"]


def train_without_trainer(args: TrainingArguments, model, tokenizer, data) -> float:
    """As `train_with_trainer`, in a plain loop."""
    accelerator = Accelerator(cpu=args.use_cpu)
    collator = DataCollatorWithPadding(tokenizer)
    train = DataLoader(data["train"], args.per_device_train_batch_size, shuffle=True, collate_fn=collator)
    validation = DataLoader(data["validation"], args.per_device_eval_batch_size, collate_fn=collator)
    no_decay = ("bias", "LayerNorm.weight")
    named = list(model.named_parameters())
    groups = [
        {
            "params": [tensor for name, tensor in named if not name.endswith(no_decay)],
            "weight_decay": args.weight_decay,
        },
        {"params": [tensor for name, tensor in named if name.endswith(no_decay)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate)
    steps = int(args.num_train_epochs * len(train))
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    model, optimizer, train, validation, scheduler = accelerator.prepare(
        model, optimizer, train, validation, scheduler
    )
    for epoch in range(int(args.num_train_epochs)):
        model.train()
        for batch in train:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        accuracy = evaluate(accelerator, model, validation)
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, accuracy {accuracy:.3f}")
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
    return accuracy


def evaluate(accelerator: Accelerator, model, validation) -> float:
    model.eval()
    logits, labels = [], []
    for batch in validation:
        with torch.no_grad():
            output = model(**batch)
        found, wanted = accelerator.gather_for_metrics((output.logits, batch["labels"]))
        logits += found.tolist()
        labels += wanted.tolist()
    return accuracy_of(logits, labels)


def main() -> None:
    script, args = HfArgumentParser((ScriptArguments, TrainingArguments)).parse_args_into_dataclasses()
    if not script.trust_remote_code:
        import kadapter_hf  # noqa: F401
    kwargs = {"trust_remote_code": script.trust_remote_code}
    set_seed(args.seed)
    data = load_dataset("csv", data_files={"train": script.train_file, "validation": script.validation_file})
    names = sorted(data["train"].unique("label"))
    ids = {name: number for number, name in enumerate(names)}
    config = AutoConfig.from_pretrained(
        script.model_name_or_path, num_labels=len(names), id2label=dict(enumerate(names)), label2id=ids, **kwargs
    )
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path, use_fast=True, **kwargs)
    model = AutoModelForSequenceClassification.from_pretrained(
        script.model_name_or_path, config=config, ignore_mismatched_sizes=True, **kwargs
    )

    def features(rows):
        encoded = tokenizer(rows["sentence"], truncation=True, max_length=script.max_seq_length)
        return {**encoded, "labels": [ids[name] for name in rows["label"]]}

    data = data.map(features, batched=True, remove_columns=data["train"].column_names)
    train = train_without_trainer if script.no_trainer else train_with_trainer
    accuracy = train(args, model, tokenizer, data)

    again = AutoModelForSequenceClassification.from_pretrained(args.output_dir, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(args.output_dir, **kwargs)
    accelerator = Accelerator(cpu=args.use_cpu)
    validation = DataLoader(
        data["validation"], args.per_device_eval_batch_size, collate_fn=DataCollatorWithPadding(tokenizer)
    )
    reloaded = evaluate(accelerator, *accelerator.prepare(again, validation))
    results = {"accuracy": accuracy, "reloaded_accuracy": reloaded, "labels": again.config.label2id}
    results["imported"] = "kadapter_hf" in sys.modules
    Path(args.output_dir, "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
