"""`base-informed`: a Normal prior that holds A where the base's layers already hear something."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus
from transformers import WhisperForConditionalGeneration

from blora_pyro.adapters import ALL_LINEAR, Site, find_targets
from blora_pyro.data import Batch
from blora_pyro.errors import UserError, check_positive
from blora_pyro.guides import normal
from blora_pyro.guides.contracts import Independent, maps_of
from blora_pyro.models import FactorPrior
from blora_pyro.models.second_moments import OWN, STATISTICS, UTTERANCES, layer_statistics

EXPLANATION = (
    "A base-informed prior shrinks direction by direction: where a layer's inputs are large "
    "whenever the base transcribes its old languages, A is pulled to 0 as by a Normal much "
    "narrower than {scale:g} (1 / (1 + {lam:g} c) of its variance, c the inputs' second moment "
    "over its mean); where the base hears nothing A is as free as under `normal`, and B is so "
    "everywhere, or with lam_b narrower where the base's predictions depend on a layer's outputs. "
    "Contraction and signal-to-noise are those of A's independent coordinates."
)


class Colouring(dist.transforms.Transform):
    """z -> A = z D Qᵀ, both (modules, rank, n): rows of covariance s² I become s² (I + lam C)^-1.

    For B, (modules, n, rank), it is the same of the columns: z -> B = Q D z.

    C = Q diag(c) Qᵀ of each layer and D = (I + lam diag(c))^(-1/2). Q completes C's k leading
    eigenvectors by any orthonormal basis of the rest, where c is one value. It is a product of k
    Householder reflections, Q = I - V T Vᵀ with V (n, k) (Schreiber and Van Loan, A
    Storage-Efficient WY Representation, 1989), so that a map costs 4 rank n k operations and no
    n x n matrix.
    """

    domain = codomain = constraints.independent(constraints.real, 2)
    bijective = True

    def __init__(
        self, vectors: Tensor, values: Tensor, lam: float, of_columns: bool = False
    ) -> None:
        """The map of some layers.

        Args:
            vectors: Leading eigenvectors of C, (modules, n, k), made orthonormal here.
            values: Their eigenvalues, and that of the rest, (modules, k + 1).
            lam: The weight of C.
            of_columns: Map columns, those of a B.
        """
        super().__init__()
        self._of_columns = of_columns
        n, k = vectors.shape[1:]
        reflections, tau = torch.geqrf(vectors.float())
        self._v = reflections.tril(-1) + torch.eye(n, k, device=vectors.device)
        products = (self._v.mT @ self._v).triu(1) * tau[:, :, None]
        self._t = torch.linalg.solve_triangular(
            products, torch.diag_embed(tau), upper=True, unitriangular=True
        )
        c = torch.cat([values[:, :k], values[:, k:].expand(-1, n - k)], 1).float()
        self.scales = (1 + lam * c).rsqrt()  # the diagonal of D, (modules, n)

    def _call(self, z: Tensor) -> Tensor:
        scaled = self._as_rows(z) * self.scales[:, None]
        return self._as_rows(scaled - scaled @ self._v @ self._t.mT @ self._v.mT)

    def _inverse(self, a: Tensor) -> Tensor:
        rows = self._as_rows(a)
        return self._as_rows((rows - rows @ self._v @ self._t @ self._v.mT) / self.scales[:, None])

    def _as_rows(self, factor: Tensor) -> Tensor:
        return factor.mT if self._of_columns else factor

    def log_abs_det_jacobian(self, z: Tensor, a: Tensor) -> Tensor:
        """Of shape (modules,): rank · log det D."""
        return self._as_rows(z).shape[-2] * self.scales.log().sum(1)

    def adjoint(self, x: Tensor) -> Tensor:
        """D Qᵀ x of columns x (modules, n, columns): A x = z (D Qᵀ x), and Bᵀ x = zᵀ (D Qᵀ x)."""
        return self.scales[:, :, None] * (x - self._v @ (self._t.mT @ (self._v.mT @ x)))

    def variance(self, of_z: Tensor) -> Tensor:
        """Variances of the factor's elements, of coordinates with variances `of_z`."""
        rows = self._as_rows(of_z)
        identity = torch.eye(rows.shape[-1], device=rows.device)
        found = []
        for i, variances in enumerate(rows):  # layer by layer, as they are n x n
            q = identity - self._v[i] @ self._t[i].mT @ self._v[i].mT  # Qᵀ
            found.append(variances @ (self.scales[i, :, None] * q).square())
        return self._as_rows(torch.stack(found))


class Coloured(dist.TransformedDistribution):
    """Of map(z), with z independent Normals; the KL of two with one map is that of their z."""

    @property
    def mean(self) -> Tensor:
        """Mean of the factor."""
        mean: Tensor = self.transforms[0](self.base_dist.mean)
        return mean

    @property
    def variance(self) -> Tensor:
        """Variance of every element; those of a row of A, or of a column of B, are dependent."""
        variance: Tensor = self.transforms[0].variance(self.base_dist.variance)
        return variance


class Prior:
    """Rows of A ~ N(0, scale² (I + lam C)^-1), columns of B ~ N(0, scale² (I + lam_b G)^-1).

    C is the second moment E[x xᵀ] of the layer's inputs under the frozen base, over the mean of its
    diagonal. It is made without old data, from the new domain's own audio, prompted in old
    languages, and the base's own transcripts of it; or from old data. An update B A x then changes
    little of what the base does with such inputs. It is the Kronecker-factored Gaussian of
    Laplace's method (Ritter, Botev and Barber, arXiv 1805.07810), as a prior on LoRA in Sliwa et
    al., arXiv 2402.12220. G, its factor of the outputs, is E[g gᵀ] of the gradient g of log p by a
    layer's outputs, over its own mean diagonal: of the same audio, with tokens drawn from what the
    base predicts after the prompt. With `lam_b` 0, the default, it is left out.

    Attributes:
        tensors: `{layer}.vectors`, the leading eigenvectors of C, (in_features, directions),
            float16, and `{layer}.values`, their eigenvalues and the mean of the others; with
            `lam_b` also those of G, `{layer}.outputs.vectors` and `{layer}.outputs.values`.
        modules: Names of the adapted layers, set by the library; empty is all linear layers.
    """

    def __init__(
        self,
        scale: float = 0.05,
        lam: float = 3.0,
        directions: int = 128,
        utterances: int = UTTERANCES,
        languages: str = "",
        statistics: str = OWN,
        lam_b: float = 0.0,
    ) -> None:
        """A Normal around 0, narrower in some directions.

        Args:
            scale: Standard deviation where the base hears nothing, and of B.
            lam: How much narrower it is where the base does: lambda; near 0 is `normal`.
            directions: Most eigenvectors that are kept a layer, the rest being treated alike;
                fewer where they would be more than a sixth of the base's parameters.
            utterances: Utterances that C is made from, the first ones.
            languages: Old languages to prompt in, with commas; those of the backward sets if left
                out, or else en, es, fr and de.
            statistics: Of what C is made: `own` is the training audio, prompted in old languages;
                `backward` the train or dev splits of the backward sets, with their own texts.
            lam_b: How much narrower B is where what the base says depends on a layer's outputs; 0
                is B as under `normal`.
        """
        check_positive(scale=scale, lam=lam, directions=directions, utterances=utterances)
        self.codes = tuple(one.strip() for one in languages.split(",")) if languages else ()
        if languages and not all(one.replace("-", "").isalpha() for one in self.codes):
            raise UserError(f"languages is '{languages}'; give codes such as en,es")
        if statistics not in STATISTICS:
            raise UserError(f"statistics is '{statistics}'; give {' or '.join(STATISTICS)}")
        self.scale, self.lam, self.languages, self.statistics = scale, lam, languages, statistics
        self.directions, self.utterances, self.lam_b = directions, utterances, lam_b
        if not 0 <= lam_b < math.inf:
            raise UserError(f"lam_b is {lam_b}; give 0, or a number above it")
        self.tensors: Mapping[str, Tensor] = {}
        self.modules: tuple[str, ...] = ()
        self._maps: dict[Any, Colouring] = {}

    def __call__(self, site: Site) -> dist.Distribution:
        """Batch shape (modules,), event shape (rows, columns)."""
        z = dist.Normal(0.0, self.scale).expand(site.shape).to_event(2)
        colouring = self.coordinates(site)
        return z if colouring is None else Coloured(z, [colouring])

    def coordinates(self, site: Site) -> Colouring | None:
        """The map from independent coordinates to the factor, where tensors are made now.

        None for B, unless there is a `lam_b`.

        Raises:
            UserError: If there are no statistics of a layer.
        """
        is_b = site.factor == "B"
        if is_b and not self.lam_b:
            return None
        device = torch.empty(0).device
        if (key := (site.modules, site.factor, device)) not in self._maps:
            names = [f"{one}.outputs" if is_b else one for one in site.modules]
            if lacking := [one for one in names if f"{one}.vectors" not in self.tensors]:
                raise UserError(
                    f"base-informed has no statistics of {lacking[0]}; fit with a base model"
                )
            vectors, values = (
                torch.stack([self.tensors[f"{one}.{what}"].to(device) for one in names])
                for what in ("vectors", "values")
            )
            self._maps[key] = Colouring(vectors, values, self.lam_b if is_b else self.lam, is_b)
        return self._maps[key]

    def prepare(
        self, base: WhisperForConditionalGeneration, batches: Iterable[Batch]
    ) -> dict[str, Tensor]:
        """Return `tensors`, from the cache if they are in it.

        Raises:
            UserError: If the base does not know a language.
        """
        self._maps.clear()
        return layer_statistics(
            base,
            batches,
            self.modules or tuple(find_targets(base, ALL_LINEAR)),
            directions=self.directions,
            utterances=self.utterances,
            languages=self.codes,
            statistics=self.statistics,
            of_outputs=self.lam_b > 0,
        )


class Guide(normal.Guide):
    """A = z D Qᵀ with z ~ N(mean, softplus(rho)²) for every element, and B as under `normal`.

    The non-centred form: means and rhos are those of z, whose KL to N(0, scale²) is that of A.
    """

    def __init__(self, model: FactorPrior) -> None:
        """Parameters of shape `site.shape` for every site of `model`.

        Raises:
            UserError: If the model's prior is not base-informed.
        """
        super().__init__(model)
        self.maps: dict[str, Any] = maps_of(model)
        if not self.maps:
            raise UserError("the guide base-informed needs that prior; give the prior's own")

    def distribution(self, site: Site) -> dist.Distribution:
        """Q of a site: batch shape (modules,), event shape (rows, columns)."""
        q = super().distribution(site)
        if site.name not in self.maps:
            return q
        return Coloured(q, [self.maps[site.name]], validate_args=False)

    def mean(self) -> dict[str, Tensor]:
        """Posterior mean of every site."""
        means = super().mean()
        return means | {name: one(means[name]) for name, one in self.maps.items()}

    def stddev(self) -> dict[str, Tensor]:
        """Posterior standard deviation of every site."""
        stddevs = super().stddev()
        coloured = {name: one.variance(stddevs[name] ** 2) for name, one in self.maps.items()}
        return stddevs | {name: variance.sqrt() for name, variance in coloured.items()}

    def independent(self) -> dict[str, Independent]:
        """The coordinates of every A."""
        return {
            name: Independent(one, self.means[name].detach(), softplus(self.rhos[name].detach()))
            for name, one in self.maps.items()
        }
