"""The kinds of prompts that an evaluation asks, which need no model to be named."""

KINDS = ("harmful", "harmless")
BORDERLINE = "borderline"
