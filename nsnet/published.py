"""Names published models, and lays out their files so that they load from a folder, without the hub.

A layout is what `find_weights` and `find_captioner` take as a local path: one safetensors file of a tower; a folder in
open_clip's format, with the tokenizer that open_clip would fetch from the hub; or a transformers folder of a captioner.
Every file is one that a bundle may hold: pickled weights are converted to safetensors. A layout that differs from the
published files names them as its origin (`digest.ORIGIN`), so that captions and features keep their identity.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from nsnet import imports, model_files, weight_formats
from nsnet.captions import PINNED_REVISIONS, identity_files
from nsnet.clip_weights import CONFIG_FILE, TIMM_WEIGHTS_FILE, WEIGHTS_FILE, find_tokenizer, tower_files
from nsnet.configuration import TIMM, CaptionerConfig, ClipConfig
from nsnet.digest import file_digest, known_digest
from nsnet.errors import NsnetError, WeightsError
from nsnet.files import read_regular

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["clip", "captioner"]
CLIP: Final = "clip"
CAPTIONER: Final = "captioner"
CAPTIONER_WEIGHTS: Final = "model.safetensors"
DEFAULT_RECIPE: Final = "vit-l-14"
"""A recipe with the captioner that a configuration has by default."""


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """The name of a model with public weights."""

    kind: Kind
    """Kind of its folder in `model_files.FOLDERS`."""
    model: str
    """open_clip's or timm's name of a tower, or the hub repository of a captioner."""
    version: str
    """Tag of a tower's weights, or commit of a captioner's repository; `main`: not pinned."""

    def __str__(self) -> str:
        return f"{self.kind} {self.model}{'@' if self.kind == CAPTIONER else ':'}{self.version}"

    @property
    def recipe(self) -> str | None:
        """A recipe that needs this model; None: no recipe names it, as a captioner of another repository."""
        if self.kind == CAPTIONER:
            return DEFAULT_RECIPE if self == captioner(CaptionerConfig()) else None
        return f"{self.model}{'.' if self.model.startswith(TIMM) else ':'}{self.version}"


def tower(config: ClipConfig) -> PublishedModel | None:
    """The name of a tower's weights; None: they are random."""
    if config.pretrained is None:
        return None
    return PublishedModel(kind="clip", model=config.model, version=config.pretrained)


def captioner(config: CaptionerConfig) -> PublishedModel | None:
    """The name of a captioner; None: the tiny one."""
    if config.model is None:
        return None
    version = config.revision or PINNED_REVISIONS.get(config.model) or "main"
    return PublishedModel(kind="captioner", model=config.model, version=version)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Files of a published model that load from a folder."""

    files: dict[str, Path]
    """Name in the folder -> local file."""
    origin: list[list[str]] | None
    """Name and SHA-256 of each published file, if they are not these files."""
    revision: str
    """Commit of the hub's repository; "": local files."""


def lay_out_tower(config: ClipConfig, found: Path, scratch: Path) -> Layout:
    """Lay out a tower that `find_weights` found. `scratch`: an empty folder for files that are made.

    Raises `WeightsError` if a file is not allowed or not readable.
    """
    if found.is_dir():
        files = _allowed(found, CLIP)
        if WEIGHTS_FILE not in files:
            raise WeightsError(f"{found} holds no {WEIGHTS_FILE}: give a folder with weights in safetensors")
        return _layout(files, tower_files(found), found)
    name = found.name if model_files.content_of(CLIP, found.name) is not None else _name(config)
    tokenizer = find_tokenizer(config)
    is_safetensors = found.suffix == ".safetensors"
    if is_safetensors and tokenizer is None:
        weight_formats.check(found)
        return _layout({name: found}, None, found.parent)
    if not config.has_text:  # nothing depends on the names of its files
        return _layout({_name(config): _converted(found, scratch / _name(config))}, None, found.parent)
    from nsnet.clip import describe_folder  # imports torch

    (scratch / CONFIG_FILE).write_text(json.dumps(describe_folder(config), indent=2) + "\n")
    if tokenizer is not None:
        _add_tokenizer(config, tokenizer, scratch)
    weights = found if is_safetensors else _converted(found, scratch / WEIGHTS_FILE)
    return _layout({**_allowed(scratch, CLIP), WEIGHTS_FILE: weights}, [[name, file_digest(found)]], found.parent)


def lay_out_captioner(found: Path, scratch: Path) -> Layout:
    """Lay out a captioner that `find_captioner` found; otherwise as `lay_out_tower`."""
    files = _allowed(found, CAPTIONER)
    if not any(_content(CAPTIONER, name).tensors for name in files):
        files[CAPTIONER_WEIGHTS] = _converted(found, scratch / CAPTIONER_WEIGHTS)
    return _layout(files, identity_files(found), found)


def _layout(files: dict[str, Path], origin: list[list[str]] | None, source: Path) -> Layout:
    """`source`: the folder of the published files."""
    same = origin is None or dict(origin) == {name: known_digest(path) for name, path in files.items()}
    return Layout(
        files=files, origin=None if same else origin, revision=source.name if source.parent.name == "snapshots" else ""
    )


def _allowed(folder: Path, kind: Kind) -> dict[str, Path]:
    """The files of a folder that a bundle may hold, each checked."""
    files = {}
    try:
        for path in sorted(folder.iterdir()):
            content = model_files.content_of(kind, path.name)
            if content is None or not content.in_bundle:
                continue
            files[path.name] = model_files.inside(folder, path.name)
            if content.tensors:
                weight_formats.check(path)
            elif content.rules is not None:
                model_files.check(read_regular(path, content.max_bytes), content, str(path))
    except OSError as error:
        raise WeightsError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error
    return files


def _content(kind: Kind, name: str) -> model_files.Content:
    content = model_files.content_of(kind, name)
    assert content is not None
    return content


def _name(config: ClipConfig) -> str:
    return WEIGHTS_FILE if config.has_text else TIMM_WEIGHTS_FILE


def _add_tokenizer(config: ClipConfig, found: Path, folder: Path) -> None:
    """Add a tokenizer to a folder in open_clip's format. `found`: the hub's folder, as far as it is in the cache."""
    if (found / "tokenizer.json").is_file():
        for name, path in _allowed(found, CLIP).items():
            if name != CONFIG_FILE and not _content(CLIP, name).tensors:
                shutil.copyfile(path, folder / name)
        return
    try:  # transformers downloads it, and converts it if it has another format
        imports.open_clip().get_tokenizer(config.model).tokenizer.save_pretrained(folder)
    except Exception as error:  # transformers raises many classes
        raise WeightsError(
            f"the tokenizer of {config.model} cannot be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): download its whole repository with `hf download`"
        ) from error


def _converted(found: Path, target: Path) -> Path:
    """Write the tensors of a pickled file, or of a captioner's folder, as safetensors. Nothing else is unpickled."""
    from safetensors.torch import save_file

    try:
        state = _tensors(found)
        # cloned: safetensors refuses tensors that share memory, as tied weights do
        save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, target)
    except NsnetError:
        raise
    except Exception as error:  # for a damaged file torch raises many kinds of exceptions
        raise WeightsError(
            f"{found} cannot be converted to safetensors: it is damaged or holds other objects than tensors, which are "
            f"refused for safety ({type(error).__name__})"
        ) from error
    return target


def _tensors(found: Path) -> "dict[str, Tensor]":
    if found.is_dir():
        from nsnet import blip_files

        with model_files.opened(found, CAPTIONER) as folder:
            return blip_files.read_weights(folder)
    weight_formats.check(found)
    state: dict[str, Any] = imports.open_clip().factory.load_state_dict(str(found))
    return state
