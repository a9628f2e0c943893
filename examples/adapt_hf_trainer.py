"""Learn the dilations of transformers' MobileViT, whose head is a DeepLabV3 pyramid, with the Trainer.

Other models of transformers have no dilated convolution. Select SegFormer's depthwise convolutions by name:
`ReceptiveFieldSearch(trainer, "*.dwconv.dwconv")`.
"""

import torch
from torch import Tensor, nn
from transformers import MobileViTConfig, MobileViTForSemanticSegmentation, Trainer, TrainingArguments

from rfield.integrations.transformers import ReceptiveFieldSearch
from rfield.segmentation.data import SyntheticCues


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, masks = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images) / 255, "labels": torch.stack(masks).long()}


def main(steps: int = 300, folder: str = "runs/mobilevit") -> nn.Module:
    model = MobileViTForSemanticSegmentation(MobileViTConfig(num_labels=4))  # or .from_pretrained(...)
    images = SyntheticCues("train", size=(128, 128), length=4 * steps)
    arguments = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=4, report_to="none")
    trainer = Trainer(model, arguments, collate, train_dataset=images)
    search = ReceptiveFieldSearch(trainer, share="parallel")
    trainer.train()
    search.fused.save_pretrained(folder)
    return search.fused


if __name__ == "__main__":
    main()
