"""The names of a checkpoint's files, and the kinds of other files that are often found in their place.

Only the first bytes are read, and the directory of a zip archive. Needs neither torch nor the library that wrote them.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
INDEX, PICKLED_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"  # of weights in several files
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "spiece.model"),
)
# Files of weights, in the order of transformers and timm: the first that exists is read.
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", PICKLED_INDEX, "pytorch_model.pth", "model.pth")

_HEAD_BYTES = 1024
_GIT_LFS = b"version https://git-lfs"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
_CONVERTED = "vitserve exports the weights of the framework that trained the network: a state dict or safetensors"
# First bytes → the kind of the file, and the remedy.
_SIGNATURES: dict[bytes, str] = {
    _GIT_LFS: "is a Git LFS pointer, not the file that it points to; run `git lfs pull` in its repository,"
    " or download the file itself",
    b"\x89HDF": f"is an HDF5 file, as Keras writes them; {_CONVERTED}",
    b"\x1f\x8b": "is compressed by gzip; decompress it first",
    b"BZh": "is compressed by bzip2; decompress it first",
    b"\xfd7zXZ": "is compressed by xz; decompress it first",
    b"7z\xbc\xaf": "is a 7-Zip archive; extract it first",
    b"Rar!": "is a RAR archive; extract it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; decompress it first",
    b"GGUF": f"is a GGUF file; {_CONVERTED}",
    b"%PDF": "is a PDF document, not weights",
    b"\xff\xd8\xff": "is a JPEG image, not weights",
    b"\x89PNG": "is a PNG image, not weights",
}
_PICKLE = (b"\x80\x03", b"\x80\x04", b"\x80\x05")  # protocols other than torch's 2


def fault_of(path: Path) -> str | None:
    """The kind of the file and the remedy, as the rest of a sentence that begins with its name.

    None if it may be weights. Raises OSError.
    """
    if path.is_dir():
        return "is a directory; name the file of the weights"
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        return "is empty: its download or copy was interrupted; fetch it again"
    for signature, sentence in _SIGNATURES.items():
        if head.startswith(signature):
            return sentence
    if head.startswith(b"PK"):
        return _fault_of_archive(path)
    return _fault_of_text(head) or _fault_of_graph(path, head)


def is_json(head: bytes) -> bool:
    """Whether these first bytes begin a JSON object or list."""
    return head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")) and b"\0" not in head


def is_foreign_pickle(head: bytes) -> bool:
    """Whether these first bytes begin a pickle in a protocol that torch's safe loader does not read."""
    return head.startswith(_PICKLE)


def _fault_of_archive(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError):  # the reader of the format reports it
        return None
    parts = {name.partition("/")[2] for name in names}  # below the archive's own directory
    if any(part.startswith("code/") for part in parts) and "constants.pkl" in parts:
        return (
            "is a TorchScript archive, whose network is code; save the weights of the original network:"
            " torch.save(model.state_dict(), FILE)"
        )
    if "data.pkl" in parts or any(name.endswith(".npy") for name in names):
        return None
    if any("serialized_exported_program" in name or name.endswith("models/model.json") for name in names):
        return f"is a program that torch.export saved; {_CONVERTED}"
    return "is a zip archive without weights of torch or numpy; extract it first, and name the file of the weights"


def _fault_of_text(head: bytes) -> str | None:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head")):
        return (
            "is an HTML or XML page, such as a login or error page that was saved in place of the file;"
            " download the file itself"
        )
    return None


def _fault_of_graph(path: Path, head: bytes) -> str | None:
    """Formats without a signature at the start."""
    if head[4:8] == b"TFL3":
        return f"is a TensorFlow Lite model; {_CONVERTED}"
    if head[257:262] == b"ustar":
        return "is a tar archive; extract it first, and name the file of the weights"
    # ONNX is a protocol buffer without a signature. Its first field is the version of the format: tag 8, one byte.
    if head[:1] == b"\x08" and (path.suffix == ".onnx" or b"pytorch" in head or b"onnx" in head):
        return f"is an ONNX model; {_CONVERTED}"
    return None
