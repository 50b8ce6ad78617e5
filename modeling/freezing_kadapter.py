"""Which parts of a model train: `requires_grad`, and training or evaluation mode."""

from collections.abc import Iterable
from typing import TypeVar

from torch import nn
from transformers.utils import logging

from .configuration_kadapter import KAdapterConfig
from .peft_kadapter import check_trains_what_runs, is_wrapped_by_peft, peft_parameters


logger = logging.get_logger(__name__)
Model = TypeVar("Model", bound="FreezingMixin")


class FreezingMixin(nn.Module):
    """The methods of `KAdapterPreTrainedModel` that freeze and unfreeze its parts."""

    config: KAdapterConfig

    def freeze_backbone(self) -> None:
        """Freezes the backbone: no gradients, no dropout."""
        self.config.freeze_backbone = True
        self._update_trainable(thaw=False)

    def unfreeze_backbone(self) -> None:
        """Trains the backbone. Saving then stores it."""
        self.config.freeze_backbone = False
        self._update_trainable()

    def freeze_knowledge_adapters(self, names: str | Iterable[str] | None = None) -> None:
        """
        Freezes these adapters, by default all.

        Raises:
            KAdapterConfigError: there is no adapter of this name.
        """
        names = self._checked_names(self.adapters if names is None else names)
        frozen = self.config.frozen_knowledge_adapters
        self.config.frozen_knowledge_adapters = [name for name in frozen if name not in names] + names
        self._update_trainable(thaw=False)

    def unfreeze_knowledge_adapters(self, names: str | Iterable[str] | None = None) -> None:
        """
        Trains these adapters, by default all, if they are active.

        Raises:
            KAdapterConfigError: there is no adapter of this name.
        """
        names = self._checked_names(self.adapters if names is None else names)
        frozen = self.config.frozen_knowledge_adapters
        self.config.frozen_knowledge_adapters = [name for name in frozen if name not in names]
        self._update_trainable()

    def freeze_head(self) -> None:
        """Freezes the fusion and the task head."""
        self.config.freeze_head = True
        self._update_trainable(thaw=False)

    def unfreeze_head(self) -> None:
        """Trains the fusion and the task head."""
        self.config.freeze_head = False
        self._update_trainable()

    def train_knowledge_adapter(self, name: str, train_head: bool = False) -> None:
        """
        Trains this adapter and freezes everything else.

        Args:
            train_head: also train the fusion and the task head, as pre-training does, which discards them afterwards
                (paper, section 3.3).

        Raises:
            KAdapterConfigError: there is no adapter of this name.
        """
        self._checked_names(name)
        if name not in self.config.active_knowledge_adapters:
            self.config.active_knowledge_adapters.append(name)
        self.config.freeze_backbone = True
        self.config.freeze_head = not train_head
        self.config.frozen_knowledge_adapters = [other for other in self.adapters if other != name]
        self._update_trainable()

    def _to_train(self) -> set[nn.Parameter]:
        """The parameters that train according to the configuration, without PEFT's."""
        config, active = self.config, self.config.active_knowledge_adapters
        backbone = set(self.backbone.parameters())
        # Only what the forward pass uses, as DDP requires.
        trained = {
            parameter
            for name in active
            if name not in config.frozen_knowledge_adapters
            for parameter in self.adapters[name].parameters()
        }
        if not config.freeze_head:
            # The output weights of a language-model head are the backbone's embeddings, and train with the backbone.
            trained |= {*self.head_parameters(), *self.fusion.used_parameters(active)} - backbone
        if not config.freeze_backbone:
            trained |= backbone
        return trained - peft_parameters(self)

    def _is_frozen_from_outside(self) -> bool:
        """Whether something such as PEFT has frozen all that should train."""
        trained = self._to_train()
        return bool(trained) and not any(parameter.requires_grad for parameter in trained)

    def _update_trainable(self, thaw: bool = True) -> None:
        """Sets `requires_grad` from the configuration; without `thaw`, what is frozen stays frozen."""
        trained = self._to_train()
        if is_wrapped_by_peft(self):
            trained = set()
            if thaw:
                logger.warning(
                    "PEFT decides what trains in a model that get_peft_model has wrapped, and saves nothing else: the rest "
                    "stays frozen. To train more, list it in modules_to_save of PEFT's configuration."
                )
        peft = peft_parameters(self)
        for parameter in self.parameters():
            if parameter.is_floating_point() and parameter not in peft:
                parameter.requires_grad_(parameter in trained and (thaw or parameter.requires_grad))
        self._settle_modes()

    def train(self: Model, mode: bool = True) -> Model:
        """As `nn.Module.train`, but frozen parts stay in evaluation mode, without dropout."""
        super().train(mode)
        self._settle_modes()
        if mode:
            check_trains_what_runs(self)
            self._warn_of_new_head()
        if self.backbone.training and not self.origins.backbone_trained:
            own = set(self.backbone.parameters()) - peft_parameters(self)
            self.origins.backbone_trained = any(parameter.requires_grad for parameter in own)
        return self

    def _settle_modes(self) -> None:
        parts = [([part], part.parameters()) for part in (self.backbone, self.fusion, *self.adapters.values())]
        for modules, parameters in (*parts, (list(self.head_modules()), self.head_parameters())):
            mode = self.training and any(parameter.requires_grad for parameter in parameters)
            for module in modules:
                if module.training != mode:
                    module.train(mode)

    def _warn_of_new_head(self) -> None:
        """PEFT freezes a head unless it finds or is given its name."""
        if self.config.freeze_head or "head" in self.origins.sources:
            return
        heads, frozen = set(self.head_modules()), []
        for name, child in self.named_children():
            parameters = list(child.parameters()) if child in heads else []
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                frozen.append(name)
        if frozen:
            logger.warning_once(
                f"the head's {frozen} are new, and something such as PEFT has frozen them: they stay random. With PEFT, pass "
                f"modules_to_save={frozen} to its configuration."
            )
