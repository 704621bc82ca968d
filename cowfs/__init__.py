"""cowfs: a copy-on-write filesystem in one image file.

The folders are floors; each imports only from those above it:
errors, storage, files, history, care, daemon, cli.
"""

__version__ = "0.1.0"
