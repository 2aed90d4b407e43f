"""The stages of a run folder, one by one and as a chain.

Uses every stage; the library and the command line stand above, ``report`` beside it.
"""
