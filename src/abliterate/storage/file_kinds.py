"""What a file is, as far as its name and its first bytes tell; nothing of it is unpickled."""

from __future__ import annotations

import zipfile
from codecs import getincrementaldecoder
from pathlib import Path

_HEAD = 512  # bytes
# How files of other kinds begin.
_BEGINNINGS = (
    (b"\x93NUMPY", "one numpy array (.npy)"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"PAR1", "a parquet table"),
    (b"\x1f\x8b", "packed with gzip"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for"),
    # torch.save until 1.5, by its first number; other pickles of protocol 2 to 5.
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a PyTorch pickle (torch.save)"),
    *((bytes((0x80, protocol)), "a pickle") for protocol in range(2, 6)),
)
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")


def describe_file(path: Path) -> str:
    """What it is: ``a PyTorch pickle (torch.save)``, ``a JSON list``, ``text``.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return "empty"
    if head.startswith(b"PK"):
        return _describe_zip(path)
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return kind
    # The header's length, then JSON.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40:
        return "a safetensors file"
    return _describe_text(head) or (
        "named as a pickle and damaged"
        if path.suffix.lower() in _PICKLES
        else "of no kind that is known here"
    )


def _describe_text(head: bytes) -> str | None:
    """What kind of text it is; None if it is none."""
    try:  # the last character may be cut in two
        text = getincrementaldecoder("utf-8")().decode(head, final=len(head) < _HEAD).lstrip()
    except UnicodeDecodeError:
        return None
    if text.lower().startswith(("<!doctype", "<html")):
        return "a web page"
    if text.startswith(("{", "[")):
        return "a JSON object" if text[0] == "{" else "a JSON list"
    plain = all(character.isprintable() or character.isspace() for character in text)
    return "text" if plain else None


def _describe_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "a zip archive that is damaged"
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        return "a PyTorch pickle (torch.save)"
    if names and all(name.endswith(".npy") for name in names):
        return "a zip of numpy arrays (.npz)"
    return "a zip archive"
