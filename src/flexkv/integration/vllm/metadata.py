"""What the scheduler half tells the worker half in one step."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """Blocks that a task loads for a request.

    Attributes:
        task_id: the store's task; None when it could not be launched, so that the load has failed.
        block_ids: the engine's blocks, in token order.
    """

    task_id: int | None
    block_ids: list[int]


@dataclass(slots=True)
class FlexKVConnectorMetadata:
    """One step's loads and saves that may begin. Engines carry it to their workers, whatever process these are in.

    Attributes:
        loads: by request id.
        saves: the store's task by id of a finished request.
    """

    loads: dict[str, LoadSpec] = field(default_factory=dict)
    saves: dict[str, int] = field(default_factory=dict)
