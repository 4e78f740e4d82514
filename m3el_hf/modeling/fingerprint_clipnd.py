"""A short name of a model's weights, to tell what other weights encoded. Flat file: it travels to the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Fingerprint:
    """Computes a module's fingerprint, and again only once a weight was replaced or changed.

    Each weight's bits are summed as integers, where it lies: sums of integers do not depend on their order, so the same
    weights have the same fingerprint on every device.

    Torch counts changes in place, but not those of fused optimizers or through ``.data``, as when an adapter is merged.
    So the first number of each weight is compared too, at the cost of a millisecond: a change that keeps all of these
    goes unnoticed.

    Adapters count by their weights and by how they are switched. Merged into the model they make other weights, which
    encode alike but for rounding, and have another fingerprint.
    """

    def __init__(self) -> None:
        self._state: tuple[object, ...] | None = None
        self._value: str | None = None

    @torch.compiler.disable
    def of(self, module: nn.Module) -> str | None:
        """Returns 16 hexadecimal digits; None where weights are not at hand (they lie on the meta device)."""
        # Encoding does not read CLIP's scale: it may change.
        weights = {name: one for name, one in module.named_parameters() if not name.endswith("logit_scale")}
        if any(one.is_meta for one in weights.values()):
            return None
        counted = [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in weights.values()]
        switches = _switches(module)
        state = counted, _firsts(weights), switches
        if state != self._state:
            digest = _digest(weights)
            self._value, self._state = _hash((digest, switches)) if switches else digest, state
        return self._value


def _switches(module: nn.Module) -> list[tuple[str, str]]:
    """How PEFT's adapters are switched, which touches no weight: which are active and, where they have one, the scale.

    A layer is known by an attribute of its class, since PEFT may not be installed.
    """
    return [
        (name, repr((one.active_adapters, one.disable_adapters, getattr(one, "scaling", None))))
        for name, one in module.named_modules()
        if hasattr(type(one), "adapter_layer_names")
    ]


@torch.no_grad()
def _firsts(weights: Mapping[str, Tensor]) -> list[str]:
    """The first number of each weight, as text: no NaN equals itself."""
    firsts = [one.detach().as_strided((), ()).float() for one in weights.values() if one.numel()]
    return [str(number) for number in _gathered(firsts).tolist()]


@torch.no_grad()
def _digest(weights: Mapping[str, Tensor]) -> str:
    sums = [one.detach().view(_INTEGERS[one.element_size()]).sum(dtype=torch.int64) for one in weights.values()]
    numbers = [one.tolist() for one in _gathered(sums)]
    described = [(name, list(one.shape), number) for (name, one), number in zip(weights.items(), numbers, strict=True)]
    return _hash(described)


def _hash(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def _gathered(sums: list[Tensor]) -> Tensor:
    """All in one tensor: one wait for the accelerator, not one a weight."""
    return torch.stack([one.to(sums[0].device) for one in sums]).cpu()
