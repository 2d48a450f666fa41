"""Positive hyper-parameters, stored as unconstrained raw parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PositiveParameter", "ScalarOrTensor", "as_number", "as_numbers"]

Transform = Literal["softplus", "exp"]
ScalarOrTensor = float | Sequence[float] | Tensor


def as_numbers(name: str, value: ScalarOrTensor) -> Tensor:
    """Real numbers as a tensor, float64, on the CPU.

    Raises:
        ValueError: The value is none, for example a word, None or a complex number.
    """
    try:
        found = torch.as_tensor(value, device="cpu")
        if not found.is_complex():
            return torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass  # torch's own words name neither the option nor what it takes
    raise ValueError(f"{name} = {value!r:.60} is neither a real number nor a tensor or list of them") from None


def as_number(name: str, value: float) -> float:
    """One real number as a float.

    Raises:
        ValueError: The value is none, or several.
    """
    found = as_numbers(name, value)
    if found.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {tuple(found.shape)}")
    return float(found)


class PositiveParameter:
    """A positive hyper-parameter, declared in a module's class body and stored as a raw parameter `raw_<name>`.

    Reading returns the (differentiable) positive value; assigning sets the raw parameter:

        class Gaussian(nn.Module):
            lengthscale = PositiveParameter()

            def __init__(self):
                super().__init__()
                PositiveParameter.register(self, "lengthscale", 1.0)

        kernel.lengthscale            # softplus(kernel.raw_lengthscale) + floor
        kernel.lengthscale = 2.5      # kernel.raw_lengthscale changes

    Args:
        transform: `"softplus"` (linear for large values) or `"exp"` (steps are relative; for quantities that
            span orders of magnitude).
        floor: Added to the positive function, so that training stays away from 0; values below twice the floor are
            twice the function instead. Any positive number whose square is representable in float64 is possible.
        optional: Allow 0 at registration; it then stays 0, without a raw parameter.
    """

    def __init__(self, transform: Transform = "softplus", floor: float = 1e-6, *, optional: bool = False) -> None:
        if transform not in ("softplus", "exp"):
            raise ValueError(f"transform={transform!r} is not one of 'softplus', 'exp'")
        self.transform, self.floor, self.optional = transform, floor, optional

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, module: None, owner: Any = None) -> PositiveParameter: ...
    @overload
    def __get__(self, module: nn.Module, owner: Any = None) -> Tensor: ...
    def __get__(self, module: nn.Module | None, owner: Any = None) -> PositiveParameter | Tensor:
        if module is None:
            return self
        raw = getattr(module, f"raw_{self.name}")
        if raw is None:
            return torch.zeros((), device="cpu", dtype=torch.float32)
        return self._view(raw, torch.promote_types(raw.dtype, torch.float32))

    def of(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        """The positive value in another dtype, which may have a smaller or larger least positive number."""
        view = self.__get__(module)
        if view.dtype == dtype:
            return view
        if dtype == torch.float32:
            return view.to(dtype).clamp_min(_SMALLEST[dtype])
        wide = self._view(getattr(module, f"raw_{self.name}"), dtype)
        return torch.where(view > _SMALLEST[view.dtype], view.to(dtype), wide)

    def _view(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        raw = raw.to(dtype)
        # the default threshold of 20 would lose nine digits in float64
        soft = torch.exp(raw) if self.transform == "exp" else F.softplus(raw, threshold=40)
        return (soft + soft.clamp_max(self.floor)).clamp_min(_SMALLEST[dtype]) if self.floor else soft

    def __set__(self, module: nn.Module, value: ScalarOrTensor) -> None:
        raw = getattr(module, f"raw_{self.name}")
        if raw is None:
            raise ValueError(f"{self.name} was fixed at 0 when {type(module).__name__} was built; build another")
        new = self.inverse(as_numbers(self.name, value))
        try:
            new = new.expand(raw.shape)
        except RuntimeError:
            raise ValueError(
                f"{self.name} has shape {tuple(raw.shape)}; a value of shape {tuple(new.shape)} does not fit"
            ) from None
        with torch.no_grad():
            raw.copy_(self._fitting(new, raw.dtype))

    def _fitting(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """The raw parameter in a dtype that can represent it."""
        if not bool(raw.to(dtype).isfinite().all()):
            raise ValueError(f"{self.name} is too large for {dtype}; build it with dtype=torch.float64")
        return raw.to(dtype)

    def inverse(self, value: Tensor) -> Tensor:
        """The raw value for a positive value.

        Raises:
            ValueError: A value is not positive and finite, or, with a floor, its square in float64 is not.
        """
        size = value.square() if self.floor else value
        if not bool(torch.all((value > 0) & (size > 0) & torch.isfinite(size))):
            squared = ", and so must its square (1.6e-162 to 1.3e154)" if self.floor else ""
            raise ValueError(f"{self.name} must be positive and finite{squared}, got {_shown(value)}")
        soft = torch.where(value < 2 * self.floor, value / 2, value - self.floor)
        return soft.log() if self.transform == "exp" else soft + torch.log(-torch.expm1(-soft))

    @staticmethod
    def register(
        module: nn.Module, name: str, value: ScalarOrTensor, *, learnable: bool = True, device=None, dtype=None
    ) -> None:
        """Register the raw parameter of the declared hyper-parameter `name`.

        Args:
            module: The owner, inside its `__init__`.
            name: The declared name.
            value: Initial (positive) value or values.
            learnable: A parameter if True; otherwise a buffer, saved with the state but not trained.
            device: Device of the raw number.
            dtype: Its dtype; torch's default if None.
        """
        descriptor = getattr(type(module), name)
        if descriptor.optional and isinstance(value, int | float) and value == 0:
            module.register_parameter(f"raw_{name}", None)
            return
        raw = descriptor.inverse(as_numbers(name, value).detach())
        if dtype is None:  # float64 if the default cannot represent it
            dtype = torch.get_default_dtype()
            dtype = dtype if bool(raw.to(dtype).isfinite().all()) else torch.float64
        raw = descriptor._fitting(raw, dtype).to(device)
        if learnable:
            module.register_parameter(f"raw_{name}", nn.Parameter(raw))
        else:
            module.register_buffer(f"raw_{name}", raw)


#: Least positive value by dtype: dividing by it stays finite, and float64 can represent its square.
_SMALLEST = {torch.float32: 1e-30, torch.float64: 1.6e-162}


def _shown(value: Tensor) -> str:
    return f"{value.item():g}" if value.numel() == 1 else f"{[round(v, 6) for v in value.flatten().tolist()[:8]]}"
