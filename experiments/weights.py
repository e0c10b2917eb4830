"""Weights that others trained: GGUF and safetensors files, and packages that carry them.

A file that can't be used raises `DataError`, whose message is the one line a user should see.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors
import safetensors.numpy
from data import DataError

from jaxattn.shapes import Float

Tensor = Float[np.ndarray, "..."]


def installed(package: str, file: str, verb: str) -> Path:
    """A file of an installed package, without importing it.

    Args:
      package: its name in Python.
      file: the file's path in it.
      verb: of the Makefile, which installs the package.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the weights ({package}) are not installed; run: make {verb}")
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.exists():
        raise DataError(f"{path}: no such file; run: make {verb}, in a new environment")
    return path


class Weights:
    """The tensors of a file, by name. Each is read when it is taken, with the shape it should have.

    Args:
      path: the file, for messages.
      tensors: what reads each tensor.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
        self.path, self._tensors = path, dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor in float32, which is then no longer there.

        Raises:
          DataError: if there is none of that name, if it has another shape, or can't be read.
        """
        read = self._tensors.pop(name, None)
        if read is None:
            raise DataError(f"{self.path}: no tensor {name!r}; this is the file of another model")
        found = read()
        if found.shape != shape:
            raise DataError(
                f"{self.path}: {name} has shape {list(found.shape)}, expected {list(shape)}"
            )
        return found.astype(np.float32)

    def leave(self, *names: str) -> None:
        """Leaves out tensors for which the model has no use, if they are there."""
        for name in names:
            self._tensors.pop(name, None)

    def finish(self) -> None:
        """Checks that every tensor was taken: what is left would be silently ignored."""
        if self._tensors:
            some = ", ".join(sorted(self._tensors)[:3])
            raise DataError(
                f"{self.path}: {len(self._tensors)} tensors have no place in the model: {some}"
            )


# ------------------------------------------------------------------------------------------- GGUF


def read_gguf(path: Path) -> tuple[dict[str, Any], Weights]:
    """The metadata and the tensors of a GGUF file.

    Raises:
      DataError: for a file that is missing, truncated, or no GGUF file.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not a whole GGUF file ({_line(error)}); download it again"
        ) from None
    return metadata, Weights(path, {t.name: _dequantized(path, t) for t in reader.tensors})


def _dequantized(path: Path, tensor: Any) -> Callable[[], Tensor]:
    def read() -> Tensor:
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise DataError(
                f"{path}: {tensor.name} is quantized as {tensor.tensor_type.name}, which the gguf "
                "package can't read; use a file quantized as Q4_0, Q4_1, Q8_0, F16 or F32"
            ) from None
        # GGUF names the fastest axis first.
        return np.asarray(values).reshape(tuple(map(int, reversed(tensor.shape))))

    return read


def in_float32(path: Path) -> Path:
    """A copy of a whole GGUF file with its tensors in float32, for programs that compute in the
    types of the file.

    It stays in the environment, under a name that says of which contents it is the copy.
    """
    with path.open("rb") as file:
        contents = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    copy = Path(sys.prefix) / "cache" / "float32" / f"{path.stem}-{contents}.gguf"
    if copy.exists():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    part = copy.with_suffix(".part")  # half a file never has the name of a whole one
    reader, general = gguf.GGUFReader(path), gguf.Keys.General
    writer = gguf.GGUFWriter(part, reader.fields[general.ARCHITECTURE].contents())
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, field in reader.fields.items():
        # The writer adds the header's fields and the architecture by itself.
        if not name.startswith("GGUF.") and name not in (general.ARCHITECTURE, general.FILE_TYPE):
            kinds = field.types  # of an array: that it is one, and that of its elements
            writer.add_key_value(name, field.contents(), kinds[0], sub_type=kinds[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, _dequantized(path, tensor)().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return part.replace(copy)


# ------------------------------------------------------------------------------------ safetensors


def read_zip(path: Path, *names: str) -> list[bytes]:
    """Files of a zip archive.

    Raises:
      DataError: if the archive can't be read, or lacks one of them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [archive.read(name) for name in names]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except KeyError as error:
        raise DataError(f"{path}: {_line(error)}") from None
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise DataError(f"{path}: not a whole zip file ({_line(error)})") from None


def read_safetensors(path: Path, raw: bytes) -> Weights:
    """The tensors of a safetensors file, given its bytes and, for messages, its path."""
    try:
        found = safetensors.numpy.load(raw)
    except safetensors.SafetensorError as error:
        raise DataError(
            f"{path}: not a whole safetensors file ({_line(error)}); download it again"
        ) from None
    return Weights(path, {name: partial(np.asarray, array) for name, array in found.items()})


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).strip("\"'")[:160]
