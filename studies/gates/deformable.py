"""`rfield train` with a deformable convolution in the head: python studies/gates/deformable.py TRAIN_FLAGS

The head's dilated convolution becomes torchvision's DeformConv2d (Dai et al., ICCV 2017), whose offsets a convolution
of the same kernel predicts from zero on. Everything else is the run that the flags describe. It writes metrics.json.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from rfield.segmentation.cli import parse
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.files.atomic import write_json
from rfield.segmentation.inference.predict import compute_device, evaluate
from rfield.segmentation.training.fit import build, fit, prepare_data, resume_state


class Deformable(nn.Module):
    """A deformable convolution with the kernel of a plain one, which it equals at the start."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        place = {"padding": conv.padding, "dilation": conv.dilation}
        self.conv = DeformConv2d(conv.in_channels, conv.out_channels, conv.kernel_size, **place)
        self.conv.weight, self.conv.bias = conv.weight, conv.bias
        self.offset = nn.Conv2d(conv.in_channels, 2 * 9, conv.kernel_size, **place)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)
        # What a run records: the field without offsets.
        self.dilation, self.stride = conv.dilation, 1
        self.receptive_field = tuple(2.0 * dilation + 1 for dilation in conv.dilation)

    def forward(self, input: Tensor) -> Tensor:
        # Its kernels have only float32 on a CPU.
        with torch.autocast(input.device.type, enabled=False):
            return self.conv(input.float(), self.offset(input.float()))


def main() -> None:
    _, config = parse(["train", *sys.argv[1:]])
    assert isinstance(config, TrainConfig)

    def progress(done: int, total: int) -> None:
        """Show nothing."""

    data = prepare_data(config, progress)
    built = build(data, progress)
    network = built.module.network
    network.head.layers.fc6 = Deformable(network.head.layers.fc6)
    fitted = fit(data, built, resume_state(data))
    network = network.to(compute_device()).eval()
    found = evaluate(network, data.val_set, data.config.model.freeze_backbone, built.val_features, progress)
    dilation = data.config.model.dilation
    metrics = {**found, "effective_dilation": dilation, "train_seconds": fitted.seconds}
    write_json(Path(data.config.run.out) / "metrics.json", metrics)


if __name__ == "__main__":
    main()
