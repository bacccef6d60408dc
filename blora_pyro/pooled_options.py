"""Which options of a fit go together with several domains."""

from blora_pyro.guides import FAMILIES

# The rows of a site must be independent: the horseshoe has one scale for them all.
FAMILIES_BY_ROW = tuple(name for name in FAMILIES if name != "horseshoe")
