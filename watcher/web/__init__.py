"""The page of ``ollama-watch web``: it reads a store, and changes nothing, nor runs anything."""
