"""ollama-watch: watches, tells and cleans what becomes of an Ollama model store's downloads."""

__version__ = "0.1.0"
