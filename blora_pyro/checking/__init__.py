"""Data looked through before a fit.

- `checks`: the whole of it; `findings`: what can be found; `report`: as tables.
"""
