"""Adapters of one worker: the names that they are served under, their slots, and the sequences that use them. Pure.

An adapter is its digest. Names point to digests; a name that is given to another adapter leaves the old one to the
sequences that have begun with it. Slots are never used twice, so that a late sequence cannot meet another adapter.

    load:    claim ─▶ the engine loads ─▶ ready | failed
    request: hold ─▶ the sequence runs ─▶ release        an adapter without names and sequences is dropped
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..core.errors import InvalidRequest, ModelNotFound, Overloaded, Unavailable

RETRY_AFTER_S = 1.0
MAX_NAME_CHARS = 256


@dataclass(frozen=True, slots=True)
class AdapterBounds:
    """How much of adapters a worker holds."""

    max_adapters: int = 0  # 0: none are served
    max_bytes: int = 0  # of all of them in memory


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter as it lies on the disk."""

    digest: bytes
    directory: str
    rank: int
    num_bytes: int  # in memory, at most


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter under one of its names."""

    name: str
    digest: bytes
    directory: str
    rank: int
    num_bytes: int
    uses: int  # sequences that have it now


@dataclass(slots=True)
class _Held:
    files: AdapterFiles
    slot: int
    num_bytes: int
    is_ready: bool = False
    uses: int = 0
    coming: set[str] = field(default_factory=set)  # names that it gets when it is ready


class AdapterTable:
    """All adapters of one worker. `drop` is called with each slot that nobody needs any more."""

    def __init__(
        self, bounds: AdapterBounds = AdapterBounds(), drop: Callable[[int], None] = lambda slot: None
    ) -> None:
        self.bounds = bounds
        self._drop = drop
        self._held: dict[int, _Held] = {}  # by slot
        self._slot_by_name: dict[str, int] = {}
        self._num_slots = 0

    def claim(self, name: str, files: AdapterFiles, *, replace: bool = False) -> int | None:
        """Begin to serve an adapter under a name; returns the slot to load it into. None: it is served already.

        `replace`: the name may be another adapter's, which then loses it as soon as this one is ready.

        Raises:
            InvalidRequest: the name is empty, too long or taken, or none of the bounds can hold the adapter.
            Overloaded: it does not fit beside the others; unload one.
        """
        self._check_name(name, files.digest, replace=replace)
        same = next((held for held in self._held.values() if held.files.digest == files.digest), None)
        if same is not None:
            if not same.is_ready:
                raise Overloaded("this adapter is being loaded already", retry_after_s=RETRY_AFTER_S)
            self._name(name, same)
            return None
        self._check_room(files)
        self._num_slots += 1
        self._held[self._num_slots] = _Held(files, self._num_slots, files.num_bytes, coming={name})
        return self._num_slots

    def ready(self, slot: int, num_bytes: int) -> None:
        """The engine holds the adapter of a slot, in so many bytes: its names are served with it from now on."""
        held = self._held[slot]
        held.is_ready, held.num_bytes = True, num_bytes
        names, held.coming = held.coming, set()
        for name in sorted(names):
            self._name(name, held)

    def failed(self, slot: int) -> None:
        """The engine does not hold the adapter of a slot."""
        del self._held[slot]

    def remove(self, name: str) -> None:
        """Serve a name no longer; sequences that have begun with its adapter go on.

        Raises:
            ModelNotFound: no adapter has this name.
        """
        slot = self._slot_by_name.pop(name, None)
        if slot is None:
            raise ModelNotFound(f"no adapter {name[:MAX_NAME_CHARS]!r} is loaded", param="lora_name")
        self._drop_if_unused(self._held[slot])

    def files_of(self, digest: bytes) -> AdapterFiles | None:
        """Files of an adapter that is ready; None: it is not held."""
        held = (held for held in self._held.values() if held.is_ready and held.files.digest == digest)
        return next((one.files for one in held), None)

    def hold(self, digest: bytes) -> int:
        """Slot of the adapter of a new sequence; 0 without one. `release` must follow, after the sequence's end.

        Raises:
            Unavailable: it is not loaded here; without it the model would answer as another one, under its name.
        """
        if not digest:
            return 0
        for held in self._held.values():
            if held.files.digest == digest and held.is_ready:
                held.uses += 1
                return held.slot
        raise Unavailable(
            f"adapter {digest.hex()[:32]} is not loaded by this worker", param="adapter", retry_after_s=RETRY_AFTER_S
        )

    def release(self, slot: int) -> None:
        """A sequence that held a slot has ended."""
        if slot:
            held = self._held[slot]
            assert held.uses > 0, f"slot {slot} is released more often than held"
            held.uses -= 1
            self._drop_if_unused(held)

    @property
    def served(self) -> tuple[ServedAdapter, ...]:
        """Adapters that requests may name, sorted by name."""
        found = []
        for name, slot in sorted(self._slot_by_name.items()):
            held = self._held[slot]
            files = held.files
            found.append(ServedAdapter(name, files.digest, files.directory, files.rank, held.num_bytes, held.uses))
        return tuple(found)

    @property
    def num_bytes(self) -> int:
        """Memory of all adapters, those included that are being loaded or only finish their sequences."""
        return sum(held.num_bytes for held in self._held.values())

    # ------------------------------------------------------------------ inside

    def _check_name(self, name: str, digest: bytes, *, replace: bool) -> None:
        if not name.strip() or len(name) > MAX_NAME_CHARS:
            raise InvalidRequest(
                f"lora_name is {name[:40]!r}; must have 1 to {MAX_NAME_CHARS} characters", param="lora_name"
            )
        slot = self._slot_by_name.get(name)
        if slot is not None and self._held[slot].files.digest != digest and not replace:
            raise InvalidRequest(
                f"the adapter {name!r} is loaded already, from other files; unload it first, or set load_inplace",
                param="lora_name",
            )

    def _check_room(self, files: AdapterFiles) -> None:
        bounds = self.bounds
        if not bounds.max_adapters:
            raise InvalidRequest("this worker serves no adapters: model.max_loras is 0", param="lora_name")
        if files.num_bytes > bounds.max_bytes:
            raise InvalidRequest(
                f"the adapter in {files.directory} needs {files.num_bytes} bytes, and model.max_lora_bytes is "
                f"{bounds.max_bytes}; raise that",
                param="lora_path",
            )
        if len(self._held) >= bounds.max_adapters:
            raise Overloaded(
                f"{len(self._held)} adapters are loaded, as many as model.max_loras allows, and {files.directory} "
                "would be one more; unload one (replacing one in place needs room for both)",
                retry_after_s=RETRY_AFTER_S,
            )
        if self.num_bytes + files.num_bytes > bounds.max_bytes:
            raise Overloaded(
                f"adapters take {self.num_bytes} bytes, {files.directory} {files.num_bytes}, and model.max_lora_bytes "
                f"is {bounds.max_bytes}; unload one (replacing one in place needs room for both)",
                retry_after_s=RETRY_AFTER_S,
            )

    def _name(self, name: str, held: _Held) -> None:
        before = self._slot_by_name.get(name)
        self._slot_by_name[name] = held.slot
        if before is not None and before != held.slot:
            self._drop_if_unused(self._held[before])

    def _drop_if_unused(self, held: _Held) -> None:
        if held.is_ready and not held.uses and held.slot not in self._slot_by_name.values():
            del self._held[held.slot]
            self._drop(held.slot)
