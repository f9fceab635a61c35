"""What every side of Gapweave agrees on: configuration, types, model, privacy arithmetic, reports."""

__version__ = "0.1.0"
PROTOCOL_VERSION = 1
"""Version of the messages between server and sites; a mismatch is refused with both versions named."""
