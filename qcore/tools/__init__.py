"""What stands on the public door and the core does without: converting, checking, planning, reports, the hub, templates.

Nothing in `qcore/` but the command line imports from here.
"""
