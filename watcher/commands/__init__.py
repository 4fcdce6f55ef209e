"""The commands' bodies, one file for each group of them."""
