"""The task heads. A repository's `auto_map` names this module."""
# ruff: noqa: F401

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

# This module imports something from each of the others, as transformers 5.5 only copies the modules that the entry module
# imports itself; and all public names, for users' own heads in repositories.
from .adapters_kadapter import KnowledgeAdapter
from .averaging_kadapter import averaged
from .backbone_kadapter import check_is_encoder, masked_lm_class
from .choosing_kadapter import ChoosingMixin
from .compat_kadapter import new_model, parameters_of
from .configuration_kadapter import KAdapterConfig, KnowledgeAdapterConfig
from .encoding_kadapter import Encoded, encodes_inputs, with_fusion_weights
from .format_kadapter import BackboneMismatchError, KAdapterConfigError, KAdapterLoadError
from .freezing_kadapter import FreezingMixin
from .fusion_kadapter import KnowledgeFusion, register_fusion
from .head_base_kadapter import HeadModel, ItemCount, checked_positions, cross_entropy, first_position, loss_of
from .layers_kadapter import TransformerLayer
from .loading_kadapter import load_repository
from .managing_kadapter import ManagingMixin
from .marking_kadapter import encode_marked
from .modeling_kadapter import KAdapterModel, KAdapterModelOutput, KAdapterPreTrainedModel
from .origins_kadapter import Origins
from .parsing_kadapter import DependencyParserOutput, KAdapterForDependencyParsing
from .peft_kadapter import plain_state_dict
from .pipelines_kadapter import custom_pipelines
from .reading_kadapter import read_adapter
from .registry_kadapter import register_head
from .replacing_kadapter import replace_files
from .saving_kadapter import save_repository
from .sources_kadapter import repository_folder
from .stacking_kadapter import run_adapters


def _classification_loss(
    logits: torch.Tensor, labels: torch.Tensor | None, config: KAdapterConfig, num_items_in_batch: ItemCount
) -> torch.Tensor | None:
    """The loss of `(batch, num_labels)` logits for `config.problem_type`, which is set from the labels if it is None."""
    if labels is None:
        return None
    if config.problem_type is None:
        if config.num_labels == 1:
            config.problem_type = "regression"
        elif labels.is_floating_point():
            config.problem_type = "multi_label_classification"
        else:
            config.problem_type = "single_label_classification"
    if config.problem_type == "single_label_classification":
        return cross_entropy(logits, labels, num_items_in_batch)
    labels = labels.to(device=logits.device, dtype=torch.float32)
    if config.problem_type == "regression":
        total = F.mse_loss(logits.float().view(labels.shape), labels, reduction="sum")
    else:
        total = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")
    return loss_of(total, labels.numel(), num_items_in_batch)


@register_head("AutoModelForSequenceClassification")
class KAdapterForSequenceClassification(HeadModel):
    """Classification or regression of a text, from the fused state of its first token. Logits: `(batch, num_labels)`."""

    @encodes_inputs
    def forward(
        self, encoded: Encoded, labels: torch.Tensor | None = None, num_items_in_batch: ItemCount = None
    ) -> SequenceClassifierOutput:
        """
        Args:
            labels: `(batch,)` class indices; `(batch,)` or `(batch, num_labels)` floats for regression; or
                `(batch, num_labels)` of 0.0 and 1.0 for several labels per text; see `config.problem_type`.
        """
        logits = self.classifier(self.dropout(self.fused(encoded, first_position(encoded))))
        loss = _classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutput(loss, logits, encoded.hidden_states, encoded.attentions)


@register_head("AutoModelForTokenClassification")
class KAdapterForTokenClassification(HeadModel):
    """A label for each token, from its fused state. Logits: `(batch, length, num_labels)`."""

    @encodes_inputs
    def forward(
        self, encoded: Encoded, labels: torch.LongTensor | None = None, num_items_in_batch: ItemCount = None
    ) -> TokenClassifierOutput:
        """
        Args:
            labels: `(batch, length)` class indices; -100 is ignored.
        """
        logits = self.classifier(self.dropout(self.fused(encoded)))
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(loss, logits, encoded.hidden_states, encoded.attentions)


@register_head("AutoModelForQuestionAnswering")
class KAdapterForQuestionAnswering(HeadModel):
    """The start and end of an answer in a text. Logits: `(batch, length)` each."""

    def add_head(self, config: KAdapterConfig, width: int) -> None:
        self.qa_outputs = nn.Linear(width, 2)

    @encodes_inputs
    def forward(
        self,
        encoded: Encoded,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
    ) -> QuestionAnsweringModelOutput:
        """
        Args:
            start_positions, end_positions: `(batch,)`; a position outside the text adds nothing to the loss, which is
                the mean over all rows, so that gradient accumulation does not change it.
        """
        logits = self.qa_outputs(self.dropout(self.fused(encoded)))
        start_logits, end_logits = (part.squeeze(-1).contiguous() for part in logits.split(1, dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            length = start_logits.shape[1]
            losses = []
            for scores, positions in ((start_logits, start_positions), (end_logits, end_positions)):
                positions = positions.reshape(-1).to(scores.device)
                positions = positions.masked_fill((positions < 0) | (positions >= length), -100)
                losses.append(cross_entropy(scores, positions, positions.numel()))
            loss = sum(losses) / 2
        return QuestionAnsweringModelOutput(loss, start_logits, end_logits, encoded.hidden_states, encoded.attentions)


@register_head("AutoModelForMultipleChoice")
class KAdapterForMultipleChoice(HeadModel):
    """
    Choice among several continuations, each scored from the fused state of its first token. Logits: `(batch, choices)`.

    Source: `COSMOSQAModel` in the original's `examples/run_finetune_cosmosqa_adapter.py`.
    """

    def add_head(self, config: KAdapterConfig, width: int) -> None:
        self.classifier = nn.Linear(width, 1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: ItemCount = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids, position_ids: `(batch, choices, length)`.
            inputs_embeds: `(batch, choices, length, hidden_size)`.
            labels: `(batch,)` index of the right choice.

        Raises:
            ValueError: the inputs have another shape.
        """
        first = input_ids if input_ids is not None else inputs_embeds
        if first is None or first.dim() < 3:
            raise ValueError("KAdapterForMultipleChoice takes inputs of shape (batch, choices, length).")
        choices = first.shape[1]
        flat = [
            None if tensor is None else tensor.flatten(0, 1)
            for tensor in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        ]
        given = kwargs.get("knowledge_adapters")
        if isinstance(given, (list, tuple)) and not all(isinstance(name, str) for name in given):
            kwargs["knowledge_adapters"] = [names for names in given for _ in range(choices)]
        encoded = self.encode(*flat, past_key_values=past_key_values, **kwargs)
        fused = self.fused(encoded, first_position(encoded))
        logits = self.classifier(self.dropout(fused)).view(-1, choices)
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        output = MultipleChoiceModelOutput(loss, logits, encoded.hidden_states, encoded.attentions)
        return with_fusion_weights(output, encoded)


@register_head("AutoModelForSequenceClassification")
class KAdapterForEntityTyping(HeadModel):
    """
    The types of one marked entity, which may have several: `out_proj(dropout(dense(f_entity)))`, no activation. Logits:
    `(batch, num_labels)`.

    Source: paper, section 4.1; `ETModel` in the original's `examples/run_finetune_openentity_adapter.py`.
    """

    def add_head(self, config: KAdapterConfig, width: int) -> None:
        if config.problem_type is None:
            config.problem_type = "multi_label_classification"
        self.dense = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, config.num_labels)

    @encodes_inputs
    def forward(
        self,
        encoded: Encoded,
        entity_start: torch.LongTensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: ItemCount = None,
    ) -> SequenceClassifierOutput:
        """
        Args:
            entity_start: `(batch,)`, the position of the marker before the entity.
            labels: `(batch, num_labels)` of 0.0 and 1.0.

        Raises:
            ValueError: `entity_start` is missing, has another shape, or is outside the text.
        """
        fused = self.fused(encoded, checked_positions("entity_start", entity_start, encoded))
        logits = self.out_proj(self.dropout(self.dense(fused)))
        loss = _classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutput(loss, logits, encoded.hidden_states, encoded.attentions)


@register_head("AutoModelForSequenceClassification")
class KAdapterForRelationClassification(HeadModel):
    """
    The relation between two marked entities: `out_proj(dropout(dense([f_subject; f_object])))`, no activation. Logits:
    `(batch, num_labels)`.

    Source: paper, section 4.3; `TACREDModel` in the original's `examples/run_finetune_TACRED_adapter.py`.
    """

    def add_head(self, config: KAdapterConfig, width: int) -> None:
        self.dense = nn.Linear(2 * width, width)
        self.out_proj = nn.Linear(width, config.num_labels)

    @encodes_inputs
    def forward(
        self,
        encoded: Encoded,
        subject_start: torch.LongTensor | None = None,
        object_start: torch.LongTensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: ItemCount = None,
    ) -> SequenceClassifierOutput:
        """
        Args:
            subject_start, object_start: `(batch,)`, the positions of the markers before the two entities.
            labels: `(batch,)` class indices.

        Raises:
            ValueError: a position is missing, has another shape, or is outside the text.
        """
        markers = (
            checked_positions("subject_start", subject_start, encoded),
            checked_positions("object_start", object_start, encoded),
        )
        pair = self.fused(encoded, torch.stack(markers, dim=1)).flatten(1)
        logits = self.out_proj(self.dropout(self.dense(pair)))
        loss = _classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutput(loss, logits, encoded.hidden_states, encoded.attentions)


class _StatesGiven(nn.Module):
    """Replaces the encoder in a masked-language model, whose head then reads the states that are passed."""

    def __init__(self, backbone: PreTrainedModel):
        super().__init__()
        self.__dict__["backbone"] = backbone  # not a submodule, as it is already one of the K-Adapter

    def __deepcopy__(self, memo: dict) -> "_StatesGiven":
        """Keeps the backbone, unless that is copied too: PEFT copies the heads in `modules_to_save`."""
        return type(self)(memo.get(id(self.backbone), self.backbone))

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["backbone"], name)  # some heads read the embeddings

    def forward(self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, **kwargs):
        return BaseModelOutput(last_hidden_state=inputs_embeds)


@register_head("AutoModelForMaskedLM")
class KAdapterForMaskedLM(KAdapterPreTrainedModel):
    """
    The backbone's own masked-language-model head on the fused states. Its weights come from the backbone's repository, and
    are tied to the backbone's embeddings if the backbone's own class ties them. Logits: `(batch, length, vocab_size)`.
    """

    needs_lm_head = True

    def __init__(self, config: KAdapterConfig, backbone: PreTrainedModel | None = None):
        """`backbone` may be a masked-language model, whose head is used, or an encoder, which gets a new head."""
        with_head = backbone
        if backbone is None or backbone.base_model is backbone:
            check_is_encoder(config.backbone_config)
            with_head = new_model(masked_lm_class(config.backbone_config), config.backbone_config)
            if backbone is not None:
                setattr(with_head, with_head.base_model_prefix, backbone)
        super().__init__(config, with_head)
        if backbone is None:
            del self.origins.sources["backbone"]
        self._take_head(with_head)
        self.post_init()

    def _take_head(self, with_head: PreTrainedModel) -> None:
        prefix = with_head.base_model_prefix
        ties = with_head.get_expanded_tied_weights_keys(all_submodels=False)
        to_backbone = {target: source for target, source in ties.items() if source.startswith(f"{prefix}.")}
        self._tied_weights_keys = {
            f"lm_head.{target}": f"backbone.{source.removeprefix(prefix + '.')}"
            for target, source in to_backbone.items()
        }
        within = {target: source for target, source in ties.items() if target not in to_backbone}
        with_head._tied_weights_keys = with_head.all_tied_weights_keys = within
        setattr(with_head, prefix, _StatesGiven(self.backbone))
        self.lm_head = with_head

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.set_output_embeddings(new_embeddings)

    @encodes_inputs
    def forward(
        self, encoded: Encoded, labels: torch.LongTensor | None = None, num_items_in_batch: ItemCount = None
    ) -> MaskedLMOutput:
        """
        Args:
            labels: `(batch, length)` token ids; -100 is ignored.
        """
        fused = self.fuse(encoded).to(next(parameters_of(self.lm_head)).dtype)
        # input_ids=None by position, as the wrapper of PEFT 0.18 around heads that train needs an argument there.
        logits = self.lm_head(None, inputs_embeds=fused, return_dict=True).logits
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return MaskedLMOutput(loss, logits, encoded.hidden_states, encoded.attentions)
