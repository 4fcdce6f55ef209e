"""A small Ollama server and a small registry, to show the project and to test it against."""
