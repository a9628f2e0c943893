"""Feeds every parser of files with mutated and random inputs, and counts what it makes of them.

    OMP_NUM_THREADS=1 python studies/fuzz/fuzz.py --inputs 100000 --jobs 2 --out studies/fuzz

Written: fuzz.json. An input is accepted, or refused with a ValueError or OSError that names a file (the command line:
one line and status 2). Anything else is a crash: another exception, a dead process, a message without a file's name, a
list whose files lie outside the root. More than 10 s of processor time for one input is a hang. Inputs are drawn from
the seed, the parser's name and their number alone; `--parser NAME --only NUMBER` repeats one with its traceback.
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import multiprocessing.pool
import random
import re
import resource
import signal
import struct
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import PIL.Image
import torch
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save

from rfield.segmentation import cli, parser
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.config.values import parse_groups
from rfield.segmentation.data import FolderDataset, SyntheticCues, check_data, faces, load_dataset
from rfield.segmentation.data.class_groups import class_groups
from rfield.segmentation.data.paths import is_inside
from rfield.segmentation.export import hub as sharing
from rfield.segmentation.export.fused_run import fuse_run
from rfield.segmentation.files.untrusted import read_json, read_weights
from rfield.segmentation.inference.onnx import load_onnx
from rfield.segmentation.models.saving import describe_network
from rfield.segmentation.runs import build_network, load_config, load_run, read_classes

_SECONDS = 10
_GIB = 4
_SAMPLES = 5
_CHUNK = 10_000

Random = random.Random
Mutation = Callable[[Random, bytes], bytes]


@dataclass
class Parser:
    """What reads an input, after it was written to `path`; `mutate` keeps the format's frame whole."""

    read: Callable[[bytes], Any]
    seeds: list[bytes]
    path: Path | None = None
    tokens: list[bytes] = field(default_factory=list)
    mutate: Mutation | None = None


_NUMBERS = [
    b"0",
    b"-1",
    b"1",
    b"255",
    b"256",
    b"65536",
    b"4294967296",
    b"9" * 25,
    b"9" * 400,
    b"1e999",
    b"-0.5",
    b"nan",
]
_TOKENS = [
    b"\0",
    b"\n",
    b"\r\n",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xc3\x28",
    b"../",
    b"/",
    b"..",
    b".",
    b"~",
    b"~x/",
    b" ",
]
_TOKENS += [
    b",",
    b"'",
    b'"',
    b"\\",
    b"*",
    b"&a ",
    b"*a",
    b"!!python/object/apply:os.system [ls]",
    b"!!int ''",
    b"%",
    b"{}",
]
_TOKENS += [
    b"[" * 2000,
    b"{",
    b"}",
    b"]",
    b"null",
    b"true",
    b"A" * 300,
    b"\xf0\x9f\x98\x80",
    b"\xed\xa0\x80",
    b"\x1c",
    b"|",
]
_VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2,
    10**25,
    10**400,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "../..",
    [],
    {},
]
_VALUES += [
    [1],
    [1, 2],
    ["a"],
    {"a": 1},
    [[]],
    [0, 0],
    "1x1",
    "1e9",
    "x" * 300,
    "\ud800",
    json.loads("[" * 40 + "]" * 40),
]


def edit(random: Random, content: bytes, tokens: list[bytes]) -> bytes:
    """One to eight small changes."""
    data = bytearray(content)
    for _ in range(min(8, int(random.expovariate(0.6)) + 1)):
        at = random.randrange(len(data) + 1)
        end = min(len(data), at + int(random.expovariate(0.15)) + 1)
        kind = random.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << random.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = data[at:end]
        elif kind == 4:
            data[at:at] = random.choice(tokens)
        elif kind == 5:
            data[at:end] = random.choice(tokens)
        elif kind == 6:
            numbers = list(re.finditer(rb"\d+", data))
            if numbers:
                number = random.choice(numbers)
                data[number.start() : number.end()] = random.choice(_NUMBERS)
        elif random.random() < 0.2:
            del data[at:]
        else:
            data[at:at] = random.randbytes(random.randrange(1, 9))
    return bytes(data)


def edit_tree(random: Random, value: Any) -> Any:
    """Another value at one place of a JSON value, or a key or item less or more."""
    if isinstance(value, (dict, list)) and value and random.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = random.choice(list(keys))
        changed: Any = dict(value) if isinstance(value, dict) else list(value)
        action = random.random()
        if action < 0.1:
            del changed[key]
        elif action < 0.15 and isinstance(value, list):
            changed *= random.choice((2, 200))
        elif action < 0.15:
            changed[random.choice(("x", "", "weights", "size"))] = random.choice(_VALUES)
        else:
            changed[key] = edit_tree(random, value[key])
        return changed
    return random.choice(_VALUES)


def edit_json(random: Random, content: bytes) -> bytes:
    return json.dumps(edit_tree(random, json.loads(content))).encode()


def edit_yaml(random: Random, content: bytes) -> bytes:
    return json.dumps(edit_tree(random, yaml.safe_load(content))).encode()


def edit_zip(random: Random, content: bytes) -> bytes:
    """Another record in an archive whose checksums fit."""
    source = zipfile.ZipFile(io.BytesIO(content))
    pick = random.choice(
        [name for name in source.namelist() if name.endswith(("data.pkl", "data.pkl", "/0", "version"))]
    )
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as target:
        for name in source.namelist():
            record = source.read(name)
            target.writestr(name, edit(random, record, _TOKENS + _OPCODES) if name == pick else record)
    return made.getvalue()


_OPCODES = [
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"ctorch\nload\n",
    b"R",
    b"(S'ls'\ntR",
    b"b",
    b"Q",
    b"J\xff\xff\xff\x7f",
]
_OPCODES += [
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nTensor\n",
    b"\x81",
    b"h\x00",
    b"ccollections\nOrderedDict\n",
    b")",
]


def edit_header(random: Random, content: bytes) -> bytes:
    """Another header in a safetensors file whose length fits."""
    length = struct.unpack("<Q", content[:8])[0]
    header = edit_json(random, content[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def edit_png(random: Random, content: bytes) -> bytes:
    """Another chunk in a PNG whose checksums fit; other files as bytes."""
    if not content.startswith(b"\x89PNG"):
        return edit(random, content, _TOKENS)
    at, chunks = 8, []
    while at < len(content):
        size = struct.unpack(">I", content[at : at + 4])[0]
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += size + 12
    pick = random.randrange(len(chunks))
    made = bytearray(content[:8])
    for index, (kind, body) in enumerate(chunks):
        body = edit(random, body, _TOKENS) if index == pick else body
        made += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return bytes(made)


def draw(parser: Parser, seed: int, name: str, number: int) -> bytes:
    """An input: in 20 one of random bytes, else a changed sample."""
    random = Random(f"{seed} {name} {number}")
    tokens = parser.tokens * 2 + _TOKENS
    if random.random() < 0.05:
        return b"".join(
            random.choice((random.choice(tokens), random.randbytes(3))) for _ in range(random.randrange(12))
        )
    sample = random.choice(parser.seeds)
    if parser.mutate is not None and random.random() < 0.5:
        return parser.mutate(random, sample)
    return edit(random, sample, tokens)


def picture(mode: str, kind: str, size: tuple[int, int] = (16, 12), **options: Any) -> bytes:
    values = np.random.default_rng(0).integers(0, 3, (size[1], size[0], 3), dtype=np.uint8)
    image = PIL.Image.fromarray(values if mode == "RGB" else values[..., 0])
    if mode == "P":
        image.putpalette([level for index in range(256) for level in (index, 255 - index, 7)])
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def lists(folder: Path) -> dict[str, Parser]:
    """Data sets of two samples each, whose lists are the inputs."""
    image, mask = picture("RGB", "JPEG"), picture("P", "PNG")
    root = folder / "lists"
    files = {f"voc/JPEGImages/{name}.jpg": image for name in "ab"}
    files |= {f"voc/SegmentationClass/{name}.png": mask for name in "ab"} | {"voc/classes.txt": b"road\ncar\nsky"}
    files |= {f"camvid/{part}/{name}.png": mask for part in ("train", "trainannot") for name in "ab"}
    files |= {f"helen/images/{name}.jpg": image for name in "ab"}
    files |= {f"helen/labels/{n}/{n}_lbl{label:02d}.png": picture("L", "PNG") for n in "ab" for label in range(11)}
    files |= {"folder/train/images/a.jpg": image, "folder/train/masks/a.png": mask}
    files |= {"outside.jpg": image, "outside.png": mask, "celeba/x": b""}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    places = {"voc": "ImageSets/Segmentation/train.txt", "camvid": "train.txt", "helen": "exemplars.txt"}
    seeds = {"voc": b"a\nb\n", "helen": b"1 , a\n2 , b\n"}
    seeds["camvid"] = b"/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png\ntrain/b.png trainannot/b.png\n"
    (root / "voc/ImageSets/Segmentation").mkdir(parents=True)

    def read(layout: str, content: bytes) -> None:
        dataset: Any = load_dataset(f"{layout}:{root / layout}", "train")
        for path in [*dataset.image_paths, *getattr(dataset, "mask_paths", ())]:
            assert is_inside(path, root / layout), f"{path} lies outside"
        dataset[0]

    escapes = [
        b"../outside",
        b"../../lists/outside",
        bytes(root / "outside"),
        b"../voc/JPEGImages/a",
        b"train/../../outside.png",
    ]
    found = {
        f"list of {layout}": Parser(functools.partial(read, layout), [seed], root / layout / places[layout], escapes)
        for layout, seed in seeds.items()
    }
    found["classes.txt"] = Parser(
        lambda content: FolderDataset(root / "folder"),
        [b"road\ncar\nsky\n", b"\n".join(b"c%d" % i for i in range(255))],
        root / "folder/classes.txt",
    )
    found["CelebA's mapping"] = Parser(
        lambda content: faces._celeba_splits(root / "celeba", [0, 1]),
        [b"idx orig_idx orig_file\n0 119613 119614.jpg\n1 99094 099095.jpg\n"],
        root / "celeba/CelebA-HQ-to-CelebA-mapping.txt",
    )
    return found


def pictures(folder: Path) -> dict[str, Parser]:
    """A data set of one sample: its mask, palette included, its image, and both in the check."""
    root = folder / "pictures"
    for name in ("train/images", "train/masks"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("road\ncar\nsky")
    image, mask = root / "train/images/a.png", root / "train/masks/a.png"
    images = [picture("RGB", kind) for kind in ("JPEG", "PNG", "BMP", "TIFF", "WEBP")]
    masks = [picture("P", "PNG"), picture("L", "PNG"), picture("P", "BMP"), picture("P", "PNG", bits=4)]

    def read(content: bytes) -> None:
        (image if content is None else mask).touch()
        FolderDataset(root, "train")[0]

    def with_image(content: bytes) -> None:
        mask.write_bytes(masks[0])
        read(content)

    def with_mask(content: bytes) -> None:
        image.write_bytes(images[0])
        read(content)

    def check(content: bytes) -> None:
        mask.write_bytes(content)
        check_data(f"folder:{root}", ["train"], workers=1)

    return {
        "image": Parser(with_image, images, image, mutate=edit_png),
        "mask and palette": Parser(with_mask, masks, mask, mutate=edit_png),
        "check-data": Parser(check, images + masks, image, mutate=edit_png),
    }


def texts(folder: Path) -> dict[str, Parser]:
    """Class groups, data specs and configs."""
    dataset = SyntheticCues("val")
    root = folder / "lists"
    config, data, run = folder / "train.yaml", folder / "data.yaml", folder / "run.yaml"
    made = parser.make_parser(cli.COMMANDS, "train")
    parser.make_parser = lambda commands, command, every=False: made

    def groups(content: bytes) -> None:
        class_groups(parse_groups(content.decode(errors="surrogateescape")), 2, dataset)

    def command(content: bytes) -> None:
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                cli.parse(["train", "--config", str(config)])
            except SystemExit as error:
                if error.code != 2 or said.getvalue().count("\n") != 1:
                    raise RuntimeError(f"status {error.code}: {said.getvalue()}") from error
                raise ValueError(str(config)) from error

    train = [
        b"data: synthetic\nout: runs/x\nmodel: small_cnn\ndilation: 8\nsearch: spsa\nlr: 1e-3\ncrop_size: [65, 65]\n",
        b"data: voc:x\nout: y\npaths: 2\nclass_groups: {small: [eye], large: [skin]}\nscale_range: 0.5,1.5\nflip: no\n"
        b"class_weights: balanced\ncanvas: 320x320\nfreeze_backbone: true\naspp: null\n",
    ]
    plain = TrainConfig(data="synthetic", out="runs/x", model="small_cnn").resolved().plain()
    return {
        "class groups": Parser(
            groups, [b"neither,green/both", b"a=green,red/b=both", b'[["red"],["both","neither"]]', b"auto"]
        ),
        "data spec": Parser(
            lambda content: load_dataset(content.decode(errors="surrogateescape")),
            [b"synthetic", b"voc:" + bytes(root / "voc"), b"camvid:" + bytes(root / "camvid"), b"helen:~/x", b"x.yaml"],
        ),
        "data config": Parser(
            lambda content: load_dataset(str(data)),
            [
                b"format: synthetic\nsize: [36, 41]\ndistance: 12\nlength: 6\nseed: 3\n",
                b"format: voc\nroot: lists/voc\ntrain: train\nsize: [8, 9]\n",
                b"format: folder\nroot: pictures\n",
            ],
            data,
            mutate=edit_yaml,
        ),
        "config of the command line": Parser(command, train, config, mutate=edit_yaml),
        "config of a run": Parser(
            lambda content: load_config(run),
            [yaml.safe_dump(plain).encode(), yaml.safe_dump(TrainConfig(data="a", out="b").plain()).encode()],
            run,
            mutate=edit_yaml,
        ),
    }


def runs(folder: Path) -> dict[str, Parser]:
    """Run folders of a small network, and files of weights."""
    config = TrainConfig(
        data="synthetic", out=str(folder / "run"), model="small_cnn", dilation=3, head_channels=2, search="spsa"
    ).resolved()
    torch.manual_seed(0)
    network = build_network(config, 2)
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config.plain()))
    classes = {"class_names": ["road", "car"], "palette": [[0, 0, 0], [9, 9, 9]], "size": [24, 32]}
    (run / "classes.json").write_text(json.dumps(classes))
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    checkpoint = run / "checkpoints/last.ckpt"
    described = describe_network(network)
    torch.save({"state_dict": state, "epoch": 1, "search": {"done": True}, "rfield": described}, checkpoint)
    scores = {"miou": 0.5, "pixel_accuracy": 0.9, "per_class": {"road": 0.4, "car": None}}
    fuse_run(run, folder / "fused")
    sharing.share_run(run, folder / "shared")
    small = {"conv.weight": torch.rand(2, 3, 3, 3), "conv.bias": torch.zeros(2)}
    buffer = io.BytesIO()
    torch.save(small, buffer)
    old = io.BytesIO()
    torch.save(small, old, _use_new_zipfile_serialization=False)
    # As many classes as the graph below has channels.
    described_classes = classes | {"class_names": ["road", "car", "sky"], "palette": [[0, 0, 0], [9, 9, 9], [7, 7, 7]]}
    notes = {name: json.dumps(value) for name, value in described_classes.items()}
    node = onnx.helper.make_node("Identity", ["image"], ["logits"])
    kinds = [onnx.helper.make_tensor_value_info(n, 1, ["N", 3, "H", "W"]) for n in ("image", "logits")]
    graph = onnx.helper.make_graph([node], "graph", [kinds[0]], [kinds[1]])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    exported = folder / "model.onnx"

    def read_notes(content: bytes) -> None:
        del model.metadata_props[:]
        text = content.decode(errors="replace")
        try:
            given = dict(json.loads(text))
        except Exception:
            given = notes | {"palette": text}
        onnx.helper.set_model_props(
            model,
            {
                str(k).encode(errors="replace").decode(): str(v).encode(errors="replace").decode()
                for k, v in given.items()
            },
        )
        exported.write_bytes(model.SerializeToString())
        load_onnx(exported)

    fused, shared = folder / "fused", folder / "shared"
    fixed = {"dilations": {"head.layers.fc6": [2, 3]}, "resizes": {"head.layers": [1.3, 0.7]}}
    changed = {**json.loads((fused / "fused.json").read_text()), "fused": fixed}
    pth, tensors, described = folder / "weights.pth", folder / "weights.safetensors", run / "described.json"
    return {
        "checkpoint": Parser(lambda content: load_run(run), [checkpoint.read_bytes()], checkpoint, _OPCODES, edit_zip),
        ".pth weights": Parser(
            lambda content: read_weights(pth),
            [buffer.getvalue(), old.getvalue()],
            pth,
            _OPCODES,
            lambda r, c: edit_zip(r, c) if c[:2] == b"PK" else edit(r, c, _OPCODES),
        ),
        ".safetensors weights": Parser(
            lambda content: read_weights(tensors), [save(small)], tensors, mutate=edit_header
        ),
        "classes.json": Parser(
            lambda content: read_classes(read_json(described), described),
            [json.dumps(classes).encode()],
            described,
            mutate=edit_json,
        ),
        "fused.json": Parser(
            lambda content: load_run(fused),
            [
                (fused / "fused.json").read_bytes(),
                json.dumps(changed).encode(),
            ],
            fused / "fused.json",
            mutate=edit_json,
        ),
        "config.json": Parser(
            lambda content: load_run(shared),
            [(shared / "config.json").read_bytes()],
            shared / "config.json",
            mutate=edit_json,
        ),
        "metrics.json": Parser(
            lambda content: sharing._scores(folder),
            [json.dumps(scores).encode()],
            folder / "metrics.json",
            mutate=edit_json,
        ),
        "notes of an ONNX file": Parser(
            read_notes, [json.dumps(notes).encode(), notes["palette"].encode()], None, mutate=edit_json
        ),
    }


def parsers(folder: Path) -> dict[str, Parser]:
    """All of them, their samples written in a folder."""
    return lists(folder) | pictures(folder) | texts(folder) | runs(folder)


def find_parser(name: str, folder: Path) -> Parser:
    """One of them; the runs, which take longest to make, are made for their own alone."""
    for make in (lists, pictures, texts, runs):
        made = make(folder)
        if name in made:
            return made[name]
    raise ValueError(f"there is no parser {name!r}")


class HangError(BaseException):
    """Nothing in the library catches it."""


def try_input(parser: Parser, content: bytes) -> tuple[str, str]:
    """What a parser makes of an input: accepted, refused, crash or hang; and in the last two cases what came."""
    if parser.path is not None:
        parser.path.write_bytes(content)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    try:
        parser.read(content)
    except HangError:
        return "hang", traceback.format_exc().splitlines()[-2].strip()
    except (ValueError, OSError) as error:
        if parser.path is None or str(Path(*parser.path.parts[:3])) in str(error):
            return "refused", ""
        return "crash", f"does not name the file: {_described(error)}"
    except (Exception, SystemExit) as error:
        return "crash", _described(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return "accepted", ""


def _described(error: BaseException) -> str:
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "rfield" in f.filename and "fuzz.py" not in f.filename
    ]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
    return f"{type(error).__name__} in {place}: {' '.join(str(error).split())[:200]}"


def _interrupt(*arguments: Any) -> None:
    raise HangError


def work(name: str, seed: int, start: int, stop: int, at: Any, found: Any) -> None:
    """Tries some inputs of a parser; `at` says which one is being tried."""
    signal.signal(signal.SIGPROF, _interrupt)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (_GIB << 30),) * 2)
    with tempfile.TemporaryDirectory() as folder:
        parser = find_parser(name, Path(folder))
        for number in range(start, stop):
            at.value = number
            content = draw(parser, seed, name, number)
            result, text = try_input(parser, content)
            found[result] = found.get(result, 0) + 1
            if text:
                found.setdefault("samples", []).append((number, text, repr(content[:200])))


def run_chunk(task: tuple[str, int, int, int]) -> tuple[str, dict[str, Any]]:
    """A chunk of a parser's inputs in a process of its own, and in another one after an input that has killed it."""
    name, seed, start, stop = task
    total: Counter[str] = Counter()
    samples: list[Any] = []
    while start < stop:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        at = multiprocessing.Value("q", start)

        def run(at: Any = at, start: int = start, theirs: Any = theirs) -> None:
            found: dict[str, Any] = {}
            work(name, seed, start, stop, at, found)
            theirs.send(found)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        theirs.close()
        found: dict[str, Any] = {}
        with contextlib.suppress(EOFError):
            found = ours.recv()
        process.join()
        if found:
            start = stop
        else:  # What came before is tried again; all of it is drawn from its number.
            samples.append((at.value, f"the process died with status {process.exitcode}", ""))
            total["crash"] += 1
            if at.value > start:
                stop_before = at.value
                _, before = run_chunk((name, seed, start, stop_before))
                total.update({key: value for key, value in before.items() if key != "samples"})
                samples += before.get("samples", [])
            start = at.value + 1
        total.update({key: value for key, value in found.items() if key != "samples"})
        samples += found.get("samples", [])
    return name, {**total, "samples": samples}


def main() -> None:
    argument = argparse.ArgumentParser(description=__doc__)
    argument.add_argument("--inputs", type=int, default=100_000, help="for each parser")
    argument.add_argument("--jobs", type=int, default=2)
    argument.add_argument("--seed", type=int, default=0)
    argument.add_argument("--parser", action="append", help="only these")
    argument.add_argument("--only", type=int, help="repeat this input of --parser")
    argument.add_argument("--out", type=Path, default=Path("studies/fuzz"))
    args = argument.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = parsers(Path(folder))
        names = args.parser or list(made)
        if args.only is not None:
            content = draw(made[names[0]], args.seed, names[0], args.only)
            print(repr(content[:2000]))
            if made[names[0]].path is not None:
                made[names[0]].path.write_bytes(content)
            made[names[0]].read(content)
            return
    tasks = [
        (name, args.seed, start, min(start + _CHUNK, args.inputs))
        for start in range(0, args.inputs, _CHUNK)
        for name in names
    ]
    results: dict[str, dict[str, Any]] = {name: {"inputs": 0, "samples": []} for name in names}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.monotonic()
    with Progress(*columns) as bar, multiprocessing.pool.ThreadPool(args.jobs) as pool:
        shown = bar.add_task("fuzzing", total=args.inputs * len(names))
        for name, found in pool.imap_unordered(run_chunk, tasks):
            count = sum(value for key, value in found.items() if key != "samples")
            bar.advance(shown, count)
            results[name]["inputs"] += count
            for key in ("accepted", "refused", "crash", "hang"):
                results[name][key] = results[name].get(key, 0) + found.get(key, 0)
            known = {re.sub(r"\d+", "", text) for _, text, _ in results[name]["samples"]}
            new = [sample for sample in found["samples"] if re.sub(r"\d+", "", sample[1]) not in known]
            results[name]["samples"] += new[: max(0, _SAMPLES - len(results[name]["samples"]))]
            content = {"seed": args.seed, "seconds": round(time.monotonic() - started), "parsers": results}
            (args.out / "fuzz.json").write_text(json.dumps(content, indent=1) + "\n")
    for name, each in results.items():
        print(name, {key: value for key, value in each.items() if key != "samples"})
        for sample in each["samples"]:
            print("  ", *sample[:2], sample[2][:150])


if __name__ == "__main__":
    main()
