"""The library's public functions: plain inputs in, small frozen results out.

``abliterate`` re-exports them. Each takes what :func:`~abliterate.api.language_model.wrap` or
``load`` returns, or a (model, tokenizer) pair, and calls what the command of its name calls. Uses
everything but the command line and the pages of ``report``.
"""
