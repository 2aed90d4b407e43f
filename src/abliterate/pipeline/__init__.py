"""The stages of a run folder, one by one and as a chain.

Uses every stage; only the command line and the report stand above.
"""
