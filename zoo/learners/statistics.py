r"""Sufficient statistics of a stream of labelled rows: counts, sums and one matrix, from which closed-form heads
follow.

With a feature map phi (random features of a kernel, a dictionary, a frozen network, or the identity), a task t and a
class c, :class:`ClassStatistics` keeps

    n[t, c]                                  rows of class c in task t
    s[t, c] = sum of phi(x)                  (D,)
    G       = sum of phi(x) phi(x)^T         (D, D), over all rows

and no rows. These sums can be added, to merge learners that were trained separately, and subtracted, to forget rows.
Nearest means, ridge regression and discriminants are functions of them: `zoo.learners.heads`.

>>> learner = ClassStatistics(FourierFeatures(64, 500))
>>> learner.update(X, labels)
>>> learner.downdate(X[:3], labels[:3])
>>> head = lda(learner)
>>> head.predict(learner.phi(X_new))
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.kernels import Kernel
from zoo.ops.numerics import autocast_disabled
from zoo.support.files import CheckpointError, read_checkpoint, write_atomic, writer_of

__all__ = ["ClassStatistics"]

Labels = Tensor | Sequence[int] | int
FeatureMap = Callable[[Tensor], Tensor]

_STATE = ("components", "counts", "sums", "gram", "grid")
_MAP = "features."  # tensors of the feature map in a saved file
_LARGEST = 2.0**53  # float64 represents all integers up to this


class _Sums(NamedTuple):
    """Sums over some rows: components (K, 2) sorted, counts (K,), sums (K, D), gram (D, D) or (0, 0)."""

    components: Tensor
    counts: Tensor
    sums: Tensor
    gram: Tensor

    def plus(self, other: _Sums, sign: int = 1) -> _Sums:
        """Sum of both, or difference (sign -1); components with count zero are dropped."""
        if not len(other.counts):
            return self
        if not len(self.counts):
            self = _Sums(self.components, self.counts, other.sums[:0], torch.zeros_like(other.gram))
        both = torch.cat([self.components, other.components])
        components, place = torch.unique(both, dim=0, return_inverse=True)
        counts = self.counts.new_zeros(len(components)).index_add_(
            0, place, torch.cat([self.counts, sign * other.counts])
        )
        sums = self.sums.new_zeros(len(components), other.sums.shape[1])
        sums.index_add_(0, place, torch.cat([self.sums, sign * other.sums]))
        alive = counts != 0
        return _Sums(components[alive], counts[alive], sums[alive], self.gram + sign * other.gram)


class ClassStatistics(nn.Module):
    """Counts, sums and second moments of features, by class and task: a learner that keeps no rows.

    All sums are float64, whatever the features' dtype, and do not depend on order or batches, up to rounding. Tasks and
    classes are arbitrary integers; new ones may appear at any time, and one without rows disappears. A call that raises
    an error changes nothing.

    Args:
        features: Maps rows to features (n, D), called in eval mode without gradients; a kernel with a finite feature
            space stands for its features. None uses the rows as features.
        gram: Keep G. Without it the state has D numbers per class and suffices for nearest means only.
        resolution: Round features to multiples of this power of two. Then every sum is exact: independent of order and
            batches to the bit, and after forgetting identical to a learner that never saw the rows
            (:meth:`fingerprint`). 2**-20 allows sums of squares up to 8,192. None disables rounding.

    Attributes:
        components: (K, 2), task and class of every pair that has rows, sorted.
        counts: (K,), their numbers of rows.
        sums: (K, D), their sums of features.
        gram: G (D, D); empty if `gram` is False.

    Raises:
        ValueError: The resolution is not a power of two.
    """

    components: Tensor
    counts: Tensor
    sums: Tensor
    gram: Tensor
    grid: Tensor

    def __init__(
        self, features: FeatureMap | None = None, *, gram: bool = True, resolution: float | None = None
    ) -> None:
        super().__init__()
        if resolution is not None and not (resolution > 0 and math.frexp(resolution)[0] == 0.5):
            raise ValueError(f"resolution={resolution} must be a power of two, such as 2**-20")
        self.features = features.features if isinstance(features, Kernel) else features
        owner = getattr(self.features, "__self__", None)
        if isinstance(
            owner, nn.Module
        ):  # the module whose method computes the features moves and is saved with the sums
            self.owner = owner
        self.has_gram = gram
        state = _empty(torch.device("cpu"))
        for name in _Sums._fields:
            self.register_buffer(name, getattr(state, name))
        self.register_buffer("grid", torch.tensor(resolution or 0.0, dtype=torch.float64))

    # ---- queries -----------------------------------------------------------------------------------------------

    @property
    def classes(self) -> Tensor:
        """Classes that have rows, sorted (C,)."""
        return self.components[:, 1].unique()

    @property
    def tasks(self) -> Tensor:
        """Tasks that have rows, sorted (T,)."""
        return self.components[:, 0].unique()

    @property
    def rows(self) -> int:
        """Number of rows learned and not forgotten."""
        return int(self.counts.sum())

    @property
    def dim(self) -> int:
        """D; 0 before the first row."""
        return self.sums.shape[1]

    def need(self, gram: bool = True) -> None:
        """Raise ValueError unless there are rows and, with `gram`, their second moments: what heads begin with."""
        if not self.rows:
            raise ValueError("no rows were learned yet: call update first")
        if gram and not self.has_gram:
            raise ValueError("this head needs the second moments G: make ClassStatistics with gram=True")

    def by_class(self) -> tuple[Tensor, Tensor]:
        """Counts (C,) and sums of features (C, D) over all tasks, in the order of `classes`."""
        classes, place = self.components[:, 1].unique(return_inverse=True)
        counts = self.counts.new_zeros(len(classes)).index_add_(0, place, self.counts)
        return counts, self.sums.new_zeros(len(classes), self.dim).index_add_(0, place, self.sums)

    def count(self, label: int, task: int | None = None) -> int:
        """Number of rows of a class, in one task or in all of them.

        Raises:
            ValueError: The class is unknown, or has been forgotten.
        """
        mine = self.components[:, 1] == label
        if not bool(mine.any()):
            raise ValueError(f"class {label} was never seen{_known(self.classes)}")
        return int(self.counts[mine if task is None else mine & (self.components[:, 0] == task)].sum())

    def memory(self, itemsize: int = 8) -> int:
        """Bytes needed for the sums; of G only one triangle counts, which is what :meth:`save` writes."""
        d = self.gram.shape[0]
        return itemsize * (self.sums.numel() + d * (d + 1) // 2) + 8 * (self.components.numel() + self.counts.numel())

    def snapshot(self) -> ClassStatistics:
        """A learner with these sums and the same feature map that may learn on by itself; no memory is copied."""
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        return other

    # ---- learning and forgetting ---------------------------------------------------------------------------

    def phi(self, X: Tensor) -> Tensor:
        """Validated features of rows, (n, D).

        Raises:
            ValueError: They are not a matrix, not finite, or have another dimension than before.
        """
        with torch.no_grad(), _evaluating(self):
            F = X if self.features is None else self.features(X)
        if not isinstance(F, Tensor) or F.ndim != 2 or len(F) != len(X) or F.is_complex() or F.dtype == torch.bool:
            found = f"{F.dtype}, {tuple(F.shape)}" if isinstance(F, Tensor) else type(F).__name__
            raise ValueError(f"features must be one real vector for each of {len(X)} rows, (n, D); got {found}")
        if self.rows and F.shape[1] != self.dim:
            raise ValueError(f"the features have {F.shape[1]} dimensions, those learned before have {self.dim}")
        if not F.shape[1]:
            raise ValueError("the features have no dimensions")
        F = F.to(self.sums)
        if not bool(F.isfinite().all()):
            bad = (~F.isfinite().all(1)).nonzero().flatten()
            raise ValueError(f"the features of {len(bad)} of {len(F)} rows are not finite, first in row {int(bad[0])}")
        return F if not self.grid else (F / self.grid).round() * self.grid

    def update(self, X: Tensor, labels: Labels, task: Labels = 0, *, batch_size: int = 1024) -> ClassStatistics:
        """Add rows.

        Args:
            X: Rows (n, ...), inputs of the feature map.
            labels: Class of each row (n,), or one for all.
            task: Task of each row (n,), or one for all.
            batch_size: Rows per call of the feature map.

        Returns:
            The learner.

        Raises:
            ValueError: Features or labels are invalid; nothing was learned.
        """
        self._take(self._state().plus(self._summed(X, labels, task, batch_size)))
        return self

    def downdate(
        self, X: Tensor, labels: Labels, task: Labels = 0, *, batch_size: int = 1024, check: bool = True
    ) -> ClassStatistics:
        """Forget rows: afterwards the sums are those of the remaining rows, up to rounding.

        Rows that were learned can always be forgotten. Others are refused if the sums show it: a pair of task and class
        would have a negative count or a sum without rows, or the remaining G would not be positive semidefinite. An
        unlearned row among similar ones cannot be detected, since no rows are kept.

        Args:
            X: Rows (n, ...).
            labels: Their classes.
            task: Their tasks.
            batch_size: Rows per call of the feature map.
            check: Check the remaining G, which costs one factorisation.

        Returns:
            The learner.

        Raises:
            ValueError: These rows cannot have been learned; nothing was forgotten.
        """
        gone = self._summed(X, labels, task, batch_size)
        if len(gone.counts):
            before = self._state()
            left = _subtract(before, gone)
            if check:
                _check_left(before, gone, left)
            self._take(left)
        return self

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Add the statistics of another learner.

        Raises:
            ValueError: The learners differ in dimension, feature map or settings.
        """
        self._check_alike(other)
        theirs = _Sums(*(getattr(other, name).to(getattr(self, name)) for name in _Sums._fields))
        self._take(self._state().plus(theirs))
        return self

    def split(self, other: ClassStatistics) -> ClassStatistics:
        """Subtract the statistics of another learner; the inverse of :meth:`merge`.

        Raises:
            ValueError: The other learner's rows cannot be part of this one.
        """
        self._check_alike(other)
        before = self._state()
        gone = _Sums(*(getattr(other, name).to(getattr(self, name)) for name in _Sums._fields))
        if len(gone.counts):
            left = _subtract(before, gone)
            _check_left(before, gone, left)
            self._take(left)
        return self

    def _summed(self, X: Tensor, labels: Labels, task: Labels, batch_size: int) -> _Sums:
        if not isinstance(X, Tensor) or X.ndim < 2:
            raise ValueError(f"rows come as a tensor (n, ...), got {getattr(X, 'shape', type(X).__name__)}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        device = self.sums.device
        pairs = torch.stack([_integers(task, len(X), "task", device), _integers(labels, len(X), "labels", device)], 1)
        total = _empty(device)
        for x, pair in zip(X.split(batch_size), pairs.split(batch_size), strict=True) if len(X) else ():
            F = self.phi(x)
            components, place, counts = torch.unique(pair, dim=0, return_inverse=True, return_counts=True)
            with autocast_disabled(device):
                sums = F.new_zeros(len(components), F.shape[1]).index_add_(0, place, F)
                gram = F.mT @ F if self.has_gram else F.new_zeros(0, 0)
            if len(total.counts) and F.shape[1] != total.sums.shape[1]:
                raise ValueError(f"the features have {F.shape[1]} and {total.sums.shape[1]} dimensions in one call")
            total = total.plus(_Sums(components, counts, sums, gram))
        return total

    def _state(self) -> _Sums:
        return _Sums(self.components, self.counts, self.sums, self.gram)

    def _take(self, state: _Sums) -> None:
        if not bool(state.sums.isfinite().all()) or not bool(state.gram.isfinite().all()):
            raise ValueError("the features are so large that their sums are not finite")
        if self.grid:
            largest = float(state.gram.diagonal().max()) if state.gram.numel() else float(state.sums.abs().max())
            room = _LARGEST * float(self.grid) ** (2 if self.has_gram else 1)
            if largest >= room:
                raise ValueError(
                    f"sums of {largest:.3g} are not exact at this resolution, which has room for {room:.3g}"
                )
        if not len(state.counts):
            state = _empty(state.counts.device)
        for name in _Sums._fields:
            setattr(self, name, getattr(state, name))

    def _check_alike(self, other: ClassStatistics) -> None:
        if not isinstance(other, ClassStatistics):
            raise ValueError(f"only another ClassStatistics can be merged, not {type(other).__name__}")
        if self.rows and other.rows and self.dim != other.dim:
            raise ValueError(f"the other learner's features have {other.dim} dimensions, this one's have {self.dim}")
        if self.has_gram != other.has_gram or bool(self.grid.cpu() != other.grid.cpu()):
            raise ValueError("the other learner was made with other settings: gram and resolution must agree")
        mine, theirs = self._map_state(), other._map_state()
        if mine.keys() != theirs.keys() or any(not _same(mine[name], theirs[name]) for name in mine):
            raise ValueError("the other learner has another feature map: sums of different features cannot be added")

    # ---- state ---------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """SHA-256 of the sums: equal only if all bits are, so that with `resolution` it proves forgetting."""
        digest = hashlib.sha256()
        for name in _Sums._fields:
            value = getattr(self, name).detach().cpu().contiguous()
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update((value + 0.0 if value.is_floating_point() else value).numpy().tobytes())  # -0 equals 0
        return digest.hexdigest()

    def difference(self, other: ClassStatistics) -> float:
        """Largest difference between the sums of two learners, relative to the largest entry; inf if counts differ."""
        if not torch.equal(self.components.cpu(), other.components.cpu()) or not torch.equal(
            self.counts.cpu(), other.counts.cpu()
        ):
            return float("inf")
        worst = 0.0
        for name in ("sums", "gram"):
            a, b = getattr(self, name).cpu(), getattr(other, name).cpu()
            if a.shape != b.shape:
                return float("inf")
            if a.numel():
                worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)))
        return worst

    def save(self, path: str | Path, *, features: bool = True) -> None:
        """Write the sums, G as one triangle, and the tensors of the feature map to a safetensors file.

        Args:
            path: The file, replaced atomically.
            features: Write the feature map's tensors too.

        Raises:
            CheckpointError: The file cannot be written.
        """
        from safetensors.torch import save

        d = self.gram.shape[0]
        lower = torch.tril_indices(d, d, device=self.gram.device)
        tensors = {name: getattr(self, name) for name in _STATE} | {"gram": self.gram[lower[0], lower[1]]}
        tensors["has_gram"] = torch.tensor(self.has_gram)
        tensors |= {_MAP + name: value for name, value in self._map_state().items()} if features else {}
        content = save({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()})
        write_atomic(path, writer_of(content))

    @classmethod
    def load(cls, path: str | Path, features: FeatureMap | None = None) -> ClassStatistics:
        """Load a saved learner, to use or continue it.

        Args:
            path: The file.
            features: The feature map; its saved tensors are loaded into it.

        Raises:
            CheckpointError: The file is damaged, does not hold a learner, or belongs to another feature map.
        """
        tensors = read_checkpoint(path)
        mapped = {name.removeprefix(_MAP): tensors.pop(name) for name in [*tensors] if name.startswith(_MAP)}
        if set(tensors) != {*_STATE, "has_gram"}:
            raise CheckpointError(f"{path} does not hold the sums of a ClassStatistics: it has {_some(tensors)}")
        learner = cls(features, gram=bool(tensors["has_gram"]), resolution=float(tensors["grid"]) or None)
        own = learner._map_state()
        if mapped and {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in mapped.items()}:
            raise CheckpointError(f"{path} was saved with another feature map: pass the same one, as `features`")
        d = tensors["sums"].shape[-1] if learner.has_gram else 0
        if tensors["gram"].shape != (d * (d + 1) // 2,):
            raise CheckpointError(f"{path} is damaged: its G has {tensors['gram'].numel()} numbers for {d} dimensions")
        lower = torch.tril_indices(d, d)
        gram = torch.zeros(d, d, dtype=torch.float64)
        gram[lower[0], lower[1]] = tensors["gram"].double()
        state = _Sums(tensors["components"], tensors["counts"], tensors["sums"], gram + gram.tril(-1).mT)
        _check_state(state, f"{path} is damaged")
        learner._take(state)
        for name, value in own.items():
            if name in mapped:
                value.copy_(mapped[name])
        return learner

    def _map_state(self) -> dict[str, Tensor]:
        """Tensors of the feature map, except this learner's own sums."""
        own = self.state_dict()
        return {name: own[name] for name in own if name not in _STATE and isinstance(own[name], Tensor)}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accept sums for another number of classes and dimensions."""
        found = {name: state_dict.get(prefix + name) for name in _Sums._fields}
        if all(isinstance(value, Tensor) for value in found.values()):
            state = _Sums(*(value for value in found.values() if isinstance(value, Tensor)))
            _check_state(state, "the state dict does not hold the sums of a ClassStatistics")
            for name, value in zip(_Sums._fields, state, strict=True):
                setattr(self, name, torch.empty_like(value, device=self.sums.device, dtype=getattr(self, name).dtype))
            self.has_gram = bool(state.gram.numel()) if len(state.counts) else self.has_gram
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassStatistics:
        """Move with the feature map, but stay float64."""
        kept = {name: getattr(self, name) for name in _STATE}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            if getattr(self, name).dtype != value.dtype:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        """Rows, classes, tasks and dimensions."""
        return f"rows={self.rows}, classes={len(self.classes)}, tasks={len(self.tasks)}, dim={self.dim}"


# ---- helpers -----------------------------------------------------------------------------------------------


def _empty(device: torch.device) -> _Sums:
    integers = torch.zeros(0, dtype=torch.int64, device=device)
    numbers = torch.zeros(0, 0, dtype=torch.float64, device=device)
    return _Sums(integers.reshape(0, 2), integers, numbers, numbers)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, restored afterwards for each submodule."""
    training = [part for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def _integers(values: Labels, n: int, what: str, device: torch.device) -> Tensor:
    try:
        found = torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{what} must be integers, one for each of {n} rows or one for all") from None
    whole = not found.is_floating_point() or bool((found.isfinite() & (found == found.round())).all())
    if found.is_complex() or found.dtype == torch.bool or not whole:
        raise ValueError(f"{what} must be integers, got {found.dtype}")
    if found.ndim == 0:
        found = found.expand(n)
    if found.shape != (n,):
        raise ValueError(f"{what} has shape {tuple(found.shape)}; there are {n} rows")
    return found.to(torch.int64)


def _subtract(before: _Sums, gone: _Sums) -> _Sums:
    """The sums without some rows, after a check of the counts."""
    if before.sums.shape[1] != gone.sums.shape[1] and len(before.counts):
        raise ValueError(
            f"the features have {gone.sums.shape[1]} dimensions, those learned have {before.sums.shape[1]}"
        )
    have = {(int(t), int(c)): int(n) for (t, c), n in zip(before.components, before.counts, strict=True)}
    for (t, c), n in zip(gone.components.tolist(), gone.counts.tolist(), strict=True):
        if have.get((t, c), 0) < n:
            learned = have.get((t, c), 0)
            raise ValueError(f"cannot forget {n} rows of class {c} in task {t}: {learned or 'none'} were learned")
    return before.plus(gone, -1)


def _check_left(before: _Sums, gone: _Sums, left: _Sums) -> None:
    """Raise an error if the remaining sums show that the rows were never learned."""
    sentence = "these rows were not learned here: without them the sums would be those of no rows at all"
    scale = max(
        float(before.gram.diagonal().sum()) if before.gram.numel() else float(before.sums.square().sum()), 1e-300
    )
    alive = {tuple(pair) for pair in left.components.tolist()}
    rows = {tuple(pair): place for place, pair in enumerate(before.components.tolist())}
    for place, pair in enumerate(gone.components.tolist()):
        if tuple(pair) not in alive:
            old, mine = before.sums[rows[tuple(pair)]], gone.sums[place]
            if float((old - mine).norm()) > 1e-5 * float(old.norm() + mine.norm()) + 1e-9 * scale**0.5:
                raise ValueError(sentence)
    if not before.gram.numel():
        return
    if not len(left.counts):
        if float(left.gram.abs().max()) > 1e-6 * scale:
            raise ValueError(sentence)
        return
    scatter = left.gram - (left.sums.mT / left.counts) @ left.sums
    allowed = 1e-6 * float(gone.gram.diagonal().sum()) / float(gone.counts.sum()) + 1e-12 * scale
    eye = torch.eye(len(scatter), dtype=scatter.dtype, device=scatter.device)
    if int(torch.linalg.cholesky_ex(scatter + allowed * eye)[1]):
        raise ValueError(sentence)


def _check_state(state: _Sums, problem: str) -> None:
    """Check saved sums: shapes, dtypes, positive counts, finite values."""
    k, d = len(state.counts), state.sums.shape[-1] if state.sums.ndim == 2 else -1
    shapes = state.components.shape == (k, 2) and state.counts.shape == (k,) and state.sums.shape == (k, d)
    kinds = state.components.dtype == state.counts.dtype == torch.int64 and state.sums.is_floating_point()
    if not shapes or not kinds or state.gram.shape not in {(d, d), (0, 0)}:
        shown = ", ".join(f"{name} {tuple(value.shape)}" for name, value in zip(_Sums._fields, state, strict=True))
        raise CheckpointError(f"{problem}: {shown}")
    pairs = state.components.unique(dim=0) if k else state.components
    if not torch.equal(pairs, state.components) or bool((state.counts < 1).any()):
        raise CheckpointError(f"{problem}: its tasks and classes are not in order, or have counts below one")
    if not all(bool(value.isfinite().all()) for value in (state.sums, state.gram)):
        raise CheckpointError(f"{problem}: not all of its numbers are finite")
    if bool((state.gram.diagonal() < 0).any()):
        raise CheckpointError(f"{problem}: its G has squares below zero")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.cpu(), b.cpu())


def _known(classes: Tensor) -> str:
    return f"; known classes: {_some(classes.tolist())}" if len(classes) else "; no class was learned yet"


def _some(names: Any) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "") if listed else "nothing"
