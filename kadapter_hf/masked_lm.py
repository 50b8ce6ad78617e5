"""A K-Adapter and its untouched backbone as masked-language models, and the training of their last layers on text."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from .corpora.files import text_lines
from .features import encode
from .modeling.backbone_kadapter import masked_lm_class
from .modeling.compat_kadapter import without_load_report
from .modeling.configuration_kadapter import KAdapterConfig
from .modeling.fusion_kadapter import FUSIONS, check_fusion
from .modeling.head_base_kadapter import cross_entropy
from .modeling.heads_kadapter import KAdapterForMaskedLM
from .runs import show_progress


Model = KAdapterForMaskedLM


def backbone_of(model: str, backbone: str | None = None) -> tuple[str, str | None, bool]:
    """
    The backbone of a K-Adapter, or the model itself if it is not a K-Adapter.

    Args:
        model, backbone: repositories or folders. `backbone` replaces the one that the K-Adapter names.

    Returns:
        Its name, its revision, and whether `model` is a K-Adapter.

    Raises:
        ValueError: `model` is the file of an adapter, or the K-Adapter names no backbone or has no active adapter.
        OSError: there is no such model.
    """
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        if model.endswith(".safetensors"):
            raise ValueError(
                f"'{model}' is an adapter: put it on its backbone first, with `kadapter combine`."
            ) from None
        raise OSError(f"the model '{model}' can't be loaded: {error}") from error
    if not isinstance(config, KAdapterConfig):
        if backbone is not None:
            raise ValueError(f"'{model}' is not a K-Adapter, so there is no backbone to choose.")
        return model, None, False
    if not config.active_knowledge_adapters:
        raise ValueError(f"'{model}' has no active knowledge adapter: there is nothing to compare with its backbone.")
    if backbone is not None:
        return backbone, None, True
    if config.backbone_name_or_path is None:
        raise ValueError(f"'{model}' does not name its backbone: specify it with --backbone.")
    return config.backbone_name_or_path, config.backbone_revision, True


def load_backbone_model(name: str, revision: str | None = None, new_head: bool = False) -> Model:
    """
    The stock masked-language model in float32, as a K-Adapter without adapters. Its outputs are those of the stock model.

    Args:
        new_head: accept a model that has no masked-language-model head.

    Raises:
        ValueError: it has no such head, or transformers has none for this type of model.
    """
    masked_lm_class(AutoConfig.from_pretrained(name, revision=revision))
    with without_load_report():
        stock, info = AutoModelForMaskedLM.from_pretrained(
            name, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    missing = sorted(info["missing_keys"])
    if missing and not new_head:
        raise ValueError(
            f"'{name}' has no masked-language-model head (it lacks '{missing[0]}'), so it can only be probed with "
            "--protocol new-head, which trains one."
        )
    return Model.from_backbone(stock)


def load_kadapter(name: str, backbone: str | None = None, fusion: str | None = None) -> Model:
    """
    A K-Adapter with a masked-language-model head, in float32.

    Args:
        fusion: a kind of fusion; if the K-Adapter has another one, it is replaced by a new fusion of this kind.
    """
    model = Model.from_pretrained(name, backbone=backbone, dtype=torch.float32)
    if fusion is not None and fusion != model.config.fusion:
        check_fusion(fusion, {})
        set_seed(0)
        model.fusion = FUSIONS[fusion](model.config.backbone_config.hidden_size)
        model.config.fusion, model.config.fusion_config = fusion, {}
        model.fusion.init_shared()
        for adapter in model.adapters:
            model.fusion.add(adapter)
            model.fusion.init_adapter(adapter)
    return model


def freeze_all_but(model: Model, head: bool, seed: int = 0) -> int:
    """
    Makes the fusion train, and freezes the backbone and the adapters.

    Args:
        head: also initialise the language-model head anew and make it train. An output layer that is tied to the backbone's
            embeddings stays as it is.

    Returns:
        The number of parameters that train.

    Raises:
        ValueError: no parameter trains, as the fusion has no weights.
    """
    model.freeze_backbone()
    model.freeze_knowledge_adapters()
    model.unfreeze_head()
    if head:
        set_seed(seed)
        new = AutoModelForMaskedLM.from_config(model.config.backbone_config).state_dict()
        with torch.no_grad():
            for name, parameter in model.lm_head.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(new[name])
    else:
        model.lm_head.requires_grad_(False)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not count:
        raise ValueError(
            f"the fusion '{model.config.fusion}' has no weights to train; choose one that has, e.g. --fusion concat."
        )
    return count


def read_texts(path: str | Path) -> list[str]:
    """
    The texts of a file: JSON Lines with the field `text` if the name ends in `.jsonl`, else one text per line. Blank lines are
    skipped.

    Raises:
        ValueError: it is not UTF-8, a line is not of this format, or there is no text.
    """
    texts = []
    for place, line in text_lines(path):
        try:
            text = json.loads(line)["text"].strip() if Path(path).suffix == ".jsonl" else line
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{place} is not a JSON object with a field 'text' that is text.") from None
        if text:
            texts.append(text)
    if not texts:
        raise ValueError(f"'{path}' has no text.")
    return texts


def encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """`input_ids` and `attention_mask` of each text, truncated to `max_length` tokens."""
    return encode(Dataset.from_dict({"text": texts}), _text_features, tokenizer, max_length=max_length)


def _text_features(batch, tokenizer, *, max_length: int) -> dict[str, Any]:
    encoded = tokenizer(batch["text"], truncation=True, max_length=max_length, return_token_type_ids=False)
    return dict(encoded) | {"row": range(len(batch["text"]))}


class LossAtMasks(nn.Module):
    """
    The loss of a masked-language model, whose output layer runs at the masked positions only: these are 15 % of all, and
    the logits take most of the memory and the time.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        encoded = self.model.encode(input_ids, attention_mask)  # type: ignore[arg-type]
        masked = labels != -100
        fused = self.model.fuse(encoded)[masked]
        logits = self.model.lm_head(None, inputs_embeds=fused[None], return_dict=True).logits[0]
        return {"loss": cross_entropy(logits, labels[masked], num_items_in_batch)}


def train_on(
    model: Model,
    texts: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    epochs: int,
    learning_rate: float,
    step_size: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """
    Trains what is not frozen on masked texts (15 % of the tokens, as BERT), with a linear schedule without warm-up.

    Args:
        step_size: texts per optimizer step, a multiple of `batch_size`, which is processed at once.

    Returns:
        `steps` and the mean `loss`.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=step_size // batch_size,
            train_sampling_strategy="group_by_length",
            dataloader_pin_memory=torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            seed=seed,
        )
        trainer = Trainer(
            LossAtMasks(model),
            arguments,
            train_dataset=texts,
            data_collator=DataCollatorForLanguageModeling(tokenizer),
            processing_class=tokenizer,
        )
        show_progress(trainer)
        done = trainer.train()
    model.eval()
    return {"steps": done.global_step, "loss": done.training_loss}


def models_of(
    model: str,
    backbone: str | None = None,
    fusion: str | None = None,
    new_head: bool = False,
    with_backbone: bool = True,
) -> Iterator[tuple[str, Model]]:
    """
    Yields the untouched backbone (`backbone`), then the K-Adapter (`kadapter`) if `model` is one; each is loaded when needed.

    Args:
        with_backbone: whether a K-Adapter's backbone is included.
    """
    name, revision, is_kadapter = backbone_of(model, backbone)
    if with_backbone or not is_kadapter:
        yield "backbone", load_backbone_model(name, revision, new_head)
    if is_kadapter:
        yield "kadapter", load_kadapter(model, backbone, fusion)
