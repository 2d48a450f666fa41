"""Export to `torch.export` programs and ONNX with a dynamic batch size, verified against eager PyTorch.

>>> result = export("unireplknet_z.mnist5k", "deployed")        # model.pt2, model.onnx, deployment.json
>>> result["onnx"]["max_difference"]
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.results.timing import interleaved_times
from zoo.support.files import CheckpointError, sha256_of, write_atomic, writer_of
from zoo.support.inputs import record_of as input_record_of
from zoo.support.inputs import unit_of
from zoo.support.values import DamagedFileError, check_output, leads_out, read_json
from zoo.support.whole import staging
from zoo.tools import estimators
from zoo.tools.errors import ToolError
from zoo.tools.evaluation import batches, build_data, load, part_of, record_of
from zoo.tools.info import example
from zoo.tools.pretrained import check_outside_runs

__all__ = ["FORMATS", "export", "quantize", "run_elsewhere"]

#: onnxruntime reports to its makers unless this is set before its import; also in the processes started here.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

FORMATS = ("program", "onnx")
TOLERANCE = 1e-5
_NAMES = {"program": "model.pt2", "onnx": "model.onnx", "int8": "model.int8.onnx"}
_PREPARED = (
    "the input is rows of prepared numbers, float32, in the order of input_record.columns: numbers as in the file, the "
    "fill value of their variable where one is missing, and 1 in the column NAME=(missing) if there is one; of each "
    "category 1 in the column NAME=CATEGORY and 0 in the others"
)
_INPUTS = ("input", "marks")  # calendar marks only for forecasting models that use them


def export(
    model: str | nn.Module, folder: str | Path, formats: tuple[str, ...] = FORMATS, size: int | None = None
) -> dict[str, Any]:
    """Export a model, and compare it with eager PyTorch on batches of 1, 2 and 5.

    Args:
        model: Name with a tag, `local-dir:<folder>` or the folder of a run, which are exported in deploy form; a saved
            estimator, from rows in their own units, which it standardises itself, to probabilities or values, compared
            with its own `predict_proba` or `predict`; or a module, exported in the form it has.
        folder: Created if missing. An earlier export in it is replaced as a whole, if its inputs and classes are those
            of this one.
        formats: From :data:`FORMATS`: `program` (`torch.export`, model.pt2) and `onnx` (model.onnx).
        size: Side of the images, pixels; that of the record by default.

    Returns:
        Content of the folder's `deployment.json`: by format `file`, `bytes`, `sha256`, `max_difference` and `batches`;
        `preprocessing`, `class_names`, `input_record`, and `output` of an estimator (`probabilities` or `values`).

    Raises:
        CheckpointError: The folder is that of a run, or of its model.
        OutputError: The folder cannot be created.
        ToolError: The folder contains other files of these names, or an earlier export in a format that is not among
            `formats`, or of a model with other inputs or classes; the model cannot be exported, or the export differs
            by more than 1e-5 of its largest output.
    """
    if unknown := [f for f in formats if f not in FORMATS]:
        raise ToolError(f"format {unknown[0]!r} is not one of {', '.join(FORMATS)}")
    folder = check_output(folder)
    check_outside_runs(folder)
    earlier = _check_own(folder, formats)
    network = _network_of(model).eval()
    cfg: Any = getattr(network, "pretrained_cfg", None) or {}
    inputs = _arguments(network, 2, size)
    told: dict[str, Any] = {"model": model if isinstance(model, str) else type(network).__name__}
    told |= {"input": ["batch", *inputs[0].shape[1:]], "preprocessing": _preprocessing(cfg)}
    told |= {name: ["batch", *x.shape[1:]] for name, x in zip(_INPUTS[1:], inputs[1:], strict=False)}
    told["class_names"] = list(cfg.get("label_names") or ())
    told["input_record"] = record = input_record_of(network)
    if earlier and any(earlier.get(key) != json.loads(json.dumps(told[key])) for key in ("class_names", "input")):
        raise ToolError(
            f"{folder} holds the export of another model, {earlier['model']!r:.80}, which has other inputs or classes: "
            "choose another folder, or remove that one"
        )
    if record["kind"] == "table" and record.get("variables"):
        told["prepared"] = _PREPARED
    if unit_of(record) != (1.0, 0.0):
        told["output"] = "standardised values: times target_scale plus target_mean (input_record) they are the target's"
    if isinstance(network, estimators.Pipeline):
        told["output"] = "probabilities" if told["class_names"] else "values"
    batches = {n: _arguments(network, n, size) for n in (1, 2, 5)}
    with torch.no_grad():
        answers = getattr(network, "expected", None) or (lambda *x: network(*x).numpy())  # of an estimator: its own
        expected = {n: answers(*x) for n, x in batches.items()}
    with _written(folder) as place, _quiet():
        program = _program(network, inputs)
        for kind in formats:
            path = place / _NAMES[kind]
            write_atomic(path, (_write_program if kind == "program" else _write_onnx)(program, inputs))
            found = _run(kind, path, batches)
            worst = max(float(np.abs(found[n] - expected[n]).max()) for n in batches)
            scale = max(1.0, max(float(np.abs(y).max()) for y in expected.values()))
            if not worst <= TOLERANCE * scale:
                raise ToolError(
                    f"{folder / path.name} differs from the model by {worst:.2g}, more than {TOLERANCE * scale:.2g}"
                )
            told[kind] = _entry(path) | {"max_difference": worst, "batches": list(batches)}
        _write_deployment(place, told)
    return told


def _network_of(model: str | nn.Module) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    saved = estimators.open_estimator(model)
    return load(model) if saved is None else estimators.pipeline(saved)


def _write_deployment(place: Path, told: Mapping[str, Any]) -> None:
    text = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
    write_atomic(place / "deployment.json", writer_of(text.encode()))


def _check_own(folder: Path, formats: Collection[str]) -> dict[str, Any]:
    """Content of `deployment.json` of an earlier export; empty if there is none.

    Raises:
        ToolError: A file of these names is not in it, or has a format that is not among `formats` and would remain.
    """
    taken = [name for name in (*_NAMES.values(), "deployment.json") if os.path.lexists(folder / name)]
    if not taken:
        return {}
    try:
        told = read_json(folder / "deployment.json")
    except (OSError, DamagedFileError):
        told = None
    known = isinstance(told, dict) and {"model", "input", "preprocessing"} <= told.keys()
    for kind, name in _NAMES.items():
        if name in taken and not (known and _is_recorded(folder / name, told.get(kind))):
            raise ToolError(f"{folder} holds {name}, which no export wrote: choose another folder")
    if not known:
        raise ToolError(f"{folder} holds {taken[0]}, which no export wrote: choose another folder")
    for kind in FORMATS:
        if _NAMES[kind] in taken and kind not in formats:
            raise ToolError(
                f"{folder} holds {_NAMES[kind]} of an earlier export, which this one would leave there: export as "
                f"{kind} too, remove the file, or choose another folder"
            )
    return told


def _is_recorded(path: Path, entry: Any) -> bool:
    digest = entry.get("sha256") if isinstance(entry, dict) else None
    return path.is_file() and not leads_out(path, path.parent) and sha256_of(path) == digest


def _entry(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _arguments(network: nn.Module, batch: int, size: int | None) -> tuple[Tensor, ...]:
    """Random arguments of a model: inputs, and for a forecasting model calendar marks."""
    inputs, record = example(network, batch, size), input_record_of(network)
    if record["kind"] != "series" or not record.get("time_features"):
        return (inputs,)
    marks = torch.rand(*inputs.shape[:2], record["time_features"], generator=torch.Generator().manual_seed(1))
    return inputs, marks - 0.5


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """Temporary folder whose files replace those in `folder` at once if the block succeeds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staging(folder, without=(_NAMES["int8"],)) as place:  # the int8 file belongs to the old model.onnx
            yield place
    except CheckpointError as error:  # of a file in the temporary folder
        raise ToolError(re.sub(r"/\.new\.[0-9a-f]{12}\.tmp(?=/)", "", str(error))) from error
    except OSError as error:
        raise ToolError(f"cannot write {error.filename or folder}: {error.strerror or error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' logs, warnings and prints."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def _preprocessing(cfg: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {k: cfg[k] for k in keys if cfg.get(k) is not None}


def _program(network: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            return torch.export.export(network, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    except Exception as error:  # torch.export raises errors of many kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ToolError(f"{type(network).__name__} cannot be exported: {reason}") from error


def _write_program(program: Any, inputs: tuple[Tensor, ...]) -> Any:
    content = io.BytesIO()  # torch's own writer ends the process on a full disk
    torch.export.save(program, content)
    return writer_of(content.getvalue())


def _write_onnx(program: Any, inputs: tuple[Tensor, ...]) -> Any:
    _require("onnxscript")
    onnx = torch.onnx.export(
        program,
        inputs,
        input_names=list(_INPUTS[: len(inputs)]),
        output_names=["output"],
        dynamic_shapes=tuple({0: "batch"} for _ in inputs),
        dynamo=True,
        verbose=False,
    )
    assert onnx is not None
    return writer_of(onnx.model_proto.SerializeToString())


def _require(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise ToolError(f"this needs {package}: pip install 'kernel-zoo[export]'") from None


def session(path: Path, threads: int = 0) -> Any:
    """An onnxruntime session on the CPU."""
    runtime = _require("onnxruntime")
    runtime.disable_telemetry_events()  # also if it was imported before this module
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(kind: str, path: Path, batches: Mapping[int, tuple[Tensor, ...]]) -> dict[int, np.ndarray]:
    if kind == "onnx":
        runner = session(path)
        names = [entry.name for entry in runner.get_inputs()]
        return {
            n: runner.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]
            for n, inputs in batches.items()
        }
    module = torch.export.load(path).module()
    with torch.no_grad():
        return {n: module(*inputs).numpy() for n, inputs in batches.items()}


# ---- elsewhere ---------------------------------------------------------------------------------------------

_ELSEWHERE = """
import sys

class NoZoo:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("zoo", "timm", "lightning"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, NoZoo())
import numpy as np
for at in range(0, len(sys.argv) - 1, 3):
    path, inputs, outputs = sys.argv[1:][at : at + 3]
    x = np.load(inputs)
    if path.endswith(".onnx"):
        import onnxruntime
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        y = session.run(None, {session.get_inputs()[0].name: x})[0]
    else:
        import torch
        with torch.no_grad():
            y = torch.export.load(path).module()(torch.from_numpy(x)).numpy()
    np.save(outputs, y)
assert not {"zoo", "timm", "lightning"} & set(sys.modules)
"""


def run_elsewhere(files: Mapping[Path, np.ndarray]) -> dict[Path, np.ndarray]:
    """Run exported files in a new process that cannot import the zoo, timm or Lightning.

    Args:
        files: A batch of inputs for each file; `.onnx` runs in onnxruntime, others as `torch.export` programs.

    Returns:
        The outputs of each file.

    Raises:
        ToolError: A file does not run.
    """
    with tempfile.TemporaryDirectory() as place:
        arguments, made = [], {}
        for i, (path, inputs) in enumerate(files.items()):
            given, made[path] = Path(place, f"{i}-inputs.npy"), Path(place, f"{i}-outputs.npy")
            np.save(given, inputs)
            arguments += [str(path.absolute()), str(given), str(made[path])]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-c", _ELSEWHERE, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place, env=env, timeout=300)
        if done.returncode:
            lost = next((path for path, array in made.items() if not array.is_file()), path)
            raise ToolError(f"{lost} does not run elsewhere: {done.stderr.strip().splitlines()[-1][:200]}")
        return {path: np.load(array) for path, array in made.items()}


# ---- int8 --------------------------------------------------------------------------------------------------


def quantize(model: str, folder: str | Path, limit: float = 0.005, rounds: int = 60) -> dict[str, Any]:
    """Dynamic int8 quantisation of an exported ONNX model, kept if the test accuracy stays within a limit.

    Only matrix products are quantised, per output channel: onnxruntime's dynamic int8 convolutions are several times
    slower than float ones.

    Args:
        model: A shipped weight or the folder of a run, whose record names the data.
        folder: Folder of an export with `model.onnx`; `model.int8.onnx` and its entry in `deployment.json` are added.
        limit: Largest loss of accuracy, absolute.
        rounds: Timed calls of each form, interleaved.

    Returns:
        `accuracy`, `accuracy_int8`, `kept`, `bytes`, `bytes_int8`, and `times_faster` (median ratio of the CPU times of
        one batch of 32; below 1 is slower).

    Raises:
        ToolError: The model is not a classifier, or `model.onnx` is missing.
    """
    folder = Path(folder)
    source = folder / "model.onnx"
    if not source.is_file():
        raise ToolError(f"there is no {source}: export the model first")
    told = _check_own(folder, FORMATS)
    quantization = _require("onnxruntime.quantization")
    record = record_of(model)
    if not record["class_names"]:
        raise ToolError(f"{record['name']} predicts values; int8 is judged by the accuracy of classes")
    with _written(folder) as place:
        target = place / _NAMES["int8"]
        with _quiet():
            quantization.quantize_dynamic(
                str(source),
                str(target),
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                weight_type=quantization.QuantType.QUInt8,
            )
        found = _compare(source, target, record, rounds)
        found["kept"] = found["accuracy"] - found["accuracy_int8"] <= limit
        told.pop("int8", None)
        if found["kept"]:
            told["int8"] = _entry(target)
        else:
            target.unlink()
        _write_deployment(place, told)
    return found


def _compare(source: Path, target: Path, record: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    inputs, targets = test_part(record)
    exact, small = session(source), session(target)
    name = exact.get_inputs()[0].name
    scores = [float((_decide(s, name, inputs) == targets).mean()) for s in (exact, small)]
    batch = {name: inputs[:32]}
    times = interleaved_times(
        {"exact": lambda: exact.run(None, batch), "small": lambda: small.run(None, batch)}, rounds
    )
    ratio = statistics.median(a / b for a, b in zip(times["exact"].cpu, times["small"].cpu, strict=True))
    found = {"accuracy": scores[0], "accuracy_int8": scores[1], "n": len(targets)}
    found |= {"bytes": source.stat().st_size, "bytes_int8": target.stat().st_size, "times_faster": ratio}
    return found


def test_part(record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of the test part, or else the validation part, of a record's data."""
    pairs = [(x.numpy(), y.numpy()) for x, y in batches(build_data(record), part=part_of(record))]
    inputs, targets = (np.concatenate(part) for part in zip(*pairs, strict=True))
    return inputs, targets


def _decide(runner: Any, name: str, inputs: np.ndarray) -> np.ndarray:
    out = np.concatenate([runner.run(None, {name: inputs[i : i + 64]})[0] for i in range(0, len(inputs), 64)])
    return (out[:, 0] > 0).astype(np.int64) if out.shape[1] == 1 else out.argmax(1)
