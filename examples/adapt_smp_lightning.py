"""Learn the dilations of segmentation_models_pytorch's DeepLabV3+ with Lightning."""

import lightning as L
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rfield.integrations.lightning import ReceptiveFieldSearch
from rfield.segmentation.data import SyntheticCues


class Segmenter(L.LightningModule):
    """A module as it is without rfield."""

    def __init__(self) -> None:
        super().__init__()
        self.model = smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=4)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        image, mask = batch
        return F.cross_entropy(self.model(image / 255), mask.long(), ignore_index=255)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(steps: int = 300, folder: str = "runs/lightning") -> nn.Module:
    images = SyntheticCues("train", size=(128, 128), length=4 * steps)
    # One factor for the pyramid, so that its rates keep their ratios.
    search = ReceptiveFieldSearch("model.decoder.aspp.0", share="parallel")
    trainer = L.Trainer(max_steps=steps, default_root_dir=folder, logger=False, callbacks=[search])
    trainer.fit(Segmenter(), DataLoader(images, batch_size=4))
    return search.fused.model


if __name__ == "__main__":
    main()
