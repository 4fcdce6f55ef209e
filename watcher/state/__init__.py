"""What we keep in ``.ollama-watch/``, and the only calls that change a file.

`fs` changes files, `folders` opens a store, `state_folder` opens our own folder in it. What is read
back from there is input like any other: `checks` bounds it.
"""
