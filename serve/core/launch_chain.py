"""What a replica tries after a start that failed: the same launch again, the next of its chain, or nothing more.

A chain is what may serve a model, best first: the bundle that its configuration names, the one that the alias pointed
to before, the fallback engine. Where a failed engine leaves traces in the replica's process, nothing else is started
there: the replica ends, and the next one goes on with the chain, as a rejected bundle is known to all of them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """Whose fault a failed start was, as far as that can be told."""

    OPERATOR = "operator"  # a mistake in the configuration: it will be the same with another bundle, or in another try
    BUNDLE = "bundle"  # wrong files, wrong answers: it will be the same in another try, and on any node
    NODE = "node"  # wrong hardware or software for this bundle: the same in another try, but not on every node
    ENGINE = "engine"  # it did not start; once may be an accident
    SURROUNDINGS = "surroundings"  # a store that does not answer, a node that dies: no matter of the bundle


@dataclass(frozen=True)
class FailedStart:
    """A start that failed.

    Attributes:
        link: Which launch of the chain it was.
        fault: Why it failed.
        failures: How many starts of that launch have failed, this one included.
        stained: Whether the engine was in this process, and left traces there.
    """

    link: int
    fault: Fault
    failures: int
    stained: bool


@dataclass(frozen=True)
class NextStart:
    """What to do then.

    Attributes:
        link: Which launch to try now; None: none, the replica ends.
        reject: Whether the bundle is to be rejected for all replicas.
    """

    link: int | None
    reject: bool = False


def after_failure(failed: FailedStart, links: int, max_failures: int) -> NextStart:
    """Decide how to go on.

    Args:
        failed: What happened.
        links: Length of the chain.
        max_failures: How often a launch is tried before the next one; with one launch alone, each replica tries once.
    """
    lasting = failed.fault in (Fault.OPERATOR, Fault.BUNDLE, Fault.NODE) or failed.failures >= max_failures
    if not lasting:
        again = links > 1 and not failed.stained
        return NextStart(failed.link if again else None)
    following = failed.link + 1
    return NextStart(
        link=following if following < links and not failed.stained else None,
        # A node that does not suit a bundle says nothing of the nodes of others who use the store: only where the next
        # replica could not go on otherwise.
        reject=failed.fault in (Fault.BUNDLE, Fault.ENGINE) or (failed.fault is Fault.NODE and failed.stained),
    )


def first_link(bundles: Sequence[str | None], rejected: Collection[str]) -> int | None:
    """Return where a new replica begins: at the first launch whose bundle was not rejected; None: at none.

    Args:
        bundles: Fingerprint of each launch's bundle; None: it has none.
        rejected: Fingerprints of bundles that others have found not to work.
    """
    return next((link for link, bundle in enumerate(bundles) if bundle is None or bundle not in rejected), None)
