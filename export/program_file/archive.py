"""Reads a .pt2 archive of torch.export.save() without executing code of it.

torch.export.load() is not safe for files of others: it unpickles weights, constants, and example inputs without
restriction, looks up any function of any module by name, evaluates symbolic sizes as Python, and imports modules that
the structure of inputs and outputs names. So only archives are accepted that need none of this, and torch reads a copy
with nothing but the checked contents. The format: torch/export/pt2_archive and torch/_export/serde/schema.py.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from vitserve.export.checkpoint.errors import CheckpointError

_MODEL, _INPUTS = "models/model.json", "data/sample_inputs/model.pt"
_WEIGHTS, _CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
_CONFIGURATIONS = {_WEIGHTS: re.compile(r"weight_\d+"), _CONSTANTS: re.compile(r"tensor_\d+")}
_COPIED = re.compile(
    r"data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder|\.data/.*"
)
# Operators of torch itself. from_file opens files.
_OPERATOR = re.compile(r"torch\.ops\.aten\.(?!from_file)[a-z_]\w*\.\w+")
_FUNCTIONS = re.compile(
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|neg|pos|and_|or_|not_|eq|ne|lt|le|gt|ge|getitem)"
)
_SYMBOLIC = re.compile(r"torch\.sym_(int|float|max|min|not|ite|sum)|math\.(ceil|floor|trunc|sqrt)")
# A symbolic size: numbers, operators, and these names. Quotes only around the name of a symbol.
_SYMBOL = re.compile(r"'[a-z]+\d+'")
_NAME = re.compile(r"[A-Za-z_]\w*")
_SIZE_NAME = re.compile(
    r"Symbol|Integer|Rational|Add|Mul|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|TruncToInt|positive|nonnegative"
    r"|integer|True|False|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|[a-z]\d+"
)
_SIZE = re.compile(r"[A-Za-z0-9_\s(),+*/<>=-]{1,500}")
_IDENTIFIER = re.compile(r"[\w.+]*", re.ASCII)  # of values, tensors, and modules; + in versions
_TEXT = re.compile(r"[\w.,:;> -]*", re.ASCII)  # arguments of operators, such as the equation of an einsum
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict"}


def read_program(path: Path) -> ExportedProgram:
    """Raises CheckpointError naming the part that is not read."""
    contents = _contents(path)
    for name, pattern in _CONFIGURATIONS.items():
        for tensor, payload in _json(path, contents, name).get("config", {}).items():
            if not isinstance(payload, dict) or payload.get("use_pickle") is not False:
                raise _unsafe(path, f"the tensor {tensor} is pickled")
            _check_names(path, tensor, None)
            if not pattern.fullmatch(str(payload.get("path_name"))):
                raise _unsafe(path, f"the constant {tensor} is an object")
    model = _json(path, contents, _MODEL)
    _check(path, model)
    contents[_MODEL] = json.dumps(model).encode()
    contents[_INPUTS] = _inputs(path, contents[_INPUTS])
    return _loaded(path, contents)


def _contents(path: Path) -> dict[str, bytes]:
    """The files of the archive that are used, without the directory that contains all of them."""
    try:
        with zipfile.ZipFile(path) as archive:
            contents = {}
            for entry in archive.infolist():
                name = entry.filename.partition("/")[2]
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{path} is compressed, which torch.export.save() does not do: {name}")
                if name in (_MODEL, _INPUTS, _WEIGHTS, _CONSTANTS) or _COPIED.fullmatch(name):
                    contents[name] = archive.read(entry)
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path} is truncated or not an archive of torch.export.save(): {error}") from error
    for name in (_MODEL, _INPUTS, _WEIGHTS, _CONSTANTS):
        if name not in contents:
            raise CheckpointError(
                f"{path} has no {name}: it is not an archive that this version of torch.export.save() writes for one"
                f" program (torch {torch.__version__}); an AOTInductor package is compiled code, which is not read"
            )
    return contents


def _json(path: Path, contents: dict[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = json.loads(contents[name])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} in {path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} in {path} is damaged: not an object")
    return value


def _check(path: Path, model: dict[str, Any]) -> None:
    """Raises CheckpointError for names and texts that torch would look up, evaluate, or import. Removes metadata."""
    model["guards_code"] = []  # Python, which checks that sizes are as the example's
    for holder, key, value in _entries(model):
        if key in ("target", "as_operator"):
            _check_operator(path, str(value))
        elif key == "metadata":
            holder[key] = {}
        elif key == "expr_str":
            _check_size(path, str(value))
        elif key in ("in_spec", "out_spec") and value:
            _check_structure(path, value)
        else:
            _check_names(path, key, value)


def _entries(value: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Every key of every object. Changes of the object while this runs are allowed."""
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, dict):
            for key in list(current):
                yield current, key, current[key]
            pending += current.values()
        elif isinstance(current, list):
            pending += current


def _check_operator(path: Path, name: str) -> None:
    if not any(known.fullmatch(name) for known in (_OPERATOR, _SYMBOLIC, _FUNCTIONS)):
        raise _unsafe(path, f"the operator {name[:80]!r}")


def _check_names(path: Path, key: str, value: Any) -> None:
    """torch writes names into the Python that it makes of a graph."""
    allowed = _TEXT if key in ("as_string", "as_strings") else _IDENTIFIER
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    for text in (key, *texts):
        if not (allowed if text is not key else _IDENTIFIER).fullmatch(text):
            raise _unsafe(path, f"the name {text[:80]!r}")


def _check_size(path: Path, text: str) -> None:
    rest = _SYMBOL.sub("", text)
    unknown = [name for name in _NAME.findall(rest) if not _SIZE_NAME.fullmatch(name)]
    if unknown or "**" in rest or not _SIZE.fullmatch(rest):
        raise _unsafe(path, f"the symbolic size {text[:80]!r}")


def _check_structure(path: Path, text: Any) -> None:
    """Of inputs or outputs: tuples, lists, and dictionaries with texts as keys."""
    try:
        _, structure = json.loads(text)
        for holder, key, value in _entries(structure):
            if key == "type" and value not in _CONTAINERS:
                raise CheckpointError(
                    f"{path} has inputs or outputs of the type {value}, which is not loaded; export a module that"
                    " returns the logits"
                )
            if key == "context" and value not in (None, "null"):
                keys = json.loads(value)
                if holder.get("type") != "builtins.dict" or not all(str(key).isidentifier() for key in keys):
                    raise _unsafe(path, "a structure of inputs or outputs that is not a tuple, list, or dictionary")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the structure of inputs or outputs in {path} is damaged: {error}") from error


def _inputs(path: Path, pickled: bytes) -> bytes:
    """The example inputs, which the restricted unpickler reads, saved again."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = torch.load(io.BytesIO(pickled), map_location="cpu", weights_only=True) if pickled else {}
    except pickle.UnpicklingError as error:
        raise _unsafe(path, "example inputs that are not tensors") from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError, OSError) as error:
        raise CheckpointError(f"the example inputs in {path} are damaged: {error}") from error
    buffer = io.BytesIO()
    torch.save(inputs, buffer)
    return buffer.getvalue()


def _loaded(path: Path, contents: dict[str, bytes]) -> ExportedProgram:
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy = Path(temporary) / "program.pt2"
        with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as archive:
            for name, data in contents.items():
                archive.writestr(f"program/{name}", data)
        try:
            return torch.export.load(copy)
        except Exception as error:  # torch's deserializer has no common base class
            reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
            raise CheckpointError(f"torch {torch.__version__} cannot read {path}: {reason}") from error


def _unsafe(path: Path, content: str) -> CheckpointError:
    return CheckpointError(f"{path} has {content}, which is not loaded because loading it could execute code")
