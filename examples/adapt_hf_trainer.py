"""Learn the dilations of transformers' MobileViT, whose head is a DeepLabV3 pyramid, with the Trainer.

Other models of transformers have no dilated convolution. Select SegFormer's depthwise convolutions by name:
`rfield.adapt(model, "*.dwconv.dwconv")`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MobileViTConfig, MobileViTForSemanticSegmentation, Trainer, TrainerCallback, TrainingArguments

import rfield
from rfield.segmentation.data import SyntheticCues


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, masks = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images) / 255, "labels": torch.stack(masks).long()}


class SearchingTrainer(Trainer):
    search: rfield.SampledSearch

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        return self.search.loss(inputs) if model.training else super().compute_loss(model, inputs, *args, **kwargs)


class Step(TrainerCallback):
    def __init__(self, search: rfield.SampledSearch) -> None:
        self.search = search

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.search.step()


def main(steps: int = 300, folder: str = "runs/mobilevit") -> nn.Module:
    model = MobileViTForSemanticSegmentation(MobileViTConfig(num_labels=4))  # or .from_pretrained(...)
    rfield.adapt(model, share="parallel")
    images = SyntheticCues("train", size=(128, 128), length=4 * steps)
    optimizer = torch.optim.AdamW(rfield.parameter_groups(model, lr=1e-3, factor_lr=1e-2))
    arguments = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=4, report_to="none")
    trainer = SearchingTrainer(model, arguments, collate, train_dataset=images, optimizers=(optimizer, None))
    validation = SyntheticCues("val", size=(128, 128), length=8)
    held_out = [collate([validation[index]]) for index in range(len(validation))]
    trainer.search = rfield.SampledSearch(
        model, lambda model, batch: model(**trainer._prepare_inputs(batch)).loss, 6 * steps // 10, held_out
    )
    trainer.add_callback(Step(trainer.search))
    trainer.train()
    plain = rfield.fuse(model)
    plain.save_pretrained(folder)
    return plain


if __name__ == "__main__":
    main()
