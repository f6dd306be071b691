"""Import names of other tools, as thin shims over qcore's public functions.

Change `from auto_gptq import …` to `from qcore.compat.auto_gptq import …`, `from auto_round import …` to
`from qcore.compat.auto_round import …`, and scripts run. This package stands above the core: nothing in the core imports
it, and unlike the core it may name plugins, as any caller does.
"""
