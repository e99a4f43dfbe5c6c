"""Bundles of strangers, mostly sealed anew by them: settings, files and weights that are not what they should be."""

import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import struct
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

from nsnet import bundle
from nsnet.detector import Detector
from nsnet.errors import BundleError, ConfigError, WeightsError
from tests.fuzz import ESCAPE, Payload
from tests.fuzz.mutations import mutated
from tests.support.tables import save_bundle

CODE: Final = f"import os\nos.mkdir({ESCAPE!r})\n"
BAIT: Final = "/tmp/bait.json"
"""Never opened, wherever a bundle names it."""
KEYS: Final[dict[str, Any]] = {
    "auto_map": {"AutoModel": "modeling.Foreign", "AutoTokenizer": ["modeling.Foreign", None]},
    "trust_remote_code": True, "custom_pipelines": {"a": {"impl": "modeling.Foreign"}}, "_name_or_path": BAIT,
    "tokenizer_class": "Foreign",
    "tokenizer_kwargs": {"trust_remote_code": True},
    "auto_mapping": {"base_model_class": "system", "parent_library": "os"},
    "hf_model_name": "stranger/model", "hf_tokenizer_name": "../..", "vocab_file": BAIT, "bpe_path": BAIT,
    "quantization_config": {"quant_method": "x"}, "model_type": "modeling", "timm_model_name": "hf-hub:a/b",
    "attn_implementation": "stranger/kernel", "custom_generate": "a/b", "__class__": "os", "weight_map": {"a": BAIT},
    "chat_template": "{{ ''.__class__ }}", "architectures": ["Foreign"], "dtype": "os.system", "_commit_hash": "../..",
    "base_model_name_or_path": "stranger/model", "loftq_config": {"a": 1}, "additional_special_tokens": [BAIT],
}  # fmt: skip
VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 3, 17, 1000, 10**6, 2**31, 2**40, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "x", "hf-hub:stranger/model", "local-dir:/tmp", "../../../tmp/bait.json", BAIT,
    "file:///tmp/bait.json", "http://127.0.0.1:9/x", "\0", "x" * 10**5, "ViT-bigG-14", "openai",
    "__import__('os').system('x')", [], {}, [1], [[]], {"a": 1}, ["x"] * 1000, json.loads("[" * 100 + "]" * 100),
)  # fmt: skip
FILES: Final[dict[str, bytes]] = {
    "modeling.py": CODE.encode(), "captioner/modeling.py": CODE.encode(), "clip/tokenizer.py": CODE.encode(),
    "captioner/pytorch_model.bin": b"", "clip/open_clip_pytorch_model.bin": b"", "lora/adapter_model.bin": b"",
    "captioner/__init__.py": CODE.encode(), "clip/model.safetensors": b"",
    "captioner/model-00001-of-00002.safetensors": b"", "captioner/vocab.txt": b"a\nb\n", "clip/tokenizer.json": b"{}",
    "captioner/added_tokens.json": b'{"<x>": 9999999999}',
    "captioner/special_tokens_map.json": b'{"unk_token": "/tmp/bait.json"}', "sitecustomize.py": CODE.encode(),
    "captioner/chat_template.jinja": b"{{ 1 }}", "clip/merges.txt": b"a b\n", "captioner/kernel.so": b"\x7fELF",
    "captioner/model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
}  # fmt: skip
"""Names -> content; where it is empty a pickle."""


@cache
def whole() -> Path:
    """A bundle with all that one can hold."""
    return save_bundle(Path(tempfile.mkdtemp(prefix="nsnet-fuzz-bundle-")))


def write(seed: int, folder: Path) -> None:
    """The bundle of a case."""
    rng = random.Random(f"bundles {seed}")
    copy = folder / "bundle"
    shutil.copytree(whole(), copy)
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice((_settings, _settings, _settings, _settings, _description, _file, _special, _tensors, _bytes))(
            rng, copy
        )
    if rng.random() < 0.9:
        with contextlib.suppress(KeyError, TypeError, AttributeError):  # the case has damaged what is sealed
            seal(copy)


def seal(folder: Path) -> None:
    """Record every file as it lies there, as any stranger can."""
    path = folder / bundle.DESCRIPTION
    if (values := _read(path)) is None:
        return
    names = sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file())
    values["files"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in names
        if name not in (bundle.DESCRIPTION, bundle.CARD)
    }
    kept = (values[name] for name in ("format_version", "config", "calibration", "clip_digest", "files"))
    values["detector_id"] = bundle._identity(*kept)
    values.pop("sha256", None)
    values["sha256"] = bundle._seal_of(json.loads(json.dumps(values)))
    path.write_text(json.dumps(values))


def _changed(rng: random.Random, value: Any) -> Any:
    """JSON with one place changed, wherever it is."""
    objects = list(_objects(value))
    if not objects:
        return rng.choice(VALUES)
    at = rng.choice(objects)
    kind = rng.random()
    key = rng.choice([*at] if isinstance(at, dict) else range(len(at))) if at else None
    if kind < 0.25 and isinstance(at, dict):
        name = rng.choice([*KEYS])
        at[name] = KEYS[name]
    elif key is None or (kind < 0.35 and isinstance(at, dict)):
        if isinstance(at, dict):
            at.pop(key, None)
    elif type(at[key]) in (int, float) and rng.random() < 0.6:
        at[key] = rng.choice((at[key] * 2, at[key] + 1, -at[key], at[key] * 1000, 10**5, 10**7, 2**31 - 1, 2**40, 0))
    else:
        at[key] = rng.choice(VALUES)
    return value


def _objects(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for part in value.values() if isinstance(value, dict) else value[:20]:
            yield from _objects(part)


def _read(path: Path) -> Any:
    """The JSON in a file of the bundle; None: there is none, or no file."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() and not path.is_symlink() else None
    except (ValueError, RecursionError):
        return None


def _names(folder: Path, ending: str = "") -> list[str]:
    """Files that can be changed."""
    return sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob(f"*{ending}") if p.is_file() and not p.is_symlink()
    )


def _settings(rng: random.Random, folder: Path) -> None:
    path = folder / rng.choice([name for name in _names(folder, ".json") if "/" in name] or [bundle.DESCRIPTION])
    if (value := _read(path)) is not None:
        path.write_text(json.dumps(_changed(rng, value)))


def _description(rng: random.Random, folder: Path) -> None:
    path = folder / bundle.DESCRIPTION
    if (values := _read(path)) is not None:
        part = rng.choice((values, values.get("config"), values.get("config"), values.get("config")))
        _changed(rng, part if isinstance(part, dict) else values)
        path.write_text(json.dumps(values))


def _file(rng: random.Random, folder: Path) -> None:
    name = rng.choice([*FILES])
    if (folder / name).parent.is_dir() and not (folder / name).exists():
        (folder / name).write_bytes(FILES[name] or pickle.dumps(Payload()))


def _special(rng: random.Random, folder: Path) -> None:
    """A file becomes a link, FIFO, folder, or is gone; or it gets another one's content."""
    names = _names(folder)
    path, other = (folder / rng.choice(names) for _ in range(2))
    kind, content = rng.randrange(6), other.read_bytes()
    path.unlink()
    if kind == 0:
        path.symlink_to(rng.choice((BAIT, "/dev/zero", "/etc/passwd", "../..", path.name)))
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.mkdir()
    elif kind > 3:
        path.write_bytes(content)


def _tensors(rng: random.Random, folder: Path) -> None:
    """The header of weights says something else."""
    paths = [folder / name for name in _names(folder, ".safetensors")]
    if not paths:
        return
    data = (path := rng.choice(paths)).read_bytes()
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        name = rng.choice([key for key in header if key != "__metadata__"])
        one = header[name]
        dtype, shape, offsets = one["dtype"], one["shape"], one["data_offsets"]
    except (ValueError, KeyError, TypeError, IndexError):
        return
    big = rng.choice((0, 1, -1, 2**31, 2**40, 2**63, 2**64, 10**30))
    one |= rng.choice((
        {"shape": [big, *shape]}, {"shape": []}, {"shape": [big]}, {"data_offsets": [0, big]}, {"shape": [1] * 1000},
        {"data_offsets": [offsets[-1], offsets[0]]}, {"data_offsets": [0, len(data)]},
        {"dtype": rng.choice(("F64", "I8", "F8_E4M3", "x"))},
        {"dtype": dtype, "extra": 1}, {"shape": shape[::-1]},
    ))  # fmt: skip
    if rng.random() < 0.2:
        header[rng.choice((f"{name}.more", "../x", "__metadata__", "visual.proj"))] = header.pop(name)
    text = json.dumps(header).encode()
    length = rng.choice((len(text),) * 4 + (2**63, 2**32, 0, len(text) + 8, 10**8))
    path.write_bytes(struct.pack("<Q", length) + text + data[8 + size :])


def _bytes(rng: random.Random, folder: Path) -> None:
    path, other = (folder / rng.choice(_names(folder)) for _ in range(2))
    path.write_bytes(mutated(rng, path.read_bytes() or b"\0", other.read_bytes() or b"\0"))


def run(folder: Path) -> str:
    """Read and load the bundle: it loads, or is refused as a whole."""
    try:
        bundle.read(folder / "bundle")
    except BundleError:
        return "refused when read"
    try:
        Detector.load(folder / "bundle")
    except (BundleError, WeightsError, ConfigError) as error:
        short = any(word in str(error) for word in ("MemoryError", "allocate memory", "DefaultCPUAllocator"))
        assert not short, f"allocation: {error}"
        return f"refused when loaded: {type(error).__name__}"
    return "loaded"


def close() -> None:
    """Remove the bundle that all others are made from."""
    shutil.rmtree(whole().parent)
