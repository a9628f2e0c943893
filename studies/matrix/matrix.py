"""Everybody's models through all of rfield: adapted, trained, fused, exported, compiled, timed; a table, cell by cell.

    PYTHONPATH=. python studies/matrix/matrix.py OUT [--only NAME,...] [--stages STAGE,...] [--steps 20] [--rounds 9]

Weights are random and nothing is downloaded. OUT/matrix.json is written after every model, and cells in it are kept: a
model is run again for the cells that it lacks. OUT/matrix.md is the table. A cell that cannot be filled holds the
reason, and those that need it say so.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.timing import Group, machine, measure, peak_memory
from torch import Tensor, nn

import rfield
from rfield.search import SampledSearch
from rfield.segmentation.export.onnx import compare, quiet_exporters, write_onnx
from rfield.surgery.fuse import dilations, set_dilations

CLASSES = 3
BATCH = 2
STAGES = {
    "adapt": "adapt",
    "train": "train",
    "moved": "dilations that changed",
    "fuse": "fuse",
    "parity": "fused: difference",
    "onnx": "ONNX: difference",
    "ops": "same ONNX operators",
    "sizes": "ONNX, other sizes: difference",
    "compile": "torch.compile: difference",
    "inductor": "inductor: difference",
    "latency": "time, fused / stock",
    "memory": "peak memory, fused / stock",
}
# What a stage works on: without it the stage is not reached.
NEEDS = {
    "train": "adapt",
    "moved": "train",
    "fuse": "train",
    "parity": "fuse",
    "onnx": "fuse",
    "ops": "onnx",
    "sizes": "fuse",
    "compile": "fuse",
    "inductor": "fuse",
    "latency": "fuse",
    "memory": "fuse",
}
# Of the range of all logits.
TOLERANCE = 1e-4
LIBRARIES = ("torchvision", "segmentation-models-pytorch", "transformers", "timm", "onnx", "onnxscript", "onnxruntime")


class TimmSegmenter(nn.Module):
    """The last map of a timm network at stride 8, and a 1x1 convolution."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import timm

        self.backbone = timm.create_model(name, pretrained=False, features_only=True, output_stride=8)
        self.classifier = nn.Conv2d(self.backbone.feature_info.channels()[-1], CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.backbone(image)[-1])


class Logits(nn.Module):
    """A model of any library as a function of the image to its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        output = self.model(image)
        output = output["out"] if isinstance(output, dict) and "out" in output else output
        return getattr(output, "logits", output)


def torchvision(name: str) -> nn.Module:
    from torchvision.models import segmentation

    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES)


def smp(name: str) -> nn.Module:
    import segmentation_models_pytorch

    return getattr(segmentation_models_pytorch, name)("resnet18", encoder_weights=None, classes=CLASSES)


def segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 64], "num_attention_heads": [1, 2, 4, 8]}
    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=CLASSES, decoder_hidden_size=32, **sizes))


def upernet() -> nn.Module:
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 48, 64], out_features=stages)
    config = {"hidden_size": 32, "auxiliary_in_channels": 48, "auxiliary_channels": 16}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone, num_labels=CLASSES, **config))


def mobilevit() -> nn.Module:
    from transformers import MobileViTConfig, MobileViTForSemanticSegmentation

    return MobileViTForSemanticSegmentation(MobileViTConfig(num_labels=CLASSES, output_stride=16))


def dpt() -> nn.Module:
    from transformers import DPTConfig, DPTForSemanticSegmentation

    encoder = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    decoder = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 32}
    return DPTForSemanticSegmentation(DPTConfig(num_labels=CLASSES, image_size=96, **encoder, **decoder))


# How a model is built, the image's side in px, and which convolutions are named where none is dilated.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, str | None]] = {
    "torchvision lraspp_mobilenet_v3_large": (lambda: torchvision("lraspp_mobilenet_v3_large"), 97, None),
    "torchvision deeplabv3_mobilenet_v3_large": (lambda: torchvision("deeplabv3_mobilenet_v3_large"), 97, None),
    "torchvision fcn_resnet50": (lambda: torchvision("fcn_resnet50"), 97, None),
    "torchvision deeplabv3_resnet50": (lambda: torchvision("deeplabv3_resnet50"), 97, None),
    "smp DeepLabV3, resnet18": (lambda: smp("DeepLabV3"), 96, None),
    "smp DeepLabV3Plus, resnet18": (lambda: smp("DeepLabV3Plus"), 96, None),
    "smp PAN, resnet18": (lambda: smp("PAN"), 128, None),
    "smp UPerNet, resnet18": (lambda: smp("UPerNet"), 96, "decoder.fpn_conv_blocks"),
    "smp Unet, resnet18": (lambda: smp("Unet"), 96, "decoder.blocks.0"),
    "transformers Segformer": (segformer, 96, "*.dwconv.dwconv"),
    "transformers UperNet, ConvNext": (upernet, 96, "*.dwconv"),
    "transformers MobileViT, DeepLabV3": (mobilevit, 96, None),
    "transformers DPT": (dpt, 96, "neck.fusion_stage.layers.*"),
    "timm resnet18, stride 8": (lambda: TimmSegmenter("resnet18"), 97, None),
    "timm convnext_atto, stride 8": (lambda: TimmSegmenter("convnext_atto"), 97, None),
    "timm regnety_002, stride 8": (lambda: TimmSegmenter("regnety_002"), 97, None),
    "timm tf_efficientnet_lite0, stride 8": (lambda: TimmSegmenter("tf_efficientnet_lite0"), 97, None),
}


def data(count: int, side: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(BATCH, 3, side, side, generator=generator) for _ in range(count)]
    return [(image, (F.avg_pool2d(image[:, :1], 9, 1, 4)[:, 0] > 0).long()) for image in images]


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    image, mask = batch
    return F.cross_entropy(F.interpolate(Logits(model)(image), mask.shape[1:], mode="bilinear"), mask)


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    # rfield's own reasons are whole sentences.
    return (text if type(error) is ValueError else f"{type(error).__name__}: {text}")[:300]


class Trial:
    """One model on its way through the stages; each method is a stage and gives the cell's text and its figures."""

    def __init__(self, name: str, steps: int, rounds: int, out: Path) -> None:
        self.build, self.side, self.select = MODELS[name]
        self.steps, self.rounds, self.out = steps, rounds, out
        torch.manual_seed(0)
        self.stock = self.build()
        self.model = copy.deepcopy(self.stock)
        self.image = data(1, self.side)[0][0]

    def adapt(self) -> tuple[str, dict[str, Any]]:
        how = ""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                self.layers = rfield.adapt(self.model)
            except ValueError:
                if self.select is None:
                    raise
                self.layers = rfield.adapt(self.model, self.select)
                how = f", none dilated: `{self.select}`"
        left = [str(warning.message) for warning in caught if "is left as it is" in str(warning.message)]
        how += f"; {len(left)} left out" if left else ""
        return f"{len(self.layers)} convolutions{how}", {"layers": len(self.layers), "left_out": left}

    def train(self) -> tuple[str, dict[str, Any]]:
        batches = data(self.steps + 1, self.side)
        # One reading, at the end, of three dilations a factor on one image: the search's mechanics, not its quality.
        held_out = [tuple(part[:1] for part in batches.pop())]
        search = SampledSearch(self.model.train(), loss_fn, self.steps, held_out, narrowings={}, candidates=3)
        optimizer = torch.optim.AdamW(rfield.parameter_groups(self.model, lr=1e-4, factor_lr=0.05))
        self.start = [layer.effective_dilation[0] for layer in self.layers]
        losses = []
        for batch in batches:
            loss = search.loss(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            search.step()
            losses.append(float(loss.detach()))
        if not (search.done and all(torch.isfinite(torch.tensor(losses)))):
            raise ValueError(f"the losses are {losses}")
        self.search = search
        return f"ok, loss {losses[0]:.2f} to {losses[-1]:.2f}", {"losses": losses}

    def moved(self) -> tuple[str, dict[str, Any]]:
        # Every layer has a factor of its own, in the order of the layers.
        ends = [values[0] for values in self.search.unsnapped]
        changes = [max(end / start, start / end) for start, end in zip(self.start, ends, strict=True)]
        snapped = [round(layer.effective_dilation[0]) for layer in self.layers]
        count = sum(end != round(start) for start, end in zip(self.start, snapped, strict=True))
        if not count:
            raise ValueError(f"no dilation changed; the largest change of a factor is {max(changes):.2g} times")
        figures = {"start": self.start, "end": ends, "snapped": snapped, "changes": changes}
        return f"{count} of {len(changes)}, up to {max(changes):.2g} times", figures

    def fuse(self) -> tuple[str, dict[str, Any]]:
        self.plain = rfield.fuse(self.model.eval())
        ours = [name for name, module in self.plain.named_modules() if type(module).__module__.startswith("rfield")]
        if ours:
            raise ValueError(f"rfield's layers are left at {', '.join(ours)}")
        set_dilations(self.stock, dilations(self.plain))
        self.stock.load_state_dict(self.plain.state_dict(), strict=True)
        self.stock.eval()
        return "ok", {"dilations": dilations(self.plain)}

    def parity(self) -> tuple[str, dict[str, Any]]:
        image = [self.image]
        learned = compare(Logits(self.model), Logits(self.plain), image)[0]
        stock = compare(Logits(self.stock), Logits(self.plain), image)[0]
        return self._judged(max(learned, stock), {"learned": learned, "stock": stock})

    def onnx(self) -> tuple[str, dict[str, Any]]:
        difference, agreement = self._onnx_parity(self._write(self.plain, "fused"), [self.image])
        return self._judged(difference, {"agreement": agreement})

    def sizes(self) -> tuple[str, dict[str, Any]]:
        # Smp's models want whole multiples of their stride.
        other = torch.randn(BATCH, 3, self.side + 32, self.side + 64, generator=torch.Generator().manual_seed(1))
        Logits(self.plain)(other)
        path = self._write(self.plain, "sizes", {"image": dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)})
        difference, agreement = self._onnx_parity(path, [self.image, other])
        return self._judged(difference, {"agreement": agreement, "sizes": [list(other.shape[2:])]})

    def ops(self) -> tuple[str, dict[str, Any]]:
        fused, stock = (self._operators(path) for path in (self.out / "fused.onnx", self._write(self.stock, "stock")))
        if fused != stock:
            more = {name: fused[name] - stock[name] for name in fused | stock if fused[name] != stock[name]}
            raise ValueError(f"more or fewer in the fused network: {more}")
        return f"ok, {sum(fused.values())}", {"operators": dict(sorted(fused.items()))}

    def compile(self) -> tuple[str, dict[str, Any]]:
        return self._compiled("aot_eager")

    def inductor(self) -> tuple[str, dict[str, Any]]:
        return self._compiled("inductor")

    def latency(self) -> tuple[str, dict[str, Any]]:
        models = {"stock": self.stock, "stock again": copy.deepcopy(self.stock), "fused": self.plain}
        with torch.no_grad():
            cases = {name: lambda model=model: model(self.image) for name, model in models.items()}
            rows = {row["case"]: row for row in measure(Group("latency", cases), self.rounds)}
        (low, middle, high), again = rows["fused"]["ratio"], rows["stock again"]["ratio"][1]
        text = f"{middle:.2f} ({low:.2f} to {high:.2f}; stock / stock {again:.2f})"
        return text, {name: {"ms": row["ms"], "ratio": row["ratio"]} for name, row in rows.items()}

    def memory(self) -> tuple[str, dict[str, Any]]:
        with torch.no_grad():
            stock, fused = (peak_memory(lambda model=model: model(self.image)) for model in (self.stock, self.plain))
        return f"{fused / stock:.2f}", {"stock_mib": stock / 2**20, "fused_mib": fused / 2**20}

    def _compiled(self, backend: str) -> tuple[str, dict[str, Any]]:
        torch._dynamo.reset()
        compiled = torch.compile(Logits(self.plain), backend=backend, fullgraph=True)
        difference, _ = compare(Logits(self.plain), compiled, [self.image])
        return self._judged(difference, {"backend": backend})

    def _onnx_parity(self, path: Path, images: list[Tensor]) -> tuple[float, float]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def run(image: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])

        return compare(Logits(self.plain), run, images)

    def _judged(self, difference: float, figures: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        if not difference <= TOLERANCE:
            raise ValueError(f"the logits differ by {difference:.2g} of their range (at most {TOLERANCE:g})")
        return f"{difference:.0e}" if difference else "0", {"difference": difference, **figures}

    def _write(self, model: nn.Module, name: str, dynamic: dict[str, Any] | None = None) -> Path:
        path = self.out / f"{name}.onnx"
        with quiet_exporters():
            program = torch.export.export(Logits(model).eval(), (self.image,), dynamic_shapes=dynamic)
        write_onnx(program, {}, path)
        return path

    def _operators(self, path: Path) -> Counter[str]:
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        return Counter(node.op_type for graph in (model.graph, *model.functions) for node in graph.node)


def try_model(
    name: str, steps: int, rounds: int, wanted: list[str], cells: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The model's entry: the cells that are there, and those wanted."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(name, steps, rounds, Path(folder))
        run_stages(trial, wanted, cells)
    ordered = {stage: cells[stage] for stage in STAGES if stage in cells}
    return {"side": trial.side, "batch": BATCH, "steps": steps, "cells": ordered}


def run_stages(trial: Trial, wanted: list[str], cells: dict[str, dict[str, Any]]) -> None:
    """Fills the cells that lack; stages on which they rest are run again, and their cells stay."""
    missing = {stage for stage in wanted if stage not in cells}
    needed = set(missing)
    for stage in reversed(STAGES):
        if stage in needed and stage in NEEDS:
            needed.add(NEEDS[stage])
    for stage in (stage for stage in STAGES if stage in needed):
        need = NEEDS.get(stage)
        if need and not cells[need]["ok"]:
            cells.setdefault(stage, {"ok": False, "text": f"needs {need}"})
            continue
        begun = time.perf_counter()
        try:
            text, figures = getattr(trial, stage)()
            cell = {"ok": True, "text": text, **figures}
        except Exception as error:  # Whatever other people's code does is what the cell is for.
            cell = {"ok": False, "text": first_line(error)}
        cells.setdefault(stage, cell | {"seconds": round(time.perf_counter() - begun, 1)})


def table(report: dict[str, Any]) -> str:
    lines = ["| model | " + " | ".join(STAGES.values()) + " |", "|---" * (len(STAGES) + 1) + "|"]
    reasons = []
    for name in (name for name in MODELS if name in report["models"]):
        entry = report["models"][name]
        texts = []
        for stage in STAGES:
            cell = entry["cells"].get(stage)
            if cell is None:
                texts.append("")
                continue
            texts.append(cell["text"].replace("|", "\\|") if cell["ok"] or "seconds" not in cell else "**no**")
            if texts[-1] == "**no**":
                reasons.append(f"- {name}, {STAGES[stage]}: {cell['text']}")
            reasons += [f"- {name}: {text}" for text in cell.get("left_out", [])]
        lines.append(f"| {name}, {entry['side']} px | " + " | ".join(texts) + " |")
    cells = [entry["cells"] for entry in report["models"].values()]
    ok = [cell["ok"] for each in cells for cell in each.values()]
    lines += ["", f"{sum(ok)} of {len(ok)} cells hold."]
    timed = [each["latency"] for each in cells if each.get("latency", {"ok": False})["ok"]]
    if timed:
        medians = [statistics.median(each[case]["ratio"][1] for each in timed) for case in ("fused", "stock again")]
        lines.append(
            f"The median of the models' times, fused over stock, is {medians[0]:.2f}; that of stock over itself is "
            f"{medians[1]:.2f}."
        )
    lines += ["", *reasons] if reasons else []
    return "\n".join(lines) + "\n"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"models": {}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(key.replace(",", "") for key in MODELS), help="parts of names")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--stages", default=",".join(STAGES), help="columns to fill")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "matrix.json"
    parts, wanted = arguments.only.split(","), arguments.stages.split(",")
    for name in MODELS:
        cells = read(path)["models"].get(name, {"cells": {}})["cells"]
        missing = [stage for stage in wanted if stage not in cells]
        if not missing or not any(part in name.replace(",", "") for part in parts):
            continue
        entry = try_model(name, arguments.steps, arguments.rounds, missing, cells)
        for stage in missing:
            cell = entry["cells"][stage]
            print(f"{name}: {STAGES[stage]}: {cell['text']} ({cell.get('seconds', 0)} s)", flush=True)
        # Whole after every model, so that what was found is not lost; another process may have added to it.
        report = read(path)
        report["machine"] = machine() | {"threads": torch.get_num_threads()}
        report["libraries"] = {library: version(library) for library in LIBRARIES}
        report["models"][name] = entry
        path.write_text(json.dumps(report, indent=1) + "\n")
        (arguments.out / "matrix.md").write_text(table(report))
    print(table(read(path)))


if __name__ == "__main__":
    main()
