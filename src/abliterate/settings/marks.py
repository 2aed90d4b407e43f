"""What a setting's declaration can say beside its type, default and bounds."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel


@dataclass(frozen=True)
class Recorded:
    """Marks a setting that later stages take from a run folder's record.

    Without the mark a setting is never taken from there. Mark what names the experiment and can do
    nothing else: see ``abliterate.settings.sections``.
    """


@dataclass(frozen=True)
class Granted:
    """Marks a setting that a report's commands never repeat from a record: the reader grants it.

    Attributes:
        placeholder: what stands for the value in the command; None: the option is left out.
    """

    placeholder: str | None = None


@dataclass(frozen=True)
class Needs:
    """Marks a setting that has no effect unless another one of its section asks for something.

    Attributes:
        settings: of these one at least must ask.
        values: what it must be; without any: anything that is neither none nor empty.
    """

    settings: tuple[str, ...]
    values: tuple[object, ...] = ()

    def are_met(self, section: BaseModel) -> bool:
        """Whether the settings of ``section`` give the marked one an effect."""
        held = [getattr(section, name) for name in self.settings]
        return any(one in self.values if self.values else one not in (None, ()) for one in held)


@dataclass(frozen=True)
class Follows:
    """Marks a setting that is what another section has under its name, until it is given itself.

    Attributes:
        table: the other section's; its setting has the same type and default.
    """

    table: str


@dataclass(frozen=True)
class Listed:
    """Marks a setting of which a configuration may give a list that is not empty; of one that is
    text with commas, a whole number too.

    Attributes:
        unless: what there is where the setting is left out.
    """

    unless: str


@dataclass(frozen=True)
class Option:
    """The option by which commands override a setting. A setting may have several, each of its own
    commands, if they say different things.

    Attributes:
        help: what ``--help`` says. The default is shown behind it, unless it tells the default.
        panel: the heading that it stands under; None: with the command's own options.
        commands: the commands that have it.
        flags: its spelling, where that is not the setting's name; of a switch that can be turned
            off too, both: ``--filter/--no-filter``.
        implied: the value of the flag alone, of an option whose value may be left out.
    """

    help: str
    panel: str | None
    commands: tuple[str, ...]
    flags: str | None = None
    implied: str | None = None


def sections_of(schema: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The sections of settings, by the names of their tables."""
    sections: dict[str, type[BaseModel]] = {}
    for table, field in schema.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, BaseModel)
        sections[table] = field.annotation
    return sections


def is_recorded(section: type[BaseModel], name: str) -> bool:
    """Whether later stages take this setting of a section from a run folder's record."""
    return any(isinstance(mark, Recorded) for mark in section.model_fields[name].metadata)


def granted(section: type[BaseModel], name: str) -> Granted | None:
    """The mark of a setting that no report repeats."""
    marks = section.model_fields[name].metadata
    return next((mark for mark in marks if isinstance(mark, Granted)), None)


def options_of(section: type[BaseModel], name: str) -> list[Option]:
    """The options of a setting."""
    return [mark for mark in section.model_fields[name].metadata if isinstance(mark, Option)]


def option_for(command: str, section: type[BaseModel], name: str) -> Option | None:
    """The option that a command has for a setting, if it has one."""
    options = options_of(section, name)
    return next((option for option in options if command in option.commands), None)


def flags_of(section: type[BaseModel], name: str) -> str:
    """How a setting's option is spelled: ``--n-train``, ``--filter/--no-filter``."""
    spelled = (option.flags for option in options_of(section, name) if option.flags)
    return next(spelled, "--" + name.replace("_", "-"))


def needs_of(section: type[BaseModel], name: str) -> Needs | None:
    """What gives a setting its effect; None of one that always has it."""
    marks = section.model_fields[name].metadata
    return next((mark for mark in marks if isinstance(mark, Needs)), None)


def followed_table(section: type[BaseModel], name: str) -> str | None:
    """The table whose setting of that name counts where this one is not given."""
    marks = section.model_fields[name].metadata
    return next((mark.table for mark in marks if isinstance(mark, Follows)), None)


def listed(section: type[BaseModel], name: str) -> Listed | None:
    """The mark of a setting that may be a list, and no empty one."""
    marks = section.model_fields[name].metadata
    return next((mark for mark in marks if isinstance(mark, Listed)), None)
