"""Backends: one file each, one contract (`base.py`)."""
