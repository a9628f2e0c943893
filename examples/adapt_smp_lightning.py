"""Learn the dilations of segmentation_models_pytorch's DeepLabV3+ with Lightning."""

import lightning as L
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import rfield
from rfield.segmentation.data import SyntheticCues

Batch = tuple[Tensor, Tensor]


class Adapted(L.LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.model = smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=4)
        rfield.adapt(self.model, "decoder", share="parallel")  # one factor: the rates keep their ratios
        self.search = rfield.SpsaSearch(self.model, self.loss_fn, steps=6 * steps // 10)

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        image, mask = (part.to(self.device) for part in batch)
        return F.cross_entropy(model(image / 255), mask.long(), ignore_index=255)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        return self.search.loss(batch)

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_index: int) -> None:
        self.search.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(rfield.parameter_groups(self, lr=1e-3, factor_lr=1e-2))

    def on_save_checkpoint(self, checkpoint: dict[str, object]) -> None:
        checkpoint["search"] = self.search.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, dict[str, object]]) -> None:
        self.search.load_state_dict(checkpoint["search"])


def main(steps: int = 300, folder: str = "runs/lightning") -> nn.Module:
    module = Adapted(steps)
    images = SyntheticCues("train", size=(128, 128), length=4 * steps)
    trainer = L.Trainer(max_steps=steps, default_root_dir=folder, logger=False)
    trainer.fit(module, DataLoader(images, batch_size=4))
    plain = rfield.fuse(module.model)
    print("the first rate was 12; the search found", module.search.unsnapped, "before rounding")
    return plain


if __name__ == "__main__":
    main()
