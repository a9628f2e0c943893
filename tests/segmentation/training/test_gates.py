"""Runs with gates: what they train, report and draw."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from rfield.segmentation import plots
from rfield.segmentation.data import evaluation_transform, load_dataset
from rfield.segmentation.inference.gates import field_map, gated_layer, rate_fields, read_gates
from rfield.segmentation.runs import load_run
from rfield.segmentation.training import train

Make = Any


@pytest.mark.parametrize(("gates", "frozen"), [("image", True), ("pixel", True), ("pixel", False)])
def test_a_run_says_and_draws_what_it_chose(make: Make, gates: str, frozen: bool) -> None:
    config = make(gates=gates, search="none", aspp=(1, 4), freeze_backbone=frozen, optimizer="adamw")
    metrics = train(config)
    out, network = Path(config.run.out), load_run(config.run.out).network
    layer = gated_layer(network)
    assert layer is not None
    assert not torch.equal(layer.mean_gates, torch.full((2,), 0.5))
    assert metrics["effective_dilation"] == 4
    said = metrics["gates"]
    assert said["each"] == gates
    assert [(each["rate"], each["receptive_field_px"]) for each in said["rates"]] == [(1, 23), (4, 47)]
    assert rate_fields(network) == [23, 47]

    dataset = load_dataset(config.data.data, "val")
    means, chosen = [], []
    for image, _ in (dataset[index] for index in range(len(dataset))):
        read = read_gates(network, evaluation_transform()(image, torch.zeros(36, 41))[0], frozen)
        assert read.shape == ((2, 1, 1) if gates == "image" else (2, 9, 11))
        torch.testing.assert_close(read.sum(0), torch.ones(read.shape[1:]))
        field = field_map(network, read, (36, 41))
        assert field.shape == (36, 41)
        assert 23 < float(field.min()) <= float(field.max()) < 47
        means.append(read.mean((1, 2)))
        chosen.append(float(23 * means[-1][0] + 47 * means[-1][1]))
    mean = torch.stack(means).mean(0)
    assert [each["mean_gate"] for each in said["rates"]] == pytest.approx(mean.tolist(), abs=1e-5)
    assert said["field_px"] == pytest.approx(np.mean(chosen), abs=1e-3)
    assert said["least_field_px"] == pytest.approx(min(chosen), abs=1e-3)
    assert said["greatest_field_px"] == pytest.approx(max(chosen), abs=1e-3)
    assert said["images"] == len(dataset)
    assert -1 <= said["size_correlation"] <= 1
    with PIL.Image.open(out / "gates.png") as drawn:
        assert drawn.width > 900


def test_a_map_of_another_size_is_not_drawn() -> None:
    with pytest.raises(ValueError, match=r"each image needs a map of its own size, got 1 images and maps of \[3, 4\]"):
        plots.gate_maps([np.zeros((4, 3, 3), np.uint8)], [np.zeros((3, 4))], [1, 2])
