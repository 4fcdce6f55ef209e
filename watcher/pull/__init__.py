"""A model's download from its start to its end, through a server; and the queue of downloads."""
