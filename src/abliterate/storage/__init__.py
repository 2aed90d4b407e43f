"""Artifacts (JSON, safetensors; written atomically) and bytes between files.

Uses ``errors`` only.
"""
