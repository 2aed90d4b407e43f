"""What is taken out of directions: their components along vectors that are no refusal.

*harmless*: the mean harmless activation at a direction's own position and layer. *first token*:
the mean residual stream of the prompt's first token at the direction's own layer. In many models
that token is an attention sink (Xiao et al. 2023) with a massive activation (Sun et al. 2024): its
stream is a hundred times as long as that of other tokens, so a direction that lies along it a
little takes more away there than anywhere else, and every later token attends to what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from abliterate.settings.sections import SelectSettings

# Names of records and metadata, which are those of the settings.
HARMLESS, FIRST_TOKEN = "project_harmless", "project_first_token"
_TAKEN_OUT = "taken_out"


@dataclass(frozen=True)
class Projection:
    """Which components directions are without.

    Attributes:
        harmless: that along the mean harmless activation.
        first_token: that along the mean residual stream of the first token.
    """

    harmless: bool = False
    first_token: bool = False

    @classmethod
    def recorded(cls, record: Mapping[str, Any]) -> Projection:
        """What a record's ``direction``, or a safetensors file's metadata, says of it."""
        return cls(*(record.get(key) in (True, "true") for key in (HARMLESS, FIRST_TOKEN)))

    @classmethod
    def recorded_when_loaded(cls, record: Mapping[str, Any]) -> Projection:
        """What a record's ``direction`` says was taken out of it when it was loaded."""
        names = record.get(_TAKEN_OUT)
        return cls(*(isinstance(names, list) and key in names for key in (HARMLESS, FIRST_TOKEN)))

    @classmethod
    def asked(cls, settings: SelectSettings) -> Projection:
        """What settings ask for."""
        return cls(settings.project_harmless, settings.project_first_token)

    def __bool__(self) -> bool:
        return self.harmless or self.first_token

    def __sub__(self, other: Projection) -> Projection:
        return Projection(
            self.harmless and not other.harmless, self.first_token and not other.first_token
        )

    def __or__(self, other: Projection) -> Projection:
        return Projection(self.harmless or other.harmless, self.first_token or other.first_token)

    @property
    def names(self) -> list[str]:
        """The settings that ask for it."""
        held = {HARMLESS: self.harmless, FIRST_TOKEN: self.first_token}
        return [name for name, there in held.items() if there]

    @property
    def options(self) -> list[str]:
        """The same on the command line."""
        return [f"--{name.replace('_', '-')}" for name in self.names]

    @property
    def record(self) -> dict[str, bool]:
        """What records hold of it; nothing where nothing was taken out."""
        return dict.fromkeys(self.names, True)

    @property
    def when_loaded(self) -> dict[str, list[str]]:
        """What records hold of what was taken out when a direction was loaded."""
        return {_TAKEN_OUT: self.names} if self else {}

    @property
    def metadata(self) -> dict[str, str]:
        """The same in the metadata of a safetensors file."""
        return dict.fromkeys(self.names, "true")

    @property
    def words(self) -> str:
        """What was taken out, for readers."""
        parts = {
            HARMLESS: "the mean harmless activation",
            FIRST_TOKEN: "the mean residual stream of the first token",
        }
        return " and ".join(parts[name] for name in self.names)

    def of(self, vectors: Tensor, mean_harmless: Tensor, mean_first_token: Tensor | None) -> Tensor:
        """``vectors`` without these components; zero where nothing else is there.

        Args:
            vectors: float64 ``[..., d_model]``.
            mean_harmless: of a shape that broadcasts to theirs.
            mean_first_token: likewise; needed only if its component is asked for.
        """
        from abliterate.metrics.geometry import without_components

        along = [mean_harmless.double()] if self.harmless else []
        if self.first_token:
            assert mean_first_token is not None
            along.append(mean_first_token.double())
        return without_components(vectors, *along)


WHOLE = Projection()  # nothing was taken out
