"""One look at a store: nothing is judged here and nothing is changed."""
