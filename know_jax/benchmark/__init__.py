"""How fast and how large: prediction and training measured side by side, in one run.

`runner.run` measures, `report` says what was found. Every section takes `settings.Settings` and
gives JSON data, in which all times are there, so that every ratio can be computed again.
"""
