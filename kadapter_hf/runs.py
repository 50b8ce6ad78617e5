"""What the runs of Trainer have in common: arguments and their errors, checkpoints, interruption."""

import argparse
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    HfArgumentParser,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME, logging

from kadapter_cli._flags import FlagParser, check_values

from .activations import CachedStates, cached_states
from .corpora.files import write_json
from .hub import push_folder


logger = logging.get_logger(__name__)


class Parser(FlagParser, HfArgumentParser):
    """
    The parser of a command.

    Args:
        defaults: returns the default values of flags that depend on other flags.
    """

    def __init__(self, *args, defaults: Callable[[argparse.Namespace], Mapping[str, Any]] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.defaults = defaults

    def parse(self, flags: Sequence[str]) -> tuple[Any, ...]:
        """The arguments, an object of each dataclass; exits with code 2 if they are wrong."""
        *parsed, rest = self.parse_known(flags)
        self.refuse(rest)
        return tuple(parsed)

    def parse_known(self, flags: Sequence[str]) -> tuple[Any, ...]:
        """As `parse`, and a list of the flags that are not known."""
        if self.defaults is not None:
            self.set_defaults(**self.defaults(self.parse_known_args(list(flags))[0]))
        try:
            # transformers changes the arguments of some flags in place.
            parsed = self.parse_args_into_dataclasses(list(flags), True, look_for_args_file=False)
            for arguments in parsed:
                if isinstance(arguments, TrainingArguments):
                    check_training_arguments(arguments)
        except (ValueError, TypeError, OSError, ImportError) as error:  # what the dataclasses check
            self.error(str(error))
        return parsed


def check_training_arguments(training: TrainingArguments) -> None:
    """Raises a ValueError for a value that Trainer can't use, which it would notice only later."""
    check_values(training)
    try:
        get_reporting_integration_callbacks(training.report_to)
    except ValueError as error:
        raise ValueError(f"--report_to: {error}") from None


def schedule(training: TrainingArguments) -> str:
    """How long and how fast a model will be trained, in words."""
    number, unit = (training.num_train_epochs, "epoch") if training.max_steps <= 0 else (training.max_steps, "step")
    rate, rows = training.learning_rate, training.per_device_train_batch_size * training.gradient_accumulation_steps
    return f"learning rate {rate:g}, {rows} rows per device and step, {number:g} {unit}{'' if number == 1 else 's'}"


class Progress(ProgressCallback):
    """
    A bar for the training with the loss, and one for each evaluation that disappears with its end. What Trainer logs are lines
    in the log of this package; on a terminal, those of the training are only for debugging, as the bar says the same.
    """

    training_bar: Any
    prediction_bar: Any

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            self.training_bar = self._bar(args, "Training", state.max_steps, initial=state.global_step, unit="step")
        self.current_step = state.global_step

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            if self.prediction_bar is None:
                self.prediction_bar = self._bar(args, "Evaluating", len(eval_dataloader), leave=False, unit="batch")
            self.prediction_bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        values = ", ".join(f"{name} {value:.4g}" for name, value in quality(logs).items())
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}")
            values += f"; {self._left(state)} left"
        elif "eval_loss" not in logs:  # the summary at the end
            return
        has_bar = logging.is_progress_bar_enabled() and not args.disable_tqdm
        level = logging.DEBUG if "loss" in logs and has_bar else logging.INFO
        logger.log(level, f"Step {state.global_step} of {state.max_steps}: {values}")

    def _bar(self, args: Any, name: str, total: int, **kwargs: Any) -> tqdm:
        return logging.tqdm(desc=name, total=total, disable=args.disable_tqdm, dynamic_ncols=True, **kwargs)

    def _left(self, state: Any) -> str:
        seconds = time.monotonic() - self.started
        done = max(state.global_step - self.first, 1)
        return tqdm.format_interval(seconds / done * (state.max_steps - state.global_step))


def show_progress(trainer: Trainer) -> None:
    """Replaces the bars of a Trainer, which prints a dict at each log; that of notebooks stays."""
    theirs = trainer.pop_callback(ProgressCallback) or trainer.pop_callback(PrinterCallback)
    if theirs is not None:
        trainer.add_callback(Progress)


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C stops the training after the current step and saves a checkpoint; a second one stops it immediately."""

    interrupted = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = signal.signal(signal.SIGINT, self.interrupt)

    def interrupt(self, *_):
        self.interrupted = True
        signal.signal(signal.SIGINT, self.before)

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGINT, self.before)


def check_report_to(training: TrainingArguments) -> None:
    """Raises an ImportError if a package for --report_to is missing, which Trainer would do after minutes of preparation."""
    for callback in get_reporting_integration_callbacks(training.report_to):
        try:
            callback()
        except RuntimeError as error:
            raise ImportError(f"--report_to: {error}") from None


def checkpoint_to_resume(training: TrainingArguments, overwrite: bool) -> str | None:
    """The checkpoint to continue from. Raises a ValueError if an earlier run's results would be replaced unasked."""
    folder = Path(str(training.output_dir))
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    wanted = training.resume_from_checkpoint
    if wanted is None:
        ways = "replace it with --overwrite_output_dir, or choose another --output_dir."
        if last is not None and not overwrite:
            raise ValueError(
                f"'{last}' is from an earlier run: continue it with --resume_from_checkpoint true, {ways}"
            )
        if (folder / CONFIG_NAME).exists() and not overwrite:
            raise ValueError(f"'{folder}' has the results of an earlier run: {ways}")
        return None
    if str(wanted).lower() != "true":
        return str(wanted)
    if last is None:
        logger.warning(f"'{folder}' has no checkpoint to resume from: starting from the beginning.")
    return last


def remove_checkpoints(folder: Path) -> None:
    """Removes those of an earlier run, which a resumed run would take for its own."""
    while folder.is_dir() and (checkpoint := get_last_checkpoint(str(folder))) is not None:
        shutil.rmtree(checkpoint)


def use_cached_states(
    trainer: Trainer,
    splits: Mapping[str, Dataset],
    folder: str | None,
    dtype: torch.dtype | None = None,
) -> dict[str, CachedStates]:
    """The rows of each split with what the frozen parts of the trainer's model compute for them; see `cached_states`."""
    training, model = trainer.args, trainer.model
    model.to(training.device)  # type: ignore[arg-type, union-attr]
    with nullcontext() if folder is None else training.main_process_first(desc="frozen states"):
        cached = {
            name: cached_states(model, rows, trainer.data_collator, folder, dtype=dtype)  # type: ignore[arg-type]
            for name, rows in splits.items()
        }
    training.remove_unused_columns = False  # which would remove the states
    return cached


def train(trainer: Trainer, checkpoint: str | None, stop: StopOnInterrupt) -> None:
    """
    Trains, from a checkpoint if there is one, otherwise after removing those of an earlier run.

    Raises:
        KeyboardInterrupt: Ctrl-C; its message says what was saved.
        ValueError: --metric_for_best_model is not one of the metrics.
    """
    folder = str(trainer.args.output_dir)
    if checkpoint is None and trainer.is_world_process_zero():
        remove_checkpoints(Path(folder))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise ValueError(error.args[0]) from None  # names the metrics there are
    if stop.interrupted:
        raise KeyboardInterrupt(
            f"Stopped after saving '{get_last_checkpoint(folder)}'. To continue from it, add "
            "--resume_from_checkpoint true."
        )


def save_and_push(trainer: Trainer, commit_message: str, files: Mapping[str, Any] | None = None) -> None:
    """
    Saves the model, Trainer's state, and these files of JSON, and with --push_to_hub pushes all of it.

    It is not Trainer that pushes, as its model card would overwrite the K-Adapter's.
    """
    training = trainer.args
    pushes, training.push_to_hub = training.push_to_hub, False
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    folder = Path(str(training.output_dir))
    for name, content in (files or {}).items():
        write_json(folder / name, content)
    if pushes:
        push_folder(
            folder,
            str(trainer.hub_model_id),
            commit_message=commit_message,
            private=training.hub_private_repo,
            token=training.hub_token,
            revision=training.hub_revision,
        )


def label_fields(labels: Sequence[str]) -> dict[str, Any]:
    """The fields of a configuration for these labels, in the order of the model's outputs; none without labels."""
    if not labels:
        return {}
    return {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}


def sample(rows: Dataset, seed: int, *limits: int | None) -> Dataset:
    """As many random rows as the smallest limit allows. Files are often sorted, so the first rows would be one-sided."""
    count = min([len(rows), *(limit for limit in limits if limit is not None)])
    return rows if count == len(rows) else rows.shuffle(seed=seed).select(range(count))


def quality(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics without those about speed."""
    return {
        key: value
        for key, value in metrics.items()
        if not key.endswith(("_second", "runtime", "epoch", "preparation_time"))
    }
