# The compiled extension; see csrc/module.cpp.

from collections.abc import Callable, Mapping, Sequence
from typing import Any

torch_version: str

def advise_huge_pages(address: int, nbytes: int, /) -> None: ...
def chain_names() -> list[str]: ...
def emulate_only_last(items: int, /) -> None: ...
def has_cuda() -> bool: ...
def has_emulator() -> bool: ...
def instruction_set() -> str: ...

class Plan:
    def __init__(
        self,
        hyper: Sequence[str],
        counters: Sequence[str],
        ignored: Sequence[str],
        intern: Callable[[Mapping[str, Any]], object],
        memory: object,
        emulate: bool,
        /,
    ) -> None: ...
    def build(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Any, Any],
        native: Sequence[Sequence[bool]],
        rows: Sequence[Sequence[int]],
        fresh: Sequence[Sequence[bool]],
        /,
    ) -> None: ...
    def gather(
        self, groups: list[Any], state: dict[Any, Any], sync: list[bool | tuple[Any, int]] | None, /
    ) -> bool: ...
    def devices(self) -> list[int]: ...
    def device_launches(self) -> int: ...
    def launch(self, steps: list[tuple[int, int, int]], /) -> None: ...
