"""`base-informed`: a Normal prior that holds A where the base's layers already hear something."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus
from transformers import WhisperForConditionalGeneration

from blora_pyro.adapters import ALL_LINEAR, Site, find_targets
from blora_pyro.data import IGNORED, Batch
from blora_pyro.errors import UserError, check_positive
from blora_pyro.files import cache_dir, replace_file
from blora_pyro.guides import normal
from blora_pyro.guides.contracts import Independent, maps_of
from blora_pyro.models import FactorPrior
from blora_pyro.models.decoding import decode
from blora_pyro.models.encoder import embed, first_adapted, run_layers
from blora_pyro.models.encoder_states import weights_hash

USUAL_LANGUAGES = ("en", "es", "fr", "de")
UTTERANCES = 96  # that second moments are made from
OWN, BACKWARD = STATISTICS = ("own", "backward")
PART = 6  # of the base's parameters: at most one in so many is as many as the eigenvectors have
MOST_TOKENS = 64  # of a transcript, so that one which repeats itself does not outweigh the others
OVERSAMPLING, ITERATIONS = 32, 4  # of the randomised eigendecomposition

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

    @torch.no_grad()
    def prepare(
        self, base: WhisperForConditionalGeneration, batches: Iterable[Batch]
    ) -> dict[str, Tensor]:
        """Return `tensors`, from the cache if they are in it.

        Raises:
            UserError: If the base does not know a language.
        """
        self._maps.clear()
        modules = self.modules or tuple(find_targets(base, ALL_LINEAR))
        prompts = _prompts(base, self.codes) if self.statistics == OWN else []
        heard = [*islice(_utterances(batches), self.utterances)]
        said = prompts if self.statistics == OWN else [(one.prompt, one.target) for one in heard]
        file = _file(base, heard, [modules, said, self.directions, self.lam_b > 0])
        layers = {name: base.get_submodule(name) for name in modules}
        with suppress(OSError, SafetensorError, ValueError):
            if file is not None:
                found = load_file(file, str(base.device))
                check_statistics(found, statistics_sizes(layers, self.lam_b))
                return found
        moments = SecondMoments(base, modules)
        gradients = SecondMoments(base, modules if self.lam_b else (), of_outputs=True)
        for number, utterance in enumerate(heard):
            states = _listen(base, utterance, moments)
            own = self.statistics == OWN
            prompt = prompts[number % len(prompts)] if own else utterance.prompt
            if not own and len(utterance.target) > 1:  # more than its end
                tokens = [*prompt, *utterance.target[:-1]]
            else:
                tokens = _transcript(base, states, prompt)
            moments.add(tokens, states)
            if self.lam_b:
                gradients.add_gradients(utterance, tokens, len(prompt), states)
        room = base.num_parameters() // (PART * (moments.size + gradients.size))
        count, tensors = max(1, min(self.directions, room)), dict[str, Tensor]()
        for key in statistics_sizes(layers, self.lam_b):
            is_input, name = key in layers, key.removesuffix(".outputs")
            found = leading_eigenvectors((moments if is_input else gradients).pop(name), count)
            tensors |= {f"{key}.{what}": one.contiguous() for what, one in found.items()}
        with suppress(OSError):  # a cache that can't be written is none
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                replace_file(file, save({name: one.cpu() for name, one in tensors.items()}))
        return tensors


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


# ---- the statistics


def statistics_sizes(layers: Mapping[str, Any], lam_b: float) -> dict[str, int]:
    """Return the size of every statistic by the name that its tensors begin with, see `Prior`.

    Args:
        layers: What has `in_features` and `out_features` by the name of every adapted layer.
        lam_b: See `Prior`.
    """
    sizes = {name: layer.in_features for name, layer in layers.items()}
    if lam_b:
        sizes |= {f"{name}.outputs": layer.out_features for name, layer in layers.items()}
    return sizes


def check_statistics(tensors: Mapping[str, Tensor], layers: Mapping[str, int]) -> None:
    """Refuse stored statistics that can't be.

    Args:
        tensors: See `Prior`.
        layers: See `statistics_sizes`.

    Raises:
        ValueError: Naming the first.
    """
    names = {f"{layer}.{what}" for layer in layers for what in ("vectors", "values")}
    if wrong := names ^ tensors.keys():
        raise ValueError(f"prior.{min(wrong)} is {'missing' if wrong & names else 'of no layer'}")
    for layer, size in layers.items():
        vectors, values = (tensors[f"{layer}.{what}"] for what in ("vectors", "values"))
        k = vectors.shape[-1] if vectors.dim() == 2 else 0
        if vectors.shape != (size, k) or not 0 <= k <= size or values.shape != (k + 1,):
            what = f"{tuple(vectors.shape)} and {tuple(values.shape)}"
            raise ValueError(f"prior.{layer} has vectors and values of shapes {what}")
        if not (vectors.is_floating_point() and values.is_floating_point()):
            raise ValueError(f"prior.{layer} has statistics that are no floats")
        # unit vectors to half precision, and eigenvalues of a mean diagonal of 1
        if not (vectors.abs() <= 1.01).all() or not ((values >= 0) & (values <= 1.01 * size)).all():
            raise ValueError(f"prior.{layer} has statistics that no inputs have")


def leading_eigenvectors(moment: Tensor, count: int) -> dict[str, Tensor]:
    """Return `vectors` (n, k), k = min(count, n), and `values` (k + 1,) of a second moment (n, n).

    The moment is divided by the mean of its diagonal; the last value is the mean of the eigenvalues
    that are left. By subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061), which is
    exact for all of them.
    """
    n = len(moment)
    k = min(count, n)
    c = moment / moment.diagonal().mean().clamp(min=torch.finfo(moment.dtype).tiny)
    vectors, values, _ = torch.svd_lowrank(c, min(n, k + OVERSAMPLING), ITERATIONS)
    vectors, values = vectors[:, :k], values[:k]
    rest = (c.diagonal().sum() - values.sum()).clamp(min=0) / max(n - k, 1)
    return {"vectors": vectors.half(), "values": torch.cat([values, rest[None]]).float()}


def _prompts(base: WhisperForConditionalGeneration, codes: Sequence[str]) -> list[list[int]]:
    """Return the decoder's prompt in every language; of an English-only base the one it has."""
    settings: Any = base.generation_config
    start, end = [base.config.decoder_start_token_id], []
    if (last := getattr(settings, "no_timestamps_token_id", None)) is not None:
        end = [last]
    known = getattr(settings, "lang_to_id", None) or {}
    if not known:
        return [start + end]
    tasks = getattr(settings, "task_to_id", None) or {}
    end = [tasks["transcribe"], *end] if "transcribe" in tasks else end
    codes = codes or [one for one in USUAL_LANGUAGES if f"<|{one}|>" in known]
    prompts = []
    for code in codes:
        tokens = [f"<|{one}|>" for one in code.split("-")]
        if unknown := [one for one in tokens if one not in known]:
            some = ", ".join(sorted(name.strip("<|>") for name in known)[:12])
            raise UserError(
                f"languages has '{code}', and the base has no {unknown[0]}; give some of: {some}"
            )
        prompts.append([*start, *(known[one] for one in tokens), *end])
    if not prompts:
        raise UserError("the base knows none of the usual languages; give some as languages")
    return prompts


class _Utterance(NamedTuple):
    """An utterance of a batch: its audio, and its own tokens."""

    features: Tensor  # (1, mels, frames)
    states: Tensor | None  # before the first adapted layer, if known
    prompt: list[int]
    target: list[int]  # with the end token; none of a batch without labels


def _utterances(batches: Iterable[Batch]) -> Iterator[_Utterance]:
    for batch in batches:
        states, labels = batch.encoder_states, batch.labels
        for i, features in enumerate(batch.input_features):
            inputs, target = batch.decoder_input_ids[i].tolist(), list[int]()
            if labels is not None:
                target = labels[i][labels[i] != IGNORED].tolist()
                inputs = inputs[: labels[i].tolist().index(target[0]) + 1] if target else inputs
            own = None if states is None else states[i : i + 1]
            yield _Utterance(features[None], own, inputs, target)


def _file(
    base: WhisperForConditionalGeneration, heard: Sequence[_Utterance], about: list[Any]
) -> Path | None:
    """Return the file of the statistics, named by a hash of all that they depend on."""
    if (folder := cache_dir()) is None:
        return None
    own = [weights_hash(base), torch.__version__, base.device.type, str(base.dtype)]
    code = sha256(Path(__file__).read_bytes()).hexdigest()
    total = sha256(json.dumps([*about, *own, code]).encode())
    for features, *_ in heard:
        total.update(f"{tuple(features.shape)}".encode())
        total.update(features.cpu().contiguous().numpy().data)
    return folder / "statistics" / f"{total.hexdigest()}.safetensors"


class SecondMoments:
    """E[x xᵀ] over the inputs x of some linear layers, added up as a base hears and speaks.

    Or over the gradients of log p by their outputs.

    Attributes:
        base: The frozen Whisper.
        modules: Names of the layers.
    """

    def __init__(
        self,
        base: WhisperForConditionalGeneration,
        modules: Iterable[str],
        of_outputs: bool = False,
    ) -> None:
        """Of nothing yet."""
        self.base, self.modules = base, tuple(modules)
        size_of = "out_features" if of_outputs else "in_features"
        sizes = {name: getattr(base.get_submodule(name), size_of) for name in self.modules}
        self._sums = {
            name: torch.zeros(size, size, device=base.device) for name, size in sizes.items()
        }
        self._counts = dict.fromkeys(self.modules, 0)

    @property
    def size(self) -> int:
        """The number of inputs, or outputs, of all layers together."""
        return sum(map(len, self._sums.values()))

    def pop(self, name: str) -> Tensor:
        """Return the second moment of a layer, (n, n), and forget it."""
        return self._sums.pop(name) / max(self._counts.pop(name), 1)

    def add(self, tokens: Sequence[int], states: Tensor) -> None:
        """Add what the decoder's layers hear as it is given these tokens."""
        inputs = torch.tensor([[*tokens]], device=self.base.device)
        with self.adding():
            self.base.model.decoder(inputs, encoder_hidden_states=states, use_cache=False)

    def add_gradients(
        self, utterance: "_Utterance", tokens: Sequence[int], prompt: int, states: Tensor
    ) -> None:
        """Add g gᵀ of the gradients g of an utterance's log p by the layers' outputs.

        Args:
            utterance: The utterance.
            tokens: What the decoder is given; at every position after the first `prompt` - 1 a
                token is drawn from what the base predicts, as in `elastic.fisher_information`.
            prompt: Number of the tokens that are prompt.
            states: The encoder's.
        """
        base, zeros = self.base, dict[str, Tensor]()

        def add_zeros(name: str, output: Tensor) -> Tensor:
            zeros[name] = torch.zeros_like(output, requires_grad=True)
            return output + zeros[name]

        hooks = [
            base.get_submodule(name).register_forward_hook(
                lambda layer, inputs, output, name=name: add_zeros(name, output)
            )
            for name in self.modules
        ]
        try:
            with torch.enable_grad():
                if first_adapted(base, self.modules) < base.config.encoder_layers:
                    states = _listen(base, utterance, names=self.modules)
                inputs = torch.tensor([[*tokens]], device=base.device)
                hidden = base.model.decoder(inputs, encoder_hidden_states=states, use_cache=False)
                predicted = base.proj_out(hidden[0][0, prompt - 1 :]).float().log_softmax(-1)
                drawn = torch.multinomial(predicted.detach().exp(), 1)
                log_p = predicted.gather(1, drawn).sum()
                found = torch.autograd.grad(log_p, [*zeros.values()])
        finally:
            for hook in hooks:
                hook.remove()
        for name, gradient in zip(zeros, found, strict=True):
            rows = gradient.flatten(0, -2).float()
            self._sums[name] += rows.mT @ rows
            self._counts[name] += len(rows)

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Inside a `with`, add what the layers are given; layers of one input share its x xᵀ."""
        seen: dict[Any, tuple[Tensor, Tensor]] = {}  # with x, so that its memory is not another's

        def add(name: str, x: Tensor) -> None:
            if (key := (x.data_ptr(), x.shape)) not in seen:
                rows = x.flatten(0, -2).float()
                seen[key] = x, rows.mT @ rows
            self._sums[name] += seen[key][1]
            self._counts[name] += x[..., 0].numel()

        hooks = [
            self.base.get_submodule(name).register_forward_pre_hook(
                lambda layer, inputs, name=name: add(name, inputs[0])
            )
            for name in self.modules
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _listen(
    base: WhisperForConditionalGeneration,
    utterance: _Utterance,
    *moments: SecondMoments,
    names: Sequence[str] = (),
) -> Tensor:
    """Return the encoder's states of an utterance, and add what its layers hear.

    `names` are those of the adapted layers, where nothing is to be added.
    """
    states = utterance.states
    modules = moments[0].modules if moments else names
    first = 0 if states is None else first_adapted(base, modules)
    encoder: Any = base.get_encoder()
    with ExitStack() as hooks:
        for one in moments:
            hooks.enter_context(one.adding())
        states = embed(base, utterance.features) if states is None else states.to(base.dtype)
        return encoder.layer_norm(run_layers(encoder.layers[first:], states))


def _transcript(
    base: WhisperForConditionalGeneration, states: Tensor, prompt: list[int]
) -> list[int]:
    """Return a prompt and what the base itself says then."""
    room = base.config.max_target_positions - len(prompt) - 1
    (tokens,) = decode(SimpleNamespace(net=base), states, [prompt], [min(MOST_TOKENS, room)])
    return [*prompt, *tokens]


@torch.no_grad()
def second_moments(
    base: WhisperForConditionalGeneration,
    batches: Iterable[Batch],
    modules: Iterable[str],
    languages: Sequence[str] = (),
    utterances: int = UTTERANCES,
) -> tuple[SecondMoments, SecondMoments]:
    """Return what layers hear of the new domain, and of its audio in old languages.

    The first is made from the utterances' own prompts and texts, the second as `Prior` makes it.

    Args:
        base: The frozen Whisper in eval mode, without adapters.
        batches: Utterances of the new domain in full windows, on the base's device.
        modules: Names of the layers.
        languages: Old languages; none are en, es, fr and de.
        utterances: How many are heard, the first ones.

    Raises:
        UserError: If the base does not know a language.
    """
    prompts, modules = _prompts(base, languages), tuple(modules)
    new, old = SecondMoments(base, modules), SecondMoments(base, modules)
    for number, one in enumerate(islice(_utterances(batches), utterances)):
        states = _listen(base, one, new, old)
        new.add([*one.prompt, *one.target[:-1]], states)
        old.add(_transcript(base, states, prompts[number % len(prompts)]), states)
    return new, old
