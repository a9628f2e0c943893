"""Learn the rates of torchvision's DeepLabV3 pyramid in a plain training loop."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

import rfield
from rfield.search.held_out import HeldOut
from rfield.segmentation.data import SyntheticCues

Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    image, mask = batch
    return F.cross_entropy(model(image / 255)["out"], mask.long(), ignore_index=255)


def main(steps: int = 300, out: str = "runs/deeplabv3.pt") -> nn.Module:
    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    rfield.adapt(model, "classifier", share="parallel")  # before the optimizer is made
    optimizer = torch.optim.AdamW(rfield.parameter_groups(model, lr=1e-3, factor_lr=1e-2))
    train = DataLoader(SyntheticCues("train", length=4 * steps), batch_size=4)
    held_out = HeldOut(train)
    search = rfield.SampledSearch(model, loss_fn, steps=6 * steps // 10, held_out=held_out)
    for batch in train:
        search.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        search.step()
        if search.done:
            held_out.give_back()
    print(search.report())
    plain = rfield.fuse(model)
    Path(out).parent.mkdir(exist_ok=True)
    torch.save(plain.state_dict(), out)  # the keys of torchvision's own model
    return plain


if __name__ == "__main__":
    main()
