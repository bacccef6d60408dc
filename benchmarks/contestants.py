"""The contestants of `steps.py`, `overhead.py` and `memory.py`: ours, and its peers.

All adapt one frozen Whisper, whose weights they share: the same layers, rank, alpha, start, Adam,
one draw a step, and the mean token NLL of one batch. Adam is torch's fused one for all. None clips,
none has dropout.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from peft import LoraConfig, get_peft_model
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.nn import functional
from transformers import WhisperConfig, WhisperForConditionalGeneration

from blora_pyro.adapters import find_targets
from blora_pyro.data import IGNORED, Batch
from blora_pyro.fitting.checkpoints import Checkpoints
from blora_pyro.fitting.processes import Processes
from blora_pyro.fitting.svi import Trainer
from blora_pyro.guides import build_guide, build_prior
from blora_pyro.models import BLoRA
from blora_pyro.options import FittingOptions

# Width, layers of encoder and of decoder, heads, mel bins.
GEOMETRIES = {
    "tiny": (384, 4, 4, 6, 80),
    "base": (512, 6, 6, 8, 80),
    "small": (768, 12, 12, 12, 80),
    "large-v3": (1280, 32, 32, 20, 128),
}
BETA, LR, PRIOR_SCALE = 1e-4, 1e-3, 0.05
START_RHO = -5.0
PEER = "PEFT LoRA"
FOREVER = 10**9


def geometry(name: str, **changes: Any) -> WhisperConfig:
    """Return the configuration of a Whisper of a published size, with 30 s windows."""
    width, encoder, decoder, heads, mels = GEOMETRIES[name]
    shape: dict[str, Any] = {
        "d_model": width,
        "encoder_layers": encoder,
        "decoder_layers": decoder,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width,
        "num_mel_bins": mels,
        "vocab_size": 51865,
    }
    return WhisperConfig(**shape | changes)


def random_net(config: WhisperConfig) -> WhisperForConditionalGeneration:
    """Return a Whisper with random weights, frozen."""
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(config).requires_grad_(False).eval()


def shared_copy(net: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    """Return a net of other modules that share the weights of `net`."""
    return copy.deepcopy(net, {id(one): one for one in net.parameters()})


def random_batch(config: WhisperConfig, size: int, length: int = 30, prompt: int = 4) -> Batch:
    """Return noise and tokens: a window each, `length` positions, the prompt is no target."""
    rng = torch.Generator().manual_seed(0)
    frames = 2 * config.max_source_positions
    features = torch.randn(size, config.num_mel_bins, frames, generator=rng)
    tokens = torch.randint(config.vocab_size, (size, length + 1), generator=rng)
    labels = tokens[:, 1:].clone()
    labels[:, : prompt - 1] = IGNORED
    return Batch(features, tokens[:, :-1], labels)


class Contestant:
    """Takes steps on a batch, in a parameter store of its own where it has one."""

    def __init__(self, net: WhisperForConditionalGeneration, rank: int, targets: str, bf16: bool):
        """Adapt a copy of `net`."""
        self.net, self.rank, self.bf16 = shared_copy(net), rank, bf16
        self.layers = find_targets(self.net, targets)
        self.store: dict[str, Any] = {"params": {}, "constraints": {}}

    def store_in_place(self) -> AbstractContextManager[object]:
        """Return what a step is taken in; it is no part of the step."""
        return pyro.get_param_store().scope(self.store)

    def autocast(self) -> AbstractContextManager[object]:
        """Return autocast to bfloat16 for the net's products, if `bf16`."""
        kind = self.net.device.type
        return torch.autocast(kind, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def nll(self, batch: Batch) -> Tensor:
        """Return the mean token NLL, as transformers computes it."""
        with self.autocast():
            return self.net(
                input_features=batch.input_features,
                decoder_input_ids=batch.decoder_input_ids,
                labels=batch.labels,
                use_cache=False,
            ).loss

    def step(self, batch: Batch) -> object:
        """Take a step: forward, backward, optimiser."""
        raise NotImplementedError


class Ours(Contestant):
    """A step of `fit_guide`, whole."""

    def __init__(self, *arguments: Any, guide: str = "normal", beta: float = BETA, **more: Any):
        """Make the trainer of a guide."""
        super().__init__(*arguments, **more)
        prior = build_prior("normal", scale=PRIOR_SCALE)
        targets = ",".join(self.layers)
        autocast = torch.bfloat16 if self.bf16 else None
        self.model = BLoRA(self.net, prior, self.rank, 2.0 * self.rank, targets, autocast)
        self.guide: Any = build_guide(guide, self.model)
        options = FittingOptions(beta=beta, lr=LR, steps=FOREVER, batch_size=1)
        self.loop = Trainer(self.model, self.guide, options, Checkpoints(None), None, Processes())

    def step(self, batch: Batch) -> object:
        """Take a step of `Trainer`: loss, gradients, Adam, and all checks."""
        return self.loop.step(batch)


class Peft(Contestant):
    """LoRA of PEFT in a plain torch loop."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        """Put PEFT's layers in, which alone are trained."""
        super().__init__(*arguments, **more)
        # task_type stays None: PEFT's sequence-to-sequence wrapper does not take Whisper's inputs.
        lora = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=list(self.layers))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what transformers has deprecated
            get_peft_model(self.net, lora)
        self.trained = [one for one in self.net.parameters() if one.requires_grad]
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> Any:
        """Return Adam."""
        return torch.optim.Adam(self.trained, lr=LR, fused=True)

    def step(self, batch: Batch) -> object:
        """Take a step as in any tutorial."""
        self.optimizer.zero_grad()
        loss = self.nll(batch)
        loss.backward()
        self.optimizer.step()
        return loss.item()


class Ivon(Peft):
    """LoRA of PEFT, with IVON in place of Adam: a mean-field Gaussian too (arXiv 2402.17641)."""

    def make_optimizer(self) -> Any:
        """Return the optimiser of the package `ivon-opt`, which only this contestant needs."""
        import ivon

        return ivon.IVON(self.trained, lr=LR, ess=1e4, hess_init=1.0)

    def step(self, batch: Batch) -> object:
        """Take a step with one draw."""
        with self.optimizer.sampled_params(train=True):
            self.optimizer.zero_grad()
            loss = self.nll(batch)
            loss.backward()
        self.optimizer.step()
        return loss.item()


class _Hooked(Contestant):
    """Factors of one layer at a time, added by forward hooks."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        """Add hooks that read `factors`: layer -> (A, B)."""
        super().__init__(*arguments, **more)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in self.layers.items():
            layer.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            a, b = self.factors[name]
            return output + 2.0 * functional.linear(functional.linear(inputs[0], a), b)

        return add

    def starts(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return layer -> A Kaiming-uniform, B zero."""
        found = {}
        for name, layer in self.layers.items():
            bound = layer.in_features**-0.5
            a = torch.empty(self.rank, layer.in_features).uniform_(-bound, bound)
            found[name] = a, torch.zeros(layer.out_features, self.rank)
        return found


class PlainMeanField(_Hooked):
    """Reparameterised LoRA without Pyro: mean and rho a matrix, closed-form KL, Adam."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        """Make the parameters of every matrix of every layer."""
        super().__init__(*arguments, **more)
        self.means = {
            name: [nn.Parameter(one) for one in pair] for name, pair in self.starts().items()
        }
        self.rhos = {
            name: [nn.Parameter(torch.full_like(one, START_RHO)) for one in pair]
            for name, pair in self.means.items()
        }
        trained = [
            one for part in (self.means, self.rhos) for pair in part.values() for one in pair
        ]
        self.optimizer = torch.optim.Adam(trained, lr=LR, fused=True)

    def step(self, batch: Batch) -> object:
        """Take a step: draw, forward, KL, backward, Adam."""
        self.optimizer.zero_grad()
        kl = torch.zeros(())
        for name, means in self.means.items():
            drawn = []
            for mean, rho in zip(means, self.rhos[name], strict=True):
                sigma = functional.softplus(rho)
                drawn.append(mean + sigma * torch.randn_like(sigma))
                ratio = (sigma / PRIOR_SCALE).square()
                far = (mean / PRIOR_SCALE).square()
                kl = kl + 0.5 * (ratio + far - 1 - ratio.log()).sum()
            self.factors[name] = drawn[0], drawn[1]
        loss = self.nll(batch) + BETA * kl
        loss.backward()
        self.optimizer.step()
        return loss.item()


class PyroPerMatrix(_Hooked):
    """A Pyro site a matrix, `AutoNormal`, `SVI` and Pyro's Adam: the plainest Pyro program."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        """Make the program and its guide."""
        super().__init__(*arguments, **more)
        starts = self.starts()
        values = {
            f"{name}.{factor}": one
            for name, pair in starts.items()
            for factor, one in zip("AB", pair, strict=True)
        }

        def model(batch: Batch) -> None:
            for name, pair in starts.items():
                a, b = (
                    pyro.sample(
                        f"{name}.{factor}",
                        dist.Normal(0.0, PRIOR_SCALE).expand(one.shape).to_event(2),
                    )
                    for factor, one in zip("AB", pair, strict=True)
                )
                self.factors[name] = a, b
            with self.autocast():
                logits = self.net(
                    input_features=batch.input_features,
                    decoder_input_ids=batch.decoder_input_ids,
                    use_cache=False,
                ).logits
            assert batch.labels is not None
            is_target = batch.labels != IGNORED
            # The mean over N tokens, the latent sites weighed by beta: all of it divided by beta.
            weight = 1 / (BETA * batch.num_tokens)
            with poutine.scale(scale=weight), pyro.plate("targets", int(is_target.sum())):
                tokens = dist.Categorical(logits=logits[is_target].float())
                pyro.sample("tokens", tokens, obs=batch.labels[is_target])

        guide = AutoNormal(model, init_loc_fn=lambda site: values[site["name"]], init_scale=0.007)
        self.svi = SVI(model, guide, pyro.optim.Adam({"lr": LR, "fused": True}), Trace_ELBO())

    def step(self, batch: Batch) -> object:
        """Take a step."""
        return self.svi.step(batch)


def point(*arguments: Any, **more: Any) -> Ours:
    """Return our own plain LoRA: the same program with a point as its guide, and no KL."""
    return Ours(*arguments, **more, guide="point", beta=0.0)


CONTESTANTS: dict[str, Callable[..., Contestant]] = {
    PEER: Peft,
    "ours": Ours,
    "ours, point": point,
    "plain mean field": PlainMeanField,
    "IVON on PEFT LoRA": Ivon,
    "AutoNormal, a site a matrix": PyroPerMatrix,
}
