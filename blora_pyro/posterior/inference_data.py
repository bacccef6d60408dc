"""The one place that knows which ArviZ is installed: 0.23 (InferenceData) or 1.x (DataTree).

Everything is built from xarray Datasets, so that both see the same names, dimensions and
coordinates.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import xarray

MIN_RATIOS = 30  # a tail of six, the least that both fit


def import_arviz() -> ModuleType:
    """ArviZ, without the advertisement of 1.x that 0.23 gives as a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    return arviz


def _is_datatree() -> bool:
    return int(import_arviz().__version__.partition(".")[0]) >= 1


def inference_data(groups: Mapping[str, xarray.Dataset]) -> Any:
    """`arviz.InferenceData` (0.23) or `xarray.DataTree` (1.x) of Datasets by group name."""
    if _is_datatree():
        return xarray.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})
    return import_arviz().InferenceData(**groups)


def save_inference_data(data: Any, path: str | Path) -> Path:
    """Write to netCDF (`.nc`) or to a zarr store (`.zarr`, needs the zarr package).

    `arviz.from_netcdf` reads the one back, `xarray.open_datatree(path, engine="zarr")` the other.

    Raises:
        ValueError: If the path ends in neither.
    """
    path = Path(path)
    if path.suffix == ".zarr":
        # ArviZ 0.23 refuses zarr 3 itself
        tree = data if isinstance(data, xarray.DataTree) else data.to_datatree()
        tree.to_zarr(path, mode="w", zarr_format=2)  # version 3 has no standard for texts yet
    elif path.suffix == ".nc":
        data.to_netcdf(str(path))
    else:
        raise ValueError(f"'{path}' ends in neither .nc nor .zarr; give one of them")
    return path


def pareto_khat(log_ratios: np.ndarray) -> float:
    """Shape of the generalised Pareto fitted to the largest importance ratios (arXiv 1507.02646).

    Infinite where there is nothing to fit: below 30 draws, if the largest ratios are all the same,
    or if they lie so far apart that most of them vanish beside the largest.

    Args:
        log_ratios: log p - log q at draws from q, (draws,); any constant may be missing.
    """
    ratios = np.array(log_ratios, np.float64)  # a copy, because 0.23 works in its argument
    if len(ratios) < MIN_RATIOS:
        return math.inf
    try:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            if _is_datatree():
                from arviz_stats.base import array_stats

                khat = array_stats.psislw(-ratios)[1]  # takes log-likelihoods
            else:
                khat = import_arviz().psislw(ratios)[1]
    except ValueError:  # what 1.x raises if all are the same
        return math.inf
    return float(khat) if np.isfinite(khat) else math.inf
