"""Per-prompt activations kept on disk: ``RUN/activations.safetensors``, written row by row.

Tensors ``harmful`` and ``harmless`` are ``[n_prompts, n_layers, n_positions, d_model]`` in the
model's dtype, ``kept_harmful`` and ``kept_harmless`` say which rows count towards the means.
Neither writing nor reading holds more than a batch, or one layer, in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from abliterate.errors import InputError, UsageError
from abliterate.settings import parse_layers
from abliterate.storage.artifacts import read_tensors, tensor_metadata
from abliterate.storage.guarded_files import naming, replacing
from abliterate.storage.json_text import parse_json

KINDS = ("harmful", "harmless")

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def choose_layers(spec: str, n_layers: int) -> tuple[int, ...]:
    """The layers that ``--save-activations`` names, ascending.

    Raises:
        UsageError: the list is malformed or names a layer that the model lacks.
    """
    if spec == "all":
        return tuple(range(n_layers))
    try:
        layers = parse_layers(spec)
    except UsageError:
        layers = None
    if not layers or max(layers) >= n_layers:
        raise UsageError(
            f"--save-activations must be all or layers such as 3,5-7 of 0 to {n_layers - 1}, not "
            f"'{spec}'"
        )
    return tuple(sorted(layers))


@dataclass(frozen=True)
class Wanted:
    """Which of the activations seen are kept.

    Attributes:
        layers: model layers, ascending.
        positions: all positions of the extraction, as they come.
        which: ``last`` keeps the last of them, ``all`` every one.
    """

    layers: tuple[int, ...]
    positions: tuple[int, ...]
    which: Literal["last", "all"]

    @property
    def kept_positions(self) -> tuple[int, ...]:
        """The positions kept, counted from the prompt's end."""
        return self.positions[-1:] if self.which == "last" else self.positions

    def take(self, activations: Tensor) -> Tensor:
        """``[batch, n_positions, n_layers, d_model]`` to what is kept of it, layers first."""
        chosen = activations[:, -len(self.kept_positions) :, list(self.layers)]
        return chosen.transpose(1, 2).contiguous().cpu()


class ActivationWriter:
    """Fills the tensors of one safetensors file, in whatever order the rows come.

    ``put(kind, rows, activations)`` may be handed to ``extract`` as its ``keep``.
    """

    def __init__(
        self, file: IO[bytes], path: Path, wanted: Wanted, counts: Mapping[str, int], model: str
    ) -> None:
        """Write to ``file``, which will be called ``path``."""
        self._file, self._path = file, path
        self.wanted, self._counts, self._model = wanted, counts, model
        self._starts: dict[str, int] = {}

    def put(self, kind: str, rows: Sequence[int], activations: Tensor) -> None:
        """Write the rows of one batch, ``[batch, n_positions, n_layers, d_model]``."""
        chosen = self.wanted.take(activations)
        if not self._starts:
            self._begin(chosen)
        bytes_of = chosen.view(torch.uint8).numpy().reshape(len(rows), -1)
        with naming(self._path):
            for row, content in zip(rows, bytes_of, strict=True):
                self._file.seek(self._starts[kind] + row * content.nbytes)
                self._file.write(content.tobytes())

    def finish(self, kept: Mapping[str, Sequence[bool]]) -> None:
        """Write which rows count."""
        with naming(self._path):
            for kind in KINDS:
                self._file.seek(self._starts[f"kept_{kind}"])
                self._file.write(bytes(kept[kind]))

    def _begin(self, sample: Tensor) -> None:
        """The header, now that dtype and width are known; every tensor has its place in it."""
        shape = list(sample.shape[1:])
        row = sample[0].numel() * sample.element_size()
        # The widest element type first, so that every tensor is aligned.
        sizes = {kind: self._counts[kind] * row for kind in KINDS}
        sizes |= {f"kept_{kind}": self._counts[kind] for kind in KINDS}
        header: dict[str, Any] = {
            "__metadata__": {
                "layers": json.dumps(self.wanted.layers),
                "model": self._model,
                "positions": json.dumps(self.wanted.kept_positions),
            }
        }
        offset = 0
        for name, size in sizes.items():
            flags = name.startswith("kept_")
            header[name] = {
                "dtype": "BOOL" if flags else _DTYPES[sample.dtype],
                "shape": [size] if flags else [self._counts[name], *shape],
                "data_offsets": [offset, offset + size],
            }
            self._starts[name] = offset
            offset += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self._starts = {name: start + 8 + len(text) for name, start in self._starts.items()}
        with naming(self._path):
            self._file.write(len(text).to_bytes(8, "little") + text)
            self._file.truncate(8 + len(text) + offset)


@contextmanager
def activation_writer(
    path: Path, wanted: Wanted, counts: Mapping[str, int], model: str
) -> Iterator[ActivationWriter]:
    """A writer whose file appears at ``path``, whole, when the context ends without an error.

    Args:
        path: ``RUN/activations.safetensors``.
        wanted: which activations are kept.
        counts: prompts of each kind.
        model: name of the checkpoint, for the file's metadata.
    """
    with replacing(path) as file:
        yield ActivationWriter(file, path, wanted, counts, model)


@dataclass(frozen=True)
class Activations:
    """A file of activations, read one layer at a time.

    Attributes:
        path: the file.
        layers: the model layers it holds, ascending.
        positions: the positions it holds, counted from the prompt's end.
    """

    path: Path
    layers: tuple[int, ...]
    positions: tuple[int, ...]

    @classmethod
    def open(cls, path: Path) -> Activations:
        """Read the header.

        Raises:
            InputError: the file is missing, damaged or not one of these.
        """
        read_tensors(path, *(f"kept_{kind}" for kind in KINDS))
        metadata = tensor_metadata(path)
        try:
            layers, positions = (parse_json(metadata[key]) for key in ("layers", "positions"))
            return cls(path, tuple(map(int, layers)), tuple(map(int, positions)))
        except (KeyError, ValueError, TypeError):
            raise InputError(
                f"{path} does not say which layers and positions it holds: make it again with "
                "`abliterate extract --save-activations`"
            ) from None

    def at(self, layer: int, position: int) -> tuple[Tensor, Tensor]:
        """Harmful and harmless rows that count, each float64 ``[n, d_model]``."""
        from safetensors import SafetensorError, safe_open

        layer_index, position_index = self.layers.index(layer), self.positions.index(position)
        counting = []
        try:
            with safe_open(self.path, "pt") as file:
                for kind in KINDS:
                    rows = file.get_slice(kind)[:, layer_index, position_index]
                    counting.append(rows[file.get_tensor(f"kept_{kind}")].double())
        except (SafetensorError, IndexError, RuntimeError) as error:
            raise InputError(f"{self.path} is damaged ({error}): run extract again") from None
        return counting[0], counting[1]
