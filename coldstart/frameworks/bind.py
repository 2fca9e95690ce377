"""The arrays of a snapshot, put into a skeleton that the user's ``build`` made."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, NamedTuple

from coldstart.errors import StateMismatchError
from coldstart.frameworks import torch as for_torch
from coldstart.frameworks.paths import attribute, shown
from coldstart.frameworks.views import Views, same_as
from coldstart.frameworks.walk import Walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from coldstart.frameworks.walk import Spot
    from coldstart.manifest import Leaf

LISTED_DIFFERENCES = 20
_HINT_CANDIDATES = 500


def bind(
    skeleton: Any,
    leaves: Sequence[Leaf],
    modules: Mapping[str, bool],
    buffer_array: Callable[[int], Any],
    *,
    besides: Sequence[str] = (),
) -> Any:
    """Put the arrays that ``leaves`` describe in the place of the skeleton's own, and return the skeleton.

    The arrays are views of the buffers, never copies: ``buffer_array(i)`` is a writable uint8 array over buffer ``i``.
    Paths, roles, dtypes and shapes must agree (strides may differ); the skeleton's arrays may be on the meta device.
    Tied leaves become one object, parameters require gradients as captured, and torch modules get the training mode
    that ``modules`` has for their path. What is at or below a path of ``besides`` is not looked at: it may be without bytes.
    All else of the skeleton stays as it is. What is returned is the skeleton
    itself, unless that is a tuple or a bare array, which can only be made anew.

    Raises StateMismatchError with every difference, before anything is changed; ManifestError for impossible leaves.
    """
    with _NoCollection():
        by_path = {leaf.path: leaf for leaf in leaves if not _is_below_any(leaf.path, besides)}
        return _bound(skeleton, by_path, modules, Views(buffer_array), besides)


def _is_below_any(path: str, above: Sequence[str]) -> bool:
    """Whether ``path`` is one of the paths or below one; "" is above everything."""
    return any(not each or path == each or path.startswith((f"{each}.", f"{each}[")) for each in above)


class _NoCollection:
    """No garbage collection meanwhile.

    Ten thousand arrays are a hundred thousand objects, none of them garbage; with torch's modules in memory the
    collector doubles the time of a bind by looking for some.
    """

    def __enter__(self) -> None:
        self._enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            gc.enable()


def _bound(
    skeleton: Any, by_path: Mapping[str, Leaf], modules: Mapping[str, bool], views: Views, besides: Sequence[str]
) -> Any:
    walk = Walk(skeleton)
    spots = [spot for spot in walk.spots if not _is_below_any(spot.path, besides)]
    differences = [*_array_differences(spots, by_path), *_module_differences(walk.modules, modules)]
    if differences:
        raise _mismatch(differences)
    _place(spots, by_path, views)
    for path, training in modules.items():
        vars(walk.modules[path])["training"] = training
    _check_nothing_on_meta(walk, besides)
    return walk.state


def _place(spots: Sequence[Spot], by_path: Mapping[str, Leaf], views: Views) -> None:
    inside = {spot.path for spot in spots if spot.wrappers}
    made: dict[str, Any] = {}
    for leaf in by_path.values():
        first = same_as(leaf, by_path)
        if first.path not in made:
            made[first.path] = views.plain(first) if first.path in inside else views.finished(first)
        made[leaf.path] = made[first.path]
    for spot in spots:
        leaf, array = by_path[spot.path], made[spot.path]
        if spot.wrappers:
            spot.wrappers[0].requires_grad = leaf.requires_grad
        elif leaf.framework == "torch":
            for_torch.keep_attributes(spot.array, array)
        spot.place(array)


def _check_nothing_on_meta(walk: Walk, besides: Sequence[str]) -> None:
    """What was placed is real; this looks at what the modules and tensor subclasses made of it."""
    left = [
        attribute(path, name)
        for path, module in walk.modules.items()
        for field, _ in for_torch.MODULE_FIELDS[:2]
        for name, tensor in vars(module).get(field, {}).items()
        if tensor is not None and tensor.is_meta and not _is_below_any(attribute(path, name), besides)
    ]
    if left:
        raise _mismatch(
            [_Difference(f"{shown(path)} is still on the meta device, after all was put in") for path in left]
        )


# --- what differs --------------------------------------------------------------------------------------------------


class _Difference(NamedTuple):
    text: str
    path: str = ""
    candidates: Sequence[str] = ()


def _array_differences(spots: Sequence[Spot], by_path: Mapping[str, Leaf]) -> Iterator[_Difference]:
    found = {spot.path: spot for spot in spots}
    missing = {leaf.path: leaf.shape for leaf in by_path.values() if leaf.path not in found}
    unexpected = {spot.path: _shape(spot) for spot in spots if spot.path not in by_path}
    missing_of_shape, unexpected_of_shape = _by_shape(missing), _by_shape(unexpected)
    for path, shape in missing.items():
        text = f"{shown(path)} ({by_path[path].dtype} {list(shape)}) was captured, and build() did not make it"
        yield _Difference(text, path, unexpected_of_shape.get(shape, ()))
    for path, shape in unexpected.items():
        text = f"{shown(path)} ({_kind(found[path])}) was made by build(), and not captured"
        yield _Difference(text, path, missing_of_shape.get(shape, ()))
    for path, spot in found.items():
        text = _difference(spot, by_path[path]) if path in by_path else ""
        if text:
            yield _Difference(f"{shown(path)} {text}")


def _difference(spot: Spot, leaf: Leaf) -> str:
    reason = spot.refusal(meta=True)
    if reason:
        return f"{reason} in what build() made"
    form = spot.form()
    if (spot.framework, spot.role, form.dtype, form.shape) == (leaf.framework, leaf.role, leaf.dtype, leaf.shape):
        return ""
    compared = (
        ("framework", spot.framework, leaf.framework),
        ("role", spot.role, leaf.role),
        ("dtype", form.dtype, leaf.dtype),
        ("shape", list(form.shape), list(leaf.shape)),
    )
    differing = [f"{what} {captured}, made with {built}" for what, built, captured in compared if built != captured]
    return f"was captured with {'; '.join(differing)}"


def _module_differences(built: Mapping[str, Any], captured: Mapping[str, bool]) -> Iterator[_Difference]:
    for path in captured:
        if path not in built:
            yield _Difference(f"{shown(path)} was a torch module when captured, and build() did not make it")


def _mismatch(differences: Sequence[_Difference]) -> StateMismatchError:
    listed = [f"  - {difference.text}{_hint(difference)}" for difference in differences[:LISTED_DIFFERENCES]]
    if len(differences) > LISTED_DIFFERENCES:
        listed.append(f"  ... and {len(differences) - LISTED_DIFFERENCES} more")
    places = "1 place" if len(differences) == 1 else f"{len(differences)} places"
    lines = [
        f"build() and the captured state differ in {places}:",
        *listed,
        "Let build() make what load() returns; until it does, load runs instead.",
    ]
    return StateMismatchError("\n".join(lines), differences=[difference.text for difference in differences])


def _hint(difference: _Difference) -> str:
    import difflib

    nearest = difflib.get_close_matches(difference.path, difference.candidates[:_HINT_CANDIDATES], n=1)
    return f"; is it {shown(nearest[0])}?" if nearest else ""


def _by_shape(shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[int, ...], list[str]]:
    paths: dict[tuple[int, ...], list[str]] = {}
    for path, shape in shapes.items():
        paths.setdefault(shape, []).append(path)
    return paths


def _shape(spot: Spot) -> tuple[int, ...]:
    return tuple(getattr(spot.array, "shape", ()))


def _kind(spot: Spot) -> str:
    if spot.refusal(meta=True):
        return type(spot.array).__name__
    form = spot.form()
    return f"{form.dtype} {list(form.shape)}"
