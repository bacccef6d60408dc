"""What is made of posteriors after their fits.

- `strength`: a weaker one; `pruning`: a smaller one;
- `combining`: one of several, by their ΔW; `factors`: A and B of one layer, apart from its group.
"""
