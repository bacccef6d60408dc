"""Second moments of what a frozen base's layers hear, and their leading eigenvectors."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from blora_pyro.data import IGNORED, Batch
from blora_pyro.errors import UserError
from blora_pyro.files import cache_dir, replace_file
from blora_pyro.models.decoding import decode
from blora_pyro.models.encoder import embed, first_adapted, run_layers
from blora_pyro.models.encoder_states import weights_hash

USUAL_LANGUAGES = ("en", "es", "fr", "de")
UTTERANCES = 96  # that second moments are made from
OWN, BACKWARD = STATISTICS = ("own", "backward")
PART = 6  # of the base's parameters: at most one in so many is as many as the eigenvectors have
MOST_TOKENS = 64  # of a transcript, so that one which repeats itself does not outweigh the others
OVERSAMPLING, ITERATIONS = 32, 4  # of the randomised eigendecomposition


def statistics_sizes(layers: Mapping[str, Any], of_outputs: bool) -> dict[str, int]:
    """Return the size of every statistic by the name that its tensors begin with.

    Args:
        layers: What has `in_features` and `out_features` by the name of every adapted layer.
        of_outputs: Of the outputs, too.
    """
    sizes = {name: layer.in_features for name, layer in layers.items()}
    if of_outputs:
        sizes |= {f"{name}.outputs": layer.out_features for name, layer in layers.items()}
    return sizes


def check_statistics(tensors: Mapping[str, Tensor], layers: Mapping[str, int]) -> None:
    """Refuse stored statistics that can't be.

    Args:
        tensors: See `layer_statistics`.
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
def layer_statistics(
    base: WhisperForConditionalGeneration,
    batches: Iterable[Batch],
    modules: Sequence[str],
    directions: int,
    utterances: int = UTTERANCES,
    languages: Sequence[str] = (),
    statistics: str = OWN,
    of_outputs: bool = False,
) -> dict[str, Tensor]:
    """Return what is kept of second moments, from the cache if it is there.

    It is `{layer}.vectors` and `{layer}.values` of the layer's inputs, see `leading_eigenvectors`,
    and with `of_outputs` `{layer}.outputs.vectors` and `{layer}.outputs.values`, of the gradients
    by its outputs.

    Args:
        base: The frozen Whisper in eval mode, without adapters.
        batches: Utterances in full windows, on the base's device.
        modules: Names of the layers.
        directions: Most eigenvectors that are kept a layer.
        utterances: How many are heard, the first ones.
        languages: Old languages to prompt in; none are en, es, fr and de.
        statistics: `own`: the base's own transcripts in these languages; `backward`: the
            utterances' own prompts and texts, or where there is none a transcript.
        of_outputs: Of the outputs, too.

    Raises:
        UserError: If the base does not know a language.
    """
    own = statistics == OWN
    prompts = _prompts(base, languages) if own else []
    heard = [*islice(_utterances(batches), utterances)]
    said = prompts if own else [(one.prompt, one.target) for one in heard]
    file = _file(base, heard, [modules, said, directions, of_outputs])
    layers = {name: base.get_submodule(name) for name in modules}
    with suppress(OSError, SafetensorError, ValueError):
        if file is not None:
            found = load_file(file, str(base.device))
            check_statistics(found, statistics_sizes(layers, of_outputs))
            return found
    moments = SecondMoments(base, modules)
    gradients = SecondMoments(base, modules if of_outputs else (), of_outputs=True)
    for number, utterance in enumerate(heard):
        states = _listen(base, utterance, moments)
        prompt = prompts[number % len(prompts)] if own else utterance.prompt
        if not own and len(utterance.target) > 1:  # more than its end
            tokens = [*prompt, *utterance.target[:-1]]
        else:
            tokens = _transcript(base, states, prompt)
        moments.add(tokens, states)
        if of_outputs:
            gradients.add_gradients(utterance, tokens, len(prompt), states)
    room = base.num_parameters() // (PART * (moments.size + gradients.size))
    count, tensors = max(1, min(directions, room)), dict[str, Tensor]()
    for key in statistics_sizes(layers, of_outputs):
        is_input, name = key in layers, key.removesuffix(".outputs")
        found = leading_eigenvectors((moments if is_input else gradients).pop(name), count)
        tensors |= {f"{key}.{what}": one.contiguous() for what, one in found.items()}
    with suppress(OSError):  # a cache that can't be written is none
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, save({name: one.cpu() for name, one in tensors.items()}))
    return tensors


@torch.no_grad()
def second_moments(
    base: WhisperForConditionalGeneration,
    batches: Iterable[Batch],
    modules: Iterable[str],
    languages: Sequence[str] = (),
    utterances: int = UTTERANCES,
) -> tuple[SecondMoments, SecondMoments]:
    """Return what layers hear of the new domain, and of its audio in old languages.

    The first is made from the utterances' own prompts and texts, the second as `layer_statistics`
    makes it.

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
