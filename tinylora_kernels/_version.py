"""The one place that holds the version: pyproject.toml, the native build and the package read it from here."""
__version__ = "0.1.0"
