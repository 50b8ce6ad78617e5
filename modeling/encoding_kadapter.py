"""Running the backbone and the knowledge adapters, the first step of every model's `forward`."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, can_return_tuple

from .compat_kadapter import parameters_of, running_position_ids
from .configuration_kadapter import KAdapterConfig
from .format_kadapter import KAdapterConfigError
from .layers_kadapter import states_at
from .peft_kadapter import virtual_tokens
from .stacking_kadapter import run_adapters


Output = TypeVar("Output", bound=ModelOutput)


@dataclass
class Encoded:
    """
    The result of `encode`, which heads read.

    Args:
        backbone_state (`torch.FloatTensor` of shape `(batch, length, hidden_size)`): the backbone's last hidden state.
        run_adapters (`Callable`): runs the adapters and returns their outputs by name. It takes the positions that are read,
            `(batch,)` or `(batch, number)`, or None for all: the last layer computes no others.
        hidden_states, attentions (`tuple`, *optional*): the backbone's, if requested.
        virtual_tokens (`int`): the number of positions that PEFT's prompt methods put before those of the text. Positions
            that the caller passes don't count them.
        at_positions (`bool`): whether `backbone_state` is `(batch, number, hidden_size)`, at the positions that the head
            reads, as `fusion_states` were passed.
        parts (`list`): if rows have different adapters, the indices and the `Encoded` of each group of rows with the same
            adapters. `knowledge` then is zero in the rows without an adapter; `fuse` fuses each row with its own adapters.
        fusion_weights (`dict[str, torch.FloatTensor]`, *optional*): the weight of each adapter, `(batch, positions read)`, if
            requested and as soon as the states are fused.
    """

    backbone_state: torch.Tensor
    run_adapters: Callable[[torch.Tensor | None], dict[str, torch.Tensor]]
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    virtual_tokens: int = 0
    at_positions: bool = False
    parts: list[tuple[torch.Tensor, "Encoded"]] = field(default_factory=list)
    fusion_weights: dict[str, torch.Tensor] | None = None

    @functools.cached_property
    def knowledge(self) -> dict[str, torch.Tensor]:
        """The output of each adapter, of the same shape as `backbone_state`."""
        return self.run_adapters(None)

    def at(self, positions: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        The backbone's state and the adapters' outputs at one position of each row, `(batch,)`, or several,
        `(batch, number)`; None for all. Call it once: the adapters run each time.
        """
        if positions is None:
            return self.backbone_state, self.knowledge
        select = _at_given if self.at_positions else states_at
        return select(self.backbone_state, positions), self.run_adapters(positions)

    def divide(self, groups: Mapping[tuple[str, ...], list[int]], run: Callable[..., dict[str, torch.Tensor]]) -> None:
        """Divides the batch into `parts`, whose rows have the same adapters. `run` takes names, rows and positions."""
        state = self.backbone_state
        if sum(map(len, groups.values())) != len(state):
            raise KAdapterConfigError(
                f"knowledge_adapters has {sum(map(len, groups.values()))} rows, and the batch {len(state)}."
            )
        for names, places in groups.items():
            rows = torch.tensor(places, device=state.device)
            part = Encoded(state[rows], functools.partial(run, names, rows), at_positions=self.at_positions)
            part.fusion_weights = self.fusion_weights
            self.parts.append((rows, part))
        self.run_adapters = self._run_parts

    def _run_parts(self, positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
        outputs = [(rows, part.at(_rows_of(positions, rows))[1]) for rows, part in self.parts]
        return _in_rows(outputs, len(self.backbone_state))


def _at_given(state: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """
    The state at `positions`, `(batch,)` or `(batch, number)`, from one that was computed at these positions only. That may
    have more positions at the end if the rows of its batch had more, such as words.

    Raises:
        ValueError: it was computed at other positions, as for another head.
    """
    if positions is None:
        return state
    single = positions.dim() == 1
    wanted = 1 if single else positions.shape[1]
    if state.shape[1] < wanted or (single and state.shape[1] > 1):
        raise ValueError(
            f"fusion_states have {state.shape[1]} positions, and the head reads {wanted} of each row: they were computed for "
            "another head."
        )
    return state[:, 0] if single else state[:, :wanted]


def _rows_of(tensor: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows.to(tensor.device)]


def _select_outputs(
    outputs: Mapping[str, torch.Tensor],
    names: Sequence[str],
    rows: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """The given outputs of adapters, which then don't run."""
    selected = {name: outputs[name] if rows is None else outputs[name][rows] for name in names}
    return {name: _at_given(output, positions) for name, output in selected.items()}


def _in_rows(parts: list[tuple[torch.Tensor, dict[str, torch.Tensor]]], batch: int) -> dict[str, torch.Tensor]:
    """Joins the tensors by name of parts of a batch; rows of parts that lack a name are zero."""
    whole: dict[str, torch.Tensor] = {}
    for rows, tensors in parts:
        for name, tensor in tensors.items():
            known = whole.get(name, tensor.new_zeros(batch, *tensor.shape[1:]))
            whole[name] = known.index_copy(0, rows.to(tensor.device), tensor)
    return whole


class EncodingMixin(nn.Module):
    """The methods of `KAdapterPreTrainedModel` that run its backbone and adapters."""

    config: KAdapterConfig

    def encode(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        *,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> Encoded:
        """
        Runs the backbone and the active adapters.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: `(batch, length)`, as for the backbone.
            inputs_embeds: `(batch, length, hidden_size)`, instead of `input_ids`.
            past_key_values: keys and values of a prefix for each layer of the backbone, as PEFT's prefix tuning passes them;
                `attention_mask` then covers the prefix too.
            kwargs: `output_attentions` and `output_hidden_states` (a list of indices returns only these states);
                `knowledge_adapters`, names of adapters to use instead of the active ones, or a list of names for each row;
                `output_fusion_weights`; and states that were computed before, so that frozen parts need not run again:
                `backbone_states`, `(batch, states, length, hidden_size)`: the `backbone_states_read`, then the backbone's
                last hidden state. The backbone then does not run.
                `fusion_states`, `(batch, 1 or 1 + adapters, number, hidden_size)`: the inputs of the fusion at the
                positions that the head reads, i.e. the backbone's last hidden state and the output of each active adapter.
                Only the fusion and the head then run. Without the outputs of the adapters, these run on
                `backbone_states`, which then lack the last hidden state.

        Raises:
            KAdapterConfigError: there is no adapter of a name, or the backbone lacks what the adapters or PEFT need.
            ValueError: states that were computed before have another shape, or lack some that the adapters read.
        """
        names, groups = self._names_by_row(kwargs.pop("knowledge_adapters", None))
        given, fusion_states = kwargs.pop("backbone_states", None), kwargs.pop("fusion_states", None)
        with_weights = kwargs.pop("output_fusion_weights", None)
        if fusion_states is not None:
            encoded, run = self._given_fusion_states(fusion_states, given, attention_mask, names)
        else:
            states: Any
            if given is not None:
                states = self._given_states(given, names)
                output: Any = BaseModelOutput(last_hidden_state=states[-1])
            else:
                inputs: dict[str, Any] = dict(input_ids=input_ids, attention_mask=attention_mask)
                inputs |= dict(token_type_ids=token_type_ids, position_ids=position_ids)
                inputs |= dict(inputs_embeds=inputs_embeds, past_key_values=past_key_values)
                inputs = {name: value for name, value in inputs.items() if value is not None}
                states, output = self._run_backbone(names, inputs | kwargs)
            last = output["last_hidden_state"]
            if attention_mask is not None and attention_mask.dim() == 2:
                attention_mask = attention_mask[:, -last.shape[1] :]  # without the part for past_key_values
            run = functools.partial(self._run_adapters, states, attention_mask)
            encoded = Encoded(
                backbone_state=last,
                run_adapters=functools.partial(run, names, None),
                hidden_states=output.get("hidden_states"),
                attentions=output.get("attentions"),
                virtual_tokens=virtual_tokens() if inputs_embeds is not None and past_key_values is None else 0,
            )
        encoded.fusion_weights = {} if with_weights else None
        if groups is not None:
            encoded.divide(groups, run)
        return encoded

    def backbone_states_read(self, names: Iterable[str] | None = None) -> list[int]:
        """The indices of the backbone's hidden states that these adapters read, by default the active, in ascending order."""
        names = self.active_knowledge_adapters if names is None else names
        return sorted({layer for name in names for layer in self.adapters[name].config.backbone_layers})

    def _run_adapters(
        self,
        states: Any,
        attention_mask: torch.Tensor | None,
        names: Sequence[str],
        rows: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """The outputs of these adapters; of these rows, if there are any, at `positions` in them."""
        if rows is not None:
            states = {layer: _rows_of(states[layer], rows) for layer in self.backbone_states_read(names)}
            attention_mask = _rows_of(attention_mask, rows)
        return run_adapters({name: self.adapters[name] for name in names}, states, attention_mask, positions)

    def _given_states(self, given: torch.Tensor, names: Sequence[str], last: bool = True) -> dict[int, torch.Tensor]:
        """The given states by index; the backbone's last has the index -1."""
        read = self.backbone_states_read()
        states = [*read, -1] if last else read
        if given.dim() != 4 or given.shape[1] != len(states):
            and_last = " and the backbone's last" if last else ""
            raise ValueError(
                f"backbone_states must be of shape (batch, {len(states)}, length, width), the states {read}{and_last}; not "
                f"{tuple(given.shape)}."
            )
        missing = sorted(set(self.backbone_states_read(names)) - set(read))
        if missing:
            raise ValueError(f"backbone_states lack the states {missing}, which the adapters {list(names)} read.")
        return dict(zip(states, given.to(self.own_dtype()).unbind(1), strict=True))

    def _given_fusion_states(
        self,
        given: torch.Tensor,
        backbone_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        names: Sequence[str],
    ) -> tuple[Encoded, Callable[..., dict[str, torch.Tensor]]]:
        active: list[str] = self.active_knowledge_adapters if backbone_states is None else []
        if given.dim() != 4 or given.shape[1] != 1 + len(active):
            outputs = f" and the outputs of {', '.join(active)}" if active else ""
            raise ValueError(
                f"fusion_states must be of shape (batch, {1 + len(active)}, number, width), the backbone's last state"
                f"{outputs}; not {tuple(given.shape)}."
            )
        last, *outputs = given.to(self.own_dtype()).unbind(1)
        if backbone_states is None:
            missing = [name for name in names if name not in active]
            if missing:
                raise ValueError(f"fusion_states lack the outputs of {missing}, which are not active.")
            run = functools.partial(_select_outputs, dict(zip(active, outputs, strict=True)))
        else:
            states = self._given_states(backbone_states, names, last=False)
            run = functools.partial(self._run_adapters, states, attention_mask)
        return Encoded(last, functools.partial(run, names, None), at_positions=True), run

    def fuse(self, encoded: Encoded, positions: torch.Tensor | None = None) -> torch.Tensor:
        """
        The states after the fusion, of all positions, `(batch, length, width)`, or of those of `Encoded.at`; without
        adapters in the backbone's dtype. Call it once per forward pass: the adapters run each time.

        Raises:
            ValueError: the weights of the adapters were requested, and the fusion has none.
        """
        if encoded.parts:
            parts = [(rows, self.fuse(part, _rows_of(positions, rows))) for rows, part in encoded.parts]
            if encoded.fusion_weights is not None:
                weights = [(rows, part.fusion_weights or {}) for rows, part in encoded.parts]
                encoded.fusion_weights = _in_rows(weights, len(encoded.backbone_state))
            order = torch.cat([rows for rows, _ in parts]).argsort()
            fused = torch.cat([of_part for _, of_part in parts])
            return fused[order.to(fused.device)]
        state, knowledge = encoded.at(positions)
        if encoded.fusion_weights is not None and knowledge:
            weights = self.fusion.weights(state, knowledge)
            if weights is None:
                raise ValueError(
                    f"output_fusion_weights: the fusion '{self.config.fusion}' has no weights of adapters; 'attention', 'gate' "
                    "and 'add' with a scale have."
                )
            encoded.fusion_weights = {name: weight.reshape(len(weight), -1) for name, weight in weights.items()}
        return self.fusion(state, knowledge)

    def _run_backbone(self, names: Sequence[str], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        read = self.backbone_states_read(names)
        past, embeds = kwargs.get("past_key_values"), kwargs.get("inputs_embeds")
        if past is not None and "past_key_values" not in inspect.signature(self.backbone.forward).parameters:
            raise KAdapterConfigError(
                f"the backbone ({self.backbone.config.model_type}) takes no past_key_values, which PEFT's prefix tuning puts "
                "before the text. Use another of PEFT's methods, such as LoRA or prompt tuning."
            )
        if "position_ids" not in kwargs and any(self.adapters[name].config.attend_to_padding for name in names):
            start = 0 if past is None else past.get_seq_length()
            position_ids = running_position_ids(self.backbone, kwargs.get("input_ids", embeds), start)
            kwargs |= {} if position_ids is None else {"position_ids": position_ids}
        kwargs.pop("num_items_in_batch", None)
        wants = kwargs.pop("output_hidden_states", None)
        wants = self.config.output_hidden_states if wants is None else wants
        if kwargs.get("output_attentions") is None and self.config.output_attentions:
            kwargs["output_attentions"] = True
        # With gradient checkpointing, the embeddings' output requires gradients even if nothing in the backbone does.
        needs_graph = not self.training or past is not None or (embeds is not None and embeds.requires_grad)
        needs_graph = needs_graph or any(parameter.requires_grad for parameter in parameters_of(self.backbone))
        # Newer versions of transformers keep only the states with the given indices, older ones keep all.
        wanted = [*read, *wants] if isinstance(wants, list) else True if wants else read
        with torch.set_grad_enabled(torch.is_grad_enabled() and needs_graph):
            output = self.backbone(**kwargs, output_hidden_states=wanted, return_dict=True)
        states = output.get("hidden_states")
        if read and (states is None or len(states) <= read[-1]):
            raise KAdapterConfigError(
                f"the backbone ({self.backbone.config.model_type}) returned {len(states or ())} hidden states, and the "
                f"adapters read number {read[-1]}; it can't be a backbone."
            )
        if not wants:
            output["hidden_states"] = None
        elif isinstance(wants, list):
            kept = {index % len(states) for index in wants}
            output["hidden_states"] = tuple(state if index in kept else None for index, state in enumerate(states))
        return states, output


def with_fusion_weights(output: Output, encoded: Encoded) -> Output:
    """Adds `fusion_weights` to the output of a model, if they were requested."""
    if encoded.fusion_weights is not None:
        output["fusion_weights"] = ModelOutput(encoded.fusion_weights)
    return output


def encodes_inputs(forward: Callable[..., ModelOutput]) -> Callable[..., Any]:
    """
    Decorator for a model's `forward(self, encoded, …)`: takes the inputs of `encode`, and calls it with the result.

    The signature, which Trainer, pipelines and PEFT read, has the inputs of `encode` first, then the parameters of
    `forward` itself, which may also be some of these inputs, such as `attention_mask`. With `return_dict=False`, the result is
    a tuple.
    """
    *inputs, past, others = inspect.signature(EncodingMixin.encode).parameters.values()
    names = [parameter.name for parameter in inputs[1:]]
    own = dict(list(inspect.signature(forward).parameters.items())[2:])
    also_inputs = [name for name in own if name in names]
    own = {name: parameter for name, parameter in own.items() if name not in names}

    @functools.wraps(forward)
    def encode_first(self, *args, **kwargs):
        more = args[len(names) :]
        own_kwargs = dict(zip(own, more, strict=False)) | {name: kwargs.pop(name) for name in own if name in kwargs}
        own_kwargs |= {name: (dict(zip(names, args, strict=False)) | kwargs).get(name) for name in also_inputs}
        encoded = self.encode(*args[: len(names)], **kwargs)
        return with_fusion_weights(forward(self, encoded, *more[len(own) :], **own_kwargs), encoded)

    signature = [*inputs, *own.values(), past, others]
    encode_first.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    del encode_first.__wrapped__  # accelerate unwraps a model's `forward` as far as it can
    return can_return_tuple(encode_first)
