"""Bytes from registries, moved by ourselves: no byte is fetched twice.

A layer arrives in ``.ollama-watch/transfers/<digest>/``, out of reach of the server's start, beside
a ledger of what has arrived. After a kill, a power cut, a full disk or a lost connection it
continues where it stopped. It gets its name in ``blobs/`` once its hash is right, and the manifest
comes last.

`push` goes the other way, from a store to a mirror; `questions` asks for a manifest or a length.

Others use `model.Transfer`, `push.Push`, `questions`, `taking_over`, `publication`, `store.opened`
and `values`.
"""
