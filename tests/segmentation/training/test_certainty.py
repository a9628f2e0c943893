"""What a training says of how sure its search is, and the images that it is told by."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rfield.search import judge
from rfield.segmentation.cli import main
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import load_dataset
from rfield.segmentation.files.atomic import write_json
from rfield.segmentation.runs import build_network
from rfield.segmentation.training import train
from rfield.segmentation.training.held_out import HeldOut, WholeImages, draw_held_out
from rfield.segmentation.training.losses import make_loss
from rfield.segmentation.training.module import ParsingModule

Make = Callable[..., TrainConfig]


def data_of(tmp_path: Path, length: int) -> str:
    path = tmp_path / f"data{length}.yaml"
    path.write_text(f"format: synthetic\nsize: [48, 57]\ndistance: 12\nlength: {length}\n")
    return str(path)


@pytest.mark.slow
def test_a_search_that_has_learned_is_judged_by_its_images(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(
        data=data_of(tmp_path, 60),
        search="sampled",
        search_share=1.0,
        dilation=9,
        head_channels=16,
        dropout=0.0,
        optimizer="adamw",
        lr=3e-3,
        head_lr_scale=1.0,
        crop_size=(41, 41),
        scale_range=(1.0, 1.0),
        flip=False,
        colour_jitter=0.0,
        batch_size=4,
        epochs=10,
        val_every=10,
    )
    search = train(config)["search"]
    assert "held out" not in capsys.readouterr().err
    verdict = search["verdict"]
    assert (verdict["kind"], verdict["dilation"], verdict["present"]) == ("clear", 2, 9)
    assert verdict["gain"] > 2 * verdict["standard_error"] > 0
    assert len(search["held_out"]) == 16 == len(set(search["held_out"]))
    losses = dict(search["losses"])
    assert {len(each) for each in losses.values()} == {16}
    assert [dilation for dilation, _ in search["errors"]] == list(losses) == [d for d, _ in search["curve"]]
    assert dict(search["errors"])[2.0] == 0 < dict(search["errors"])[1.0] < 0.1
    assert all(len(reading["errors"]) == len(reading["curve"]) for reading in search["readings"])
    text = (Path(config.run.out) / "metrics.json").read_text()
    assert json.loads(text)["search"] == json.loads(json.dumps(search))
    assert max(len(line) for line in text.splitlines()) > 200, "a line of losses a dilation, not one a loss"


@pytest.mark.slow
@pytest.mark.parametrize("search", ["sampled", "gradient", "spsa"])
def test_the_command_says_first_and_last_that_an_answer_is_not_reliable(
    make: Make, search: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make(search=search, freeze_backbone=True, epochs=1)
    arguments = [f"--{name}={value}" for name, value in config.plain().items() if name in ("data", "out", "cache")]
    main(["train", *arguments, "--model=small_cnn", "--head-channels=8", f"--search={search}", "--epochs=1",
          "--freeze-backbone", "--batch-size=2", "--workers=0"])  # fmt: skip
    shown = capsys.readouterr()
    (line,) = [line for line in shown.out.splitlines() if line.startswith("not reliable: ")]
    verdict = json.loads((Path(config.run.out) / "metrics.json").read_text())["search"]["verdict"]
    assert line == f"not reliable: {verdict['reason']}"
    if search == "sampled":
        assert "reads its curve on 2 of 6 training images, at most a third; with fewer than 16" in shown.err
        for reason in ("2 held-out images", "frozen at random weights", "steps"):
            assert reason in line
    else:
        assert "reads its curve on" not in shown.err
        assert f"a search by {search} reads no curve" in line


@pytest.mark.slow
@pytest.mark.figures
def test_every_path_has_a_verdict(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make(search="sampled", paths=2, rectangular=True, epochs=2)
    search = train(config)["search"]
    assert [(each["path"], each["axis"]) for each in search["factors"]] == [
        (0, "height"), (0, "width"), (1, "height"), (1, "width")
    ]  # fmt: skip
    assert all(each["verdict"]["kind"] == "not reliable" for each in search["factors"])
    assert search["verdict"] == search["factors"][0]["verdict"]
    assert (Path(config.run.out) / "curve.png").stat().st_size > 10_000


class TestHeldOut:
    def test_a_tenth_but_16_where_a_third_allows(self, make: Make) -> None:
        for count in (*range(3, 60), 100, 159, 161, 639, 641, 5000):
            drawn = draw_held_out(count, "synthetic", seed=0)
            assert len(drawn) <= count / 3
            assert len(drawn) == min(64, max(16, round(count / 10))) or (count < 48 and len(drawn) == count // 3)
            assert drawn == sorted(set(drawn))
            assert 0 <= drawn[0] <= drawn[-1] < count

    def test_two_images_are_too_few(self, make: Make) -> None:
        with pytest.raises(ValueError, match="has 2 images to train on, and 3 are needed"):
            draw_held_out(2, "synthetic", seed=0)

    def test_images_without_a_label_are_not_read(self, make: Make) -> None:
        samples = WholeImages(load_dataset(make().data.data, "train"), None)

        class Void(WholeImages):
            void: Sequence[int] = (1, 4)

            def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
                image, mask = super().__getitem__(index)
                return image, torch.full_like(mask, 255) if index in self.void else mask

        void = Void(samples.dataset, None)
        assert HeldOut(void, [0, 1, 2, 4]).indices == [0, 2]
        assert HeldOut(void, [0, 2]).ids == [samples.dataset.ids[0], samples.dataset.ids[2]]
        with pytest.raises(ValueError, match="2 training images out, but none of them has a labelled pixel"):
            HeldOut(void, [1, 4])
        void.void = range(len(void))
        with pytest.raises(ValueError, match=r"none of the \d+ training images has a labelled pixel: label the images"):
            HeldOut(void, [1, 4])

    def test_pixels_weigh_by_the_root_of_their_class_s_rarity(self, make: Make) -> None:
        masks = [torch.tensor([[0, 0, 0, 255], [0, 0, 0, 255]]), torch.tensor([[0, 0, 0, 1]]), torch.tensor([[3] * 9])]
        samples: Any = [(None, mask) for mask in masks]
        weights = HeldOut(samples, [0, 1]).class_weights(4)
        # Shares of 9/10 and 1/10: a third of the weight, and on average 1.
        assert weights[1:].tolist() == pytest.approx([3 * float(weights[0]), 0, 0])
        assert (0.9 * weights[0] + 0.1 * weights[1]).item() == pytest.approx(1)


class TestChances:
    """The loss of predicting the classes' shares, as the search reads losses."""

    def module(self, make: Make, reading_weights: torch.Tensor | None = None, **values: Any) -> ParsingModule:
        torch.manual_seed(0)
        config = make(search="sampled", **values).resolved()
        network = build_network(config, 4, None, [(0, 1), (2, 3)] if values.get("class_groups") else None)
        names = ("a", "b", "c", "d")
        groups = [(0, 1), (2, 3)] if values.get("class_groups") else None
        weights = values.get("class_weights")
        module = ParsingModule(network, config, names, self.batches(), groups, weights, reading_weights)
        module.search = module._make_search(10)
        return module

    def batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        masks = torch.randint(0, 4, (3, 1, 17, 17)).clamp(max=2)
        masks[1, 0, :9] = 255
        masks[2, 0, 4:] = 0
        return [(torch.randn(1, 3, 17, 17), mask) for mask in masks]

    def read(self, module: ParsingModule, logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
        """The held-out losses, factor by factor, of a network that predicts the same everywhere."""

        def constant(self: ParsingModule, network: Any, batch: Any) -> Any:
            mask = self._target(network, batch)[1]
            return logits[None, :, None, None].expand(-1, -1, *mask.shape[1:]), mask

        monkeypatch.setattr(ParsingModule, "_logits", constant)
        assert module.search is not None
        loss = module.search.loss_fn
        with torch.no_grad():
            found = [loss(module.network, batch) for batch in self.batches()]
        each = [value[1] if isinstance(value, tuple) else value.expand(1) for value in found]
        return torch.stack(each).mean(0)

    @pytest.mark.parametrize("kind", ["plain", "weighted", "guided", "class_weights"])
    def test_no_constant_prediction_does_better(self, make: Make, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        reading_weights = None if kind == "class_weights" else torch.tensor([0.5, 2.0, 1.0, 0.0])
        values: dict[str, Any] = {}
        if kind == "plain":
            reading_weights = torch.ones(4)
        if kind == "guided":
            values = {"paths": 2, "class_groups": "x", "path_guidance": "search", "path_weight": 3.0}
        if kind == "class_weights":
            values = {"class_weights": (1.0, 5.0, 0.5, 1.0)}
        module = self.module(make, reading_weights, **values)
        torch.manual_seed(1)
        batches = self.batches()
        monkeypatch.setattr(self, "batches", lambda: batches)
        chances = module.chances(batches)
        shares = []
        for _, mask in [module._target(module.network, batch)[:2] for batch in batches]:
            counts = mask[mask != 255].bincount(minlength=4) * torch.tensor(values.get("class_weights", (1.0,) * 4))
            shares.append(counts / counts.sum())
        for index, chance in enumerate(chances):
            weights = torch.ones(4) if reading_weights is None else reading_weights.clone()
            if kind == "guided":
                weights[[2 * index, 2 * index + 1]] *= 3
            best = (torch.stack(shares).mean(0) * weights).clamp(min=1e-12).log()
            assert self.read(module, best, monkeypatch)[index].item() == pytest.approx(chance, rel=1e-4)
            for _ in range(5):
                assert self.read(module, best + torch.randn(4), monkeypatch)[index] > chance

    def test_of_another_loss_it_is_that_loss(self, make: Make) -> None:
        pytest.importorskip("segmentation_models_pytorch")
        module = self.module(make, loss="dice")
        torch.manual_seed(1)
        batches = self.batches()
        (chance,) = module.chances(batches)
        masks = [module._target(module.network, batch)[1] for batch in batches]
        shares = [mask[mask != 255].bincount(minlength=4) / (mask != 255).sum() for mask in masks]
        logits = torch.stack(shares).mean(0).clamp(min=1e-12).log()[None, :, None, None]
        losses = [make_loss("dice", 4)(logits.expand(-1, -1, *mask.shape[1:]), mask) for mask in masks]
        assert chance == pytest.approx(torch.stack(losses).mean().item())
        shares = masks[0].flatten()[masks[0].flatten() != 255].bincount(minlength=4).float()
        logits = (shares / shares.sum()).clamp(min=1e-12).log()[None, :, None, None].expand(-1, -1, *masks[0].shape[1:])
        alone = make_loss("dice", 4)(logits, masks[0]).item()
        assert module.chances(batches[:1]) == [pytest.approx(alone)], "one image is enough"

    def test_a_network_that_predicts_them_is_not_reliable(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        module = self.module(make, torch.ones(4))
        torch.manual_seed(1)
        batches = self.batches()
        monkeypatch.setattr(self, "batches", lambda: batches)
        (chance,) = module.chances(batches)
        loss = self.read(module, torch.zeros(4), monkeypatch).tolist() * 16
        verdict = judge([[{1: loss, 2: loss, 4: loss}]], 2, chance=chance)
        assert verdict.kind == "not reliable"
        assert "no better than that of the class frequencies" in verdict.reason

    def test_no_labels_where_the_loss_is_taken(self, make: Make) -> None:
        batch = (torch.randn(1, 3, 17, 17), torch.full((1, 17, 17), 255))
        with pytest.raises(ValueError, match="no pixel of the held-out images has a label"):
            self.module(make, torch.ones(4)).chances([batch])


def test_numbers_of_a_list_share_a_line_and_texts_stay(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None, float("inf")], "b": ["x [ 1,  2 ]", [-1e-9]], "c": [], "d": [[1, 2], [3]]}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == content
    assert '"a": [1, 2.5, null, Infinity],' in text
