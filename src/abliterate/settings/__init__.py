"""Every setting of the pipeline, declared once; the lowest floor but errors, and as light.

``sections`` declares them, ``marks`` says what a declaration can hold beside a type, a default and
bounds, ``loading`` reads them from TOML files, given options and the records of earlier stages. The
command line's options (``cli.options``) and a report's commands come from the same declarations.
"""

from abliterate.settings.loading import Tables, load_settings, parse_layers, take_recorded
from abliterate.settings.marks import (
    Granted,
    Option,
    Recorded,
    flags_of,
    granted,
    is_recorded,
    option_for,
    options_of,
    sections_of,
)
from abliterate.settings.sections import (
    ChatSettings,
    EvaluateSettings,
    ExtractSettings,
    ModelSettings,
    OrthogonalizeSettings,
    SelectSettings,
    Settings,
    public_url,
)

__all__ = [
    "ChatSettings",
    "EvaluateSettings",
    "ExtractSettings",
    "Granted",
    "ModelSettings",
    "Option",
    "OrthogonalizeSettings",
    "Recorded",
    "SelectSettings",
    "Settings",
    "Tables",
    "flags_of",
    "granted",
    "is_recorded",
    "load_settings",
    "option_for",
    "options_of",
    "parse_layers",
    "public_url",
    "sections_of",
    "take_recorded",
]
