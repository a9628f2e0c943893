"""Whole runs that search: several paths, features computed once, held-out images, the curve."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rfield.search import SampledSearch
from rfield.search.sets import Combinations
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import AugmentedDataset
from rfield.segmentation.files.checkpoints import read_checkpoint
from rfield.segmentation.models import ParsingNetwork
from rfield.segmentation.models.saving import describe_network, rebuild_network
from rfield.segmentation.runs import load_config, load_run, run_at_dilations
from rfield.segmentation.training import ParsingModule, read_factor_csv, train

pytestmark = pytest.mark.slow

STEPS_AN_EPOCH = 3
Make = Callable[..., TrainConfig]


@pytest.mark.parametrize("search", ["gradient", "spsa", "sampled"])
@pytest.mark.parametrize("rectangular", [False, True])
def test_paths_are_learned_and_recorded(make: Make, search: str, rectangular: bool) -> None:
    groups = {"near": ["neither"], "far": ["both", "red right"]}
    values: dict[str, Any] = {"search": search, "rectangular": rectangular, "search_share": 0.9}
    config = make(paths=2, class_groups=groups, dilation=4, epochs=2, **values)
    metrics = train(config)
    assert [path["class_group"] for path in metrics["paths"]] == [["neither"], ["red right", "both"]]
    assert [path["class_group_name"] for path in metrics["paths"]] == ["near", "far"]
    with (Path(config.run.out) / "paths.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    series = {(row["path"], row["axis"]) for row in rows}
    assert series == {(path, axis) for path in "12" for axis in (("height", "width") if rectangular else ("height",))}
    assert len(rows) == 2 * STEPS_AN_EPOCH * len(series)
    last = {(int(row["path"]), row["axis"]): float(row["effective_dilation"]) for row in rows[-len(series) :]}
    # Snapped at the search's end, before the last step.
    assert [path["effective_dilation"] for path in metrics["paths"]] == [last[index, "height"] for index in (1, 2)]
    for path in metrics["paths"]:
        assert path["receptive_field_px"] == pytest.approx(15 + 8 * path["effective_dilation"], rel=1e-6)
        assert path["factor"] == pytest.approx(4 / path["effective_dilation"], rel=1e-6)
    assert ("rectangle" in metrics) == rectangular
    for field in metrics.get("rectangle", ()):
        assert field["effective_dilation"] == last[field["path"] + 1, field["axis"]]
    # Each has gone its own way, and what a step ran at is what its row says.
    ways = [[row["factor"] for row in rows if (row["path"], row["axis"]) == each] for each in sorted(series)]
    assert all(len(set(way)) > 1 for way in ways)
    assert all(ways.count(way) == 1 for way in ways)
    assert (Path(config.run.out) / "paths.png").is_file()
    if search == "sampled":
        assert len(metrics["search"]["factors"]) == len(series)
    again = load_run(config.run.out).network
    for path, described in zip(again.head.paths, metrics["paths"], strict=True):
        assert path.effective_dilation[0] == pytest.approx(described["effective_dilation"], rel=1e-6)


@pytest.mark.figures
def test_paths_that_are_not_needed_are_taken_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Combinations, "fewest", lambda self: self.best_of_each_size()[2])
    config = make(search="sampled", paths="auto", epochs=4, search_share=0.5)
    metrics = train(config)
    out = Path(config.run.out)
    assert len(metrics["paths"]) == 2
    assert load_config(out / "config.yaml").model.paths == 2
    sets = metrics["search"]["sets"]
    assert 1 <= len(sets["best"]) <= 10
    assert sets["best"][0]["loss"] <= min(each["loss"] for each in sets["best_of_each_size"])
    assert [sum(rate is not None for rate in each["rates"]) for each in sets["best_of_each_size"]] == [1, 2, 3, 4]
    kept = [path for path, rate in enumerate(sets["chosen"]["rates"]) if rate is not None]
    assert [sets["chosen"]["rates"][path] for path in kept] == [path["effective_dilation"] for path in metrics["paths"]]
    assert [factor["path"] for factor in metrics["search"]["factors"]] == kept
    costs = sets["class_costs"]
    named = [name for path in metrics["paths"] for name in path["serves"]]
    assert len(named) == sum(any(cost is not None for cost in row) for row in costs)
    assert (out / "class_paths.png").stat().st_size > 5_000
    network = load_run(out).network
    assert len(network.head.heads()) == 2
    # The paths that are left out have not been trained since, nor decayed.
    saved = read_checkpoint(out / "checkpoints" / "last.ckpt")["state_dict"]
    for path in set(range(4)) - set(kept):
        assert not saved[f"network.head.paths.{path}.layers.fc8.weight"].any()


@pytest.mark.parametrize(("search", "most"), [("sampled", 0.7), ("spsa", 0.8)])
def test_a_search_computes_features_once_for_all_dilations(
    make: Make, monkeypatch: pytest.MonkeyPatch, search: str, most: float
) -> None:
    calls = {"features": 0, "logits_of": 0}

    def count(method: str) -> None:
        real = getattr(ParsingNetwork, method)

        def counting(self: ParsingNetwork, *arguments: Any) -> Any:
            calls[method] += not torch.is_inference_mode_enabled()  # The validation looks once.
            return real(self, *arguments)

        monkeypatch.setattr(ParsingNetwork, method, counting)

    count("features")
    count("logits_of")
    train(make(search=search, decoder=True))
    assert 0 < calls["features"] < most * calls["logits_of"], calls


def test_published_guidance_warns_of_the_drift(make: Make) -> None:
    values: dict[str, Any] = {"path_guidance": "gradient", "path_weight": 30.0, "optimizer": "adamw", "lr": 0.05}
    config = make(
        paths=2, class_groups=[["neither"], ["both"]], epochs=20, val_every=20, head_lr_scale=1.0, dropout=0.0, **values
    )
    with pytest.warns(UserWarning, match="no joint rest point"):
        train(config)


def test_a_drift_is_told_where_the_sum_explodes_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ParsingModule.training_step

    def training_step(self: ParsingModule, *arguments: Any) -> Any:
        loss = real(self, *arguments)
        self.network.head.path_logits = torch.tensor([60.0, 55.0, 80.0])
        return loss

    monkeypatch.setattr(ParsingModule, "training_step", training_step)
    config = make(paths=2, class_groups=[["neither"], ["both"]], path_guidance="gradient", epochs=1)
    with pytest.warns(UserWarning, match="60 in root mean square where their sum has 80"):
        train(config)


@pytest.mark.parametrize("shared", ["search", "always"])
def test_paths_share_a_kernel_during_the_search_or_always(make: Make, shared: str) -> None:
    config = make(search="sampled", paths=2, shared_kernel=shared, epochs=2, search_share=0.5)
    train(config)
    one, other = (
        dict(path.layers.named_parameters())
        for path in load_run(config.run.out, search_weights=True).network.head.paths
    )
    assert [name for name in one if name.endswith(("weight", "bias")) and not torch.equal(one[name], other[name])] == []
    one, other = (dict(path.layers.named_parameters()) for path in load_run(config.run.out).network.head.paths)
    equal = [torch.equal(one[name], other[name]) for name in one if not name.endswith("log_factor")]
    assert all(equal) == (shared == "always")


def test_aspp_trains_with_equal_dilations_a_1x1_convolution_and_image_pooling(make: Make) -> None:
    metrics = train(make(aspp=("pool", 4, "1x1", 4), search="none", epochs=1))
    assert [path["effective_dilation"] for path in metrics["paths"]] == [0, 4, 0, 4]
    assert [path["receptive_field_px"] for path in metrics["paths"]] == [None, 15 + 8 * 4, 15, 15 + 8 * 4]
    assert [path.get("branch") for path in metrics["paths"]] == ["pool", None, "1x1", None]
    assert metrics["effective_dilation"] == 4


def test_further_paths_take_the_place_of_dilated_ones(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # Image pooling and one dilation are best; the 1x1 convolution and the other dilations are not.
    def score(table: Combinations, combination: tuple[int | None, ...]) -> list[list[float]]:
        return [[float(sum((place is not None) != (path in (1, 3)) for path, place in enumerate(combination)))]]

    monkeypatch.setattr(Combinations, "_score", score)
    config = make(search="sampled", paths=2, extra_paths=("1x1", "pool"), epochs=2, search_share=0.5)
    metrics = train(config)
    assert [path.get("branch") for path in metrics["paths"]] == [None, "pool"]
    rates = metrics["search"]["sets"]["chosen"]["rates"]
    assert (rates[0], rates[2], rates[3]) == (None, None, 0)
    assert [factor["path"] for factor in metrics["search"]["factors"]] == [1]
    network = load_run(config.run.out).network
    assert [path.branch for path in network.head.heads()] == [None, "pool"]
    assert network.spec is not None
    assert network.spec.head.extra_paths == ("pool",)
    image = torch.rand(1, 3, 40, 33)
    torch.testing.assert_close(rebuild(network)(image), network(image))
    # The weights of the search have all paths, and run at any dilation.
    shared = load_run(config.run.out, search_weights=True).network
    assert len(shared.head.heads()) == 4
    before = shared(image)
    run_at_dilations(shared, [2, 3])
    assert [path.realised_dilation for path in shared.head.heads()] == [(2, 2), (3, 3), (0, 0), (0, 0)]
    assert not torch.allclose(shared(image), before)
    with pytest.raises(ValueError, match="got 1 dilation, but the network has 2 learned dilations"):
        run_at_dilations(shared, [2])


def rebuild(network: ParsingNetwork) -> torch.nn.Module:
    """Return a network built from what checkpoints hold, with the same weights."""
    again = rebuild_network(describe_network(network), Path("checkpoint"))
    again.load_state_dict(network.state_dict())
    return again.eval()


def test_a_sampled_search_holds_images_out_and_gives_them_back(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    real = AugmentedDataset.__getitem__

    def watched(self: AugmentedDataset, key: tuple[int, int]) -> Any:
        seen.extend(set() for _ in range(key[0] + 1 - len(seen)))
        seen[key[0]].add(key[1])
        return real(self, key)

    monkeypatch.setattr(AugmentedDataset, "__getitem__", watched)
    config = make(search="sampled", search_share=0.6, dilation=5)
    metrics = train(config)
    assert [len(images) for images in seen] == [4, 4, 6], "a third is held out"
    dilations = read_factor_csv(Path(config.run.out) / "factor.csv")["effective_dilation"]
    assert dilations[5:].tolist() == pytest.approx([metrics["effective_dilation"]] * 4)
    assert metrics["search"]["kind"] == "sampled"
    curve = dict(metrics["search"]["curve"])
    assert min(curve, key=lambda dilation: curve[dilation]) == pytest.approx(metrics["effective_dilation"], abs=1)
    assert all(loss > 0 for loss in curve.values())


@pytest.mark.parametrize("loss", ["cross_entropy", "dice"])
def test_the_curve_counts_small_classes_unless_the_loss_says_what_counts(
    make: Make, loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    read: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    real_logits, real_losses = ParsingModule._logits, SampledSearch._call_loss_fn

    def watched_logits(self: ParsingModule, network: torch.nn.Module, batch: Any) -> Any:
        seen.append(real_logits(self, network, batch))
        return seen[-1]

    def watched_losses(self: SampledSearch, batch: Any) -> Any:
        output = real_losses(self, batch)
        if not self.model.training:
            read.append((batch[1], *seen[-1], output[1]))
        return output

    monkeypatch.setattr(ParsingModule, "_logits", watched_logits)
    monkeypatch.setattr(SampledSearch, "_call_loss_fn", watched_losses)
    train(make(search="sampled", search_share=0.6, loss=loss))
    whole = {mask.numpy().tobytes(): mask for mask, *_ in read}
    labels = torch.cat([mask[mask != 255] for mask in whole.values()])
    weight = (labels.bincount() / len(labels)).sqrt().sum()
    for _, logits, mask, factor_losses in read:
        losses = [
            F.cross_entropy(logits[0, :, y, x], mask[0, y, x]) * (len(labels) / (labels == mask[0, y, x]).sum()).sqrt()
            for y, x in (mask[0] != 255).nonzero().tolist()
        ]
        expected = (torch.stack(losses).mean() / weight).item()
        assert (factor_losses.item() == pytest.approx(expected, rel=1e-4)) == (loss == "cross_entropy")


def test_the_start_of_a_sampled_search_does_not_matter(make: Make) -> None:
    first, second = (train(make(f"from-{d}", search="sampled", dilation=d, freeze_backbone=True)) for d in (2, 7))
    assert first["miou"] == second["miou"]
    assert first["effective_dilation"] == pytest.approx(second["effective_dilation"])


def test_no_search_has_no_factor(make: Make) -> None:
    config = make(search="none", epochs=1)
    metrics = train(config)
    assert "search" not in metrics
    assert metrics["factor"] == 1
    with pytest.raises(FileNotFoundError, match=r"search_weights\.safetensors: a run has it once its sampled"):
        load_run(config.run.out, search_weights=True)
    with pytest.raises(ValueError, match="got 1 dilation, but the network has none that is learned"):
        run_at_dilations(load_run(config.run.out).network, [2])
