import math

import numpy as np
import pytest
import xarray

from blora_pyro.posterior.inference_data import (
    import_arviz,
    inference_data,
    pareto_khat,
    save_inference_data,
)

MODULES = ["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1", "été"]
DRAWS = 60


def datasets() -> dict[str, xarray.Dataset]:
    """Groups as `Posterior.to_arviz` makes them."""
    rng = np.random.default_rng(0)
    coords = {"chain": [0], "draw": np.arange(DRAWS), "module": MODULES, "rank": [0, 1]}
    sample = ("chain", "draw")

    def factors(mean, sd):
        weights = mean + sd * rng.standard_normal((1, DRAWS, 3, 2, 4))
        return xarray.Dataset(
            {
                "A_5x4": ((*sample, "module", "rank", "in_feature"), weights.astype(np.float32)),
                "A_5x4_global": (sample, rng.random((1, DRAWS)).astype(np.float32)),
            },
            coords={**coords, "in_feature": np.arange(4)},
            attrs={"prior": "horseshoe", "prior_args": '{"scale": 0.05}'},
        )

    stats = {name: (sample, rng.standard_normal((1, DRAWS))) for name in ("log_guide", "log_prior")}
    return {
        "posterior": factors(3.0, 0.5),
        "prior": factors(0.0, 2.0),
        "sample_stats": xarray.Dataset(stats, {"chain": [0], "draw": np.arange(DRAWS)}),
    }


@pytest.fixture
def groups() -> dict[str, xarray.Dataset]:
    return datasets()


def dataset(data, group: str) -> xarray.Dataset:
    """A group, of an InferenceData or of a DataTree."""
    found = data[group]
    return found if isinstance(found, xarray.Dataset) else found.to_dataset()


def assert_holds(data, groups) -> None:
    """Values, types, dimensions, coordinates and attributes of every group."""
    names = {name.strip("/") for name in (data.groups if is_tree(data) else data.groups())} - {""}
    assert names == set(groups)
    for name, expected in groups.items():
        found = dataset(data, name)
        xarray.testing.assert_identical(found, expected)
        for key, variable in expected.variables.items():
            assert found[key].dims == variable.dims
            if key != "module":  # texts have a type of their own on disk
                assert found[key].dtype == variable.dtype


def is_tree(data) -> bool:
    return isinstance(data, xarray.DataTree)


# ---- groups


def test_the_class_is_that_of_the_installed_arviz(groups):
    arviz = import_arviz()
    data = inference_data(groups)
    if int(arviz.__version__.split(".")[0]) >= 1:
        assert is_tree(data)
    else:
        assert type(data) is arviz.InferenceData


def test_groups_hold_what_they_were_given(groups):
    assert_holds(inference_data(groups), datasets())


def test_layers_are_chosen_by_name(groups):
    weights = dataset(inference_data(groups), "posterior")["A_5x4"]
    assert list(weights["module"].values) == MODULES
    chosen = weights.sel(module=MODULES[1], rank=1)
    assert chosen.dims == ("chain", "draw", "in_feature")
    np.testing.assert_array_equal(chosen, groups["posterior"]["A_5x4"].values[:, :, 1, 1])


def test_one_group_is_enough(groups):
    only = {"posterior": groups["posterior"]}
    assert_holds(inference_data(only), only)


def test_arviz_itself_summarises_the_draws(groups):
    data = inference_data(groups)
    table = import_arviz().summary(data, var_names=["A_5x4"], kind="stats", round_to="none")
    weights = groups["posterior"]["A_5x4"].values[0].astype(float).reshape(DRAWS, -1)
    assert len(table) == 3 * 2 * 4
    assert table.index[0] == f"A_5x4[{MODULES[0]}, 0, 0]"
    assert table.index[-1] == f"A_5x4[{MODULES[2]}, 1, 3]"
    np.testing.assert_allclose(table["mean"].astype(float), weights.mean(0), rtol=1e-5)
    np.testing.assert_allclose(table["sd"].astype(float), weights.std(0, ddof=1), rtol=1e-2)


def test_arviz_itself_gives_intervals_of_the_prior(groups):
    data = inference_data(groups)
    hdi = import_arviz().hdi(dataset(data, "prior"))["A_5x4"]
    width = float((hdi[..., 1] - hdi[..., 0]).mean())
    assert 2 * 1.2 * 2.0 < width < 2 * 2.2 * 2.0  # of a Normal, between 77% and 97%


# ---- files


@pytest.mark.parametrize("as_text", [False, True])
def test_netcdf_brings_everything_back(groups, tmp_path, as_text):
    path = tmp_path / "draws.nc"
    written = save_inference_data(inference_data(groups), str(path) if as_text else path)
    assert written == path
    assert_holds(import_arviz().from_netcdf(str(path)), groups)


def test_zarr_brings_everything_back(groups, tmp_path):
    path = save_inference_data(inference_data(groups), tmp_path / "draws.zarr")
    with xarray.open_datatree(path, engine="zarr") as data:
        assert_holds(data, groups)


@pytest.mark.parametrize("name", ["draws.nc", "draws.zarr"])
def test_a_second_file_replaces_the_first(groups, tmp_path, name):
    path = tmp_path / name
    save_inference_data(inference_data(groups), path)
    only = {"posterior": groups["posterior"].isel(draw=[0, 1])}
    save_inference_data(inference_data(only), path)
    with xarray.open_datatree(path, engine="zarr" if "zarr" in name else "h5netcdf") as data:
        assert_holds(data, only)


@pytest.mark.parametrize("name", ["draws", "draws.json", "draws.nc.gz", "nc", ".nc", "draws.NC"])
def test_another_suffix_is_refused_and_nothing_written(groups, tmp_path, name):
    with pytest.raises(ValueError, match=r"neither \.nc nor \.zarr"):
        save_inference_data(inference_data(groups), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_saving_changes_nothing(groups, tmp_path):
    data = inference_data(groups)
    for name in ("draws.nc", "draws.zarr"):
        save_inference_data(data, tmp_path / name)
    assert_holds(data, datasets())


# ---- k-hat


def pareto_ratios(k: float, count: int, seed: int) -> np.ndarray:
    """Logarithms of ratios from a generalised Pareto distribution of shape k and scale 1."""
    u = np.random.default_rng(seed).random(count)
    return np.log(np.expm1(-k * np.log(u)) / k)


def likeliest_shape(log_ratios: np.ndarray) -> float:
    """Maximum-likelihood k of the tail, by a grid of k / scale, drawn to 1/2 by ten draws.

    Vehtari et al. (arXiv 1507.02646): a tail of min(0.2 S, 3 sqrt S) ratios. Grimshaw (1993): for a
    given theta = k / scale, k is the mean of log(1 + theta x).
    """
    ratios = np.sort(np.exp(log_ratios - log_ratios.max()))
    count = math.ceil(min(0.2 * len(ratios), 3 * len(ratios) ** 0.5))
    excess = ratios[-count:] - ratios[-count - 1]
    theta = np.geomspace(1e-3, 1e4, 4000) / excess.mean()
    k = np.log1p(theta[:, None] * excess).mean(1)
    likeliest = k[np.argmax(np.log(theta / k) - k)]
    return (count * likeliest + 10 * 0.5) / (count + 10)


@pytest.mark.parametrize("k", [0.3, 0.5, 0.7, 1.0])
def test_khat_is_the_shape_of_pareto_ratios(k):
    found = [pareto_khat(pareto_ratios(k, 20_000, seed)) for seed in range(6)]
    assert abs(np.mean(found) - k) < 0.1
    assert np.std(found) < 0.15


@pytest.mark.parametrize("count", [3000, 20_000])
@pytest.mark.parametrize("k", [0.4, 0.8, 1.5])
def test_khat_is_near_the_likeliest_shape(k, count):
    ratios = pareto_ratios(k, count, seed=1)
    assert pareto_khat(ratios) == pytest.approx(likeliest_shape(ratios), abs=0.05)


def test_khat_tells_a_light_tail_from_a_heavy_one():
    x = np.random.default_rng(2).standard_normal(4000)
    # q is N(0, 1): p narrower, and p wider, whose ratios have no variance
    narrow, wide = (-(x**2) / 2 * (1 / s**2 - 1) for s in (0.8, 3.0))
    assert pareto_khat(narrow) < 0.2
    assert pareto_khat(wide) > 0.5


def test_khat_asks_neither_for_a_constant_nor_for_an_order():
    ratios = pareto_ratios(0.6, 500, seed=3)
    khat = pareto_khat(ratios)
    assert pareto_khat(ratios + 1000) == pytest.approx(khat, abs=1e-6)
    assert pareto_khat(np.random.default_rng(0).permutation(ratios)) == pytest.approx(khat)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_khat_leaves_its_argument_alone(dtype):
    ratios = pareto_ratios(0.6, 200, seed=4).astype(dtype)
    before = ratios.copy()
    ratios.flags.writeable = False
    assert type(pareto_khat(ratios)) is float
    np.testing.assert_array_equal(ratios, before)


def test_khat_takes_ratios_of_a_thousand_nats():
    ratios = 300 * np.random.default_rng(5).standard_normal(50)
    assert 5 < pareto_khat(ratios) < math.inf


@pytest.mark.parametrize(
    "ratios",
    [[], [1.0], [0.0, 5.0], np.arange(29.0), np.zeros(50), np.full(1000, -1e6), [1e5, *[0.0] * 49]],
    ids=["none", "one", "two", "29", "equal", "equal and far", "one far above"],
)
def test_khat_is_infinite_where_there_is_no_tail_to_fit(ratios):
    assert pareto_khat(np.array(ratios)) == math.inf


def test_khat_needs_thirty_draws():
    assert math.isfinite(pareto_khat(np.random.default_rng(6).standard_normal(30)))
