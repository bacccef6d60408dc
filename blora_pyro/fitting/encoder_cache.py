"""States of the encoder before its first adapted layer, computed once for every utterance."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from blora_pyro.data import Batch
from blora_pyro.errors import UserError
from blora_pyro.fitting.batches import Teacher
from blora_pyro.models import BLoRA
from blora_pyro.models.encoder_states import EncoderStates, states_of


class EncoderCache:
    """Adds the encoder's states before the first adapted layer to a batch, from a file on disk.

    They are the same at every step, as the layers before it are frozen and have no dropout, and no
    gradient goes through them. Fits to the same data in one process share them.

    Attributes:
        states: The file; see `EncoderStates`.
    """

    def __init__(
        self, model: BLoRA, utterances: int, then: Teacher | None = None, fingerprint: str = ""
    ) -> None:
        """Create the file, or take that of another fit.

        Args:
            model: Program of the fit.
            utterances: Their number.
            then: The teacher that follows.
            fingerprint: Of the training data; "" shares nothing.

        Raises:
            UserError: If the first layer is adapted, or there is no room on the disk.
        """
        self.likelihood, self.then = model.likelihood, then
        first, net = self.likelihood.first_adapted, model.net
        if first == 0:
            raise UserError(
                "cache_encoder is given, but target_modules adapts the encoder's first layer, and "
                "all after it changes; adapt the decoder alone, with target_modules "
                "'.*decoder.*', or later layers, or leave cache_encoder out"
            )
        if fingerprint:
            what = (fingerprint, first, self.likelihood.autocast)
            self.states = states_of(net, utterances, what)
        else:
            shape = net.config.max_source_positions, net.config.d_model
            self.states = EncoderStates(utterances, shape, net.dtype)

    def __call__(self, batch: Batch, indices: Sequence[int], number: int) -> Batch:
        """Return the batch (full windows, on the CPU) with the states.

        Raises:
            UserError: If the disk is full.
        """
        features = dict(zip(indices, batch.input_features, strict=True))
        states = self.states.of(
            indices,
            # One at a time, so that a resumed fit with other batches gets the same bits.
            lambda missing: torch.stack([self._states(features[index]) for index in missing]),
        )
        batch = replace(batch, encoder_states=states)
        return batch if self.then is None else self.then(batch, indices, number)

    @torch.no_grad()
    def _states(self, features: Tensor) -> Tensor:
        features = features[None].to(self.likelihood.net.device)
        return self.likelihood.frozen_states(features)[0].cpu()
