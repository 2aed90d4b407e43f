"""Which candidate: bypass, induce and KL of each, filters, and the search that leaves out what
cannot change the choice.

Uses ``inference`` for the passes.
"""
