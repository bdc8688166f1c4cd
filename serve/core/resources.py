"""Amounts of resources, written as Ray writes them (`CPU`, `GPU`, `memory`, custom names): sums, and text."""

from collections.abc import Mapping, Sequence

Resources = Mapping[str, float]
ACCELERATOR = "accelerator_type:"


def describe(resources: Resources) -> str:
    """Return it as text for a message."""
    parts = []
    for name, amount in sorted(resources.items(), key=lambda item: (item[0] != "GPU", item[0])):
        parts.append(f"{amount / 2**30:.3g} GiB memory" if name == "memory" else f"{amount:g} {name}")
    return ", ".join(parts) or "nothing"


def times(resources: Resources, count: int) -> dict[str, float]:
    """Return what so many take together."""
    # A label-like resource, as Ray makes of an accelerator's type, is asked for once, however many share it.
    return {
        name: amount if name.startswith(ACCELERATOR) else round(amount * count, 4) for name, amount in resources.items()
    }


def add(one: Resources, other: Resources) -> dict[str, float]:
    """Return the sum, by name."""
    names = dict.fromkeys([*one, *other])
    return {name: round(one.get(name, 0) + other.get(name, 0), 4) for name in names}


def add_all(bundles: Sequence[Resources]) -> dict[str, float]:
    """Return the sum of all bundles, by name."""
    total: dict[str, float] = {}
    for bundle in bundles:
        total = add(total, bundle)
    return total
