"""Names ↔ estimators: where a string or mapping from a user, a file or a command line becomes a validated object."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from bilevel.errors import ConfigError, unknown_name
from bilevel.hypergrad.amigo import AmIGO
from bilevel.hypergrad.automatic import Automatic
from bilevel.hypergrad.base import Estimator
from bilevel.hypergrad.bome import BOME
from bilevel.hypergrad.conjugate_gradient import ConjugateGradient
from bilevel.hypergrad.exact import Exact
from bilevel.hypergrad.f2sa import F2SA
from bilevel.hypergrad.finite_difference import FiniteDifference
from bilevel.hypergrad.fsla import FSLA
from bilevel.hypergrad.gmres import GMRES
from bilevel.hypergrad.identity import Identity
from bilevel.hypergrad.minres import MINRES
from bilevel.hypergrad.neumann import Neumann
from bilevel.hypergrad.nystrom import Nystrom
from bilevel.hypergrad.one_step import OneStep
from bilevel.hypergrad.pzobo import PZOBO
from bilevel.hypergrad.sama import SAMA
from bilevel.hypergrad.soba import SOBA
from bilevel.hypergrad.stocbio import StocBiO
from bilevel.hypergrad.ttsa import TTSA
from bilevel.hypergrad.unrolled import Unrolled

__all__ = ["as_estimator", "available_methods"]

ENTRY_POINT_GROUP = "bilevel.methods"

_BUILT_IN: tuple[type[Estimator], ...] = (
    # H⁻¹ ≈ I, or one step
    FiniteDifference,
    Identity,
    Automatic,
    OneStep,
    SAMA,
    # the linear system
    Neumann,
    ConjugateGradient,
    MINRES,
    GMRES,
    Nystrom,
    Exact,
    # the inner updates
    Unrolled,
    PZOBO,
    # a second inner iterate
    F2SA,
    BOME,
    # one loop
    SOBA,
    AmIGO,
    StocBiO,
    TTSA,
    FSLA,
)
_ALIASES: Mapping[str, str] = {"cg": "conjugate_gradient", "fd": "finite_difference", "darts": "finite_difference"}


def available_methods() -> dict[str, type[Estimator]]:
    """Returns all estimator classes by name: ours, then those that installed packages register.

    Raises:
        ConfigError: A registered object is no :class:`Estimator`, or takes a name of ours.
    """
    methods = {cls.name: cls for cls in _BUILT_IN}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        cls = point.load()
        if not (isinstance(cls, type) and issubclass(cls, Estimator)):
            raise ConfigError(
                f"entry point {point.name!r} ({point.value}) in {ENTRY_POINT_GROUP!r} is no Estimator subclass"
            )
        if point.name in methods or point.name in _ALIASES:
            raise ConfigError(f"entry point {point.value} registers method {point.name!r}, which exists already")
        methods[point.name] = cls
    return methods


def as_estimator(method: Estimator | str | Mapping[str, Any]) -> Estimator:
    """Returns an estimator from itself, its name, or a mapping with ``method`` and its fields.

    Raises:
        UnknownNameError: No such method or field; the message lists what exists.
        ConfigError: A field's value makes no sense.

    Example:
        >>> as_estimator({"method": "neumann", "terms": 3})
        Neumann(terms=3)
        >>> as_estimator("cg").name
        'conjugate_gradient'
    """
    if isinstance(method, Estimator):
        return method
    if isinstance(method, type) and issubclass(method, Estimator):
        raise ConfigError(f"method must be an instance: write {method.__name__}(), not {method.__name__}")
    if isinstance(method, str):
        method = {"method": method}
    if not isinstance(method, Mapping):
        raise ConfigError(
            f"method must be an estimator, a name or a mapping with 'method', not {type(method).__name__}"
        )
    settings = dict(method)
    name = settings.pop("method", None)
    methods = available_methods()
    if name is None:
        raise ConfigError(f"a method given as a mapping needs the key 'method', one of {', '.join(methods)}")
    name = _ALIASES.get(str(name), str(name))
    if name not in methods:
        raise unknown_name("method", name, [*methods, *_ALIASES])
    fields = [field.name for field in dataclasses.fields(methods[name])]
    for key in settings:
        if key not in fields:
            raise unknown_name(f"field of method {name!r}:", str(key), fields)
    return methods[name](**settings)
