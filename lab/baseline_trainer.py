"""The baselines in siftune's Trainer, so that their steps are measured as those of siftune's own methods are."""

from typing import Any

from torch import Tensor, nn

from lab.baselines import Baseline
from siftune.methods.drivers.batches import Batch, RowDraws
from siftune.methods.options import GASTSettings
from siftune.train.trainer import SiftTrainer


class BaselineTrainer(SiftTrainer):
    """siftune's Trainer with the passes of a baseline in the place of a training step."""

    baseline: Baseline
    _begun = -1  # the step for which the baseline has drawn

    @classmethod
    def take_over(
        cls, trainer: SiftTrainer, kind: type[Baseline], settings: GASTSettings, seed: int = 0
    ) -> "BaselineTrainer":
        """Turn a Trainer that is set up for dense training into one that selects; all else stays as it is."""
        trainer.__class__ = cls
        chunk = trainer.args.per_device_train_batch_size
        trainer.baseline = kind(trainer.model, settings, loss=trainer.support_loss, chunk=chunk, seed=seed)
        trainer.baseline.draws = RowDraws(trainer.train_dataset, trainer.data_collator, trainer.baseline.generator)
        return trainer

    def support_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Loss of support rows, as the Trainer computes that of its own."""
        with self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, self._prepare_inputs(dict(batch)))
        return loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Select, with as many forward and backward passes as the baseline makes."""

        def run(batch: Batch) -> Tensor:
            loss: Tensor = super(BaselineTrainer, self).training_step(model, dict(batch), num_items_in_batch)
            return loss

        if self._begun != self.state.global_step:
            self._begun = self.state.global_step
            model.train()  # an evaluation leaves it in eval mode
            self.baseline.begin()
        return self.baseline.step(inputs, run)
