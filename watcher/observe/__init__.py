"""One look at a store and its machine: nothing is judged here, and nothing is changed.

`evidence.observe` is the way in: a `Host` gives an `Evidence`.
"""
