"""Names of the built-in prior families and guides, and the modules that define them."""

from pathlib import Path

FAMILIES = {
    "normal": "blora_pyro.guides.normal",
    "laplace": "blora_pyro.guides.laplace",
    "student-t": "blora_pyro.guides.student_t",
    "scale-mixture": "blora_pyro.guides.scale_mixture",
    "horseshoe": "blora_pyro.guides.horseshoe",
    "learned-scale": "blora_pyro.guides.learned_scale",
    "pretrained-scale": "blora_pyro.guides.pretrained_scale",
    "a-only": "blora_pyro.guides.a_only",
}
GUIDES = {
    **FAMILIES,
    "point": "blora_pyro.guides.point",
    "auto-normal": "blora_pyro.guides.auto_normal",
}
PREVIOUS_POSTERIOR = "previous-posterior"  # the prior that `prior_from` resolves to
# Families whose rows depend on one another, by a scale that they share: they cannot be pooled.
DEPENDENT_ROWS = ("horseshoe",)


def is_code(name: object) -> bool:
    """Return whether a prior or guide is the path of a Python file, which loading it would run."""
    return Path(str(name)).suffix == ".py"
