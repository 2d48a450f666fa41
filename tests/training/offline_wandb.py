"""Read an offline W&B run: LevelDB log framing around protobuf records."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32 * 1024
FULL, FIRST, LAST = 1, 2, 4


def records(path: Path) -> Iterator[Any]:
    """Every record of a `.wandb` file in order; a torn end, as a killed process leaves it, ends the iteration."""
    data, position, pieces = path.read_bytes(), 7, b""  # 7: the file's own header
    while position + 7 <= len(data):
        room = BLOCK - position % BLOCK
        if room < 7:  # the rest of a block is padding
            position += room
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        payload = data[position + 7 : position + 7 + length]
        position += 7 + length
        if len(payload) < length or kind == 0:
            return
        pieces = payload if kind in (FULL, FIRST) else pieces + payload
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            yield record


def run_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("run-*.wandb"))


def history(path: Path) -> list[dict[str, Any]]:
    """Logged rows, one dictionary each."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


def config(path: Path) -> dict[str, Any]:
    """The run's configuration."""
    found: dict[str, Any] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        updates = record.run.config.update if kind == "run" else record.config.update if kind == "config" else []
        found |= {"/".join(u.nested_key) or u.key: json.loads(u.value_json) for u in updates}
    return found


def kinds(path: Path) -> set[str]:
    return {record.WhichOneof("record_type") for record in records(path)}


def run(path: Path) -> Any:
    """The record of the run itself: its id, name, group and sweep; the service may write it after the run's end."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                return record.run
        time.sleep(0.05)
    raise AssertionError(f"{path} holds no run")
