"""What Ollama reads, writes and sends: names, progress files, manifests, its server's stream.

Facts of its source and its registry, each with the place where it stands. Knows nothing of us.
"""
