"""Checks of what users give, and what to say where it is wrong.

What comes in: arguments, functions and names as users wrote them. What goes out: the same, checked
and in one form, or an error that names the argument, what came, what was expected, and the remedy.

The files, in any order:

- `arrays`: what is no array is an error.
- `integers`: numbers that meet positions become int32, ids become arrays of one dtype; both exact.
- `options`: flags are True or False, precisions are JAX's.
- `user_functions`: errors inside a user's function, in the user's words, with file and line.
- `foreign_names`: names of other libraries, and what to write here instead.

The example that every room carries on is `masks.segments(ids) & masks.causal()`. Its ids may have
64 bits, as hashes of documents do; JAX by default has 32, so they are numbered:

>>> import numpy as np
>>> from jaxattn.checks.integers import identifiers
>>> hashes = np.array([2**40, 2**40, 2**40, 2**50, 2**50, 2**50])
>>> identifiers((hashes, "segments(q_ids)", ("[T]", "[B, T]")))[0].tolist()
[0, 0, 0, 1, 1, 1]

A mistake says what to write:

>>> from jaxattn import masks
>>> masks.causal() & masks.sliding_window(-1)
Traceback (most recent call last):
    ...
ValueError: sliding_window(left): got -1, expected at least 0
>>> masks.causal_mask
Traceback (most recent call last):
    ...
AttributeError: module 'jaxattn.masks' has no attribute 'causal_mask'; here it is masks.causal()
"""
