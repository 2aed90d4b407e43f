"""A direction in the files of other programs: GGUF control vectors, steering-vectors, npz.

The direction of layer ``L`` acts on ``resid_pre[L]``, what enters block ``L``. The others count the
block whose output it is: ``L - 1``. llama.cpp and repeng add nothing to the output of block 0, so
a control vector needs ``L >= 2``.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args

from abliterate.errors import InputError, UsageError
from abliterate.extras import import_extra

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Format = Literal["gguf", "steering-vectors", "npz"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[Format, str] = {
    "gguf": ".gguf",
    "steering-vectors": ".safetensors",
    "npz": ".npz",
}
_ARCHITECTURE = "controlvector"
_HOOK_POINT = "resid_pre"
_GGUF_VECTOR, _STEERING_VECTOR = "direction.", "layer_activations."
# The widest and deepest models' have some megabytes: more is no file of vectors.
_LARGEST = 256 << 20
_MOST_LAYERS = 1000


@dataclass(frozen=True)
class ForeignVector:
    """A vector out of another program's file.

    Attributes:
        values: float64 ``[d_model]``.
        layer: the block that it enters, or None if the file does not say.
        position: the token that it was taken at, or None.
    """

    values: NDArray[np.float64]
    layer: int | None
    position: int | None = None


@dataclass(frozen=True)
class ForeignVectors:
    """Vectors of several layers out of another program's file.

    Attributes:
        by_layer: float64 ``[d_model]`` by the block that it enters.
        listed: the file lists its layers one by one: it does not say how many the model has.
    """

    by_layer: dict[int, NDArray[np.float64]]
    listed: bool

    @property
    def width(self) -> int:
        return len(next(iter(self.by_layer.values())))


def encode(
    vector: NDArray[np.float64],
    layer: int | None,
    position: int | None,
    to: Format,
    model_type: str = "",
) -> bytes:
    """The content of another program's file.

    Args:
        vector: ``[d_model]``, not normalised: those programs add it as it is, times a factor.
        layer: the block that it enters.
        position: the token that it was taken at.
        to: the format.
        model_type: of the model, which GGUF keeps as a hint.

    Raises:
        InputError: the format counts layers, and there is none that it could name.
        UsageError: the package that writes it is not installed.
    """
    import numpy as np

    if to == "npz":
        return _npz(vector, layer, position)
    if layer is None:
        raise InputError(
            f"the direction does not record its layer, which {to} needs: give a run folder, or "
            "--to npz"
        )
    first = 2 if to == "gguf" else 1
    if layer < first:
        raise InputError(
            f"the direction enters block {layer}, {to} files begin at block {first}: give --to npz"
        )
    if to == "gguf":
        return _gguf(vector, layer - 1, model_type)
    from safetensors.numpy import save

    metadata = {"layer_type": "decoder_block"}
    return save({f"{_STEERING_VECTOR}{layer - 1}": vector.astype(np.float32)}, metadata)


def _npz(vector: NDArray[np.float64], layer: int | None, position: int | None) -> bytes:
    import numpy as np

    numbers = {"layer": layer, "position": position}
    known = {name: np.int64(value) for name, value in numbers.items() if value is not None}
    file = io.BytesIO()
    np.savez(file, direction=vector, hook_point=np.str_(_HOOK_POINT), **known)  # type: ignore[arg-type]
    return file.getvalue()


def _gguf(vector: NDArray[np.float64], block: int, model_type: str) -> bytes:
    import numpy as np

    gguf = import_extra("gguf", "--to gguf", "gguf", "exchange")
    with TemporaryDirectory() as folder:  # the package writes to paths alone
        path = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(path, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", 1)
        writer.add_tensor(f"{_GGUF_VECTOR}{block}", vector.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def is_foreign(path: Path) -> bool:
    """Whether a file's name says that another program's format is in it."""
    return path.suffix.lower() in (".gguf", ".npz")


def read_foreign(path: Path) -> ForeignVector | ForeignVectors:
    """What a ``.gguf`` or ``.npz`` file holds, or a safetensors file of steering-vectors.

    One vector, or vectors of several layers; an npz file has these as ``directions``
    ``[n_layers, d_model]``.

    Raises:
        InputError: it cannot be read, or holds no vector.
        UsageError: the package that reads it is not installed.
    """
    if path.stat().st_size > _LARGEST:
        raise InputError(f"{path} holds no direction: it has {path.stat().st_size:,} bytes")
    try:
        if path.suffix.lower() == ".npz":
            return _read_npz(path)
        read = _read_gguf if path.suffix.lower() == ".gguf" else _read_steering_vector
        return _by_entered_block(path, read(path))
    except (OSError, ValueError, LookupError, TypeError, EOFError, ArithmeticError, RuntimeError,
            MemoryError, zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        raise InputError(
            f"{path} cannot be read as {path.suffix[1:]} ({str(error)[:120]}): export it again"
        ) from None


def steering_layers(names: list[str]) -> list[str]:
    """Those of a safetensors file's tensors that are steering-vectors' activations."""
    return [name for name in names if _block(name, _STEERING_VECTOR) is not None]


def _block(name: str, prefix: str) -> int | None:
    """The number behind the prefix of a tensor's name; None of another tensor."""
    number = name.removeprefix(prefix)
    is_one = name.startswith(prefix) and number.isascii() and number.isdecimal()
    return int(number) if is_one and len(number) < 9 else None


def _numbered(path: Path, names: Iterable[str], prefix: str) -> Iterator[tuple[int, str]]:
    """The tensors with that prefix, by their block.

    Raises:
        InputError: two are of one block, or no model has so many.
    """
    seen = dict[int, str]()
    for name in names:
        block = _block(name, prefix)
        if block is None:
            continue
        if block in seen:
            raise InputError(f"{path} holds two vectors for one layer: {seen[block]} and {name}")
        if block >= _MOST_LAYERS:
            raise InputError(f"{path} names layer {block}: no model has so many")
        seen[block] = name
        yield block, name


def _by_entered_block(
    path: Path, by_block: dict[int, NDArray[Any]]
) -> ForeignVector | ForeignVectors:
    """The vectors, each by the block whose output it belongs to in the file."""
    if not by_block:
        raise InputError(f"{path} holds no vector: give a file that holds a direction")
    found = {block + 1: _checked(path, vector) for block, vector in sorted(by_block.items())}
    if len(found) == 1:
        ((layer, values),) = found.items()
        return ForeignVector(values, layer)
    return _several(path, found, listed=True)


def _several(path: Path, found: dict[int, NDArray[np.float64]], listed: bool) -> ForeignVectors:
    widths = {len(values) for values in found.values()}
    if len(widths) > 1 or 0 in widths:
        raise InputError(f"{path} holds vectors of different sizes: {sorted(widths)}")
    return ForeignVectors(found, listed)


def _checked(path: Path, vector: NDArray[Any]) -> NDArray[np.float64]:
    import numpy as np

    if not isinstance(vector, np.ndarray):
        raise InputError(f"{path}: what it calls its vector is no array")
    if vector.ndim != 1 or not np.issubdtype(vector.dtype, np.floating):
        raise InputError(
            f"{path}: its vector must be one row of floats, not {list(vector.shape)} {vector.dtype}"
        )
    return np.array(vector, dtype=np.float64)


def _read_npz(path: Path) -> ForeignVector | ForeignVectors:
    import numpy as np

    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is no npz file (a zip of arrays), or is damaged: export it again")
    with np.load(path, allow_pickle=False) as file:
        held = file.files if isinstance(file, np.lib.npyio.NpzFile) else []
        if "direction" not in held and "directions" not in held:
            raise InputError(f"{path} has no array 'direction' and none 'directions'")
        if sum(part.file_size for part in zipfile.ZipFile(path).infolist()) > _LARGEST:
            raise InputError(f"{path} holds no direction: it unpacks to more than any has")
        point = str(file["hook_point"]) if "hook_point" in held else _HOOK_POINT
        if point != _HOOK_POINT:
            raise InputError(
                f"{path} acts on {json.dumps(point)[:40]}, not on {_HOOK_POINT}: a direction is "
                "taken from what enters a block"
            )
        if "directions" in held:
            rows = file["directions"]
            if rows.ndim != 2 or not len(rows) or not np.issubdtype(rows.dtype, np.floating):
                raise InputError(
                    f"{path}: 'directions' must be [n_layers, d_model] floats, not "
                    f"{list(rows.shape)} {rows.dtype}"
                )
            found = {layer: _checked(path, row) for layer, row in enumerate(rows)}
            return _several(path, found, listed=False)
        bounds = {"layer": range(_MOST_LAYERS), "position": range(-(1 << 20), 0)}
        numbers = {name: _whole(path, file, name, bounds[name]) for name in bounds}
        return ForeignVector(_checked(path, file["direction"]), **numbers)


def _whole(path: Path, file: Any, name: str, bounds: range) -> int | None:
    """A number of an npz file; None where it has none of that name."""
    if name not in file.files:
        return None
    value = file[name]
    if value.shape != () or value != int(value) or int(value) not in bounds:
        raise InputError(
            f"{path}: '{name}' must be a whole number from {bounds.start} to {bounds.stop - 1}, "
            f"not {str(value)[:40]}"
        )
    return int(value)


def _read_gguf(path: Path) -> dict[int, NDArray[Any]]:
    import numpy as np

    package = import_extra("gguf", str(path), "gguf", "exchange")

    class Bounded(package.GGUFReader):  # type: ignore[misc, name-defined]
        """Ends where the file does: its counts are a stranger's."""

        def _get(self, offset: Any, dtype: Any, count: Any = 1, *rest: Any, **named: Any) -> Any:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise ValueError("it ends early")
            return super()._get(offset, dtype, count, *rest, **named)

    reader = Bounded(path)
    kind = reader.get_field("general.architecture")
    held = b"" if kind is None else bytes(kind.parts[kind.data[0]])
    if held != _ARCHITECTURE.encode():
        what = json.dumps(held.decode(errors="replace"))[:40] if held else "no architecture"
        raise InputError(
            f"{path} is a GGUF file of {what}, not of {_ARCHITECTURE}: of GGUF files a direction "
            "is read from control vectors alone"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    found = {}
    for block, name in _numbered(path, tensors, _GGUF_VECTOR):
        kind_of = tensors[name].tensor_type.name
        if kind_of not in ("F32", "F16", "F64"):
            raise InputError(f"{path}: '{name}' is {kind_of}, not F32")
        found[block] = np.array(tensors[name].data)
    return found


def _read_steering_vector(path: Path) -> dict[int, NDArray[Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            kind = (file.metadata() or {}).get("layer_type", "decoder_block")
            if kind != "decoder_block":
                raise InputError(
                    f"{path} acts on {json.dumps(kind)}, not on the stream behind a decoder_block"
                )
            return {
                block: file.get_tensor(name)
                for block, name in _numbered(path, file.keys(), _STEERING_VECTOR)
            }
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def check_format(to: str) -> Format:
    """The format of that name.

    Raises:
        UsageError: there is none.
    """
    for name in FORMATS:
        if to == name:
            return name
    raise UsageError(f"--to must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, not '{to}'")
