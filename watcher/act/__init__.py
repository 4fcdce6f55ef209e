"""Carrying out a plan: intent, second look, change, outcome; and finishing what a kill left.

`apply.apply` is the way in. `transaction` is the only caller that moves or removes a store's files.
"""
