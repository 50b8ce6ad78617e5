"""
One training run with the stock Trainer, in one or several processes: `train.py '{"backbone": …, "output": …}'`.

The settings are JSON; see `SETTINGS`. The first process writes `result.json` and the trained model into the output.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from kadapter_hf import (
    KAdapterForMaskedLM,
    KAdapterForSequenceClassification,
    KAdapterForTokenClassification,
    KnowledgeAdapterConfig,
)


SETTINGS = {
    "head": "KAdapterForTokenClassification",
    "active": ["factual", "linguistic"],
    "fusion": "concat",
    "freeze_backbone": True,
    "dropout": True,
    "stop_after": None,  # the step after which to wait to be killed
    "resume": None,  # a checkpoint
    "fsdp_on_cpu": False,
    "arguments": {},  # of TrainingArguments
}
HEADS = {
    head.__name__: head
    for head in (KAdapterForMaskedLM, KAdapterForSequenceClassification, KAdapterForTokenClassification)
}
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}


class Stop(TrainerCallback):
    """Says that a step is done, and then waits to be killed."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            print("waiting", flush=True)
            signal.pause()


def rows(head: type, count: int = 16) -> Dataset:
    """Random texts; where each token may have a label, each text has another number of them."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(5, 60, (count, 10), generator=generator)
    labels = torch.randint(3, (count, 10), generator=generator)
    if head is KAdapterForSequenceClassification:
        labels = labels[:, 0]
    else:
        for row in range(count):
            labels[row, row % 9 + 1 :] = -100
    columns = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs), "labels": labels}
    return Dataset.from_dict({name: column.tolist() for name, column in columns.items()})


def use_fsdp_on_cpu() -> None:
    """Makes accelerate, which supports FSDP only on GPUs, run it in these CPU processes."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState

    plugin = FullyShardedDataParallelPlugin()
    states = (Accelerator(cpu=True, fsdp_plugin=plugin).state, PartialState())
    states[0].fsdp_plugin = plugin
    for state in states:
        state.distributed_type = DistributedType.FSDP


def main(settings: dict) -> Trainer:
    head, output = HEADS[settings["head"]], Path(settings["output"])
    # First, as in scripts: the number of processes is known from here on.
    args = TrainingArguments(
        output_dir=str(output),
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        **({"learning_rate": 1e-2, "use_cpu": True, "save_strategy": "no"} | settings["arguments"]),
    )
    set_seed(0)
    model = head.from_backbone(
        settings["backbone"],
        adapters={name: KnowledgeAdapterConfig(**SIZES) for name in ("factual", "linguistic")},
        fusion=settings["fusion"],
        freeze_backbone=settings["freeze_backbone"],
        **({} if head is KAdapterForMaskedLM else {"num_labels": 3}),
    )
    model.set_active_knowledge_adapters(settings["active"])
    if not settings["dropout"]:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    if settings["fsdp_on_cpu"]:
        use_fsdp_on_cpu()
    callbacks = [] if settings["stop_after"] is None else [Stop(settings["stop_after"])]
    trainer = Trainer(model, args, train_dataset=rows(head), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=settings["resume"])
    trainer.save_model(str(output / "trained"))
    if args.process_index == 0:
        result = {
            "steps": [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry],
            "processes": args.world_size,
            "wrapped": [kind.__name__ for kind in type(trainer.model_wrapped).__mro__],
        }
        (output / "result.json").write_text(json.dumps(result))
    trainer.accelerator.wait_for_everyone()
    return trainer


if __name__ == "__main__":
    trainer = main(SETTINGS | json.loads(sys.argv[1]))
    # The model is still held and Python's own end is skipped: giving up a gloo group that DDP has used hangs at times.
    sys.stdout.flush()
    os._exit(0)
