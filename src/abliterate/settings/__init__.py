"""Every setting of the pipeline, declared once; the lowest floor but errors, and as light.

``sections`` declares them; ``marks`` is what a declaration can say beside a type, a default and
bounds, ``values`` what single values must be; ``loading`` reads settings from TOML files, given
options and the records of earlier stages, and ``without_effect`` refuses what would do nothing. The
command line's options (``cli.options``) and the commands in a report come from the same
declarations. Uses ``errors`` and ``resources``.
"""

from abliterate.settings.loading import (
    load_settings,
    parse_layers,
    parse_memory,
    take_recorded,
)
from abliterate.settings.marks import (
    Follows,
    Granted,
    Needs,
    Option,
    Recorded,
    flags_of,
    followed_table,
    granted,
    is_recorded,
    option_for,
    options_of,
    sections_of,
)
from abliterate.settings.sections import (
    ExtractSettings,
    ModelSettings,
    OrthogonalizeSettings,
    Settings,
)
from abliterate.settings.values import public_url
from abliterate.settings.without_effect import Tables, given_options, refuse_without

__all__ = [
    "ExtractSettings",
    "Follows",
    "Granted",
    "ModelSettings",
    "Needs",
    "Option",
    "OrthogonalizeSettings",
    "Recorded",
    "Settings",
    "Tables",
    "flags_of",
    "followed_table",
    "given_options",
    "granted",
    "is_recorded",
    "load_settings",
    "option_for",
    "options_of",
    "parse_layers",
    "parse_memory",
    "public_url",
    "refuse_without",
    "sections_of",
    "take_recorded",
]
