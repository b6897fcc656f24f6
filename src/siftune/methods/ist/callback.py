"""IST for any transformers Trainer, and for plain training loops."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from siftune.base.errors import RecipeError
from siftune.base.settings import documented
from siftune.methods.drivers.batches import Batch, Loss, model_loss
from siftune.methods.drivers.layer_callback import LayerCallback
from siftune.methods.drivers.layer_driver import LayerSelection, LayerStack
from siftune.methods.ist.importance import Importance
from siftune.methods.ist.settings import ISTSettings


@documented
@dataclass(eq=False)
class IST(LayerCallback, ISTSettings):
    """Importance-aware Sparse Tuning: train the layers that matter (arXiv 2410.11772).

    Args:
        seed: Seed of IST's own generator.
        layers: Path of the decoder layers, where they are not found by structure.

    Attributes:
        last: The `LayerChoice` of the current step.
        importance: (L,) float64 importance logits, high = important.
        on_select: Called with each step's choice, where set.

    Raises:
        RecipeError: When a setting is out of its range.

    Example:
        >>> ist = IST(active=0.5, interval=2)
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[ist])
        >>> output = trainer.train()
        >>> len(ist.last.layers), ist.importance.shape  # half of the model's four layers
        (2, torch.Size([4]))
    """

    def policy(self, stack: LayerStack, generator: torch.Generator) -> Importance:
        """Layers by importance."""
        return Importance(stack, self, generator)

    def attach(
        self,
        model: nn.Module,
        *,
        batches: Iterable[Batch] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        loss: Loss = model_loss,
    ) -> LayerSelection:
        """Select layers in a plain training loop.

        Args:
            model: Causal LM with adapters.
            batches: Batches on which the candidate sets are compared, one each time; started again at the end.
            optimizer: Where given, its steps drive the selection; else call `step()` after each. Importance from
                gradients takes it.
            loss: Loss of a batch, a scalar.

        Returns:
            A context manager; `last.layers` are the layers that train now.

        Raises:
            RecipeError: When there are no `batches` although `interval` asks for updates, or no `optimizer` although
                the importance is from gradients.

        Example:
            >>> with IST(active=0.5, interval=2).attach(model, batches=loader, optimizer=optimizer) as sift:
            ...     for batch in loader:
            ...         model(**batch).loss.backward()
            ...         optimizer.step()
            ...         optimizer.zero_grad()
            ...     sift.importance.shape
            torch.Size([4])
        """
        if batches is None and self.interval is not None and not self.scores_nothing:
            raise RecipeError("IST compares layers on rows: give attach(..., batches=...), or set interval=None.")
        return self._attach(model, batches, optimizer, loss)
