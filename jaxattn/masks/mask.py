"""`Mask`: a pure function of positions, and its algebra.

A mask answers one question for one query and one key: may the query attend to the key? Everything
else in the library is derived from that answer.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import Field, fields, is_dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ..checks.arrays import array_of
from ..checks.foreign_names import WORDS, unknown_method
from ..checks.user_functions import call_user, named, one_bool, uncalled
from ..pytrees import ByStructure, pytree, static
from ..shapes import Array, ArrayLike, Bool
from .door import views
from .positions import Positions
from .results import Html, Why

Scalar: TypeAlias = Any
Predicate4 = Callable[[Scalar, Scalar, Scalar, Scalar], Any]


class Mask(ByStructure):
    """Which query may see which key: a pure function of positions.

    The one required method is `__call__(b, h, q, k) -> bool`, written for a single query and a
    single key: `b` is the batch row, `h` the query head, `q` and `k` the positions of the query
    and of the key, all scalar int32, possibly traced. True means *may attend*. A class of yours
    needs nothing else, and may hold arrays; to be an argument of a jitted function it has to be
    registered, by `jax.tree_util.register_dataclass` for one.

    Masks compose with `&`, `|`, `~` and `^`, with each other and with any callable
    `(b, h, q, k) -> bool`. They have no length: the same mask serves every shape. Without arrays
    they are equal, and hash, by how they were written; with arrays they have no hash.

    Example:
      >>> from jaxattn import masks
      >>> mask = masks.causal() & masks.sliding_window(1)
      >>> mask.dense(3, 3)[0, 0].astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    def __call__(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Bool[Array, ""]:
        raise TypeError(f"{type(self).__name__} is a Mask without __call__(b, h, q, k)")

    def __repr__(self) -> str:
        return attributes(self)

    def __and__(self, other: MaskLike) -> Mask:
        return And(self, as_mask(other, "&"))

    def __rand__(self, other: MaskLike) -> Mask:
        return And(as_mask(other, "&"), self)

    def __or__(self, other: MaskLike) -> Mask:
        return Or(self, as_mask(other, "|"))

    def __ror__(self, other: MaskLike) -> Mask:
        return Or(as_mask(other, "|"), self)

    def __xor__(self, other: MaskLike) -> Mask:
        return Xor(self, as_mask(other, "^"))

    def __rxor__(self, other: MaskLike) -> Mask:
        return Xor(as_mask(other, "^"), self)

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise TypeError(
            f"a mask has no truth value: got {self!r} where Python wants a bool (`and`, `or`, "
            "`not`, `if`); compose masks with `&`, `|`, `~` and `^`"
        )

    if not TYPE_CHECKING:
        # Hidden from type checkers, for which a mask would otherwise have every attribute.
        def __getattr__(self, name: str) -> Any:
            raise unknown_method(self, name)

    # NumPy would otherwise try to compose elementwise: `array & mask` must come here.
    __array_ufunc__ = None

    def dense(
        self,
        T: int,
        S: int,
        batch: int = 1,
        heads: int = 1,
        positions: Positions | None = None,
    ) -> Bool[Array, "batch heads T S"]:
        """The mask as an array, O(T * S): for looking at, and for libraries that want one.

        Args:
          T, S: numbers of queries and of keys.
          batch, heads: numbers of batch rows and of query heads.
          positions: the positions of each, where they are not 0, 1, 2, ...

        Returns:
          Booleans `[batch, heads, T, S]`, True where the query may see the key.
        """
        return views().dense(self, T, S, batch, heads, positions)

    def why(self, q: int, k: int, b: int = 0, h: int = 0) -> Why:
        """Why the query at `q` may see the key at `k`, or may not; see `jaxattn.views.why`."""
        return views().why(self, q, k, b, h)

    def show(self, T: int | None = None, S: int | None = None, **options: Any) -> None:
        """Prints a picture of the mask; `jaxattn.views.text.text` has the options."""
        print(views().text(self, T, S, **options))

    def plot(
        self, ax: Any = None, T: int | None = None, S: int | None = None, **options: Any
    ) -> Any:
        """Draws the mask by matplotlib, and returns the axes; see `jaxattn.views.plot`."""
        return views().plot(self, ax, T, S, **options)

    def html(self, T: int | None = None, S: int | None = None, **options: Any) -> Html:
        """The mask as a page whose cells say why; see `jaxattn.views.html`."""
        return views().html(self, T, S, **options)

    def _repr_html_(self) -> str | None:
        return views().notebook(self)


MaskLike: TypeAlias = Mask | Predicate4 | ArrayLike


def as_mask(given: Any, where: str = "mask") -> Mask:
    """A `Mask` from a mask, a callable `(b, h, q, k) -> bool`, or a boolean array.

    Raises:
      TypeError: for anything else, a float or integer array above all.
    """
    if isinstance(given, Mask):
        return given
    if isinstance(given, (bool, np.bool_)):
        raise TypeError(f"{where}: got {given!r}; say masks.full() or masks.empty()")
    if hasattr(given, "dtype") and hasattr(given, "shape"):
        return dense(given)
    if callable(given):
        check_is_predicate(given, where)
        uncalled(given, where)
        return Predicate(given, ())
    expected = (
        "expected a Mask, a callable (b, h, q, k) -> bool, or a boolean array [T, S] or "
        "[B|1, N|1, T|1, S|1]"
    )
    if isinstance(given, str):
        said = WORDS.get(given.lower())
        raise TypeError(f"{where}: got {given!r}, " + (f"say {said}" if said else expected))
    raise TypeError(f"{where}: got {type(given).__name__}, {expected}")


def check_is_predicate(given: Any, where: str) -> None:
    """Checks that a callable is not a score.

    Raises:
      TypeError: for a score.
    """
    if (remedy := getattr(given, "not_a_mask", None)) is not None:
        raise TypeError(f"{where}: got the score {given!r}, expected a mask; {remedy}")


def leaf_repr(leaf: Any) -> str:
    """A leaf as it appears in the repr of a mask or a score: its value, or dtype and shape."""
    if isinstance(leaf, (int, float)):
        return repr(leaf)
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else type(leaf).__name__


def attributes(thing: Any) -> str:
    """The repr of a mask or score of a user's own class: `Near(reach=3)`."""
    held = getattr(thing, "__dict__", {}).items()
    inner = ", ".join(f"{name}={leaf_repr(value)}" for name, value in held)
    return f"{type(thing).__name__}({inner})"


# --- masks of the library -------------------------------------------------------------------------


def constructor(cls: type) -> str:
    """The name of the function that makes a class: `sliding_window` for `SlidingWindow`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()


def argument(each: Field[Any]) -> str:
    """The argument of the constructor that a field is made of: its name, unless it says another."""
    return str(each.metadata.get("argument", each.name))


def call_repr(thing: Any) -> str:
    """The call that makes a mask or score of the library: `sliding_window(3, 0)`.

    Fields are its arguments, in order; those that have their default, or `repr=False`, are left
    out.
    """
    given = []
    for each in fields(thing):
        value = getattr(thing, each.name)
        if each.repr and value is not each.default:
            keyword = f"{each.name}=" if each.kw_only is True else ""
            given.append(keyword + _value_repr(value))
    return f"{constructor(type(thing))}({', '.join(given)})"


def _value_repr(value: Any) -> str:
    if not isinstance(value, tuple):
        return leaf_repr(value)
    return f"({', '.join(map(leaf_repr, value))}{',' * (len(value) == 1)})"


class BuiltInMask(Mask, ABC):
    """A mask of the library: a pytree whose fields are its arguments, and one line of maths."""

    @abstractmethod
    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        """Whether the query may attend to the key; one bool."""

    def __call__(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Bool[Array, ""]:
        return one_bool(self.formula(b, h, q, k), repr(self))

    def __repr__(self) -> str:
        return call_repr(self)

    def required_length(self) -> int | None:
        """The number of queries, and of keys, that the mask is for; None for any number."""
        return None


def entry(array: Any, *index: Any) -> Any:
    """`array[index]` with as many trailing indices as the array has axes: `[]`, `[T]`, `[B, T]`."""
    rank = np.ndim(array)
    return array[index[len(index) - rank :]] if rank else array


def tokens_of(mask: Mask) -> Iterator[tuple[int, Mask]]:
    """The parts of a mask that are for a certain number of tokens, and those numbers."""
    if isinstance(mask, BuiltInMask) and (length := mask.required_length()) is not None:
        yield length, mask
    for part in parts_of(mask):
        yield from tokens_of(part)


def parts_of(mask: Mask) -> Iterator[Mask]:
    """The masks that a mask is made of."""
    if not is_dataclass(mask):
        return
    for each in fields(mask):
        value = getattr(mask, each.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Mask):
                yield part


def check_tokens(mask: Mask, positions: Positions, T: int, S: int, where: str = "mask") -> None:
    """Checks that a mask for a certain number of tokens is used on as many.

    Raises:
      ValueError: for other numbers of queries or keys, where they count from 0.
    """
    for length, part in tokens_of(mask):
        for letter, given, size in (("T", positions.q, T), ("S", positions.k, S)):
            if given is None and size != length:
                raise ValueError(
                    f"{where}: got {part!r}, which is for {length} tokens, and {letter} = {size}; "
                    f"expected {letter} = {length}. Tokens before the grid, such as a class token, "
                    "are its prefix="
                )


@pytree
class Dense(BuiltInMask):
    """The mask that `dense` makes."""

    array: Any

    def formula(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Any:
        if np.ndim(self.array) == 2:
            return self.array[q, k]
        # An extent of 1 means "the same for all"; the shape says which axes have it.
        index = (0 if n == 1 else at for n, at in zip(self.array.shape, (b, h, q, k), strict=True))
        return self.array[tuple(index)]


@pytree
class Predicate(Mask):
    """A mask from a user's function `fn(b, h, q, k, *args) -> bool` and its array arguments."""

    fn: Callable[..., Any] = static()
    args: tuple[Any, ...] = ()

    def __call__(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Bool[Array, ""]:
        args = (b, h, q, k, *self.args)
        result = call_user(self.fn, args, repr(self), "b, h, q, k")
        return one_bool(result, named(repr(self), self.fn))

    def __repr__(self) -> str:
        if isinstance(traced := getattr(self.fn, "name", None), str):
            return traced
        if isinstance(self.fn, Mask):
            return repr(self.fn)
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        return f"predicate({', '.join([name, *map(leaf_repr, jax.tree.leaves(self.args))])})"


def dense(array: Bool[ArrayLike, "..."]) -> Mask:
    """A mask given as an array: `array[q, k]`, or `array[b, h, q, k]`.

    Args:
      array: booleans, exactly `[T, S]`, or `[B|1, N|1, T|1, S|1]`; True where the query may
        attend to the key.

    Raises:
      TypeError: for an array that is not boolean: `from_array(array, convention)` reads the
        conventions of other libraries, `jaxattn.scores.bias(array)` adds one to the logits.
      ValueError: for any other rank.
    """
    values = array_of(array, "mask", "booleans [T, S] or [B|1, N|1, T|1, S|1]")
    if values.dtype != jnp.bool_:
        raise TypeError(
            f"mask: got an array of {values.dtype}, expected booleans (True: may attend); read it "
            "with masks.from_array(array, convention), one of 'attend', 'ignore', 'additive', "
            "'hf', 'keras', 'flax', or add it to the logits with scores.bias(array)"
        )
    if values.ndim not in (2, 4):
        raise ValueError(
            f"mask: got a boolean array of shape {list(values.shape)}, expected [T, S] or "
            "[B|1, N|1, T|1, S|1]; for [B, S] padding use masks.key_padding(valid)"
        )
    return Dense(values)


def _chained(mask: And | Or | Xor, sign: str) -> str:
    """Two masks with the operator between them, as a user writes it."""
    sides = mask.left, mask.right
    return f" {sign} ".join(repr(s) if type(s) is type(mask) else _enclosed(s) for s in sides)


def _enclosed(part: Mask) -> str:
    """In parentheses where it is an operator's expression."""
    return f"({part!r})" if isinstance(part, (And, Or, Xor)) else repr(part)


@pytree
class And(Mask):
    """Both parts allow it."""

    left: Mask
    right: Mask

    def __call__(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Bool[Array, ""]:
        return self.left(b, h, q, k) & self.right(b, h, q, k)

    def __repr__(self) -> str:
        return _chained(self, "&")


@pytree
class Or(Mask):
    """One part or the other allows it."""

    left: Mask
    right: Mask

    def __call__(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Bool[Array, ""]:
        return self.left(b, h, q, k) | self.right(b, h, q, k)

    def __repr__(self) -> str:
        return _chained(self, "|")


@pytree
class Xor(Mask):
    """Exactly one of the two parts allows it."""

    left: Mask
    right: Mask

    def __call__(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Bool[Array, ""]:
        return self.left(b, h, q, k) ^ self.right(b, h, q, k)

    def __repr__(self) -> str:
        return _chained(self, "^")


@pytree
class Not(Mask):
    """The part does not allow it."""

    part: Mask

    def __call__(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Bool[Array, ""]:
        return ~self.part(b, h, q, k)

    def __repr__(self) -> str:
        return f"~{_enclosed(self.part)}"


@pytree
class PerHead(Mask):
    """Query head `h` uses `parts[h]`."""

    parts: tuple[Mask, ...]

    def __call__(self, b: Scalar, h: Scalar, q: Scalar, k: Scalar) -> Bool[Array, ""]:
        # A head beyond the list sees nothing: an or of "head h is mine and my part allows it".
        cases = [(h == i) & part(b, h, q, k) for i, part in enumerate(self.parts)]
        return reduce(jnp.logical_or, cases)

    def __repr__(self) -> str:
        return f"per_head([{', '.join(map(repr, self.parts))}])"
