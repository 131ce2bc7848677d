"""The version of tpcompiler. Everything else that needs it reads it from here."""

__version__ = "0.1.0"
