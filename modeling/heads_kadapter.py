"""Task heads on a K-Adapter's fused states. The module that a repository's `auto_map` names: it imports all the others."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from .adapters_kadapter import KnowledgeAdapter, KnowledgeFusion
from .backbone_kadapter import check_is_encoder, masked_lm_class
from .card_kadapter import card_text
from .configuration_kadapter import KAdapterConfig, KAdapterConfigError, KnowledgeAdapterConfig
from .head_base_kadapter import HeadModel, cross_entropy, loss_of
from .hub_kadapter import push_folder
from .modeling_kadapter import KAdapterModel, KAdapterModelOutput, KAdapterPreTrainedModel
from .parsing_kadapter import DependencyParserOutput, KAdapterForDependencyParsing
from .peft_kadapter import plain_state_dict
from .repository_kadapter import RepositoryModel
from .sources_kadapter import repository_folder
from .storage_kadapter import BackboneMismatchError, KAdapterLoadError


# Older versions of transformers copy, of a repository's code, only what its entry module itself imports: so this one
# imports something from each of its siblings.
__all__ = [
    "BackboneMismatchError",
    "DependencyParserOutput",
    "KAdapterConfig",
    "KAdapterConfigError",
    "KAdapterForDependencyParsing",
    "KAdapterForEntityTyping",
    "KAdapterForMaskedLM",
    "KAdapterForMultipleChoice",
    "KAdapterForQuestionAnswering",
    "KAdapterForRelationClassification",
    "KAdapterForSequenceClassification",
    "KAdapterForTokenClassification",
    "KAdapterLoadError",
    "KAdapterModel",
    "KAdapterModelOutput",
    "KnowledgeAdapter",
    "KnowledgeAdapterConfig",
    "KnowledgeFusion",
    "RepositoryModel",
    "card_text",
    "plain_state_dict",
    "push_folder",
    "repository_folder",
]


def _classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config: KAdapterConfig,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor:
    """The loss for `(batch, num_labels)` logits that `config.problem_type` says; if it says none, the labels decide."""
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


def _check_marker(name: str, positions: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
    batch, length = state.shape[:2]
    if positions is None:
        raise ValueError(
            f"{name} is missing: the position of the marker before the entity in each row, shape (batch,)."
        )
    if positions.shape != (batch,) or positions.is_floating_point():
        raise ValueError(
            f"{name} must be a LongTensor of shape ({batch},), not {positions.dtype} of {tuple(positions.shape)}."
        )
    if not torch.compiler.is_compiling() and positions.device.type == "cpu":
        outside = positions[(positions < 0) | (positions >= length)]
        if outside.numel():
            raise ValueError(f"{name} has {outside[0].item()}, but the rows are {length} tokens long.")
    return positions


class KAdapterForSequenceClassification(HeadModel):
    """Classification or regression of a text, from the fused state of its first token."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """
        Args:
            labels: `(batch,)` class indices, `(batch,)` or `(batch, num_labels)` floats to regress on, or
                `(batch, num_labels)` of 0.0 and 1.0 where several labels may hold; see `config.problem_type`.

        Returns:
            `logits` of shape `(batch, num_labels)`.
        """
        state, knowledge, output = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )
        logits = self.classifier(self.dropout(self._fused_at(state, knowledge, self._first_position(state))))
        loss = None
        if labels is not None:
            loss = _classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.get("attentions")
        )


class KAdapterForTokenClassification(HeadModel):
    """A label for each token, from its fused state."""

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """
        Args:
            labels: `(batch, length)` class indices; -100 where a token has none.

        Returns:
            `logits` of shape `(batch, length, num_labels)`.
        """
        state, knowledge, output = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )
        logits = self.classifier(self.dropout(self._fused(state, knowledge)))
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.get("attentions")
        )


class KAdapterForQuestionAnswering(HeadModel):
    """The start and end of an answer in a text."""

    _classifier_name = "qa_outputs"

    def _add_head(self, config: KAdapterConfig, width: int) -> None:
        self.qa_outputs = nn.Linear(width, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """
        Args:
            start_positions, end_positions: `(batch,)`; a position outside the text adds nothing to the loss, which is
                the mean over all rows, so that accumulating gradients over micro-batches does not change it.

        Returns:
            `start_logits` and `end_logits` of shape `(batch, length)`.
        """
        state, knowledge, output = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )
        logits = self.qa_outputs(self.dropout(self._fused(state, knowledge)))
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
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=output.hidden_states,
            attentions=output.get("attentions"),
        )


class KAdapterForMultipleChoice(HeadModel):
    """
    Choice among several continuations, each scored from the fused state of its first token.

    Source: `COSMOSQAModel` in the original's `examples/run_finetune_cosmosqa_adapter.py`.
    """

    def _add_head(self, config: KAdapterConfig, width: int) -> None:
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
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> MultipleChoiceModelOutput:
        """
        Args:
            input_ids, attention_mask, token_type_ids, position_ids: `(batch, choices, length)`.
            inputs_embeds: `(batch, choices, length, hidden_size)`.
            labels: `(batch,)` index of the right choice.

        Returns:
            `logits` of shape `(batch, choices)`.
        """
        first = input_ids if input_ids is not None else inputs_embeds
        if first is None or first.dim() < 3:
            raise ValueError("KAdapterForMultipleChoice takes inputs of shape (batch, choices, length).")
        choices = first.shape[1]
        flat = [
            None if tensor is None else tensor.flatten(0, 1)
            for tensor in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        ]
        state, knowledge, output = self._encode(*flat, **kwargs)
        fused = self._fused_at(state, knowledge, self._first_position(state))
        logits = self.classifier(self.dropout(fused)).view(-1, choices)
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.get("attentions")
        )


class KAdapterForEntityTyping(HeadModel):
    """
    The types of one marked entity, of which several may hold: `out_proj(dropout(dense(f_entity)))`, no activation.

    Source: paper, section 4.1; `ETModel` in the original's `examples/run_finetune_openentity_adapter.py`.
    """

    def _add_head(self, config: KAdapterConfig, width: int) -> None:
        if config.problem_type is None:
            config.problem_type = "multi_label_classification"
        self.dense = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        entity_start: torch.LongTensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """
        Args:
            entity_start: `(batch,)`, the position of the marker before the entity.
            labels: `(batch, num_labels)` of 0.0 and 1.0.

        Returns:
            `logits` of shape `(batch, num_labels)`.

        Raises:
            ValueError: `entity_start` is missing, of another shape, or outside the text.
        """
        state, knowledge, output = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )
        fused = self._fused_at(state, knowledge, _check_marker("entity_start", entity_start, state))
        logits = self.out_proj(self.dropout(self.dense(fused)))
        loss = None
        if labels is not None:
            loss = _classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.get("attentions")
        )


class KAdapterForRelationClassification(HeadModel):
    """
    The relation between two marked entities: `out_proj(dropout(dense([f_subject; f_object])))`, no activation.

    Source: paper, section 4.3; `TACREDModel` in the original's `examples/run_finetune_TACRED_adapter.py`.
    """

    def _add_head(self, config: KAdapterConfig, width: int) -> None:
        self.dense = nn.Linear(2 * width, width)
        self.out_proj = nn.Linear(width, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        subject_start: torch.LongTensor | None = None,
        object_start: torch.LongTensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """
        Args:
            subject_start, object_start: `(batch,)`, the positions of the markers before the two entities.
            labels: `(batch,)` class indices.

        Returns:
            `logits` of shape `(batch, num_labels)`.

        Raises:
            ValueError: a marker position is missing, of another shape, or outside the text.
        """
        state, knowledge, output = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )
        markers = (
            _check_marker("subject_start", subject_start, state),
            _check_marker("object_start", object_start, state),
        )
        pair = torch.cat([self._fused_at(state, knowledge, marker) for marker in markers], dim=-1)
        logits = self.out_proj(self.dropout(self.dense(pair)))
        loss = None
        if labels is not None:
            loss = _classification_loss(logits, labels, self.config, num_items_in_batch)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.get("attentions")
        )


class _StatesGiven(nn.Module):
    """
    Stands where a masked-language-model class has its encoder, and returns the states that it is given.

    So each model type's own class applies its own head, and no head is written again here.
    """

    def __init__(self, backbone: PreTrainedModel):
        super().__init__()
        self.__dict__["backbone"] = backbone  # not a submodule: it is one of the K-Adapter already

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["backbone"], name)  # some heads read the embeddings

    def forward(self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, **kwargs):
        return BaseModelOutput(last_hidden_state=inputs_embeds)


class KAdapterForMaskedLM(KAdapterPreTrainedModel):
    """
    The backbone's own masked-language-model head on the fused states.

    Without an active adapter it predicts exactly what the backbone does. The head's weights come from the backbone's
    repository, and its output layer is tied to the backbone's embeddings where the backbone's own class ties them.
    """

    _needs_lm_head = True

    def __init__(self, config: KAdapterConfig, backbone: PreTrainedModel | None = None):
        """`backbone` may be a masked-language model, whose head is then used, or an encoder, and the head is new."""
        if backbone is None or backbone.base_model is backbone:
            check_is_encoder(config.backbone_config)
            with_head = masked_lm_class(config.backbone_config)._from_config(config.backbone_config)
            if backbone is not None:
                setattr(with_head, with_head.base_model_prefix, backbone)
        else:
            with_head = backbone
        super().__init__(config, with_head)
        if backbone is None:
            self._sources.clear()
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

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """
        Args:
            labels: `(batch, length)` token ids; -100 where nothing is to be predicted.

        Returns:
            `logits` of shape `(batch, length, vocab_size)`.
        """
        state, knowledge, output = self._encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs
        )
        fused = self.fusion(state, knowledge).to(self.lm_head.dtype)
        logits = self.lm_head(inputs_embeds=fused, return_dict=True).logits
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.get("attentions")
        )
