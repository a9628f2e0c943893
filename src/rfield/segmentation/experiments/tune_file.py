"""Find the receptive field that a network of the user's own should have: `rfield tune --model FILE.py:NAME`."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from rfield.receptive_field.probe import output_map
from rfield.segmentation.config.experiments import TuneConfig
from rfield.segmentation.config.train import differences
from rfield.segmentation.conventions import Progress
from rfield.segmentation.data import IGNORE_INDEX, ParsingDataset, load_dataset, training_transform
from rfield.segmentation.files.atomic import write_json, write_text
from rfield.segmentation.inference.predict import compute_device
from rfield.segmentation.web.report import try_report
from rfield.surgery.tune import Tuned, tune
from rfield.text import counted

# Options that mean something for a network that rfield has not built.
_OPTIONS = (
    *("data", "train_split", "crop_size", "scale_range", "flip", "colour_jitter"),
    *("model", "out", "report", "workers", "batch_size", "epochs", "max_steps", "lr", "seeds", "select", "share"),
)


def run_tune_file(config: TuneConfig, network: nn.Module, progress: Progress | None = None) -> str:
    """Find the dilations of a network's convolutions by `rfield.tune`, with cross-entropy on a data set.

    The network is trained as a whole, from the weights that it has. The answer is written to `answer.md` and
    `answer.json` in the folder `out`.

    Args:
        config: what to tune, on which data.
        network: maps normalised images to logits, one channel for each class, of any size.
        progress: called with (steps done, all steps).

    Returns:
        The page.

    Raises:
        ValueError, OSError: if the data cannot be read, the network does not fit them, or the config has options of
            rfield's own networks.
    """
    _check_options(config)
    options, optim = config.train.data, config.train.optim
    dataset = load_dataset(options.data, options.train_split)
    loader = DataLoader(
        _Samples(dataset, config), optim.batch_size or 8, shuffle=True, num_workers=config.train.run.workers
    )
    steps = min(optim.max_steps or optim.epochs * len(loader), optim.epochs * len(loader))
    device = compute_device()
    found = tune(
        network.to(device),
        _loss_function(config.train.model.model, options.data, dataset.num_classes, device),
        loader,
        config.grid.select,
        config.grid.share,
        steps=steps,
        lr=optim.lr or 1e-4,
        seeds=config.grid.seeds,
        progress=progress,
    )
    page = _page(config, found, steps)
    out = Path(config.train.run.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "answer.json", {**_plain(found), "steps": steps, "config": config.plain()})
    write_text(out / "answer.md", page)
    if config.train.run.report != "none":
        try_report(out)
    return f"{page}\nthis page and answer.json are in {out}"


def _check_options(config: TuneConfig) -> None:
    """Raise ValueError for options that have no meaning for a network of the user's own."""
    default = TuneConfig(data=config.train.data.data, out=config.train.run.out)
    changed = [line.partition(":")[0] for line in differences(default.plain(), config.plain(), ignored=_OPTIONS)]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} {'is' if len(changed) == 1 else 'are'} for rfield's own networks, and not for "
            f"{config.train.model.model}"
        )


class _Samples(Dataset[tuple[Tensor, Tensor]]):
    """Random crops of a data set's images and masks."""

    def __init__(self, dataset: ParsingDataset, config: TuneConfig) -> None:
        options = config.train.data
        self.dataset = dataset
        self.transform = training_transform(
            options.crop_size, options.scale_range, options.flip, options.colour_jitter, dataset.mirrored_classes
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.transform(*self.dataset[index])
        return image, mask


def _loss_function(model: str, data: str, num_classes: int, device: torch.device) -> Any:
    """Return the cross-entropy over the labelled pixels of a batch; 0 for one without labels."""

    def loss_fn(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        image, mask = (part.to(device) for part in batch)
        logits = output_map(network(image))
        if logits.shape[1] != num_classes:
            raise ValueError(
                f"{model} returns {counted(logits.shape[1], 'channel')}, but {data} has {counted(num_classes, 'class')}"
            )
        if logits.shape[2:] != mask.shape[1:]:
            logits = F.interpolate(logits, mask.shape[1:], mode="bilinear")
        total = F.cross_entropy(logits, mask, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / (mask != IGNORE_INDEX).sum().clamp(min=1)

    return loss_fn


def _plain(found: Tuned) -> dict[str, Any]:
    factors = [
        {
            "layers": {name: {"now": now, "best": best} for name, (now, best) in factor.layers.items()},
            "side": factor.side or None,
            "curve": list(factor.curve.items()),
            "verdict": factor.verdict.plain(),
        }
        for factor in found.factors
    ]
    return {"recommended_dilations": found.dilations, "factors": factors}


def _page(config: TuneConfig, found: Tuned, steps: int) -> str:
    """Return the answer as a page of Markdown."""
    factors = "\n".join(f"- {factor}" for factor in found.factors)
    code = str(found).splitlines()[-1]
    seeds = counted(len(config.grid.seeds), "seed")
    about = f"{config.train.model.model} on {config.train.data.data}, {counted(steps, 'step')}, {seeds}."
    return f"""# What receptive field should this network have?

{about} Each line: the layers of one factor, their dilations now and the best
ones that were read, and how sure that is.

{factors}

```python
{code}
```
"""
