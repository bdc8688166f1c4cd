"""Series: records with the numbers 1, 2, 3, ..., written once and never changed.

The next number is given by exclusive creation, so that of two writers at once one gets the next number, and the other
one learns it, looks again, and decides anew.
"""

from collections.abc import Mapping
from typing import Any

from serve.artifacts.json_object import read_json, write_json
from serve.artifacts.objects import Objects, read_many
from serve.errors import BundleCorrupt

_SUFFIX = ".json"


class Series:
    """The records of one folder of a store."""

    def __init__(self, objects: Objects, folder: str) -> None:
        self._objects = objects
        self._folder = folder

    def numbers(self) -> tuple[int, ...]:
        """Return the numbers there are, ascending."""
        return numbers_of([info.key for info in self._objects.listing(self._folder)])

    def read(self, number: int) -> dict[str, Any]:
        """Return a record.

        Raises:
            BundleCorrupt: There is none, or something else.
        """
        return self._checked(number, self._objects.read(self._key(number)))

    def _checked(self, number: int, data: bytes | None) -> dict[str, Any]:
        record = read_json(data)
        if record is None:
            place = f"{self._objects.url}/{self._key(number)}"
            raise BundleCorrupt(f"{place} is no record of a store; it was damaged, or removed by hand")
        return record

    def read_all(self) -> dict[int, dict[str, Any]]:
        """Return all records by number, ascending.

        Raises:
            BundleCorrupt: One of them is something else.
        """
        numbers = self.numbers()
        found = read_many(self._objects, [self._key(number) for number in numbers])
        return {number: self._checked(number, found[self._key(number)]) for number in numbers}

    def create(self, number: int, record: Mapping[str, Any]) -> bool:
        """Write a record; False: somebody else took the number. Contents of different writers have to differ."""
        return self._objects.create(self._key(number), write_json(record))

    def _key(self, number: int) -> str:
        return f"{self._folder}/{number:08d}{_SUFFIX}"


def numbers_of(keys: list[str]) -> tuple[int, ...]:
    """Return the numbers of the records among keys, ascending; what is none is passed over."""
    stems = (key.rpartition("/")[2].removesuffix(_SUFFIX) for key in keys if key.endswith(_SUFFIX))
    return tuple(sorted(int(stem) for stem in stems if stem.isdigit()))
