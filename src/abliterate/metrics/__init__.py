"""Numbers from logits, answers and vectors: refusal score, KL, intervals, separation.

Uses nothing of the project but the lowest floor: every function is arithmetic on tensors and text.
"""
