"""Policies by affinity: a session has one home, a LoRA adapter has a few. Soft: who is overloaded is no home."""

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from serve.core.routing.decision import Column, FleetView, PrefixMatch, Scores
from serve.core.routing.policies.least_load import prefer
from serve.core.routing.request import RouteRequest

# Finaliser constants of SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class SessionAffinityPolicy:
    """The session's home, or if that is overloaded the home it would have without it, and so on.

    Homes follow rendezvous hashing: when a replica joins or leaves, only sessions move that gain or lose it. A request
    without a session goes to the fewest requests.

    Attributes:
        overload_factor, overload_requests: See `overloaded`.

    Source: Thaler and Ravishankar, "Using name-based mappings to increase hit rates", IEEE/ACM ToN 6 (1998); bounded
    loads as in Mirrokni, Thorup, Zadimoghaddam, "Consistent hashing with bounded loads", SODA 2018, and as SGLang's
    gateway bounds them (at most 1.5 times the mean, sglang#31170). Production-stack's `SessionRouter` has no bound.
    """

    overload_factor: float = 1.5
    overload_requests: int = 4
    name: ClassVar[str] = "session_affinity"
    ties_at_random: ClassVar[bool] = False

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        requests = view.requests
        if not request.session:
            return Scores(requests, {"requests": requests}, "no_session")
        busy = overloaded(requests, self.overload_factor, self.overload_requests)
        distance = 1.0 - rendezvous(request.session, view.replica_ids)
        cost = np.where(busy, 2.0 + requests, distance)
        rule = "home_overloaded" if busy[int(distance.argmin())] else "home"
        return Scores(cost, {"distance": distance, "requests": requests, "overloaded": busy.astype(np.float64)}, rule)


@dataclass(frozen=True)
class LoraAffinityPolicy:
    """The least busy of the adapter's homes, or of all if the homes are overloaded.

    So that each replica keeps few adapters loaded. A request of the base model goes to the fewest requests.

    Attributes:
        homes: Replicas that an adapter has at most while none of them is overloaded.
        overload_factor, overload_requests: See `overloaded`.

    Source: rendezvous hashing as in `SessionAffinityPolicy`; the aim is that of llm-d's `lora-affinity-scorer`, which
    prefers replicas that have the adapter loaded, then those that have room for it.
    """

    homes: int = 2
    overload_factor: float = 1.5
    overload_requests: int = 4
    name: ClassVar[str] = "lora_affinity"
    ties_at_random: ClassVar[bool] = False

    def score(self, request: RouteRequest, view: FleetView, match: PrefixMatch, rng: random.Random) -> Scores:
        requests = view.requests
        if not request.lora:
            return Scores(requests, {"requests": requests}, "no_lora")
        weight = rendezvous(request.lora, view.replica_ids)
        is_home = np.zeros(len(view), dtype=bool)
        is_home[weight.argsort()[-self.homes :]] = True
        home = is_home & ~overloaded(requests, self.overload_factor, self.overload_requests)
        terms = {"requests": requests, "home": is_home.astype(np.float64)}
        return Scores(prefer(home, requests), terms, "home" if home.any() else "homes_overloaded")


def overloaded(requests: Column, factor: float, slack: int) -> npt.NDArray[np.bool_]:
    """Return who has more than `factor` times the mean and more than `slack` requests above it; never everybody."""
    mean = float(requests.mean())
    return requests > max(factor * mean, mean + slack)


def rendezvous(key: str, replica_ids: tuple[str, ...]) -> Column:
    """Return the weight in [0, 1) of each replica for a key; the highest is the key's home."""
    salted = _hashes(replica_ids) ^ np.uint64(_hash(key))
    x = (salted ^ (salted >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


@lru_cache(maxsize=8)
def _hashes(replica_ids: tuple[str, ...]) -> npt.NDArray[np.uint64]:
    hashes = np.fromiter(map(_hash, replica_ids), dtype=np.uint64, count=len(replica_ids))
    hashes.flags.writeable = False
    return hashes


@lru_cache(maxsize=65_536)
def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
