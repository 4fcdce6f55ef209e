"""What a look means, and what to do about it: pure functions of the evidence. No I/O, no clock.

`diagnose.diagnose` gives each download its condition, `plan.make` makes the plan,
`transitions` has what to remember and which events follow.
"""
